"""Where studies are stored: from a URL to an Optuna storage, and what may go wrong with one (no torch).

======================================  ==================================================================
``sqlite:////path/study.db``            one file, WAL mode, for the processes of one machine
``postgresql://user@host/db``           a server, for any number of machines
``journal:///shared/study.log``         one file on a disk that all machines share (Optuna's JournalStorage)
======================================  ==================================================================

Anything else that Optuna accepts works for one process.
"""

from __future__ import annotations

import logging
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mupx import mounts, turns
from mupx.errors import NotFoundError, StorageError, UsageError
from mupx.files import disk

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

T = TypeVar("T")
TIMEOUT = 60  # seconds to wait for another writer
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds between attempts, the last one again and again
JOURNAL = "journal://"
KEEP_ALIVE = {
    "connect_timeout": 10,  # seconds, as are the others
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "application_name": "mupx",
}
_TABLES = {"studies", "trials", "version_info"}
_log = logging.getLogger("mupx")


class _Connection(sqlite3.Connection):
    """A SQLite connection whose writer does not block readers and which syncs at checkpoints only."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        try:
            self.execute("PRAGMA journal_mode=WAL")
            self.execute("PRAGMA synchronous=NORMAL")
        except sqlite3.Error:
            self.close()
            raise


def file_url(path: Path) -> str:
    """Return the URL of a SQLite file."""
    return f"sqlite:///{path.absolute()}"


def redact(text: str) -> str:
    """Hide the passwords of every URL in a text.

    >>> redact("postgresql://ann:secret@db/studies")
    'postgresql://ann:***@db/studies'
    """
    # Greedy up to the last @: a password with a stray @ in it loses the host, never itself.
    text = re.sub(r"(://[^/\s:@]*):\S*@", r"\1:***@", text)
    return re.sub(r"(?i)([?&][^=&\s]*(?:password|passwd|secret|token)[^=&\s]*)=[^&\s#]*", r"\1=***", text)


def connect(url: str, create: bool) -> BaseStorage:
    """Open a storage.

    Args:
        url: See the module's table.
        create: Make it where it is missing.

    Raises:
        NotFoundError: There is no such file, or no table of studies.
        UsageError: The URL is malformed or its driver is not installed.
        StorageError: The storage is another program's, another Optuna's, or on a disk it must not be on.
    """
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    if url.startswith(JOURNAL):
        return _journal(url, create)
    try:
        url, options = _options(url, create)
        with _alone(url, options, create):
            return RDBStorage(url, engine_kwargs=options)
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise UsageError(
            f"cannot use storage {redact(url)} ({first_line(error)}); give a URL such as "
            "sqlite:///study.db, journal:///shared/study.log or postgresql://user@host/db, and for "
            "PostgreSQL run `pip install mupx[postgres]`"
        ) from None
    except RuntimeError as error:  # tables of another Optuna
        raise StorageError(f"storage {redact(url)}: {first_line(error)}") from None


@contextmanager
def _alone(url: str, options: dict[str, Any], create: bool) -> Iterator[None]:
    """Make tables, or look for them, in turn: those who make them at once trip over each other.

    Raises:
        NotFoundError: There are none, and none are to be made: Optuna makes them wherever it looks.
    """
    from sqlalchemy import create_engine, inspect

    engine = create_engine(url, **options)
    try:
        with _tables_turn(engine):
            if not (create or inspect(engine).has_table("studies")):
                raise NotFoundError(f"no study in {redact(url)} (it is empty); `mupx tune` makes one")
            yield
    finally:
        engine.dispose()


def _tables_turn(engine: Any) -> AbstractContextManager[None]:
    if engine.dialect.name == "postgresql":
        return turns.postgresql_turn(engine, "tables of mupx")
    file = engine.url.database
    if engine.dialect.name == "sqlite" and file and file != ":memory:":
        lock = Path(f"{file}.lock")
        if lock.exists() or mounts.writable(lock.parent):  # who may only read makes no tables either
            return turns.file_turn(lock)
    return nullcontext()


def close(storage: BaseStorage) -> None:
    """Close what a storage holds open."""
    storage.remove_session()
    engine = getattr(storage, "engine", None)
    if engine is not None:
        engine.dispose()


def names(storage: BaseStorage) -> list[str]:
    """Return the names of a storage's studies."""
    return sorted(study.study_name for study in storage.get_all_studies())


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn what the database says into one sentence, with passwords hidden."""
    from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
    from sqlalchemy.exc import SQLAlchemyError

    shown = redact(url)
    try:
        yield
    except UpdateFinishedTrialError:
        raise StorageError(
            f"a trial in {shown} was closed by another process while it ran; the same command continues"
        ) from None
    except (SQLAlchemyError, StorageInternalError, sqlite3.Error) as error:
        raise StorageError(
            f"storage {shown} does not work ({_reason(url, error)}); "
            f"{_advice(url)}, or give another --storage"
        ) from None


def patiently(call: Callable[[], T], url: str, patience: float, away: Callable[[], None] | None = None) -> T:
    """Call, and again with growing pauses while the storage is away.

    Args:
        call: What may be done twice: a storage can fail after it has done what it was asked to.
        url: Of the storage, for the message.
        patience: Seconds after which its error is raised.
        away: Called after each failure.
    """
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    pauses, began = iter(PAUSES), time.monotonic()
    pause = 0.0
    while True:
        try:
            return call()
        except (SQLAlchemyError, StorageInternalError, sqlite3.Error) as error:
            if not _passes(error) or time.monotonic() - began >= patience:
                raise
            if pause == 0.0:
                said = redact(url), first_line(error), patience
                _log.warning("storage %s: %s; trying again for %g s", *said)
            if away is not None:
                away()
            pause = next(pauses, pause)
            time.sleep(min(pause, max(patience - (time.monotonic() - began), 0.0)))


def _reason(url: str, error: BaseException) -> str:
    reason = first_line(error)
    full = "disk is full" in reason and url.startswith("sqlite:///")
    return f"{reason}: {disk(Path(url.removeprefix('sqlite:///')))}" if full else reason


def first_line(error: BaseException) -> str:
    """Return the first line of what a database says, with passwords hidden."""
    lines = str(getattr(error, "orig", None) or error.__cause__ or error).strip().splitlines()
    return redact(lines[0]) if lines else type(error).__name__


def require_shared(url: str) -> None:
    """Refuse a storage that several processes cannot search in.

    Raises:
        UsageError: Neither SQLite in a file, nor PostgreSQL, nor a journal.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    if url.startswith(JOURNAL):
        return
    try:
        parsed = make_url(url)
    except ArgumentError:
        return  # opening it says so
    file = parsed.get_backend_name() == "sqlite" and parsed.database not in (None, "", ":memory:")
    if not (file or parsed.get_backend_name() == "postgresql"):
        raise UsageError(
            f"storage {redact(url)} serves one worker only; several need a SQLite file (one machine), "
            "postgresql://user@host/db, or journal:///shared/study.log (a disk that all machines share)"
        )


