"""What a verb may be pointed at: a run folder, ``STORAGE#STUDY``, or a recipe file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mupx.config import Experiment, parse
from mupx.errors import MismatchError, NotFoundError
from mupx.recipe import Recipe, read
from mupx.study import locate, open_study, parse_reference, redact

if TYPE_CHECKING:
    from optuna import Study


def open_source(source: str, storage: str | None = None) -> tuple[Study, str]:
    """Open the study behind a run folder or ``STORAGE#STUDY``; return it with its redacted URL."""
    path = Path(source)
    if path.is_dir():
        url, name = locate(path, storage)
    elif "#" in source:
        url, name = parse_reference(source)
    else:
        raise NotFoundError(
            f"{redact(source)!r} is neither a run folder nor STORAGE#STUDY; "
            "`mupx tune` prints the folder it wrote, for example runs/NAME"
        )
    return open_study(url, name, create=False, identity=None), redact(url)


def experiment_of(study: Study) -> Experiment:
    """Return the experiment a study was made for.

    Raises:
        MismatchError: The study was not made by ``mupx tune``.
    """
    stored = study.user_attrs.get("experiment")
    if stored is None:
        raise MismatchError(f"study {study.study_name!r} was not made by `mupx tune`: it holds no experiment")
    return parse(stored)


def recipe_of(source: str, pick: str, storage: str | None = None) -> Recipe:
    """Return the recipe in a file, or of the picked trial of a study."""
    path = Path(source)
    if path.is_file() and "#" not in source:
        return read(path)
    if not path.is_dir() and "#" not in source:
        raise NotFoundError(
            f"{redact(source)!r} is neither a run folder, nor STORAGE#STUDY, nor a recipe file; "
            "`mupx tune` prints the folder and the recipe it wrote"
        )
    from mupx.search.choice import choose, recipe_from_study

    study, url = open_source(source, storage)
    chosen = choose(study, experiment_of(study), int(pick) if pick.lstrip("-").isdigit() else pick)
    return recipe_from_study(study, chosen, storage=url)
