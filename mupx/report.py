"""What a report says and which files it writes: a search as trials, a training run as steps (no torch).

pandas and matplotlib are loaded only for the files that need them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mupx.config import Experiment
from mupx.errors import NoResultError, StorageError
from mupx.files import read_json

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

LARGEST = 2.0**63  # of a number in a file: more than any step or loss, and what tables hold


@dataclass(frozen=True)
class Outputs:
    """Files to write; None leaves one out."""

    csv: Path | None = None
    parquet: Path | None = None
    figures: Path | None = None


def is_run(folder: Path) -> bool:
    """Whether a folder holds a training run."""
    return (folder / "run.json").exists()


def run_status(folder: Path) -> dict[str, Any]:
    """Return how far a training run is.

    Metrics reach the disk with each checkpoint, so a running run is seen up to its last one.

    Raises:
        StorageError: A file of the folder is damaged.
    """
    result, entries = _result(folder), read_metrics(folder)
    return {
        "kind": "run",
        "run_dir": folder,
        "state": result["outcome"] if result else "unfinished",
        "outcome": result["outcome"] if result else None,
        "step": result["steps"] if result else max((e["step"] for e in entries), default=0),
        "loss": result["train_loss"] if result else _last(entries, "loss"),
        "validation_loss": _last(entries, "validation_loss"),
        "test": result["test"] if result else None,
    }


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of ``metrics.jsonl``; the torn last line of a killed run is left out."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entries.append(_metrics(json.loads(line)))
        except (ValueError, RecursionError):
            if number < len(lines):
                raise StorageError(f"{path}, line {number} is damaged; train again with --fresh") from None
    return entries


def _metrics(entry: Any) -> dict[str, Any]:
    """Return a line of metrics as it is, if it has the types of one."""
    whole = isinstance(entry, dict) and isinstance(entry.get("step"), int)
    if not (whole and all(_number(value) for key, value in entry.items() if key != "curvature")):
        raise ValueError("no metrics")
    curvature = entry.get("curvature", {})
    if not isinstance(curvature, dict) or not all(map(_statistics, curvature.values())):
        raise ValueError("no curvature")
    for name in curvature:
        name.encode()  # a lone surrogate goes into no table
    return dict(entry)


def _statistics(found: Any) -> bool:
    return isinstance(found, dict) and all(
        _number(value) or (isinstance(value, dict) and all(map(_number, value.values())))
        for value in found.values()
    )


def _number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not abs(value) >= LARGEST)


def outcome(trial: FrozenTrial) -> str:
    """Return how a trial ended: finished, diverged, pruned, failed, lost, interrupted or running."""
    return str(trial.user_attrs.get("outcome", trial.state.name.lower()))


def ranking(study: Study) -> list[dict[str, Any]]:
    """Return all trials, those with a usable result first and best first."""
    from mupx.search.choice import usable

    good = usable(study)
    numbers = {trial.number for trial in good}
    rest = [trial for trial in study.get_trials(deepcopy=False) if trial.number not in numbers]
    return [
        {
            "trial": t.number,
            "outcome": outcome(t),
            "value": t.value if t in good else None,
            "params": t.params,
        }
        for t in [*good, *rest]
    ]


def write_study(study: Study, experiment: Experiment, outputs: Outputs) -> list[Path]:
    """Write a search's table of trials and its figures.

    Returns:
        The files written.

    Raises:
        StorageError: A file cannot be written.
    """
    trials = study.get_trials(deepcopy=False)
    written = []
    if outputs.csv or outputs.parquet:
        from mupx import tables

        written = tables.write(tables.trials_frame(trials), outputs.csv, outputs.parquet)
    if outputs.figures is not None:
        written += _study_figures(study, experiment, trials, outputs.figures)
    return written


def write_run(folder: Path, outputs: Outputs) -> list[Path]:
    """Write a training run's table of steps and its learning curve, and the same of its curvature.

    Returns:
        The files written; the curvature's, where it was measured, are ``NAME-curvature.csv`` (or Parquet)
        and ``curvature.png``.
    """
    entries = read_metrics(folder)
    measured = [entry for entry in entries if "curvature" in entry]
    written = []
    if outputs.csv or outputs.parquet:
        from mupx import tables

        written = tables.write(tables.metrics_frame(entries), outputs.csv, outputs.parquet)
        if measured:
            beside = (_beside(path) for path in (outputs.csv, outputs.parquet))
            written += tables.write(tables.curvature_frame(measured), *beside)
    if outputs.figures is not None and entries:
        from mupx import plots

        written += [plots.save(plots.run_curves(entries), outputs.figures / "curves.png")]
        if measured:
            written += [plots.save(plots.curvature_curves(measured), outputs.figures / "curvature.png")]
    return written


def _beside(path: Path | None) -> Path | None:
    return None if path is None else path.with_stem(f"{path.stem}-curvature")


def _study_figures(
    study: Study, experiment: Experiment, trials: Sequence[FrozenTrial], folder: Path
) -> list[Path]:
    from mupx import plots

    if not any(trial.state.is_finished() for trial in trials):
        return []
    marked = _marked(study, experiment)
    space, label = experiment.search.space, f"{experiment.search.objective} loss"
    figures = {}
    if len(space) > 1:
        x, y = ("lr", "damping") if {"lr", "damping"} <= space.keys() else sorted(space)[:2]
        figures["map"] = plots.loss_map(trials, space, x, y, marked, label)
    if len(space) != 2:
        figures["slices"] = plots.slices(trials, space, marked, label)
    figures["curves"] = plots.trial_curves(trials, marked, label)
    return [plots.save(figure, folder / f"{name}.png") for name, figure in figures.items()]


def _marked(study: Study, experiment: Experiment) -> dict[str, int]:
    """Return the numbers of the best and the robust trial; nothing while there are none."""
    from mupx.search.choice import choose

    try:
        return {pick: choose(study, experiment, pick).trial for pick in ("best", "robust")}
    except NoResultError:
        return {}


def _last(entries: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = (e[key] for e in reversed(entries) if e.get(key) is not None)
    return next(values, None)


def _result(folder: Path) -> dict[str, Any] | None:
    path = folder / "result.json"
    if not path.exists():
        return None
    try:
        document = read_json(path)
        if not {"outcome", "steps", "train_loss", "test"} <= document.keys():
            raise ValueError("it is no result")
        if not (isinstance(document["outcome"], str) and isinstance(document["steps"], int)):
            raise ValueError("it is no result")
        if not _number(document["train_loss"]):
            raise ValueError("its loss is no number")
        return document
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} is damaged ({error}); train again with --fresh") from None
