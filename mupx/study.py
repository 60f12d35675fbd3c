"""The Optuna store: where it lies, how it is opened, who owns a running trial (no torch).

A study is the only store of trials. By default it is one SQLite file in the run folder, in WAL mode;
any URL Optuna accepts will do. Optuna does not notice that the configuration behind a study has
changed, and a trial asked for by a process that was killed stays RUNNING for ever; the stored
*identity* and the *lease* of each trial make up for both.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING, Any

from mupx.config import refuse_difference
from mupx.errors import MismatchError, NotFoundError, StorageError, UsageError

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.samplers import BaseSampler
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial

TIMEOUT = 60  # seconds to wait for another writer
LEASE = 3600.0  # seconds without a report after which a trial on another host counts as lost
STUDY_FILE = "study.db"
VERDICTS = "verdicts"  # how the trials of a batch ended, in the study until all of them are told
NOTE = "study.json"  # in the run folder: which study of which storage belongs to it
_TABLES = {"studies", "trials", "version_info"}


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


def default_url(run_dir: Path) -> str:
    """Return the URL of the study file inside a run folder."""
    return file_url(run_dir / STUDY_FILE)


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


def parse_reference(text: str) -> tuple[str, str]:
    """Split ``STORAGE#STUDY`` into a URL and a study name; STORAGE may be the path of a SQLite file.

    Raises:
        UsageError: One of the two parts is missing.
    """
    storage, _, name = text.rpartition("#")
    if not (storage and name):
        raise UsageError(
            f"{redact(text)!r} does not name a study; give STORAGE#STUDY, "
            "for example runs/kfac/study.db#kfac or postgresql://user@host/db#kfac"
        )
    return (storage if "://" in storage else file_url(Path(storage))), name


def note(run_dir: Path, url: str, name: str) -> None:
    """Write down which study belongs to a run folder, without passwords."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        draft = run_dir / f".{NOTE}.{os.getpid()}"
        draft.write_text(json.dumps({"study": name, "storage": redact(url)}) + "\n", encoding="utf-8")
        draft.replace(run_dir / NOTE)
    except OSError as error:
        raise StorageError(f"cannot write in run folder {run_dir}: {error.strerror}") from None


def noted_name(run_dir: Path) -> str | None:
    """Return the study name a run folder has, or None when it has none yet."""
    document = _noted(run_dir)
    return None if document is None else document["study"]


def locate(run_dir: Path, storage: str | None = None) -> tuple[str, str]:
    """Return URL and name of the study of a run folder.

    Args:
        run_dir: Run folder of a `mupx tune`.
        storage: Its storage, needed only where the URL holds a password, which is never written down.

    Raises:
        NotFoundError: The folder belongs to no study.
        UsageError: The storage needs a password.
    """
    document = _noted(run_dir)
    if document is None:
        raise NotFoundError(f"no study in {run_dir}; `mupx tune --run-dir {run_dir}` makes one")
    if storage is not None:
        return storage, document["study"]
    if (run_dir / STUDY_FILE).exists():  # also where the folder has been moved
        return default_url(run_dir), document["study"]
    if "***" in document["storage"]:
        raise UsageError(
            f"the study of {run_dir} is in {document['storage']}; give --storage with the password"
        )
    return document["storage"], document["study"]


