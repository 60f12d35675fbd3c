"""From what a user points at (a run folder or STORAGE#STUDY) to an open study (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mupx import config
from mupx.config import Experiment
from mupx.errors import MismatchError, NoResultError, NotFoundError
from mupx.study import STUDY_FILE, locate, noted_name, open_study, parse_reference, redact

if TYPE_CHECKING:
    from optuna import Study

    from mupx.search.choice import Choice


@dataclass(frozen=True)
class Source:
    """An open study, where it came from, and the experiment it was made with."""

    study: Study
    url: str
    run_dir: Path | None
    experiment: Experiment

    @property
    def storage(self) -> str:
        """The storage's URL without its password."""
        return redact(self.url)

    @property
    def folder(self) -> Path:
        """Where files about the study are put: its run folder, its file's folder, or here."""
        if self.run_dir is not None:
            return self.run_dir
        return (
            Path(self.url.removeprefix("sqlite:///")).parent if self.url.startswith("sqlite:///") else Path()
        )


def is_study(text: str) -> bool:
    """Whether a text points at a study: ``STORAGE#STUDY``, or a folder that belongs to one."""
    path = Path(text)
    if path.is_dir():
        return noted_name(path) is not None or (path / STUDY_FILE).exists()
    return "#" in text and not path.exists()


def find_study(text: str, storage: str | None = None) -> Source:
    """Open the study a user points at.

    Args:
        text: Run folder or STORAGE#STUDY.
        storage: URL for a run folder whose storage has a password.

    Raises:
        NotFoundError: No such folder, storage or study.
        MismatchError: The study was not made by mupx.
        StorageError: The storage does not work.
    """
    path = Path(text)
    if "#" in text and not path.exists():
        run_dir, (url, name) = None, parse_reference(text)
    elif path.is_dir():
        run_dir, (url, name) = path, locate(path, storage)
    else:
        raise NotFoundError(f"no run folder at {text}; `mupx tune --run-dir {text}` makes one")
    study = open_study(url, name, create=False, identity=None)
    document = study.user_attrs.get("experiment")
    if document is None:
        raise MismatchError(f"study {name!r} in {redact(url)} was not made by mupx: it holds no experiment")
    return Source(study, url, run_dir, config.parse(document))


def chosen(source: Source, pick: str) -> Choice | None:
    """Return the trial of a pick, or None while no trial has a usable result."""
    from mupx.search.choice import choose

    try:
        return choose(source.study, source.experiment, pick)
    except NoResultError:
        return None


def choice_json(choice: Choice | None) -> dict[str, Any] | None:
    """Return a choice as JSON."""
    return None if choice is None else {"trial": choice.trial, "value": choice.value, "params": choice.params}
