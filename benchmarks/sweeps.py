"""Cells, lines and honest regret: what the transfer benchmarks share.

A *cell* is one training run; it is trained once and kept as a line of a CSV file, so a benchmark that is
interrupted continues, and a committed CSV prints its table without training anything. A *line* is a
half-octave sweep of one hyperparameter through a point, extended until its optimum lies inside.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from mupx import config, dotted, training
from mupx.checks import transfer
from mupx.datasets.base import Dataset

Kept = TypeVar("Kept")
Kind = TypeVar("Kind")
REACH = 4  # half-octave steps on either side: ±2 octaves


@dataclass(frozen=True)
class Cell:
    """One training run: everything its loss depends on within a benchmark's setting."""

    setting: str
    optimizer: str
    damping_rule: str
    parametrization: str
    width: int
    log2_lr: float
    log2_damping: float
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What is kept of a run; a diverged one has the untrained loss."""

    outcome: str
    train_loss: float
    validation_loss: float
    steps: int
    seconds: float


class Cells:
    """Cells trained on demand and remembered in a CSV file (None: in memory alone).

    ``data`` maps a setting to its loaded data set, for what no registry name loads.
    """

    def __init__(
        self, path: Path | None, settings: dict[str, dict[str, object]], *, offline: bool = False
    ) -> None:
        self.path, self.settings, self.offline = path, settings, offline
        self._known: dict[Cell, Outcome] = {}
        self.data: dict[str, Dataset] = {}
        if path is not None:
            self._known = read_runs(path, Cell, Outcome)

    def __getitem__(self, cell: Cell) -> Outcome:
        if cell not in self._known:
            if self.offline:
                raise KeyError(f"{cell} is not in {self.path}")
            self._known[cell] = self._train(cell)
            self._append(cell, self._known[cell])
        return self._known[cell]

    def known(self) -> Iterable[Cell]:
        """Return the cells trained so far."""
        return self._known.keys()

    def _train(self, cell: Cell) -> Outcome:
        setting = self.settings[cell.setting]
        experiment = config.parse(
            dotted.merge(
                {},
                {
                    **setting,
                    "optimizer.name": cell.optimizer,
                    "optimizer.damping_rule": cell.damping_rule or None,
                    "scaling.parametrization": cell.parametrization,
                    "scaling.width": cell.width,
                    "hyperparameters.lr": 2.0**cell.log2_lr,
                    "hyperparameters.damping": 2.0**cell.log2_damping,
                    "train.seed": cell.seed,
                },
            )
        )
        if cell.setting not in self.data:
            self.data[cell.setting] = training.load_data(experiment)
        result = training.train(experiment, data=self.data[cell.setting])
        ended = result.validation
        validation = result.untrained["validation"] if ended is None else ended.loss
        return Outcome(result.outcome, result.train_loss, validation, result.steps, round(result.seconds, 2))

    def _append(self, cell: Cell, outcome: Outcome) -> None:
        if self.path is not None:
            append_run(self.path, cell, outcome)


def read_runs(path: Path, cell: type[Kind], outcome: type[Kept]) -> dict[Kind, Kept]:
    """Return the runs that a CSV file holds; none where there is no file.

    Args:
        path: The file.
        cell: Dataclass of what identifies a run; its fields are int, float or str.
        outcome: Likewise of what is kept of it.
    """
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {_typed(cell, row): _typed(outcome, row) for row in csv.DictReader(file)}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a CSV file as text; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same keys to a CSV file, in place of what it held."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def append_run(path: Path, cell: Any, outcome: Any) -> None:
    """Append one run to a CSV file, which is begun where there is none."""
    row = {**asdict(cell), **asdict(outcome)}
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    # One short write in append mode: processes that share the file do not tear each other's lines.
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


def _typed(kind: type[Kind], row: dict[str, str]) -> Kind:
    casts: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str}
    return kind(**{f.name: casts[str(f.type)](row[f.name]) for f in fields(kind)})


def mean_loss(cells: Cells, cell: Cell, seeds: Sequence[int], key: str = "train_loss") -> float:
    """Return the mean over seeds of a cell's loss."""
    return sum(getattr(cells[replace(cell, seed=seed)], key) for seed in seeds) / len(seeds)


