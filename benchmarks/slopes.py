"""Does one step of every optimizer keep its size over width, tensor by tensor?

    python benchmarks/slopes.py            # measure over the registry, write the CSV, print
    python benchmarks/slopes.py --table    # print the committed results
    python benchmarks/slopes.py --smoke    # widths 64 … 256, one seed, no CSV
    python benchmarks/slopes.py --only sgd muon    # these optimizers; their rows in the CSV are replaced

Setting: tanh MLP 24–M–M–10 without bias, init std 1/√fan_in at base width 64, data set ``synthetic``,
cross-entropy, one batch of 64, float64, one thread; M = 256 … 2048; seeds 0, 1 and 2; lr, damping and eps
as the optimizer's class has them. Wide K-FAC and Shampoo layers are kept as columns (``solver = auto``). Of
SOAP, whose first step moves nothing, it is the second, on the same batch.

Measured: mean |ΔW h|, what the first update of one tensor does to its layer's output, against M on
log-log axes. The expected slope is 0; of the update without its lr it is minus the exponent of the lr.
Every optimizer in two regimes: ``curved``, its default damping, and ``damped``, an absolute damping (or
eps) far above every eigenvalue, so that the exponents of the ridge decide. For each field of a rule there
are rows with all multipliers of that field off by (width ratio)^½, which must fail. Parametrizations:
``mup``, and ``sp-full-alignment`` (arXiv:2407.05872), whose condition is just this.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from sweeps import read_rows, write_rows

from mupx import scaling
from mupx.checks.coordinate import read
from mupx.config import Experiment
from mupx.datasets.base import Split
from mupx.optim import OPTIMIZERS
from mupx.parametrization import experiment_from
from mupx.parts import describe, load_data
from mupx.run import Run
from mupx.scaling import LayerScale, Parametrization, Role, ScalingRule, find_parametrization, find_rule

RESULTS = Path(__file__).parent / "results" / "slopes.csv"
WIDTHS, SEEDS, BASE = (256, 512, 1024, 2048), (0, 1, 2), 64
BATCH = 64
PARAMETRIZATIONS = ("mup", "sp-full-alignment")
TOLERANCE = 0.08
FAR_ABOVE = 1e4  # every eigenvalue of a factor and every entry of a gradient, at any width
FIELDS = ("lr", "damping_A", "damping_B", "eps")
Row = dict[str, Any]


@dataclass(frozen=True)
class Faulty(Parametrization):
    """A parametrization with one field's multipliers off by (width ratio)^½ in every tensor."""

    field: str = "lr"

    def scale(self, rule: ScalingRule, role: Role, r_in: float, r_out: float, **more: Any) -> LayerScale:
        right = Parametrization.scale(self, rule, role, r_in, r_out, **more)
        value = getattr(right, self.field)
        return right if value is None else replace(right, **{self.field: value * max(r_in, r_out) ** 0.5})


@contextmanager
def fault(name: str, field: str) -> Iterator[str]:
    """Make the wrong variant of a parametrization known; no field leaves it right."""
    if not field:
        yield name
        return
    right = find_parametrization(name)
    wrong = Faulty("faulty", right.init, right.strategy, "", right.forward, field)
    with patch.dict(scaling.PARAMETRIZATIONS, {"faulty": wrong}):  # type: ignore[arg-type]
        yield "faulty"


def regimes(optimizer: str) -> list[str]:
    """Return ``curved``, and ``damped`` for a rule that has a ridge of its own scale."""
    rule = find_rule(optimizer)
    return ["curved", *(["damped"] if "absolute" in rule.damping or rule.eps is not None else [])]


def faults(optimizer: str, regime: str) -> list[str]:
    """Return the fields that a wrong exponent shows in."""
    if regime == "curved":
        return ["lr"]
    rule = find_rule(optimizer)
    ridges = rule.damping_scale("absolute") if "absolute" in rule.damping else None
    powers = {"damping_A": ridges and ridges.A, "damping_B": ridges and ridges.B, "eps": rule.eps}
    # Beside an absolute ridge an eps has nothing to do in this regime.
    return [field for field, power in powers.items() if power and not (field == "eps" and ridges)]


def experiment(optimizer: str, parametrization: str, regime: str, width: int, seed: int) -> Experiment:
    """Return the setting of one run."""
    rule = find_rule(optimizer)
    values: dict[str, Any] = {}
    if regime == "damped":
        absolute = {"damping_rule": "absolute", "damping": FAR_ABOVE}
        values = absolute if "absolute" in rule.damping else {"eps": FAR_ABOVE}
    chosen = experiment_from(
        width=width, base_width=BASE, optimizer=optimizer, parametrization=parametrization, **values
    )
    gains = {f"hyperparameters.init_mult_{role}": math.sqrt(3) for role in ("input", "hidden", "output")}
    changes = {
        "data.name": "synthetic",
        "model.name": "mlp",
        "model.args": {"activation": "tanh", "bias": False},
        "train.dtype": "float64",
        "train.schedule": "constant",
        "train.device": "cpu",
        "train.seed": seed,
    }
    return chosen.updated({**changes, **gains})


