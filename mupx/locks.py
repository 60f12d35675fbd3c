"""One process at a time in a run folder (no torch).

The lock is a file, ``run.lock``, that says who holds it: it works on file systems without locks of their
own, and whoever is refused learns whom to wait for. A lock whose process is dead is taken over, on this
host and, where Slurm has started the same job again, on any other.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from socket import gethostname

from mupx.errors import StorageError
from mupx.files import read_json, require_inside, sweep, unwritable
from mupx.processes import born

LOCK = "run.lock"
# Processes that the holder starts find its lock's token here: they run on its behalf.
TOKEN = "MUPX_LOCK_TOKEN"


@dataclass(frozen=True)
class Holder:
    """Who holds a lock: a process, by pid and start on a host, since when, for what, in which Slurm job."""

    pid: int
    host: str
    start: str | None
    since: str
    what: str
    job: str | None
    token: str

    @classmethod
    def here(cls, what: str) -> Holder:
        """Return this process."""
        since = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(os.getpid(), gethostname(), born(os.getpid()), since, what, _job(), secrets.token_hex(8))

    @property
    def gone(self) -> bool:
        """Whether the process is known to be dead; of another host's nothing is known."""
        if self.host == gethostname():
            return born(self.pid) != self.start
        return self.job is not None and self.job == _job()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (`mupx {self.what}`, since {self.since})"


@contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """Hold a run folder for the block; its litter of killed writers is removed.

    A process that the holder started passes, as it runs on the holder's behalf; so do the ranks of one
    run but the first.

    Args:
        folder: The run folder, made if need be.
        what: The verb, for whoever is refused.

    Raises:
        StorageError: Another process holds it, or the lock cannot be written.
    """
    path = folder / LOCK
    if _on_behalf(path):
        yield
        return
    mine = Holder.here(what)
    with _guard(folder):
        require_inside(folder)
        _take(path, mine)
    former = os.environ.get(TOKEN)
    os.environ[TOKEN] = mine.token
    for place in (folder, folder / "checkpoints"):
        sweep(place)
    try:
        yield
    finally:
        _restore(former)
        if _read(path) == mine and mine.pid == os.getpid():  # not in a process forked meanwhile
            with suppress(OSError):
                path.unlink()


def refuse_held(folder: Path) -> None:
    """Refuse what would disturb a process that holds a folder.

    Raises:
        StorageError: Another process holds it.
    """
    holder = _read(folder / LOCK)
    if holder is not None and not holder.gone:
        raise _refusal(folder / LOCK, holder)


def _take(path: Path, mine: Holder) -> None:
    refuse_held(path.parent)
    try:
        with suppress(FileNotFoundError):
            path.unlink()  # left by a dead process, or torn when it died
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(asdict(mine), file)
    except FileExistsError:  # somebody else was quicker, on a file system without flock
        other = _read(path)
        raise _refusal(path, other or "another process") from None
    except OSError as error:
        raise unwritable(path, error) from None


def _refusal(path: Path, holder: Holder | str) -> StorageError:
    where = ""
    if isinstance(holder, Holder) and holder.host != gethostname():
        where = f"; if that process is gone, delete {path}"
    return StorageError(
        f"{path.parent} is in use by {holder}; wait for it or stop it, or give another --run-dir{where}"
    )


def _read(path: Path) -> Holder | None:
    """Return who holds a lock; None where there is none, or one that was torn or is no lock of ours."""
    try:
        document = read_json(path)
        kinds = {field.name: document[field.name] for field in fields(Holder)}
        return Holder(**kinds) if isinstance(kinds["pid"], int) else None
    except (OSError, ValueError, KeyError):
        return None


def _on_behalf(path: Path) -> bool:
    if any(os.environ.get(rank, "0") != "0" for rank in ("RANK", "SLURM_PROCID")):
        return True
    token, holder = os.environ.get(TOKEN), _read(path)
    return holder is not None and token == holder.token and holder.pid != os.getpid()


def _restore(token: str | None) -> None:
    if token is None:
        os.environ.pop(TOKEN, None)
    else:
        os.environ[TOKEN] = token


def _job(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return what Slurm calls this job; a job that is requeued keeps its number."""
    return environment.get("SLURM_JOB_ID")


@contextmanager
def _guard(folder: Path) -> Iterator[None]:
    """Let one process at a time look at the lock and replace it, where the file system can do that."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise unwritable(folder, error) from None
    try:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
