"""Optuna's journal, mended: a line that was cut off by a full disk or a crash does not spoil those after it.

The journal is one line of JSON per operation, appended under a lock file. Optuna appends to whatever the
file ends with, so half a line makes the next one unreadable, and with it the study for everybody. Here
whoever takes the lock first removes such a line: the one who wrote it was told that it was not written.
The lock is our own, too: Optuna's lets two processes in where several wait for one that was killed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from mupx.errors import StorageError
from mupx.leases import alive, identity

BLOCK = 65536  # bytes read at a time, from the end
GRACE = 30  # seconds after which a lock that does not change is broken, where nothing is known of its holder
SILENT = 5  # seconds of waiting of which nothing is said

_log = logging.getLogger("mupx")


class Journal:
    """A journal in a file that several machines may share; what Optuna calls a journal backend.

    Raises:
        StorageInternalError: From every method, when the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        from optuna.storages.journal import JournalFileBackend

        self._lock = SharedLock(path)
        self._file = JournalFileBackend(str(path), lock_obj=self._lock)  # type: ignore[arg-type]

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Yield the operations from a number on."""
        with _as_storage_errors():
            yield from self._file.read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append operations."""
        with _as_storage_errors():
            self._file.append_logs(logs)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Keep everybody else from appending; the same thread may append meanwhile."""
        with _as_storage_errors():
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()


class SharedLock:
    """The lock of a journal: a file that says who made it, on a file system that need not have locks.

    Creating a file that must not exist is atomic from NFSv3 on. The lock of a process of this machine that
    is gone is taken over at once, any other after :data:`GRACE` seconds without a change. Optuna's removes
    whatever lock is there: of several that wait for the same dead process, one breaks the lock of the one
    that came first. Here whoever wants to remove a lock claims just this one, in a file that is named after
    its random token, and no two do so.

    Args:
        path: The journal; the lock is the file beside it that ends in ``.lock``.
    """

    def __init__(self, path: Path) -> None:
        self._journal, self.path = path, Path(f"{path}.lock")
        self._threads, self._depth, self._mine = threading.RLock(), 0, ""
        self._claimed: dict[Path, float] = {}  # by others, first seen at

    def acquire(self) -> bool:
        """Wait for the lock; a thread that holds it may take it again.

        Raises:
            OSError: The file cannot be made.
        """
        self._threads.acquire()
        try:
            if not self._depth:
                self._take()
            self._depth += 1
        except BaseException:
            self._threads.release()
            raise
        return True

    def release(self) -> None:
        """Give the lock back.

        Raises:
            StorageInternalError: It was broken meanwhile: others may have written in between.
        """
        from optuna.exceptions import StorageInternalError

        try:
            self._depth -= 1
            if not self._depth:
                if self._holder() != self._mine:
                    raise StorageInternalError(f"the lock {self.path} was broken by another process")
                self.path.unlink(missing_ok=True)
        finally:
            self._threads.release()

    def _take(self) -> None:
        self._mine = json.dumps({**identity(), "token": uuid4().hex})
        seen, since, pause, patient = "", time.monotonic(), 0.001, time.monotonic() + SILENT
        while not self._made():
            other, now = self._holder(), time.monotonic()
            if now > patient:
                _log.warning("waiting for %s, which another process holds", self.path)
                patient = math.inf
            if other != seen:
                seen, since, pause = other, now, 0.001
            if other and (_gone(other) or now - since > GRACE):
                self._break(other, now)
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        try:
            mend(self._journal)
        except BaseException:
            self.path.unlink(missing_ok=True)
            raise

    def _made(self) -> bool:
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(self._mine)
        except BaseException:
            with suppress(OSError):
                self.path.unlink()
            raise
        return True

    def _holder(self) -> str:
        """Return what tells this lock from any other; nothing where there is none."""
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
            return text or f"made at {self.path.stat().st_mtime_ns}"  # and not signed yet
        except OSError:
            return ""

    def _break(self, left: str, now: float) -> None:
        """Remove a lock that was left, if it still is the one that was seen and nobody else is at it.

        A claim is given back when the lock is gone, so whoever claims the same lock later finds another one.
        """
        claim = self.path.with_name(f"{self.path.name}.{hashlib.sha256(left.encode()).hexdigest()[:16]}")
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            if now - self._claimed.setdefault(claim, now) > GRACE:  # by one who was killed at it
                claim.unlink(missing_ok=True)
            return
        try:
            if self._holder() == left:
                self.path.unlink(missing_ok=True)
                _log.warning("%s was left by a process that is gone; it is taken over", self.path)
        finally:
            claim.unlink(missing_ok=True)


def _gone(holder: str) -> bool:
    try:
        return alive(json.loads(holder)) is False
    except (ValueError, TypeError, AttributeError, KeyError):  # torn when its maker died
        return False


def is_journal(path: Path) -> bool:
    """Whether a file may be a journal: it is empty, or its first line is an operation."""
    try:
        with open(path, "rb") as file:
            line = file.readline(BLOCK)
        return not line or (b"\n" not in line) or "op_code" in json.loads(line)
    except OSError as error:
        raise StorageError(f"cannot read journal {path}: {error.strerror}") from None
    except (ValueError, TypeError):
        return False


def mend(path: Path) -> None:
    """Cut off what follows the last line break of a file; nobody else may be writing to it."""
    with open(path, "r+b") as file:
        end = keep = file.seek(0, 2)
        while keep:
            start = max(keep - BLOCK, 0)
            file.seek(start)
            found = file.read(keep - start).rfind(b"\n")
            if found >= 0:
                keep = start + found + 1
                break
            keep = start
        if keep < end:
            file.truncate(keep)


@contextmanager
def _as_storage_errors() -> Iterator[None]:
    from optuna.exceptions import StorageInternalError

    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a line that is no JSON
        raise StorageInternalError("the journal cannot be used") from error
