"""When does second-order optimization speed up training? The poster's findings at a size for one core.

    python benchmarks/poster.py                       # fifteen minutes of one core, tables and figures
    python benchmarks/poster.py --experiment damping  # one of damping, batch, data, psgd
    python benchmarks/poster.py --table               # print the committed results
    python benchmarks/poster.py --smoke               # a corner of each, no files

Ishikawa & Yokota (ICLR Tiny 2024) find that second order pays where the batch is large or the data set
small, that K-FAC's best damping grows with the batch and the lr, and that curvature which is fitted by
iterations (PSGD) gets better with iterations but not with the batch. Here: 3-layer ReLU MLP of width 64,
14×14 Fashion-MNIST, linear decay, judged on seeds 0 and 1, tuned by octaves on the mean of two others.

``batch``: SGD, AdamW, K-FAC (trace damping) and Shampoo (relative ridge) over the batch size, two epochs.
``data``: the same over the size of the training set, 100 steps, at one batch size and at one ratio of batch
    to data. Momentum is 0.9 for all but AdamW. The lr is tuned over eight octaves, and more where the best
    is the last of them; second order's damping too, in steps of two octaves down to 2^-18, each at its own
    lr: second order has one hyperparameter more and gets more trials. By training loss where training loss is
    compared, by validation loss where test accuracy is. *First* and *second* are the better of two, chosen
    on the tuning seeds too.
``damping``: K-FAC's training loss over damping and batch at 50 steps and at two epochs, every point at its
    own lr, and over damping, batch and lr. ``!`` marks a best damping at the end of the grid.
``psgd``: over fit iterations per step and batch, 100 steps at a constant lr without momentum, K-FAC beside
    it: c(P) of :mod:`mupx.quality` along the step taken; the criterion that this PSGD fits P to,
    gᵀ P g + tr P⁻¹, at the best multiple of P and relative to P = I, for the gradient of the next batch; and
    the training loss, tuned as above. The first two at one lr and damping, median over every fifth step of
    the second half of the training.

Training losses are over the whole training set, after the last step; a run that diverged has the untrained
loss. Steps and epochs are compared, not seconds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from poster_runs import Cell, Runs, damped, walked
from sweeps import set_threads

RESULTS = Path(__file__).parent / "results"
ALL = 8000  # training examples of the data set
DAMPING = -7.0  # log2, where it is not what is asked
RIDGE = -10.0  # log2, Shampoo's, relative to λmax
FIRST, SECOND = ("sgd", "adamw"), ("kfac", "shampoo")
# Lowest log2 lr of the octaves tried at batch 16; half an octave per octave of the batch further up.
LOWEST = {"sgd": -9, "adamw": -11, "kfac": -13, "shampoo": -11}
OCTAVES = 8
START = -13  # log2 lr, low enough for every damping and batch: the best is walked to from below
FIT_LR = {"psgd": -5, "kfac": -7}  # log2, where c(P) is measured


@dataclass(frozen=True)
class Point:
    """A comparison of first with second order: one row of ``batch`` and of ``data``."""

    batch_size: int
    examples: int
    steps: int

    def cells(self, optimizer: str) -> list[Cell]:
        """Return the octaves of the lr."""
        damping = RIDGE if optimizer == "shampoo" else DAMPING
        momentum = 0.0 if optimizer == "adamw" else 0.9
        low = LOWEST[optimizer] + round(math.log2(self.batch_size / 16) / 2)
        return [
            Cell(optimizer, self.batch_size, self.examples, self.steps, lr, damping, momentum)
            for lr in range(low, low + OCTAVES)
        ]

    def tuned(self, runs: Runs, optimizers: Sequence[str], key: str) -> Cell:
        """Return the best of the optimizers by ``key``, on the tuning seeds, each as tuned."""

        found = []
        for name in optimizers:
            start = min(self.cells(name), key=lambda cell: runs.tuned(cell, key))
            found.append((damped if name in SECOND else walked)(runs, start, key))
        return min(found, key=lambda cell: runs.tuned(cell, key))

    def losses(self, runs: Runs, optimizers: Sequence[str]) -> list[float]:
        """Return the training loss of every seed at what is best by training loss."""
        return runs.judged(self.tuned(runs, optimizers, "train_loss"), "train_loss")

    def accuracies(self, runs: Runs, optimizers: Sequence[str]) -> list[float]:
        """Return the test accuracy of every seed, in per cent, at what is best by validation loss."""
        best = self.tuned(runs, optimizers, "validation_loss")
        return [100 * accuracy for accuracy in runs.judged(best, "test_accuracy")]

    def ratios(self, runs: Runs) -> list[float]:
        """Return training loss of second over first order, of every seed."""
        pairs = zip(self.losses(runs, SECOND), self.losses(runs, FIRST), strict=True)
        return [second / first for second, first in pairs]


Series = Mapping[str, Sequence[Point]]
BATCHES: Series = {"two epochs": [Point(batch, ALL, 2 * ALL // batch) for batch in (16, 128, 1024, 4000)]}
SIZES: Series = {
    "batch 250": [Point(250, examples, 100) for examples in (500, 2000, 8000)],
    "an eighth of the data": [Point(examples // 8, examples, 100) for examples in (500, 2000, 8000)],
}


CORNER = Point(100, 800, 4)


def compared(runs: Runs, name: str, series: Series) -> Iterator[str]:
    """Yield the table of ``batch`` or ``data``."""
    heads = " | ".join(f"{optimizer} loss" for optimizer in FIRST + SECOND)
    yield f"| {name} | batch size | examples | steps | {heads} | second / first | first % | second % |"
    yield "| --- " * 11 + "|"
    for label, point in ((label, point) for label, points in series.items() for point in points):
        losses = " | ".join(f"{fmean(point.losses(runs, [optimizer])):.3g}" for optimizer in FIRST + SECOND)
        ratios = ", ".join(f"{ratio:.2g}" for ratio in point.ratios(runs))
        accuracies = " | ".join(
            ", ".join(f"{accuracy:.1f}" for accuracy in point.accuracies(runs, names))
            for names in (FIRST, SECOND)
        )
        sizes = f"{point.batch_size} | {point.examples} | {point.steps}"
        yield f"| {label} | {sizes} | {losses} | {ratios} | {accuracies} |"


def draw_compared(runs: Runs, series: Series, axis: str, path: Path) -> None:
    """Draw losses and accuracies of the first series, and the ratios of all."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3), constrained_layout=True)
    points = next(iter(series.values()))
    for names, style in ((FIRST, "s--"), (SECOND, "o-")):
        ys = [fmean(point.accuracies(runs, names)) for point in points]
        xs = [getattr(point, axis) for point in points]
        middle.plot(xs, ys, style, label=" or ".join(names), markersize=4)
    for optimizer in FIRST + SECOND:
        ys = [fmean(point.losses(runs, [optimizer])) for point in points]
        style = "o-" if optimizer in SECOND else "s--"
        left.plot([getattr(point, axis) for point in points], ys, style, label=optimizer, markersize=4)
    for i, (label, points) in enumerate(series.items()):
        xs = [getattr(point, axis) for point in points]
        ratios = [point.ratios(runs) for point in points]
        right.plot(xs, [fmean(both) for both in ratios], f"C{i}-", label=label)
        right.plot(xs, ratios, f"C{i}o", markersize=4)
    right.axhline(1.0, color="grey", linewidth=0.8)
    left.set(ylabel="training loss", yscale="log")
    right.set(ylabel="second / first order", yscale="log")
    middle.set_ylabel("test accuracy, %")
    _finish(figure, (left, middle, right), axis.replace("_", " "), path)