def contributions(chosen: Experiment, steps: int = 1) -> dict[str, tuple[str, float, float]]:
    """Return parameter → (role, mean |ΔW h| after ``steps`` on one batch, its lr)."""
    data = load_data(chosen)
    if steps > 1:
        data = replace(data, train=Split(data.train.inputs[:BATCH], data.train.targets[:BATCH]))
    made = chosen.updated({"train.steps": steps, "train.batch_size": BATCH})
    run = Run(made, data, describe(made, data))
    moved = read(run, [steps]).moved[steps].own
    return {layer.name: (layer.role, moved[layer.name], layer.lr) for layer in run.layers}


@cache
def first_move(optimizer: str) -> int:
    """Return the first step that moves anything: SOAP's first one only sets up its bases."""
    at_base = experiment(optimizer, "mup", "curved", BASE, 0)
    return next(
        step for step in (1, 2) if any(moved for _, moved, _ in contributions(at_base, step).values())
    )


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """Return the least-squares slope of log value against log width."""
    x = [math.log(width) for width in widths]
    y = [math.log(max(value, 1e-300)) for value in values]
    centre = sum(x) / len(x)
    return sum((a - centre) * b for a, b in zip(x, y, strict=True)) / sum((a - centre) ** 2 for a in x)


def measure(
    optimizer: str,
    parametrization: str = "mup",
    regime: str = "curved",
    wrong: str = "",
    widths: Sequence[int] = WIDTHS,
    seeds: Sequence[int] = SEEDS,
) -> list[Row]:
    """Return one row per tensor.

    Args:
        optimizer: Name in the registry.
        parametrization: How its values are scaled.
        regime: ``curved`` or ``damped``.
        wrong: Field whose exponents are off by ½; none when empty.
        widths: From narrow to wide.
        seeds: The geometric mean over them is fitted.
    """
    steps = first_move(optimizer)
    with fault(parametrization, wrong) as law:
        found = [
            [contributions(experiment(optimizer, law, regime, width, seed), steps) for seed in seeds]
            for width in widths
        ]
    rows = []
    for name, (role, _, _) in found[0][0].items():
        means = [math.prod(each[name][1] for each in runs) ** (1 / len(seeds)) for runs in found]
        rates = [runs[0][name][2] for runs in found]
        raw = [mean / rate for mean, rate in zip(means, rates, strict=True)]
        rows.append(
            {
                "optimizer": optimizer,
                "parametrization": parametrization,
                "regime": regime,
                "fault": wrong,
                "tensor": name,
                "role": role,
                "slope": round(slope(widths, means), 4),
                "raw_slope": round(slope(widths, raw), 4),
                "raw_expected": round(-slope(widths, rates), 4),
                "widths": " ".join(map(str, widths)),
                "contributions": " ".join(f"{mean:.4g}" for mean in means),
            }
        )
    return rows


def right(row: Row) -> bool:
    """Whether a tensor's contribution keeps its size over width; one that is zero has none."""
    moved = all(float(value) > 0 for value in str(row["contributions"]).split())
    return moved and abs(float(row["slope"])) <= TOLERANCE


def all_of(optimizer: str, widths: Sequence[int], seeds: Sequence[int]) -> list[Row]:
    """Measure one optimizer in every regime and parametrization, and each fault under μP once."""
    rows: list[Row] = []
    for regime in regimes(optimizer):
        for law in PARAMETRIZATIONS:
            if law == "sp-full-alignment" and find_rule(optimizer).degree is None:
                continue
            rows += measure(optimizer, law, regime, "", widths, seeds)
        for wrong in faults(optimizer, regime):
            rows += measure(optimizer, "mup", regime, wrong, widths, seeds[:1])
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return the table of the README: slopes [input, hidden, output], right and wrong."""
    lines = ["| optimizer | parametrization | regime | input | hidden | output | with an exponent off by ½ |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for optimizer, law, regime in dict.fromkeys(
        (row["optimizer"], row["parametrization"], row["regime"]) for row in rows
    ):
        mine = [r for r in rows if (r["optimizer"], r["regime"]) == (optimizer, regime)]
        good = [r for r in mine if r["parametrization"] == law and not r["fault"]]
        wrong = [
            f"{name} {_slopes([r for r in mine if r['fault'] == name], ' ')}"
            for name in dict.fromkeys(r["fault"] for r in mine if r["fault"])
        ]
        cells = [optimizer, law, regime, _slopes(good, " | "), "; ".join(wrong) if law == "mup" else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _slopes(rows: Sequence[Row], between: str) -> str:
    return between.join(f"{float(row['slope']):+.2f}" for row in rows)


def recorded() -> list[Row]:
    """Return the rows of the committed results."""
    return read_rows(RESULTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the committed results")
    parser.add_argument("--smoke", action="store_true", help="widths 64 … 256, one seed, no CSV")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these optimizers only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = recorded()
    if not arguments.table:
        names = arguments.only or list(OPTIMIZERS)
        if arguments.smoke:
            rows = [row for name in names for row in all_of(name, (64, 128, 256), (0,))]
        else:
            for name in names:
                new = all_of(name, WIDTHS, SEEDS)
                rows = [row for row in rows if row["optimizer"] != name] + new
                print(table(new), flush=True)
                write_rows(RESULTS, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