def _noted(run_dir: Path) -> dict[str, str] | None:
    path = run_dir / NOTE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return {"study": str(document["study"]), "storage": str(document["storage"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{path} is damaged ({error}); delete it to use study {run_dir.name!r}") from None


def open_study(
    url: str,
    name: str,
    *,
    create: bool,
    identity: Mapping[str, Any] | None,
    sampler: BaseSampler | None = None,
) -> Study:
    """Open a study, or create it when it is missing and ``create`` allows that.

    Args:
        url: Any storage URL Optuna accepts.
        name: Name of the study inside the storage.
        create: Make storage and study where they are missing.
        identity: What the study depends on, stored at creation and compared afterwards; None skips it.
        sampler: Passed on to Optuna.

    Raises:
        NotFoundError: The storage or the study does not exist.
        MismatchError: The study was made with another identity, or not by mupx.
        StorageError: The storage is damaged, foreign, locked or not writable.
        UsageError: The URL is malformed or its driver is not installed.
    """
    import optuna

    with storage_errors(url), _quiet():
        storage = _connect(url, create)
        try:
            if create:
                study = optuna.create_study(
                    storage=storage, study_name=name, sampler=sampler, load_if_exists=True
                )
            else:
                study = optuna.load_study(storage=storage, study_name=name, sampler=sampler)
        except KeyError:
            _close(storage)
            raise NotFoundError(_no_study(url, name, _names(storage))) from None
        weakref.finalize(study, _close, storage)
        if identity is not None:
            _claim(study, identity)
    return study


def unused_name(url: str, name: str) -> str:
    """Return ``name``, or ``name-2``, ``name-3`` … when the storage already holds it."""
    with storage_errors(url), _quiet():
        try:
            storage = _connect(url, create=False)
        except NotFoundError:
            return name
        taken = _names(storage)
        _close(storage)
    candidates = (name if i == 1 else f"{name}-{i}" for i in range(1, len(taken) + 2))
    return next(candidate for candidate in candidates if candidate not in taken)


def finished(study: Study) -> list[FrozenTrial]:
    """Return the trials that count: complete (diverged ones too) or pruned."""
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


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
            f"a trial in {shown} was closed by another process while it ran; run one search per study"
        ) from None
    except (SQLAlchemyError, StorageInternalError, sqlite3.Error) as error:
        raise StorageError(
            f"storage {shown} does not work ({_first_line(error)}); check that it is a whole study file and "
            "that its folder is writable and not full, or give another --run-dir or --storage"
        ) from None


def hold(trial: Trial) -> None:
    """Take or renew this process's lease on a running trial."""
    pid = os.getpid()
    lease = {"pid": pid, "host": gethostname(), "start": _born(pid), "until": time.time() + LEASE}
    trial.set_user_attr("lease", lease)


def write_down(study: Study, verdicts: Mapping[int, tuple[str, float | None]]) -> None:
    """Keep how the trials of a batch ended, at one stroke, before they are told one after the other.

    A process that is killed while it tells has then told all or none, as :func:`reap` tells the rest.

    Args:
        study: Their study.
        verdicts: Trial number → name of its state, value.
    """
    study.set_user_attr(VERDICTS, {str(number): list(verdict) for number, verdict in verdicts.items()})


def reap(study: Study) -> list[int]:
    """Tell FAIL for RUNNING trials whose process is gone, or how they ended where that was written down.

    A trial is lost when its process on this host is dead or is this one, or when its lease has expired.
    Lost trials carry ``outcome = "lost"`` and do not count: their slot is run again with its own seed.

    Returns:
        Numbers of the trials that another process on this host is running right now.
    """
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    busy, verdicts = [], study.user_attrs.get(VERDICTS, {})
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if not _lost(trial):
            busy += [trial.number] if _here(trial) else []
            continue
        state, value = verdicts.get(str(trial.number), ("FAIL", None))
        # Another process may reap the same trial at the same moment.
        with suppress(UpdateFinishedTrialError):
            if str(trial.number) not in verdicts:
                study._storage.set_trial_user_attr(trial._trial_id, "outcome", "lost")
        study.tell(trial.number, value, state=TrialState[state], skip_if_finished=True)
    return busy


def _lost(trial: FrozenTrial) -> bool:
    lease = trial.user_attrs.get("lease")
    if lease is None:  # killed between asking for the trial and taking the lease
        started = trial.datetime_start
        return started is None or started.timestamp() + TIMEOUT < time.time()
    dead = lease["pid"] == os.getpid() or _born(lease["pid"]) != lease["start"]
    return (_here(trial) and dead) or bool(lease["until"] < time.time())


def _here(trial: FrozenTrial) -> bool:
    return bool(trial.user_attrs.get("lease", {}).get("host") == gethostname())


def _born(pid: int) -> str | None:
    # A pid alone may have been given to another process since; its start time has not.
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except OSError:
        return _born_without_proc(pid)


def _born_without_proc(pid: int) -> str | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"


def _connect(url: str, create: bool) -> RDBStorage:
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    try:
        url, options = _options(url, create)
        return RDBStorage(url, engine_kwargs=options)
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise UsageError(
            f"cannot use storage {redact(url)} ({_first_line(error)}); give a URL such as "
            "sqlite:///study.db or postgresql://user@host/db, and for PostgreSQL run "
            "`pip install mupx[postgres]`"
        ) from None
    except RuntimeError as error:  # tables of another Optuna
        raise StorageError(f"storage {redact(url)}: {_first_line(error)}") from None


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
        url = parsed.set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
    return url, {}


def _inspect(path: Path, create: bool) -> None:
    """Refuse a missing or foreign file before Optuna adds its tables to it."""
    if not path.exists():
        if not create:
            raise NotFoundError(f"no study file at {path}; `mupx tune` makes one in its run folder")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make folder {path.parent}: {error.strerror}") from None
        return
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")}
    if tables and not tables >= _TABLES:
        raise StorageError(
            f"{path} is a SQLite file of another program (tables: {', '.join(sorted(tables)[:5])}); "
            "give another --storage"
        )


def _claim(study: Study, identity: Mapping[str, Any]) -> None:
    """Store the identity in a new study; compare it with the stored one in an old study."""
    document = json.loads(json.dumps(identity))
    stored = study.user_attrs.get("identity")
    if stored is not None:
        refuse_difference(
            f"study {study.study_name!r}",
            stored,
            document,
            "go back to that configuration, or give another --run-dir, or --fresh to start anew",
        )
        return
    if study.get_trials(deepcopy=False):
        raise MismatchError(
            f"study {study.study_name!r} has trials that mupx did not make; give another study name"
        )
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]
    study.set_user_attr("space_hash", digest)
    study.set_user_attr("identity", document)


def _names(storage: RDBStorage) -> list[str]:
    return sorted(study.study_name for study in storage.get_all_studies())


def _no_study(url: str, name: str, names: list[str]) -> str:
    known = f"it holds: {', '.join(names)}" if names else "it is empty"
    return f"no study {name!r} in {redact(url)} ({known}); `mupx tune` makes one"


def _close(storage: RDBStorage) -> None:
    storage.remove_session()
    storage.engine.dispose()


def _first_line(error: BaseException) -> str:
    lines = str(getattr(error, "orig", None) or error.__cause__ or error).strip().splitlines()
    return redact(lines[0]) if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Optuna's "a new study created" for the block, and leave its level as it was."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)
