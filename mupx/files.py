"""The one way mupx writes a file that must survive a crash, and reads one that may come from elsewhere.

A file is written to a temporary name beside it, synced, renamed, and the folder synced: whatever happens,
its name stands for the whole old content or the whole new one. What is read is bounded, so that a file
that lies about itself is refused in a sentence.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mupx.errors import StorageError
from mupx.mounts import existing

TEMPORARY = re.compile(r"\..*\.\d+-[0-9a-f]{8}\.tmp")
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_SYNC = {errno.EINVAL, errno.EBADF, errno.EACCES, errno.ENOTSUP}  # of folders, on some file systems
MOST_TEXT = 1 << 26  # bytes of a configuration, a recipe or a result; real ones stay below a megabyte


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new file's name; when the block ends well, that file takes the place of ``path``.

    Raises:
        StorageError: The folder cannot be written or the disk is full; the old file stays whole.
    """
    # A name that nobody can have prepared: an existing one, a link above all, is never written through.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        _remove(temporary)
        raise unwritable(path, error) from None
    except BaseException:
        _remove(temporary)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``, or leave it as it was.

    Raises:
        StorageError: The folder cannot be written or the disk is full; the old file stays whole.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def append(path: Path, content: bytes) -> None:
    """Append to a file and sync it; what reached the disk of a failed append is taken back.

    Raises:
        StorageError: The file cannot be written or the disk is full.
    """
    try:
        with open(path, "ab", opener=_unlinked) as file:
            size = file.tell()
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    os.ftruncate(file.fileno(), size)
                raise
    except OSError as error:
        raise unwritable(path, error) from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no JSON object, is nested too deeply, or is larger than any that mupx writes.
    """
    try:
        document = json.loads(read_bounded(path, MOST_TEXT))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(document, dict):
        raise ValueError(f"it holds {type(document).__name__}, not an object")
    return document


def read_bounded(path: Path, most: int, waiting: bool = False) -> bytes:
    """Read a file of at most ``most`` bytes.

    Args:
        path: The file.
        most: Bytes.
        waiting: Also read from a pipe, where nobody may ever write.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is larger, or no ordinary file.
    """
    with open(path, "rb", opener=None if waiting else _not_waiting) as file:
        if not waiting and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no ordinary file")
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it holds more than {most:,} bytes")
    return content


def sync(path: Path) -> None:
    """Have the system write a file's content to the disk."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Remove the temporary files that killed writers left; nobody may be writing there."""
    with suppress(OSError):
        for path in folder.iterdir():
            if TEMPORARY.fullmatch(path.name):
                _remove(path)


def unwritable(path: Path, error: OSError) -> StorageError:
    """Return the error of a file that cannot be written: what the system said, of which disk, what to do."""
    reason = error.strerror or str(error)
    if error.errno not in FULL:
        return StorageError(f"cannot write {path}: {reason}; check its permissions or choose another place")
    return StorageError(f"cannot write {path}: {reason} ({disk(path)}); free space or choose another place")


def disk(path: Path) -> str:
    """Say on which disk a path lies and how much of it is free.

    >>> disk(Path("/")).startswith("disk /, ")
    True
    """
    place = existing(path)
    while not os.path.ismount(place) and place != place.parent:
        place = place.parent
    with suppress(OSError):
        return f"disk {place}, {shutil.disk_usage(place).free / 2**20:,.1f} MiB free"
    return f"disk {place}"


def require_inside(folder: Path) -> None:
    """Refuse links that leave a folder: it may come from elsewhere, and what is written must stay there.

    Raises:
        StorageError: A file in it is one.
    """
    try:
        links = [entry for entry in folder.iterdir() if entry.is_symlink()]
        for link in links:
            target = link.resolve()
            if not target.is_relative_to(folder.resolve()):
                raise StorageError(
                    f"{link} is a link out of the run folder (to {target}), and mupx writes inside it only; "
                    "remove the link, or make the run folder itself one"
                )
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise StorageError(f"cannot use {folder}: {error}") from None


def _not_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _unlinked(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):
        return  # Windows syncs names by itself
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
