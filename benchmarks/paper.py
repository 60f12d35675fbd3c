"""The width figures of Ishikawa & Karakida (ICLR 2024, arXiv:2312.12226), at small scale, on real data.

    python benchmarks/paper.py --figure 1            # movement of every layer: MLP and Myrtle-5 on CIFAR-10
    python benchmarks/paper.py --figure 2            # orders of A and B through training: MLP, Fashion-MNIST
    python benchmarks/paper.py --figure 4            # wider is better: MLP, Fashion-MNIST
    python benchmarks/paper.py --table               # all three from the committed results
    python benchmarks/paper.py --figure 2 --smoke    # a cut version on embedded data, no CSV

Fig. 3 (a zero head and the NNGP) is benchmarks/nngp.py. CIFAR-10 is JPEG re-encoded and averaged to
16×16 (see images.py), Fashion-MNIST is the 14×14 one. ReLU, weights of input and hidden layers start
with std √(2/fan_in) at the base width, biases, batch 128, constant lr, no averaging, refresh at every
step; seeds 0 and 1; one thread. Base width 64 for the MLP (64 … 1024), 16 channels for Myrtle-5
(16 … 128). Slopes are exponents of width; ``--png FOLDER`` draws figure 1.

Myrtle-5 under K-FAC with trace damping fails here: in the first step the convolutions' own movement grows
as width^0.2 … 0.4, most of it between 16 and 32 channels; after ten steps it is within 0.25. With ten
classes 16 channels may be too narrow a proxy. Shampoo under μP passes at the same widths.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from images import cifar10_16
from sweeps import Cells, mean_loss, set_threads
from transfer import SETTINGS, VARIANTS, base_choice

from mupx import check_plots, config, dotted, plots, training
from mupx.checks.result import Report
from mupx.checks.runner import verify
from mupx.config import Experiment
from mupx.datasets.base import Dataset

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1)
HE = math.sqrt(6)  # torch's default std is 1/√(3·fan_in)
COMMON = {
    "train.batch_size": 128,
    "train.schedule": "constant",
    "train.threads": 1,
    "optimizer.ema": 0.0,
    "optimizer.refresh": 1,
    "hyperparameters.init_mult_input": HE,
    "hyperparameters.init_mult_hidden": HE,
}
WIDTHS = {"mlp": (64, 128, 256, 512, 1024), "myrtle5": (16, 32, 64, 128)}
# What the paper shows, by optimizer, damping rule and parametrization, with our lr and damping.
RUNS = {
    "K-FAC, SP, π": ("kfac", "pi", "sp", 0.01, 0.01),
    "K-FAC, μP, π (plain heuristic)": ("kfac", "pi", "mup", 0.01, 0.01),
    "K-FAC, μP, trace (rescaled)": ("kfac", "trace", "mup", 0.01, 0.03),
    "Shampoo, SP": ("shampoo", "relative", "sp", 0.01, 1e-3),
    "Shampoo, μP": ("shampoo", "relative", "mup", 0.01, 1e-3),
}
CLAIMS = {
    1: "Paper: under SP, and under μP with the plain heuristic, |Δh| of some layers depends on width; "
    "rescaled K-FAC and Shampoo under μP keep it flat in every layer.",
    2: "Paper: A has order (1, M, M) and B (1/M, 1/M, 1) in (input, hidden, output), also during training.",
    4: "Paper: under μP the wider network is better at the same hyperparameters.",
}


def experiment(model: str, data: str, run: str) -> Experiment:
    optimizer, rule, parametrization, lr, damping = RUNS[run]
    base = WIDTHS[model][0]
    values = {
        "model.name": model,
        "data.name": data,
        "optimizer.name": optimizer,
        "optimizer.damping_rule": rule,
        "scaling.parametrization": parametrization,
        "scaling.base_width": base,
        "scaling.width": base,
        "hyperparameters.lr": lr,
        "hyperparameters.damping": damping,
    }
    return config.parse(dotted.merge({}, {**COMMON, **values}))


def measure(
    figure: int, model: str, run: str, data: Dataset, steps: Sequence[int], widths: Sequence[int]
) -> tuple[list[dict[str, object]], Report]:
    chosen = experiment(model, "synthetic", run)  # the name is not read: the data are given
    report = verify(chosen, data=data, widths=widths, seeds=SEEDS, steps=steps, sweeps=False)
    wanted = ("Δh", "own") if figure == 1 else ("size",)
    rows: list[dict[str, object]] = [
        {
            "figure": figure,
            "model": model,
            "run": run,
            "verdict": report.verdict,
            "name": row.name,
            "role": row.role,
            "quantity": row.label,
            "step": row.step,
            "slope": round(row.slope, 3),
            "low": round(row.low, 3),
            "high": round(row.high, 3),
            "expected": round(row.expected, 3),
        }
        for row in report.rows
        if row.quantity in wanted and row.role != "vector"
    ]
    print(f"{model}, {run}: {report.verdict}", *report.causes, sep="\n  ", flush=True)
    return rows, report


def figure_1(smoke: bool, folder: Path | None) -> list[dict[str, object]]:
    data = _fashion(smoke) if smoke else cifar10_16()
    rows: list[dict[str, object]] = []
    for model, widths in WIDTHS.items():
        for run in RUNS:
            more, report = measure(1, model, run, data, (1, 10), widths[:2] if smoke else widths)
            rows += more
            if folder is not None:
                name = f"paper-1-{model}-{RUNS[run][0]}-{RUNS[run][1]}-{RUNS[run][2]}.png"
                plots.save(check_plots.coordinates(report.rows), folder / name)
    return rows


def figure_2(smoke: bool, folder: Path | None) -> list[dict[str, object]]:
    widths = WIDTHS["mlp"][:2] if smoke else WIDTHS["mlp"]
    steps = (1, 5) if smoke else (1, 10, 50)
    return measure(2, "mlp", "K-FAC, μP, trace (rescaled)", _fashion(smoke), steps, widths)[0]


def _fashion(smoke: bool) -> Dataset:
    name = "fashion-mnist-14" if smoke else "fashion-mnist-14-full"
    return training.load_data(config.parse({"data": {"name": name}}))


def show(rows: Sequence[dict[str, object]]) -> None:
    for figure in (1, 2):
        mine = [row for row in rows if int(str(row["figure"])) == figure]
        if not mine:
            continue
        print(f"\nFigure {figure}. {CLAIMS[figure]}\n")
        heads = ("model", "run", "quantity", "step", "slopes by layer", "order", "verdict")
        print(f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads), sep="\n")
        keys = dict.fromkeys((r["model"], r["run"], r["quantity"], r["step"]) for r in mine)
        for model, run, quantity, step in keys:
            key = (model, run, quantity, step)
            found = [r for r in mine if (r["model"], r["run"], r["quantity"], r["step"]) == key]
            slopes = " ".join(f"{float(str(r['slope'])):+.2f}" for r in found)
            order = " ".join(f"{float(str(r['expected'])):+.0f}" for r in found)
            print(f"| {model} | {run} | {quantity} | {step} | {slopes} | {order} | {found[0]['verdict']} |")


def figure_4() -> None:
    """Print the losses at fixed base values from the committed transfer benchmark."""
    print(f"\nFigure 4. {CLAIMS[4]}\n")
    print(
        "Training loss at the values tuned at width 64 (setting of transfer.py, one pass, seeds 0 and 1):\n"
    )
    cells = Cells(RESULTS / "transfer-online.csv", SETTINGS, offline=True)
    widths = (64, 128, 256, 512, 1024, 2048)
    print("| optimizer | damping | " + " | ".join(map(str, widths)) + " |", "|" + " --- |" * 8, sep="\n")
    for variant in VARIANTS:
        if variant[2] != "mup":
            continue
        base = base_choice(cells, "online", variant, SEEDS)
        losses = []
        for width in widths:
            try:
                losses.append(f"{mean_loss(cells, replace(base, width=width), SEEDS):.4f}")
            except KeyError:
                losses.append("–")
        print(f"| {variant[0]} | {variant[1] or '–'} | {' | '.join(losses)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--figure", type=int, choices=(1, 2, 4), nargs="+", default=[1, 2, 4])
    parser.add_argument("--table", action="store_true", help="print the committed results, train nothing")
    parser.add_argument("--smoke", action="store_true", help="embedded data, two widths, no CSV")
    parser.add_argument("--png", type=Path, help="folder for figure 1 as images")
    arguments = parser.parse_args()
    print(set_threads(1))
    for figure, make in ((1, figure_1), (2, figure_2)):
        if figure not in arguments.figure:
            continue
        path = RESULTS / f"paper-{figure}.csv"
        if arguments.table:
            with path.open(newline="") as file:
                show(list(csv.DictReader(file)))
            continue
        rows = make(arguments.smoke, arguments.png)
        if not arguments.smoke:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        show(rows)
    if 4 in arguments.figure:
        figure_4()


if __name__ == "__main__":
    main()