DAMPINGS = (-17.0, -15.0, -13.0, -11.0, -9.0, -7.0, -5.0, -3.0, -1.0)
# What is fixed, batch size, steps, log2 lr (None: each damping at its own).
Damped = tuple[str, int, int, int | None]
DAMPED: Sequence[Damped] = (
    ("steps", 16, 50, None),
    ("steps", 128, 50, None),
    ("steps", 1024, 50, None),
    ("epochs", 64, 250, None),
    ("epochs", 512, 31, None),
    ("epochs", 4000, 4, None),
    ("batch", 128, 50, -11),
    ("batch", 128, 50, -9),
    ("batch", 128, 50, -7),
    ("batch", 128, 50, -5),
    ("lr", 16, 50, -9),
    ("lr", 128, 50, -9),
    ("lr", 1024, 50, -9),
)


def damping_cells(runs: Runs, grid: Sequence[float], point: Damped) -> Iterator[Cell]:
    """Yield K-FAC at every damping."""
    _, batch, steps, lr = point
    cell = Cell("kfac", batch, ALL, steps, START if lr is None else lr, grid[0])
    for damping in grid:
        cell = replace(cell, log2_damping=damping)
        if lr is None:
            # Damping shrinks the update: the best lr grows with it, and that of the last one is a start.
            cell = walked(runs, cell, "train_loss")
        yield cell


