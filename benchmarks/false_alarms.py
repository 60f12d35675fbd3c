"""How often does a right configuration fail, and how far from its order does each quantity come?

    python benchmarks/false_alarms.py            # measure what is missing, then print the table
    python benchmarks/false_alarms.py --table    # print the committed results
    python benchmarks/false_alarms.py --held-out # slopes on real data, 20 draws the thresholds have not seen
    python benchmarks/false_alarms.py --smoke    # 2 draws of two configurations, no CSV

The thresholds of `mupx verify` follow from this table. 20 draws of each configuration, draw k with the
seeds 2k and 2k+1 of init and data order; μP, base width 64, widths 64 … 512 (as --quick). Data set
``synthetic``: tanh MLP with biases, batch 64, constant lr, curvature of the current batch; data set
``fashion-mnist-14``: ReLU MLP, batch 64, linear decay, the optimizers' defaults. "with sweeps" is a whole
`verify --quick`. Off: largest distance of a slope from its order in one verification; printed are the
median and the largest over the draws. One thread.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections.abc import Iterable
from pathlib import Path

from sweeps import set_threads

from mupx import config, dotted, training
from mupx.checks.result import Report
from mupx.checks.rows import Row
from mupx.checks.runner import verify
from mupx.config import Experiment

RESULTS = Path(__file__).parent / "results" / "false-alarms.csv"
DRAWS = 20
WIDTHS = (64, 128, 256, 512)
GAINS = {f"hyperparameters.init_mult_{role}": math.sqrt(3) for role in ("input", "hidden", "output")}
SYNTHETIC = {
    "data.name": "synthetic",
    "model.args": {"activation": "tanh"},
    "optimizer.ema": 0.0,
    "optimizer.refresh": 1,
    "train.schedule": "constant",
    **GAINS,
}
REAL = {"data.name": "fashion-mnist-14"}
# Data, optimizer, damping rule, lr, damping, whether to sweep.
CONFIGURATIONS = [
    (SYNTHETIC, "sgd", None, 0.1, 0.01, False),
    (SYNTHETIC, "adamw", None, 0.01, 0.01, False),
    (SYNTHETIC, "kfac", "trace", 0.05, 0.01, False),
    (SYNTHETIC, "kfac", "absolute", 0.05, 0.01, False),
    (SYNTHETIC, "kfac", "exact", 0.05, 0.01, False),
    (SYNTHETIC, "shampoo", "relative", 0.05, 1e-3, False),
    (REAL, "sgd", None, 0.5, 0.01, False),
    (REAL, "adamw", None, 0.005, 0.01, False),
    (REAL, "kfac", "trace", 0.04, 0.01, False),
    (REAL, "kfac", "absolute", 0.2, 0.1, False),
    (REAL, "shampoo", "relative", 0.05, 1e-3, False),
    (REAL, "sgd", None, 0.5, 0.01, True),
    (REAL, "adamw", None, 0.005, 0.01, True),
    (REAL, "kfac", "trace", 0.04, 0.01, True),
    (REAL, "shampoo", "relative", 0.05, 1e-3, True),
]
COLUMNS = ("Δh", "own", "init", "ridge", "size", "norm")


def name_of(configuration: tuple) -> str:
    data, optimizer, rule, _, _, sweeps = configuration
    parts = [str(data["data.name"]), optimizer, rule or "", "with sweeps" if sweeps else ""]
    return " ".join(part for part in parts if part)


def experiment(configuration: tuple) -> Experiment:
    data, optimizer, rule, lr, damping, _ = configuration
    values = {
        "optimizer.name": optimizer,
        "optimizer.damping_rule": rule,
        "hyperparameters.lr": lr,
        "hyperparameters.damping": damping,
        "train.threads": 1,
    }
    return config.parse(dotted.merge({}, {**data, **values}))


def measure(configuration: tuple, draw: int) -> dict[str, object]:
    chosen = experiment(configuration)
    report = verify(
        chosen,
        data=training.load_data(chosen),
        widths=WIDTHS,
        seeds=(2 * draw, 2 * draw + 1),
        quick=True,
        sweeps=configuration[5],
    )
    return {"configuration": name_of(configuration), "draw": draw, **summary(report)}


def summary(report: Report) -> dict[str, object]:
    rows = [*report.rows, *report.late]
    document: dict[str, object] = {"verdict": report.verdict}
    document |= {quantity: round(_worst(rows, quantity), 3) for quantity in COLUMNS}
    drifts = [abs(sweep.drift.value) for sweep in report.own_sweeps]
    losses = [
        sum(regrets) / len(regrets) / sweep.gains[width]
        for sweep in report.own_sweeps
        for width, regrets in sweep.regrets.items()
    ]
    document["drift"] = round(max(drifts, default=math.nan), 3)
    document["regret/gain"] = round(max(losses, default=math.nan), 4)
    document["cause"] = "; ".join(report.causes)
    return document


def _worst(rows: Iterable[Row], quantity: str) -> float:
    return max((abs(row.off) for row in rows if row.quantity == quantity), default=math.nan)


def show(rows: list[dict[str, object]]) -> None:
    heads = [*COLUMNS, "drift", "regret/gain"]
    print("| configuration | fail | " + " | ".join(f"{head}: median, largest" for head in heads) + " |")
    print("|" + " --- |" * (2 + len(heads)))
    for name in dict.fromkeys(str(row["configuration"]) for row in rows):
        mine = [row for row in rows if row["configuration"] == name]
        failed = sum(row["verdict"] == "fail" for row in mine)
        cells = []
        for head in heads:
            values = [value for row in mine if not math.isnan(value := float(str(row[head])))]
            cells.append(f"{statistics.median(values):.2g}, {max(values):.2g}" if values else "–")
        print(f"| {name} | {failed} of {len(mine)} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the committed results, train nothing")
    parser.add_argument("--smoke", action="store_true", help="2 draws of two configurations, no CSV")
    parser.add_argument("--held-out", action="store_true", help="draws 20 … 39, slopes on real data, no CSV")
    arguments = parser.parse_args()
    print(set_threads(1))
    if arguments.held_out:
        chosen = [c for c in CONFIGURATIONS if c[0] is REAL and not c[5]]
        show([measure(c, draw) for c in chosen for draw in range(DRAWS, 2 * DRAWS)])
        return
    rows: list[dict[str, object]] = []
    if RESULTS.exists() and not arguments.smoke:
        with RESULTS.open(newline="") as file:
            rows = list(csv.DictReader(file))
    known = {(row["configuration"], int(str(row["draw"]))) for row in rows}
    chosen = CONFIGURATIONS[:2] if arguments.smoke else [] if arguments.table else CONFIGURATIONS
    for configuration in chosen:
        for draw in range(2 if arguments.smoke else DRAWS):
            if (name_of(configuration), draw) in known:
                continue
            row = measure(configuration, draw)
            rows.append(row)
            print(row, flush=True)
            if not arguments.smoke:
                _append(row)
    show(rows)


def _append(row: dict[str, object]) -> None:
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
