"""Do the exponents of a right implementation come out, and does each wrong one fail?

    python benchmarks/verdicts.py            # measure (about 15 minutes on one thread), write the CSV, print
    python benchmarks/verdicts.py --table    # print the committed results
    python benchmarks/verdicts.py --smoke    # widths 64 … 256, no CSV

Setting: tanh MLP 24–M–M–10 without bias, init std 1/√fan_in at base width 64, data set ``synthetic``
(Gaussian inputs, labels of a random tanh network, seed 0), cross-entropy, batch 64, constant lr, a fresh
batch every step, curvature of the current batch alone at every step; lr and damping: SGD 0.1, K-FAC
0.05 and ρ' (or ρ) 0.01, Shampoo 0.05 and a relative ridge 1e-3; widths 64 … 2048; seeds 0 and 1; one
thread. Printed: exponent of mean |Δh| on the first batch, [input, hidden, output], after 1 and 10 steps.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from sweeps import read_rows, set_threads, write_rows

from mupx import config, dotted
from mupx.checks.runner import verify
from mupx.config import Experiment

RESULTS = Path(__file__).parent / "results" / "verdicts.csv"
WIDTHS = (64, 128, 256, 512, 1024, 2048)
SEEDS = (0, 1)
# Optimizer, damping rule, lr, damping, parametrization.
RUNS = [
    ("sgd", None, 0.1, 0.01, "sp"),
    ("sgd", None, 0.1, 0.01, "mup"),
    ("kfac", "pi", 0.05, 0.01, "sp"),
    ("kfac", "trace", 0.05, 0.01, "sp"),
    ("kfac", "pi", 0.05, 0.01, "mup"),
    ("kfac", "trace", 0.05, 0.01, "mup"),
    ("shampoo", "relative", 0.05, 1e-3, "sp"),
    ("shampoo", "relative", 0.05, 1e-3, "mup"),
]


def experiment(run: tuple[str, str | None, float, float, str]) -> Experiment:
    optimizer, rule, lr, damping, parametrization = run
    gains = {f"hyperparameters.init_mult_{role}": math.sqrt(3) for role in ("input", "hidden", "output")}
    settings = {
        "data.name": "synthetic",
        "model.args": {"activation": "tanh", "bias": False},
        "optimizer.name": optimizer,
        "optimizer.damping_rule": rule,
        "optimizer.ema": 0.0,
        "optimizer.refresh": 1,
        "scaling.parametrization": parametrization,
        "train.schedule": "constant",
        "train.threads": 1,
        **gains,
        "hyperparameters.lr": lr,
        "hyperparameters.damping": damping,
    }
    return config.parse(dotted.merge({}, settings))


def measure(widths: tuple[int, ...]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for run in RUNS:
        report = verify(experiment(run), widths=widths, seeds=SEEDS, sweeps=False)
        name = f"{run[0]} {run[4]}" + (f" {run[1]}" if run[0] == "kfac" else "")
        rows += [
            {
                "run": name,
                "verdict": report.verdict,
                "widths": f"{widths[0]}-{widths[-1]}",
                "name": row.name,
                "quantity": row.label,
                "step": row.step,
                "slope": round(row.slope, 3),
                "low": round(row.low, 3),
                "high": round(row.high, 3),
                "expected": row.expected,
            }
            for row in report.rows
            if row.quantity in ("Δh", "size", "own")
        ]
        print(f"{name}: {report.verdict}", *report.causes, sep="\n  ", flush=True)
    return rows


def table(rows: list[dict[str, object]]) -> str:
    lines = ["| run | t = 1 | t = 10 | verdict |", "| --- | --- | --- | --- |"]
    for name in dict.fromkeys(str(row["run"]) for row in rows):
        mine = [row for row in rows if row["run"] == name]
        cells = []
        for step in ("1", "10"):
            moved = [r for r in mine if r["quantity"] == "Δh" and str(r["step"]) == step]
            cells.append(" ".join(f"{float(str(row['slope'])):+.2f}" for row in moved))
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {mine[0]['verdict']} |")
    return "\n".join(lines)


def curvature(rows: list[dict[str, object]]) -> str:
    lines = [
        "| K-FAC μP trace | step | input | hidden | output | order |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for label, order in (("λmax(A)", "0 1 1"), ("λmax(B)", "-1 -1 0")):
        for step in ("1", "10"):
            found = [
                f"{float(str(r['slope'])):+.2f}"
                for r in rows
                if r["run"] == "kfac mup trace" and r["quantity"] == label and str(r["step"]) == step
            ]
            lines.append(f"| {label} | {step} | {' | '.join(found)} | {order} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the committed results")
    parser.add_argument("--smoke", action="store_true", help="widths 64 … 256, no CSV")
    arguments = parser.parse_args()
    print(set_threads(1))
    if arguments.table:
        rows = read_rows(RESULTS)
    else:
        rows = measure(WIDTHS[:3] if arguments.smoke else WIDTHS)
        if not arguments.smoke:
            write_rows(RESULTS, rows)
    print(table(rows), curvature(rows), sep="\n\n")


if __name__ == "__main__":
    main()
