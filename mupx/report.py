"""Assemble what ``mupx report`` writes from a study: table and figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mupx.config import Experiment
from mupx.plots import Point, draw_curves, draw_map, save
from mupx.search.choice import choose, diverged

if TYPE_CHECKING:
    from optuna import Study


def write_figures(study: Study, experiment: Experiment, folder: Path) -> list[Path]:
    """Write ``map.png`` (and ``curves.png`` where trials reported on their way) into ``folder``.

    Raises:
        NoResultError: No trial has finished, or all diverged.
        StorageError: The folder cannot be written.
    """
    marked = {pick: choose(study, experiment, pick).trial for pick in ("best", "robust")}
    points = _points(study)
    loss = "training loss" if experiment.search.objective == "train" else "validation loss"
    names = sorted(experiment.search.space, key=lambda name: (name != "lr", name != "damping", name))
    written = [save(draw_map(points, names[:2], marked, loss), folder / "map.png")]
    curves = [point for point in points if point.curve]
    if curves:
        written.append(save(draw_curves(curves, marked, loss), folder / "curves.png"))
    return written


def _points(study: Study) -> list[Point]:
    return [
        Point(trial.number, trial.params, trial.value, diverged(trial), trial.intermediate_values)
        for trial in study.get_trials(deepcopy=False)
        if trial.value is not None and trial.state.is_finished()
    ]
