"""How long must curvature be refreshed often at first? The poster's table, at a size for one core.

    python benchmarks/poster_refresh.py           # about six minutes of one core, then table and figure
    python benchmarks/poster_refresh.py --table   # print the committed results
    python benchmarks/poster_refresh.py --smoke   # a corner of the table, no CSV

Ishikawa & Yokota (ICLR Tiny 2024, table 1) train DeiT-small on ImageNet with Shampoo, refreshed every 10
steps for a first fraction of the training and then every T. Here: 3-layer ReLU MLP of width 64, 14×14
Fashion-MNIST, batch 64, 1000 steps (eight epochs) with linear decay, seeds 0 and 1, Shampoo (relative
ridge) and K-FAC (trace damping). A run that is so much shorter has few refreshes in 0.1 % of it: the first
phase refreshes at *every* step, and the table counts in per cent of the training and in refreshes, of which
the one at step 0 is always there. The tuned lr is the best of five octaves for curvature that is always
fresh, by validation accuracy on another seed; Shampoo is also run one and two octaves below, and with its
statistics averaged in every step. Cells: test accuracy in per cent, mean over seeds.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from sweeps import set_threads

from mupx import config, dotted, training
from mupx.datasets.base import Dataset

HERE = Path(__file__).parent
STEPS = 1000
FRACTIONS = (0.0, 0.2, 0.3, 0.5, 1.0, 2.0, 3.0, 10.0)  # per cent: 1 (at step 0), 2, 3, 5 … 100 steps
INTERVALS = (10, 30, 100, 300, 1000)
SEEDS, TUNING_SEED = (0, 1), 7
OPTIMIZERS = {"shampoo": (-10.0, range(-7, -2)), "kfac": (-7.0, range(-8, -3))}  # log2 damping, log2 lr
COMMON = {"train.batch_size": 64, "train.threads": 1, "train.device": "cpu", "scaling.width": 64}
# Octaves from the tuned lr; interval of the statistics, 0 where they are averaged at refreshes alone.
VARIANTS = (("shampoo", 0, 0), ("shampoo", -1, 0), ("shampoo", -2, 0), ("shampoo", 0, 1), ("kfac", 0, 0))
AGE = "10"  # the default: the age rule with a longest interval of 10
ALWAYS = "1!"
Variant = tuple[str, int, int]


@dataclass(frozen=True)
class Cell:
    optimizer: str
    log2_lr: int
    refresh: str
    seed: int
    statistics: int = 0


@dataclass(frozen=True)
class Outcome:
    outcome: str
    steps: int
    train_loss: float
    validation_accuracy: float
    test_accuracy: float
    seconds: float


class Runs:
    """Runs made on demand and kept in a CSV file (None: in memory alone)."""

    def __init__(self, path: Path | None, steps: int, offline: bool) -> None:
        self.path, self.steps, self.offline = path, steps, offline
        self._data: Dataset | None = None
        self._known: dict[Cell, Outcome] = {}
        if path is not None and path.exists():
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    lr, seed, statistics = (int(row[key]) for key in ("log2_lr", "seed", "statistics"))
                    cell = Cell(row["optimizer"], lr, row["refresh"], seed, statistics)
                    numbers = [float(row[key]) for key in list(Outcome.__dataclass_fields__)[2:]]
                    self._known[cell] = Outcome(row["outcome"], int(row["steps"]), *numbers)

    def __getitem__(self, cell: Cell) -> Outcome:
        if cell not in self._known:
            if self.offline:
                raise KeyError(f"{cell} is not in {self.path}")
            self._known[cell] = self._train(cell)
            self._append(cell, self._known[cell])
        return self._known[cell]

    def _train(self, cell: Cell) -> Outcome:
        changes = {
            **COMMON,
            "train.steps": self.steps,
            "train.seed": cell.seed,
            "optimizer.name": cell.optimizer,
            "optimizer.refresh": cell.refresh,
            "optimizer.statistics": cell.statistics or None,
            "hyperparameters.lr": 2.0**cell.log2_lr,
            "hyperparameters.damping": 2.0 ** OPTIMIZERS[cell.optimizer][0],
        }
        experiment = config.parse(dotted.merge({}, changes))
        self._data = self._data or training.load_data(experiment)
        result = training.train(experiment, data=self._data, evaluate_test=True)
        validation, test = (0.0 if m is None else m.accuracy or 0.0 for m in (result.validation, result.test))
        print(f"{cell}: {result.outcome} after {result.steps} steps, {test:.4f}", flush=True)
        return Outcome(
            result.outcome, result.steps, result.train_loss, validation, test, round(result.seconds, 2)
        )

    def _append(self, cell: Cell, outcome: Outcome) -> None:
        if self.path is None:
            return
        row, new = {**asdict(cell), **asdict(outcome)}, not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow(row)


def phases(fraction: float, interval: int) -> str:
    """Return the schedule as it is written: refreshed at every step at first, then every ``interval``."""
    return f"1:{fraction:g}%,{interval}!"


def best_lr(runs: Runs, optimizer: str) -> int:
    grid = OPTIMIZERS[optimizer][1]
    return max(grid, key=lambda lr: runs[Cell(optimizer, lr, ALWAYS, TUNING_SEED)].validation_accuracy)


def accuracies(runs: Runs, optimizer: str, lr: int, refresh: str, statistics: int = 0) -> list[float]:
    """Return the test accuracies, in per cent, of the seeds that did not diverge."""
    found = [runs[Cell(optimizer, lr, refresh, seed, statistics)] for seed in SEEDS]
    return [100 * outcome.test_accuracy for outcome in found if outcome.outcome == "finished"]


def shown(values: Sequence[float]) -> str:
    """Return the mean, with the number of seeds that trained where some did not."""
    if not values:
        return "–"
    some = f" ({len(values)}/{len(SEEDS)})" if len(values) < len(SEEDS) else ""
    return f"{sum(values) / len(values):.1f}{some}"


def refreshes(fraction: float, steps: int) -> int:
    """Return how many steps are refreshed before the later interval begins."""
    return max(1, round(fraction * steps / 100))


def table(
    runs: Runs, variants: Sequence[Variant], fractions: Sequence[float], intervals: Sequence[int]
) -> Iterator[str]:
    """Yield a table; ``–`` is a schedule that diverged on every seed."""
    heads = " | ".join(f"{f:g} % ({refreshes(f, runs.steps)})" for f in fractions)
    yield f"| optimizer | log2 lr | statistics | then every | {heads} |"
    yield "| --- " * (len(fractions) + 4) + "|"
    for optimizer, octaves, statistics in variants:
        lr = best_lr(runs, optimizer) + octaves
        for interval in intervals:
            cells = [
                shown(accuracies(runs, optimizer, lr, phases(f, interval), statistics)) for f in fractions
            ]
            when = "each step" if statistics else "refresh"
            yield f"| {optimizer} | {lr} | {when} | {interval} | {' | '.join(cells)} |"
    for optimizer in dict.fromkeys(variant[0] for variant in variants):
        lr = best_lr(runs, optimizer)
        fresh, age = (shown(accuracies(runs, optimizer, lr, refresh)) for refresh in (ALWAYS, AGE))
        yield f"{optimizer} at 2^{lr}: {fresh} refreshed at every step, {age} by age (the default)"


def draw(runs: Runs, path: Path) -> None:
    """Draw accuracy against the number of first refreshes, one curve per later interval."""
    figure, panels = plt.subplots(1, len(VARIANTS), figsize=(15, 3.2), sharey=True, constrained_layout=True)
    colours = plt.get_cmap("viridis")([0.9 * i / (len(INTERVALS) - 1) for i in range(len(INTERVALS))])
    counts = [refreshes(fraction, runs.steps) for fraction in FRACTIONS]
    for panel, (optimizer, octaves, statistics) in zip(panels, VARIANTS, strict=True):
        lr = best_lr(runs, optimizer) + octaves
        for interval, colour in zip(INTERVALS, colours, strict=True):
            means = []
            for fraction in FRACTIONS:
                values = accuracies(runs, optimizer, lr, phases(fraction, interval), statistics)
                # A diverged run answers by chance: one class in ten.
                means.append((sum(values) + 10.0 * (len(SEEDS) - len(values))) / len(SEEDS))
            panel.plot(counts, means, "o-", color=colour, label=str(interval), markersize=4)
        title = f"{optimizer}, " + (f"lr / {2**-octaves}" if octaves else "tuned lr")
        title += ", statistics each step" if statistics else ""
        panel.set(title=title, xscale="log", xlabel="first refreshes, at every step")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test accuracy, %")
    panels[-1].legend(title="then every", fontsize=8, title_fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--csv", type=Path, default=HERE / "results" / "poster-refresh.csv")
    parser.add_argument("--png", type=Path, default=HERE / "results" / "poster-refresh.png")
    arguments = parser.parse_args()
    if not arguments.table:
        print(set_threads(1))
    if arguments.smoke:
        runs = Runs(None, 40, offline=False)
        lines = table(runs, [("shampoo", 0, 0)], (0.0, 25.0), (10,))
    else:
        runs = Runs(arguments.csv, STEPS, offline=arguments.table)
        lines = table(runs, VARIANTS, FRACTIONS, INTERVALS)
    print("\n".join(lines))
    if not (arguments.smoke or arguments.table):
        draw(runs, arguments.png)


if __name__ == "__main__":
    main()
