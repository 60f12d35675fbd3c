"""One process at a time: what has to be read from a study and written to it in one piece (no torch).

Which place of a search is free, and that it is taken now; whether a trial is still ours, and how it ended:
between reading and writing nobody else may do the same. Optuna's operations are atomic one by one only,
and on SQLite not even those that test before they set. The lock is the storage's own, so that nothing more
has to be shared, and the end of a process releases it:

* SQLite: ``flock`` on a file beside it;
* PostgreSQL: an advisory lock that ends with its transaction, also behind a pooler; a server takes it back
  from a process that holds it for a minute;
* journal: its own lock file, under which everybody appends.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mupx.journal import Journal

if TYPE_CHECKING:
    from optuna import Study

WAIT = 60  # seconds for a turn, and the longest one


def turn(study: Study) -> AbstractContextManager[None]:
    """Return the context in which no other process reads or writes the study in a turn of its own.

    Raises:
        StorageInternalError: The turn did not come, or was taken back before it was over.
    """
    storage: Any = study._storage
    backend = storage._backend if hasattr(storage, "_backend") else storage
    if isinstance(backend, Journal):
        return backend.turn()
    engine = getattr(backend, "engine", None)
    lock = None if engine is None else _LOCKS.get(engine.dialect.name)
    return nullcontext() if lock is None else lock(engine, study.study_name)


def _sqlite_turn(engine: Any, name: str) -> AbstractContextManager[None]:
    file = engine.url.database
    return file_turn(Path(f"{file}.lock")) if file and file != ":memory:" else nullcontext()


@contextmanager
def file_turn(path: Path) -> Iterator[None]:
    """Hold a lock file of this machine; the end of the process releases it.

    Raises:
        StorageInternalError: It cannot be opened, or another process holds it for too long.
    """
    import fcntl

    from optuna.exceptions import StorageInternalError

    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise StorageInternalError(f"cannot open {path}") from error
    try:
        deadline, pause = time.monotonic() + WAIT, 0.001
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise StorageInternalError(f"{path} is held by another process") from error
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        yield
    finally:
        os.close(handle)


@contextmanager
def postgresql_turn(engine: Any, name: str) -> Iterator[None]:
    """Hold an advisory lock of a server."""
    from sqlalchemy import text

    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
    limits = "SELECT set_config('lock_timeout', :ms, true), "
    limits += "set_config('idle_in_transaction_session_timeout', :ms, true)"
    with engine.connect() as connection, connection.begin():
        connection.execute(text(limits), {"ms": str(1000 * WAIT)})
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
        yield


_LOCKS: Mapping[str, Callable[[Any, str], AbstractContextManager[None]]] = {
    "sqlite": _sqlite_turn,
    "postgresql": postgresql_turn,
}
