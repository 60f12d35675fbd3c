"""Does an update that passes an early coordinate check keep its size at every width, late in training?

    python benchmarks/late_drift.py            # measure what is missing (minutes on one thread), then print
    python benchmarks/late_drift.py --table    # print the committed results
    python benchmarks/late_drift.py --smoke    # two widths, few steps, no CSV

The claim under test (arXiv:2512.05620): grafted Shampoo and SOAP pass an early check and drift late, as the
stable rank of the gradient changes with width, and blocking or spectral normalisation of the update repairs
both (the main README has what was found). Measured: the RMS → RMS operator norm ‖ΔW‖₂·√(d_in/d_out) of a
step of the hidden weight, and its stable rank ‖ΔW‖_F²/‖ΔW‖₂², after 2, 10, 100 and 300 steps; printed: their
exponents in width, 0 where the rule is right.

Setting: that of benchmarks/verdicts.py (tanh MLP 24–M–M–10 without bias, synthetic data, cross-entropy,
batch 64, constant lr, base width 64, μP), float32, statistics with ema 0.95, refreshed every 10 steps
(Shampoo: or at 5 % age), no momentum beside SOAP's own (betas 0.9, 0.95); lr untuned; seeds 0 and 1, fitted
together, losses their mean; one thread.
"""

from __future__ import annotations

import argparse
import time
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from sweeps import read_rows, set_threads, write_rows
from verdicts import experiment

from mupx import training
from mupx.checks import fits, late
from mupx.config import Experiment
from mupx.datasets.base import Dataset
from mupx.parametrization import resolved
from mupx.run import Run

RESULTS = Path(__file__).parent / "results" / "late-drift.csv"
WIDTHS, STEPS, SEEDS, HIDDEN = (64, 128, 256, 512), (2, 10, 100, 300), (0, 1), "hidden1.weight"
SHAMPOO = ("shampoo", "relative", 0.05, 1e-3, "mup")
GRAFTED = ("shampoo", "relative", 0.005, 1e-3, "mup")
SOAP = ("soap", None, 0.01, 0.01, "mup")
RUNS: dict[str, tuple[tuple[str, str | None, float, float, str], dict[str, Any]]] = {
    "shampoo": (SHAMPOO, {}),
    "shampoo, blocks 32": (SHAMPOO, {"optimizer.blocks": 32}),
    "shampoo, spectral": (SHAMPOO, {"optimizer.normalise": "spectral"}),
    "adamw#shampoo": (GRAFTED, {"optimizer.graft": "adam"}),
    "adamw#shampoo, blocks 32": (GRAFTED, {"optimizer.graft": "adam", "optimizer.blocks": 32}),
    "soap": (SOAP, {}),
    "soap, blocks 32": (SOAP, {"optimizer.blocks": 32}),
    "soap, spectral": (SOAP, {"optimizer.normalise": "spectral"}),
    "adamw#soap": (("soap", None, 0.005, 0.01, "mup"), {"optimizer.graft": "adam"}),
}
Row = dict[str, Any]


def settings(name: str, width: int, seed: int = 0) -> Experiment:
    run, changes = RUNS[name]
    common = {
        "scaling.width": width,
        "train.seed": seed,
        "optimizer.ema": 0.95,
        "optimizer.refresh": 10,
        "optimizer.betas": (0.9, 0.95),
    }
    return resolved(experiment(run).updated({**common, **changes}))


def measure(name: str, width: int, seed: int, steps: tuple[int, ...], data: Dataset) -> list[Row]:
    """Train once and read the step of the hidden weight that leads to each of ``steps``."""
    chosen = settings(name, width, seed)
    parameters = training.describe(chosen, data)
    run, started = Run(chosen, data, parameters), time.process_time()
    hidden = [p for p in parameters if p.name == HIDDEN]
    rows: list[Row] = []
    for step in steps:
        run.steps = step  # `late.read` trains up to it
        found = late.read(run, hidden)
        if HIDDEN not in found:
            break
        norm, rank, _ = found[HIDDEN]
        row = {"run": name, "width": width, "seed": seed, "step": step}
        sizes = {"norm": f"{norm:.4g}", "rank": f"{rank:.4g}", "loss": f"{run.recent_loss(-10):.4f}"}
        rows.append({**row, **sizes})
    print(f"{name}, width {width}, seed {seed}: {time.process_time() - started:.0f} s", flush=True)
    return rows


def table(rows: list[Row]) -> str:
    steps = sorted({int(row["step"]) for row in rows})
    heads = [f"norm, step {step}" for step in steps] + [f"rank, step {step}" for step in steps]
    lines = [f"| run | {' | '.join(heads)} | last loss |", "| --- " * (len(heads) + 2) + "|"]
    for name in dict.fromkeys(row["run"] for row in rows):
        mine = [row for row in rows if row["run"] == name]
        cells = [exponent(mine, quantity, step) for quantity in ("norm", "rank") for step in steps]
        last = [row for row in mine if int(row["step"]) == steps[-1]]
        losses = (
            fmean(float(row["loss"]) for row in last if int(row["width"]) == width)
            for width in sorted({int(row["width"]) for row in last})
        )
        lines.append(f"| {name} | {' | '.join(cells)} | {' '.join(f'{loss:.4f}' for loss in losses)} |")
    return "\n".join(lines)


def exponent(rows: list[Row], quantity: str, step: int) -> str:
    points = [(int(row["width"]), float(row[quantity])) for row in rows if int(row["step"]) == step]
    return "–" if len(points) < 2 else f"{fits.power_law(*zip(*points, strict=True)).value:+.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the committed results")
    parser.add_argument("--smoke", action="store_true", help="two widths, few steps, no CSV")
    arguments = parser.parse_args()
    rows: list[Row] = []
    if not arguments.smoke:
        rows = read_rows(RESULTS)
    if not arguments.table:
        print(set_threads(1))
        widths, steps, seeds = (WIDTHS[:2], (2, 4), (0,)) if arguments.smoke else (WIDTHS, STEPS, SEEDS)
        data = training.load_data(settings("soap", WIDTHS[0]))
        done = {(row["run"], int(row["width"]), int(row["seed"])) for row in rows}
        for name, width, seed in product(RUNS, widths, seeds):
            if (name, width, seed) not in done:
                rows += measure(name, width, seed, steps, data)
                if not arguments.smoke:
                    write_rows(RESULTS, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
