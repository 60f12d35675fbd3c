"""What one step of K-FAC reaches from a zero read-out, and from the one μP asks for.

    python benchmarks/nngp.py                     # train, write the CSV and print (three minutes of one core)
    python benchmarks/nngp.py --table             # print the committed results, train nothing
    python benchmarks/nngp.py --smoke             # a small version of everything, in seconds

After Fig. 3 of Ishikawa & Karakida (2024), arXiv:2312.12226, §4.3. Fashion-MNIST at 14×14 (the embedded
8,000 training, 2,000 validation and 2,000 test images), 3-layer ReLU MLP without biases, weight variance
2/fan_in, loss ½‖f − y‖² on one-hot targets, μP from base width 64, constant lr, seeds 0 and 1, one thread.

*Distance*: widths 64 … 1024, batch 256, float64, exact Fisher, absolute damping, lr 1, Gaussian input
layer. The read-out starts at 0 or at μP's values times (64/width)^k; how far is the function after one
step from kernel ridge regression with the untrained features, and with the analytic NNGP kernel?

*Accuracy*: width 256, float32, batch 64 … 4096, one step and ten; lr and K-FAC's damping chosen on the
validation split for each entry (grids below), the test split reported. K-FAC's choices touch the edge of
its grid (lr 0.1 after ten steps, damping 0.003 from batch 1024 on): its entries are lower bounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import torch
from sweeps import set_threads

from mupx import config, dotted, training
from mupx.checks import fits, nngp
from mupx.datasets.base import Dataset
from mupx.run import Run

BASE, HIDDEN_LAYERS, WEIGHT_VARIANCE = 64, 2, 2.0
CRITICAL = 6**0.5  # torch's uniform weights have variance 1/(3 fan_in)
COMMON = {
    "model.args": {"bias": False, "depth": HIDDEN_LAYERS + 1},
    "data.name": "fashion-mnist-14",
    "optimizer.fisher": "exact",
    "hyperparameters.init_mult_input": CRITICAL,
    "hyperparameters.init_mult_hidden": CRITICAL,
    "train.loss": "squared_error",
    "train.schedule": "constant",
    "train.device": "cpu",
    "train.threads": 1,
    "scaling.base_width": BASE,
}
RHO = 0.1  # of the distances
POWERS = {"0": None, "μP": 0.0, "μP · M^-½": 0.5, "μP · M^-1": 1.0}
GRIDS = {
    "kfac": [(lr, rho) for lr in (1.0, 0.3, 0.1) for rho in (0.03, 0.003)],
    "sgd": [(lr, 0.01) for lr in (0.01, 0.03, 0.1, 0.3)],
    "shampoo": [(lr, 1e-3) for lr in (0.01, 0.03, 0.1, 0.3)],
}
RULES = {"kfac": "absolute", "sgd": None, "shampoo": "relative"}
STEPS = (1, 10)


def build(data: Dataset, head: float, changes: dict[str, object]) -> Run:
    """Build a run at its first step, the μP read-out multiplied by ``head``."""
    experiment = config.parse(dotted.merge({}, {**COMMON, **changes}))
    run = Run(experiment, data, training.describe(experiment, data))
    with torch.no_grad():
        run.model.get_parameter("output.weight").mul_(head)
    return run


def distances(data: Dataset, widths: Sequence[int], seeds: Sequence[int], batch: int) -> Iterator[dict]:
    inputs = data.validation.inputs[:1000].double()
    for name, power in POWERS.items():
        for width in widths:
            for seed in seeds:
                changes = {
                    "optimizer.name": "kfac",
                    "optimizer.damping_rule": "absolute",
                    "hyperparameters.lr": 1.0,
                    # B = I at the read-out, where ρ_B does not scale: the factor on lr undoes ρ_B.
                    "hyperparameters.lr_mult_output": 1 + RHO,
                    "hyperparameters.damping": RHO,
                    "train.dtype": "float64",
                    "train.batch_size": batch,
                    "train.seed": seed,
                    "scaling.width": width,
                }
                run = build(data, 0.0 if power is None else (BASE / width) ** power, changes)
                # Uniform input weights have another limit: a unit's input is then no Gaussian.
                weight = run.model.get_parameter("input.weight")
                torch.nn.init.normal_(weight, std=(WEIGHT_VARIANCE / weight.shape[1]) ** 0.5)
                before = nngp.features(run.model, inputs)
                finite, limit = nngp.kernel_solution(run, inputs), analytic(run, inputs, RHO)
                row = {"part": "distance", "head": name, "width": width, "batch": batch, "seed": seed}
                row |= {"finite": nngp.one_step_distance(run, inputs, finite)}
                with torch.no_grad():
                    row["analytic"] = nngp.relative_distance(run.forward(inputs), limit)
                yield {**row, "moved": nngp.relative_distance(nngp.features(run.model, inputs), before)}


def analytic(run: Run, inputs: torch.Tensor, rho: float) -> torch.Tensor:
    """Return NNGP kernel ridge on the coming batch; K-FAC's ridge ρ_A·N is (ρ/base)·N per unit."""
    x, y = run.batch()
    kernel, cross = (
        nngp.nngp_kernel(other.double(), x.double(), HIDDEN_LAYERS, WEIGHT_VARIANCE) for other in (x, inputs)
    )
    return nngp.ridge_prediction(cross, kernel, nngp.one_hot(run, y).double(), rho / BASE * len(x))