def damping_table(runs: Runs, grid: Sequence[float], points: Sequence[Damped]) -> Iterator[str]:
    """Yield the table of ``damping``; the lr is that of the best damping."""
    heads = " | ".join(f"2^{damping:g}" for damping in grid)
    yield f"| damping | batch size | steps | {heads} | best log2 damping | log2 lr |"
    yield "| --- " * (len(grid) + 5) + "|"
    for point in points:
        cells = list(damping_cells(runs, grid, point))
        losses = [runs.judged(cell, "train_loss") for cell in cells]
        best = [seed.index(min(seed)) for seed in zip(*losses, strict=True)]
        dampings = ", ".join(f"{grid[k]:g}" + ("!" if k in (0, len(grid) - 1) else "") for k in best)
        lrs = ", ".join(str(cells[k].log2_lr) for k in best)
        means = " | ".join(f"{fmean(seeds):.3f}" for seeds in losses)
        yield f"| fixed {point[0]} | {point[1]} | {point[2]} | {means} | {dampings} | {lrs} |"


def draw_damped(runs: Runs, path: Path) -> None:
    """Draw loss over damping relative to the best, one curve per batch size or lr."""
    titles = {
        "steps": "50 steps, tuned lr",
        "epochs": "two epochs, tuned lr",
        "batch": "batch 128, 50 steps",
        "lr": "50 steps, lr $2^{-9}$",
    }
    figure, panels = plt.subplots(1, 4, figsize=(12, 3), sharey=True, constrained_layout=True)
    for panel, (fixed, title) in zip(panels, titles.items(), strict=True):
        points = [point for point in DAMPED if point[0] == fixed]
        for point, colour in zip(points, _shades(len(points)), strict=True):
            losses = [fmean(runs.judged(cell, "train_loss")) for cell in damping_cells(runs, DAMPINGS, point)]
            label = f"lr $2^{{{point[3]}}}$" if fixed == "batch" else f"batch {point[1]}"
            ys = [loss / min(losses) for loss in losses]
            panel.plot([2.0**d for d in DAMPINGS], ys, "o-", color=colour, label=label, markersize=4)
        panel.set(title=title, ylim=(0.98, 2.0))
    panels[0].set_ylabel("training loss / best")
    _finish(figure, panels, "damping (trace rule)", path)


ITERATIONS = (1, 2, 4, 8)
FIT_BATCHES = (16, 128, 1024, 4000)
MEASURES = {"c": "c(P)", "whitening": "own criterion", "train_loss": "training loss"}


def fit(
    runs: Runs, optimizer: str, iterations: int, batch: int, measure: str, steps: int = 100
) -> list[float]:
    """Return a measure of every seed: of P at one lr and damping, the loss at the tuned."""
    lr = FIT_LR[optimizer]
    cell = Cell(optimizer, batch, ALL, steps, lr, DAMPING, 0.0, iterations)
    if measure == "train_loss":
        cell = (damped if optimizer in SECOND else walked)(runs, cell, measure)
    return runs.judged(cell, measure)