def line(cells: Cells, centre: Cell, axis: str, seeds: Sequence[int], reach: int = REACH) -> list[Cell]:
    """Sweep ``axis`` (``log2_lr`` or ``log2_damping``) through ``centre`` in half-octave steps.

    The line reaches at least ``reach`` steps to either side and grows until its optimum is two steps inside.
    """
    return transfer.sweep(lambda cell: cells[cell].train_loss, centre, axis, seeds, reach)


def best_of(cells: Cells, points: Sequence[Cell], seeds: Sequence[int]) -> Cell:
    """Return the point with the lowest mean loss over ``seeds``."""
    return min(points, key=lambda point: mean_loss(cells, point, seeds))


def robust_of(cells: Cells, points: Sequence[Cell], seeds: Sequence[int]) -> Cell:
    """Return the point of a line whose mean with its two neighbours is lowest: not the edge of a cliff."""
    losses = [mean_loss(cells, point, seeds) for point in points]
    smooth = {i: sum(losses[i - 1 : i + 2]) / 3 for i in range(1, len(points) - 1)}
    return points[min(smooth, key=smooth.__getitem__)]


def tune_base(cells: Cells, start: Cell, axes: Sequence[str], seeds: Sequence[int]) -> Cell:
    """Tune lr and damping in turn at the base width until neither moves."""
    best = start
    for _ in range(5):
        before = best
        for axis in axes:
            best = best_of(cells, line(cells, best, axis, seeds), seeds)
        if best == before:
            break
    return best


def regret(
    cells: Cells, chosen: Cell, points: Sequence[Cell], seeds: Sequence[int], key: str = "train_loss"
) -> list[float]:
    """Return one honest regret per seed: L(chosen) − L(best), the best chosen without that seed.

    Choosing and judging on different seeds keeps the minimum of noise out of the comparison; a
    negative value means that the point chosen at this width was no better on the seed it is judged on.
    """
    result = []
    for judge in seeds:
        others = [seed for seed in seeds if seed != judge]
        rival = best_of(cells, points, others)
        result.append(
            getattr(cells[replace(chosen, seed=judge)], key) - getattr(cells[replace(rival, seed=judge)], key)
        )
    return result


def transferred(
    cells: Cells, base: Cell, chosen: Cell, axes: Sequence[str], seeds: Sequence[int], reach: int
) -> dict[str, Any]:
    """Return what lines through a transferred point say of it: the columns of a row of a table.

    Args:
        cells: The runs.
        base: The point tuned on the small model.
        chosen: The same values on the large one.
        axes: What was tuned; an axis not measured yet, on results that are only read, has no drift.
        seeds: Two or more.
        reach: Half-octave steps to either side of the transferred point, at least.

    Raises:
        KeyError: Only results are read, and the first axis is not among them.
    """
    lines = {}
    for axis in axes:
        try:
            lines[axis] = line(cells, chosen, axis, seeds, reach)
        except KeyError:
            if not cells.offline or not lines:
                raise
    points = [point for one in lines.values() for point in one]
    best = {axis: getattr(best_of(cells, one, seeds), axis) for axis, one in lines.items()}
    regrets = regret(cells, chosen, points, seeds)
    return {
        "base log2 lr": base.log2_lr,
        "drift lr": octaves(base.log2_lr, best["log2_lr"]),
        "drift ρ": octaves(base.log2_damping, best.get("log2_damping", float("nan"))),
        "base loss": mean_loss(cells, base, seeds),
        "transferred": mean_loss(cells, chosen, seeds),
        "best": mean_loss(cells, best_of(cells, points, seeds), seeds),
        "regret": sum(regrets) / len(regrets),
        "regret range": f"{min(regrets):+.4f} … {max(regrets):+.4f}",
        "validation": mean_loss(cells, chosen, seeds, "validation_loss"),
    }


def gathered(measures: Iterable[Callable[[], dict[str, Any]]], *, offline: bool) -> list[dict[str, Any]]:
    """Return a row per measurement, printed as it is made; offline without those not measured yet."""
    rows = []
    for measure in measures:
        try:
            rows.append(measure())
        except KeyError:
            if not offline:
                raise
            continue
        if not offline:
            print(rows[-1], flush=True)
    return rows


def set_threads(threads: int) -> str:
    """Set torch's threads and return a line that states machine and versions."""
    torch.set_num_threads(threads)
    return f"torch {torch.__version__}, {threads} thread(s), {os.cpu_count()} cores, CPU"


def octaves(a: float, b: float) -> float:
    """Return how many octaves b lies above a (both log2), cleaned of −0.0."""
    return math.fsum((b, -a)) or 0.0
