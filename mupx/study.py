"""A study: which one belongs to a run folder, how it is opened, what it was made with (no torch).

A study is the only store of trials; where it is kept says :mod:`mupx.storage`. Optuna does not notice that
the configuration behind a study has changed; the stored *identity* makes up for it. Who runs a trial
says :mod:`mupx.leases`.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mupx.dotted import refuse_difference
from mupx.errors import MismatchError, NotFoundError, StorageError, UsageError
from mupx.files import read_json, write_atomically
from mupx.schema import SCHEMA, migrated
from mupx.storage import close, connect, file_url, names, redact, storage_errors
from mupx.turns import turn

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

STUDY_FILE = "study.db"
NOTE = "study.json"  # in the run folder: which study of which storage belongs to it
__all__ = [
    "NOTE",
    "STUDY_FILE",
    "default_url",
    "file_url",
    "finished",
    "locate",
    "note",
    "noted_name",
    "open_study",
    "parse_reference",
    "redact",
    "storage_errors",
    "unused_name",
]


def default_url(run_dir: Path) -> str:
    """Return the URL of the study file inside a run folder."""
    return file_url(run_dir / STUDY_FILE)


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
    document = {"study": name, "storage": redact(url)}
    write_atomically(run_dir / NOTE, (json.dumps(document) + "\n").encode())


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
        document = read_json(path)
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
        storage = connect(url, create)
        try:
            if create:
                study = optuna.create_study(
                    storage=storage, study_name=name, sampler=sampler, load_if_exists=True
                )
            else:
                study = optuna.load_study(storage=storage, study_name=name, sampler=sampler)
        except KeyError:
            message = _no_study(url, name, names(storage))
            close(storage)
            raise NotFoundError(message) from None
        weakref.finalize(study, close, storage)
        _migrate(study, redact(url))
        if identity is not None:
            with turn(study):
                _claim(study, identity)
    return study


def unused_name(url: str, name: str) -> str:
    """Return ``name``, or ``name-2``, ``name-3`` … when the storage already holds it."""
    with storage_errors(url), _quiet():
        try:
            storage = connect(url, create=False)
        except NotFoundError:
            return name
        taken = names(storage)
        close(storage)
    candidates = (name if i == 1 else f"{name}-{i}" for i in range(1, len(taken) + 2))
    return next(candidate for candidate in candidates if candidate not in taken)


def finished(study: Study) -> list[FrozenTrial]:
    """Return the trials that count: complete (diverged ones too) or pruned."""
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def _migrate(study: Study, shown: str) -> None:
    """Bring a study to today's schema; those that were made before they carried one have the first."""
    stored = study.user_attrs
    today = migrated("study", {"schema": "mupx/1", **stored}, f"study {study.study_name!r} in {shown}")
    for key, value in today.items():
        if stored.get(key) != value and stored:
            study.set_user_attr(key, value)


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
    study.set_user_attr("schema", SCHEMA)
    study.set_user_attr("space_hash", digest)
    study.set_user_attr("identity", document)


def _no_study(url: str, name: str, others: list[str]) -> str:
    known = f"it holds: {', '.join(others)}" if others else "it is empty"
    return f"no study {name!r} in {redact(url)} ({known}); `mupx tune` makes one"


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