def fitted(runs: Runs, iterations: Sequence[int], batches: Sequence[int], steps: int = 100) -> Iterator[str]:
    """Yield the table of ``psgd``: every measure of both seeds."""
    yield f"| psgd | optimizer | fit iterations | {' | '.join(f'batch {batch}' for batch in batches)} |"
    yield "| --- " * (len(batches) + 3) + "|"
    for measure, label in MEASURES.items():
        rows = [("psgd", str(n), n) for n in iterations]
        rows += [("kfac", "–", 1)] if measure != "whitening" else []  # K-FAC's P is no whitening
        for optimizer, shown, count in rows:
            found = (fit(runs, optimizer, count, batch, measure, steps) for batch in batches)
            cells = (", ".join(f"{value:.3g}" for value in seeds) for seeds in found)
            yield f"| {label} | {optimizer} | {shown} | {' | '.join(cells)} |"


def draw_fitted(runs: Runs, path: Path) -> None:
    """Draw the measures over fit iterations, one curve per batch size."""
    figure, panels = plt.subplots(1, 3, figsize=(10, 3), constrained_layout=True)
    for panel, (measure, label) in zip(panels, MEASURES.items(), strict=True):
        for batch, colour in zip(FIT_BATCHES, _shades(len(FIT_BATCHES)), strict=True):
            ys = [fmean(fit(runs, "psgd", n, batch, measure)) for n in ITERATIONS]
            panel.plot(ITERATIONS, ys, "o-", color=colour, label=f"batch {batch}", markersize=4)
            if measure != "whitening":
                for seed in fit(runs, "kfac", 1, batch, measure):
                    panel.axhline(seed, color=colour, linestyle=":", linewidth=1)
        panel.set_ylabel(label + (", dotted: K-FAC" if measure != "whitening" else ", P = I: 1"))
    panels[2].set(yscale="log", ylim=(None, 1.0))  # a seed of K-FAC's that diverged is above
    _finish(figure, panels, "fit iterations per step", path)


def _shades(count: int) -> list[tuple[float, ...]]:
    return [plt.get_cmap("viridis")(0.9 * i / max(1, count - 1)) for i in range(count)]


def _finish(figure: plt.Figure, panels: Sequence[plt.Axes], xlabel: str, path: Path) -> None:
    for panel in panels:
        panel.set(xlabel=xlabel)
        panel.set_xscale("log", base=2)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


@dataclass(frozen=True)
class Finding:
    """One experiment: its table, a corner of it, and its figure."""

    table: Callable[[Runs], Iterator[str]]
    smoke: Callable[[Runs], Iterator[str]]
    draw: Callable[[Runs, Path], None]


FINDINGS = {
    "damping": Finding(
        lambda runs: damping_table(runs, DAMPINGS, DAMPED),
        lambda runs: damping_table(runs, (-7.0, -5.0), [("steps", 64, 10, None)]),
        draw_damped,
    ),
    "batch": Finding(
        lambda runs: compared(runs, "batch", BATCHES),
        lambda runs: compared(runs, "batch", {"half an epoch": [CORNER]}),
        lambda runs, path: draw_compared(runs, BATCHES, "batch_size", path),
    ),
    "data": Finding(
        lambda runs: compared(runs, "data", SIZES),
        lambda runs: compared(runs, "data", {"an eighth of the data": [CORNER]}),
        lambda runs, path: draw_compared(runs, SIZES, "examples", path),
    ),
    "psgd": Finding(
        lambda runs: fitted(runs, ITERATIONS, FIT_BATCHES),
        lambda runs: fitted(runs, (1, 2), (64,), steps=8),
        draw_fitted,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--experiment", choices=FINDINGS, help="one alone")
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not arguments.table:
        print(set_threads(1))
    corner = Runs(None, offline=False)
    for name in [arguments.experiment] if arguments.experiment else FINDINGS:
        finding = FINDINGS[name]
        if arguments.smoke:
            print("\n".join(finding.smoke(corner)))
            continue
        path = arguments.results / f"poster-{name}.csv"
        runs = Runs(path, offline=arguments.table)
        print("\n".join(finding.table(runs)), flush=True)
        if not arguments.table:
            finding.draw(runs, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
