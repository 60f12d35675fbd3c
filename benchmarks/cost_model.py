"""What `mupx advise` predicts for a training step, against what steps take.

    python benchmarks/cost_model.py               # about three minutes on one core
    python benchmarks/cost_model.py --table       # print the committed results
    python benchmarks/cost_model.py --smoke       # small widths, a few seconds

Fashion-MNIST 14×14, float32, one thread, the default refresh interval without its frequent start
(``staleness`` 1, after two warm-up rounds), trace and relative damping at their defaults; with *blocks* no
edge of a block is longer. A *round* is ``refresh`` steps, exactly one of them with a refresh; optimizers take
turns round by round, and the median over rounds counts. Both sides are the thread's own CPU seconds, as the
machine is shared. *plain* is a step without refresh, *refresh* what a refresh adds, *columns* the largest
number of columns a factor keeps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sweeps import read_rows, set_threads, write_rows

from mupx import config, dotted, parts
from mupx.advice.costs import COSTS
from mupx.advice.estimates import estimate
from mupx.advice.measuring import measure
from mupx.advice.network import network_of, outline
from mupx.advice.rates import Rates
from mupx.datasets.base import Dataset
from mupx.optim import OPTIMIZERS
from mupx.parametrization import resolved
from mupx.run import Run

HERE = Path(__file__).parent
FULL = [("mlp", 256, 64), ("mlp", 512, 64), ("mlp", 1024, 64), ("mlp", 1024, 256), ("myrtle5", 64, 64)]
SMOKE = [("mlp", 32, 16)]
REFRESH, WARM_UP, FACTOR = 10, 2, 1.5
COMPARED = [name for name in OPTIMIZERS if name in COSTS and COSTS[name].compared]
IN_BLOCKS = ", blocks of "
LABELS = [*COMPARED, f"shampoo{IN_BLOCKS}32", f"soap{IN_BLOCKS}32"]


def experiment_of(model: str, width: int, batch_size: int, label: str, refresh: int) -> config.Experiment:
    optimizer, _, blocks = label.partition(IN_BLOCKS)
    changes: dict[str, Any] = {
        "model.name": model,
        "optimizer.name": optimizer,
        "optimizer.refresh": refresh,
        "optimizer.staleness": 1.0,
        "optimizer.blocks": int(blocks or 0),
        "scaling.base_width": min(64, width),
        "scaling.width": width,
        "train.batch_size": batch_size,
        "train.steps": 10_000,
        "train.schedule": "constant",
        # Small: the spectra of the factors are then those of a run that goes on.
        "hyperparameters.lr": 2e-3 if optimizer != "adamw" else 1e-4,
        "hyperparameters.damping": 1e-2 if optimizer == "kfac" else 1e-3,
    }
    return resolved(config.parse(dotted.merge({}, changes)))


def one_round(run: Run, refresh: int) -> list[float]:
    times = []
    for _ in range(refresh):
        started = time.thread_time()
        run.advance()
        times.append(time.thread_time() - started)
    return times


def measured(runs: dict[str, Run], rounds: int, refresh: int) -> dict[str, tuple[float, float]]:
    """Return seconds of a step without refresh and of a refresh beyond that, by optimizer."""
    times: dict[str, list[list[float]]] = {name: [] for name in runs}
    for run in runs.values():
        run.advance()  # curvature is refreshed at steps 0 and 1, then at every interval
    for turn in range(WARM_UP + rounds):
        for name, run in runs.items():
            found = one_round(run, refresh)
            if turn >= WARM_UP:
                times[name].append(found)
    result = {}
    for name, rounds_ in times.items():
        steps = [statistics.median(each) for each in zip(*rounds_, strict=True)]
        # The first of a round, but of SOAP, whose first gradient of all only starts its bases, the last.
        longest = max((0, refresh - 1), key=lambda i: steps[i])
        plain = statistics.median(t for each in rounds_ for i, t in enumerate(each) if i != longest)
        result[name] = (plain, steps[longest] - plain)
    return result


def columns_of(run: Run) -> int:
    """Return the largest number of columns a factor is kept as; 0 where all are dense."""
    states = run.optimizer.state.values()
    return max((v.shape[-1] for s in states for k, v in s.items() if k.startswith("columns")), default=0)


def compare(
    setting: tuple[str, int, int], data: Dataset, rates: Rates, rounds: int, refresh: int
) -> list[dict[str, str]]:
    model, width, batch_size = setting
    experiments = {name: experiment_of(model, width, batch_size, name, refresh) for name in LABELS}
    runs = {}
    for name, experiment in experiments.items():
        runs[name] = Run(experiment, data, parts.describe(experiment, data))
    seconds, rows = measured(runs, rounds, refresh), []
    for name, experiment in experiments.items():
        described = {p.name: p for p in parts.describe(experiment, data)}
        outlined = outline(parts.factory(experiment, data), width)
        network = network_of(outlined, described, data.train.inputs[:2], batch_size, "cross_entropy")
        found = estimate(experiment.optimizer.name, network, rates, experiment, experiment.train.steps or 1)
        plain, more = seconds[name]
        mean = plain + max(more, 0.0) / refresh
        row = {"model": model, "width": width, "batch": batch_size, "optimizer": name}
        numbers = {
            "predicted_ms": 1e3 * (found.seconds or 0.0),
            "measured_ms": 1e3 * mean,
            "ratio": (found.seconds or 0.0) / mean,
            "plain_predicted_ms": 1e3 * (found.step or 0.0),
            "plain_measured_ms": 1e3 * plain,
            "refresh_predicted_ms": 1e3 * (found.refresh or 0.0),
            "refresh_measured_ms": 1e3 * more if COSTS[experiment.optimizer.name].refreshes else 0.0,
        }
        kept = {"columns": columns_of(runs[name])}
        rows.append(
            {key: str(v) for key, v in {**row, **{k: f"{v:.3f}" for k, v in numbers.items()}, **kept}.items()}
        )
    return rows


def show(rows: Sequence[dict[str, str]]) -> str:
    """Return the rows as a Markdown table, and a line about how many lie within the factor."""
    heads = [
        "model",
        "width",
        "batch",
        "optimizer",
        "predicted ms",
        "measured ms",
        "ratio",
        "plain ratio",
        "refresh ratio",
    ]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for row in rows:
        pairs = [
            (float(row[f"{part}_predicted_ms"]), float(row[f"{part}_measured_ms"]))
            for part in ("plain", "refresh")
        ]
        ratios = [f"{predicted / real:.2f}" if real > 0 else "–" for predicted, real in pairs]
        numbers = [f"{float(row[key]):.3g}" for key in ("predicted_ms", "measured_ms")]
        cells = [
            row["model"],
            row["width"],
            row["batch"],
            row["optimizer"],
            *numbers,
            f"{float(row['ratio']):.2f}",
            *ratios,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    ratios = [float(row["ratio"]) for row in rows]
    inside = sum(1 / FACTOR <= ratio <= FACTOR for ratio in ratios)
    span = f"{min(ratios):.2f} … {max(ratios):.2f}"
    return "\n".join([*lines, "", f"{inside} of {len(rows)} within a factor of {FACTOR}; ratios {span}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path, default=HERE / "results" / "cost-model.csv")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(show(read_rows(arguments.csv)))
        return
    settings, rounds, refresh = (SMOKE, 1, 2) if arguments.smoke else (FULL, arguments.rounds, REFRESH)
    print(set_threads(1))
    data = parts.load_data(experiment_of("mlp", 64, 64, "sgd", refresh))
    rows: list[dict[str, str]] = []
    for setting in settings:
        # Anew each time: on a shared machine they change with what else is running.
        rates = measure(torch.device("cpu"), torch.float32)
        rows += compare(setting, data, rates, rounds, refresh)
        print(show(rows), flush=True)
    if not arguments.smoke:
        write_rows(arguments.csv, rows)


if __name__ == "__main__":
    main()