def accuracies(data: Dataset, width: int, seeds: Sequence[int], batches: Sequence[int]) -> Iterator[dict]:
    for batch in batches:
        for seed in seeds:
            common = {"train.batch_size": batch, "train.seed": seed, "scaling.width": width}
            for optimizer, grid in GRIDS.items():
                for head in (0.0, 1.0):
                    for lr, damping in grid:
                        chosen = {
                            "optimizer.name": optimizer,
                            "optimizer.damping_rule": RULES[optimizer],
                            "hyperparameters.lr": lr,
                            "hyperparameters.damping": damping,
                        }
                        run = build(data, head, {**common, **chosen, "train.steps": STEPS[-1]})
                        row = {"part": "accuracy", "optimizer": optimizer, "head": "μP" if head else "0"}
                        row |= {"width": width, "batch": batch, "seed": seed, "lr": lr, "damping": damping}
                        yield from trained(run, row)
            for damping in sorted({damping for _, damping in GRIDS["kfac"]}):
                run = build(data, 0.0, common)
                row = {"part": "accuracy", "optimizer": "NNGP kernel ridge", "head": "–", "batch": batch}
                for split in ("validation", "test"):
                    outputs = analytic(run, getattr(data, split).inputs, damping)
                    right = outputs.argmax(-1) == getattr(data, split).targets
                    row[split] = float(right.double().mean())
                yield {**row, "seed": seed, "lr": 1.0, "damping": damping, "step": 1, "moved": 0.0}


def trained(run: Run, row: dict) -> Iterator[dict]:
    inputs = run.data.test.inputs
    before = nngp.features(run.model, inputs)
    while run.step < run.steps:
        run.advance()
        if run.step in STEPS:
            moved = nngp.relative_distance(nngp.features(run.model, inputs), before)
            scores = {
                split: run.evaluate(getattr(run.data, split)).accuracy for split in ("validation", "test")
            }
            yield {**row, "step": run.step, **scores, "moved": moved}


def show_distances(rows: pd.DataFrame) -> str:
    lines = ["| read-out | to finite-width ridge | slope | to NNGP ridge | slope | features moved | slope |"]
    lines.append("|" + " --- |" * 7)
    widest = int(rows.width.max())
    for name, group in rows.groupby("head", sort=False):
        cells = []
        for key in ("finite", "analytic", "moved"):
            size = group[group.width == widest][key].mean()
            exact = group[key].max() < 1e-10
            slope = "–" if exact else f"{fits.power_law(group.width, group[key]).value:+.2f}"
            cells += [f"{size:.1e}" if exact else f"{size:.3f}", slope]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return (
        "\n".join(lines) + f"\n\nSizes at width {widest}, means over seeds; slopes of log against log width."
    )


def show_accuracies(rows: pd.DataFrame) -> str:
    batches = sorted(rows.batch.unique())
    heads = ["optimizer", "read-out", "steps", *(f"batch {batch}" for batch in batches), "features moved"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for (step, optimizer, head), group in rows.groupby(["step", "optimizer", "head"]):
        means = group.groupby(["batch", "lr", "damping"])[["validation", "test", "moved"]].mean()
        best = means.loc[means.groupby("batch").validation.idxmax()].reset_index(["lr", "damping"])
        cells = [f"{best.test[batch]:.3f}" for batch in batches]
        lines.append(
            f"| {optimizer} | {head} | {step} | {' | '.join(cells)} | {best.moved[batches[-1]]:.2f} |"
        )
    return "\n".join(lines) + f"\n\nTest accuracy, means over seeds; features moved: at batch {batches[-1]}."


DISTANCE_CLAIM = """
The paper: one step of K-FAC from a zero read-out is NNGP kernel ridge regression and moves no feature; a
read-out that shrinks faster than μP's (b > 1) tends to the same; under μP features move at any width.
"""
ACCURACY_CLAIM = """
The paper: so K-FAC reaches the kernel's accuracy in one step, and that rises with the batch size; SGD and
Shampoo do not land on the kernel ridge solution.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the committed results, train nothing")
    parser.add_argument("--smoke", action="store_true", help="small widths and batches, one seed, no CSV")
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "nngp.csv")
    arguments = parser.parse_args()
    print(set_threads(1))
    if arguments.table:
        rows = pd.read_csv(arguments.csv, dtype={"head": str})
    else:
        data = training.load_data(config.parse(dotted.merge({}, COMMON)))
        smoke = arguments.smoke
        seeds = (0,) if smoke else (0, 1)
        widths, batches = (
            ((64, 128), (64, 256)) if smoke else ((64, 128, 256, 512, 1024), (64, 256, 1024, 4096))
        )
        rows = pd.DataFrame(
            [
                *distances(data, widths, seeds, batch=64 if smoke else 256),
                *accuracies(data, 64 if smoke else 256, seeds, batches),
            ]
        )
        if not smoke:
            rows.to_csv(arguments.csv, index=False, float_format="%.6g")
    print(DISTANCE_CLAIM)
    print(show_distances(rows[rows.part == "distance"]))
    print(ACCURACY_CLAIM)
    print(show_accuracies(rows[rows.part == "accuracy"].astype({"step": int})))


if __name__ == "__main__":
    main()
