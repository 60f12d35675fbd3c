"""Optuna's journal, mended: a line that was cut off by a full disk or a crash does not spoil those after it.

The journal is one line of JSON per operation, appended under a lock file. Optuna appends to whatever the
file ends with, so half a line makes the next one unreadable, and with it the study for everybody. Here
whoever takes the lock first removes such a line: the one who wrote it was told that it was not written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mupx.errors import StorageError

BLOCK = 65536  # bytes read at a time, from the end
GRACE = 30  # seconds after which the lock of somebody who is gone is broken; Optuna's own


class Journal:
    """A journal in a file that several machines may share; what Optuna calls a journal backend.

    Raises:
        StorageInternalError: From every method, when the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        from optuna.storages.journal import JournalFileBackend

        self.path = path
        self._file = JournalFileBackend(str(path), lock_obj=_MendingLock(path))  # type: ignore[arg-type]

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Yield the operations from a number on."""
        with _as_storage_errors():
            yield from self._file.read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append operations."""
        with _as_storage_errors():
            self._file.append_logs(logs)


class _MendingLock:
    def __init__(self, path: Path) -> None:
        from optuna.storages.journal import JournalFileOpenLock

        self._path, self._lock = path, JournalFileOpenLock(str(path), GRACE)

    def acquire(self) -> bool:
        self._lock.acquire()
        try:
            mend(self._path)
        except BaseException:
            self._lock.release()
            raise
        return True

    def release(self) -> None:
        self._lock.release()


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