def _passes(error: BaseException) -> bool:
    """Whether waiting may help: a server that is down, a lock, a disk that is full."""
    from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
    from sqlalchemy.exc import TimeoutError as NoConnection

    causes = (error, error.__cause__)
    if any(isinstance(cause, DBAPIError) and cause.connection_invalidated for cause in causes):
        return True
    kinds = (OperationalError, InterfaceError, NoConnection, OSError, sqlite3.OperationalError)
    return any(isinstance(cause, kinds) for cause in causes)


def _advice(url: str) -> str:
    if url.startswith("sqlite"):
        return "check that it is a whole study file and that its folder is writable and not full"
    if url.startswith(JOURNAL):
        return "check that it is a whole journal and that its disk is there, writable and not full"
    return "check that the server runs, that user and password are right, and that its disk is not full"


def _options(url: str, create: bool) -> tuple[str, dict[str, Any]]:
    """Return the URL with a driver that is installed, and the engine's options."""
    from sqlalchemy.engine import make_url

    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        if parsed.database and parsed.database != ":memory:":
            _inspect(Path(parsed.database), create)
        return url, {"connect_args": {"timeout": TIMEOUT, "factory": _Connection}}
    if parsed.drivername in ("postgres", "postgresql"):
        # SQLAlchemy's default driver is psycopg2; the extra installs its successor.
        parsed = parsed.set(drivername="postgresql+psycopg")
        url = parsed.render_as_string(hide_password=False)
    if parsed.drivername not in ("postgresql+psycopg", "postgresql+psycopg2"):
        return url, {}
    stated: dict[str, Any] = {key: value for key, value in KEEP_ALIVE.items() if key not in parsed.query}
    if parsed.drivername == "postgresql+psycopg":
        stated["prepare_threshold"] = None  # a pooler gives each transaction another session
    # One connection for the work, one for the turn. A server that was restarted is
    # noticed before a connection is used.
    return url, {"pool_size": 2, "max_overflow": 3, "pool_pre_ping": True, "connect_args": stated}


def _inspect(path: Path, create: bool) -> None:
    """Refuse a missing or foreign file before Optuna adds its tables to it."""
    if create:
        _refuse_network(path)
    if not path.exists():
        _require_folder(path, create)
        return
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")}
    if not (tables >= _TABLES or tables <= _own_tables()):  # some of them: whoever made them was killed
        raise StorageError(
            f"{path} is a SQLite file of another program (tables: {', '.join(sorted(tables)[:5])}); "
            "give another --storage"
        )


def _own_tables() -> set[str]:
    from optuna.storages._rdb.models import BaseModel

    return {*BaseModel.metadata.tables, "alembic_version"}


def _require_folder(path: Path, create: bool) -> None:
    if not create:
        raise NotFoundError(f"no study file at {path}; `mupx tune` makes one in its run folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make folder {path.parent}: {error.strerror}") from None


def _refuse_network(path: Path) -> None:
    kind = mounts.kind_of(path)
    if kind in mounts.NETWORK:
        folder = path.absolute().parent
        raise StorageError(
            f"{folder} is on {kind}, a network file system, where SQLite's locks and WAL do not hold; keep "
            f"the study in a journal there (--storage {JOURNAL}{folder}/study.log) or on a server (--storage "
            "postgresql://user@host/db), or give a --run-dir on a local disk"
        )


def _journal(url: str, create: bool) -> BaseStorage:
    from optuna.storages import JournalStorage

    from mupx.journal import Journal, is_journal

    path = Path(url.removeprefix(JOURNAL))
    if not path.is_absolute():
        raise UsageError(f"storage {url} needs a whole path, such as {JOURNAL}{path.absolute()}")
    if not path.exists():
        _require_folder(path, create)
    elif not is_journal(path):
        raise StorageError(f"{path} is no journal of studies; give another --storage")
    try:
        return JournalStorage(Journal(path))  # type: ignore[arg-type]
    except OSError as error:
        raise StorageError(f"cannot use journal {path}: {error.strerror}") from None
    except (KeyError, TypeError, AttributeError, AssertionError) as error:
        raise StorageError(f"{path} is no journal of a study ({error!r}); give another --storage") from None
