"""What is known to break transfer before anything is trained, each with the effect it predicts.

Every finding states what was found, what follows in numbers, and what to change. Findings of level
``error`` fail a verification by themselves; ``warning`` and ``note`` tell a reader where to look when a
measured check fails. Sources: arXiv:2312.12226 §4 (IK), 2512.05620 (Q), and slopes measured for mupx.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mupx.advice.refreshes import configured_interval
from mupx.checks.curvature_orders import BESIDE_EPS, ORDERS, RIDGES, SIZES, count
from mupx.config import Experiment
from mupx.errors import MismatchError
from mupx.groups import check_groups
from mupx.layers import Layer, Parameter, derive
from mupx.optim import OPTIMIZERS
from mupx.parts import find_optimizer, signature
from mupx.refresh import FORGOTTEN, forgets, longest_gap
from mupx.run import Run, total_steps
from mupx.usercode import is_reference

KRONECKER = ("kfac", "foof", "ekfac", "backward-only", "gauss-newton", "gauss-newton-full")
ONE_BLOCK = ("ekfac", "gauss-newton", "gauss-newton-full")  # one ridge on the whole block of a tensor
FLAT = 0.05  # exponents closer to zero than this are rounding
# Trace damping ρ'·N → slope of |Δh| at the read-out, one step, K-FAC μP, batch N = 64, up to width 2048.
UNDER_DAMPED = ((0.0064, -0.56), (0.064, -0.28), (0.19, -0.12), (0.64, -0.01))
ENOUGH = 0.25  # ρ·N/tr below which the slope exceeds a tenth
SCHEDULE_STEPS = (0.0, 0.25, 0.5, 0.9)  # parts of the run at which the groups are compared with the table

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing to know before trusting a transfer.

    Attributes:
        code: Short name, stable over versions.
        level: ``error`` fails the verification.
        text: What was found, what it does, what to change.
        slope: Predicted exponent of width by which something leaves its order, where there is one.
    """

    code: str
    level: Level
    text: str
    slope: float | None = None


def examine(
    experiment: Experiment,
    parameters: Sequence[Parameter],
    classes: int,
    widest: int,
    examples: int,
    provenance: Mapping[str, Any] | None = None,
) -> list[Finding]:
    """Check an experiment without training.

    Args:
        experiment: With its damping rule filled in.
        parameters: Its parameters.
        classes: Number of classes of the data.
        widest: Largest width that is to be verified.
        examples: Number of training examples.
        provenance: Of the recipe, which knows what was overridden.
    """
    base, wide = (
        derive(parameters, experiment.updated({"scaling.width": width}))
        for width in (experiment.scaling.base_width, widest)
    )
    return [
        *_pi(experiment),
        *_trace_damping(experiment, wide),
        *_ridges(experiment, base, wide),
        *_zero_head(experiment, parameters),
        *_whitened_noise(experiment, wide),
        *_clipping(experiment),
        *forgotten(experiment, examples),
        *_narrow(experiment, classes),
        *_differences(provenance or {}),
    ]


def flattened(run: Run) -> list[Finding]:
    """Check that the schedule keeps the ratios between groups, at several points of the run."""
    step = run.step
    try:
        for part in SCHEDULE_STEPS:
            run.step = int(part * run.steps)
            run.set_learning_rates()
            check_groups(run.optimizer, run.layers, run.factor)
    except MismatchError as error:
        return [
            Finding(
                "schedule-flattens-groups",
                "error",
                f"the schedule overwrites the groups' learning rates ({error}); each layer then leaves its "
                "order by its own lr multiplier: scale every group by one factor instead",
            )
        ]
    finally:
        run.step = step
        run.set_learning_rates()
    return []


def under_damped(ridge_share: float) -> float:
    """Return the slope predicted for ρ·N/tr of a batch-sized factor, N examples in the batch.

    >>> round(under_damped(0.064), 2)
    -0.28
    """
    shares, slopes = zip(*UNDER_DAMPED, strict=True)
    return float(np.interp(math.log(max(ridge_share, 1e-12)), np.log(shares), slopes))


def _pi(experiment: Experiment) -> Iterator[Finding]:
    if experiment.optimizer.damping_rule == "pi":
        yield Finding(
            "pi-damping",
            "warning",
            "π-damping is not width-invariant: the input layer's update shrinks up to 1/width, and at the "
            "output ρ_A vanishes against λmax(A); use optimizer.damping_rule trace (or absolute)",
            -1.0,
        )


def under_damping(names: Sequence[str], share: float, batch: int) -> Finding:
    """Return the finding for factors whose ridge is far below the eigenvalues of a batch-sized factor."""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return Finding(
        "under-damped",
        "warning",
        f"{shown}: ρ·N/tr is {share:.2g} at batch N = {batch}, below {ENOUGH}: the damping is far below the "
        "eigenvalues of a batch-sized factor, so the update follows the noise of the batch, at a predicted "
        f"slope of {under_damped(share):+.2f}; raise the damping or the batch",
        under_damped(share),
    )


def _trace_damping(experiment: Experiment, wide: Sequence[Layer]) -> Iterator[Finding]:
    """Under trace damping ρ·N/tr is ρ'·N, for every factor wider than the batch."""
    if experiment.optimizer.damping_rule != "trace":
        return
    batch = experiment.train.batch_size
    shares: dict[str, float] = {}
    for layer in wide:
        spans = ((layer.damping_A, math.prod(layer.shape[1:])), (layer.damping_B, layer.shape[0]))
        own = [ridge * batch for ridge, size in spans if ridge is not None and size > batch]
        if own and layer.role != "vector" and layer.optimizer not in ONE_BLOCK:
            shares[layer.name] = math.prod(own) ** (1 / len(own))
    low = {name: share for name, share in shares.items() if share < ENOUGH}
    if low:
        yield under_damping(list(low), min(low.values()), batch)


def _ridges(experiment: Experiment, base: Sequence[Layer], wide: Sequence[Layer]) -> Iterator[Finding]:
    """Compare each ridge's exponent in the table with that of what it is added to."""
    worst: dict[str, tuple[float, str]] = {}
    for narrow, layer in zip(base, wide, strict=True):
        growth = max(layer.r_in, layer.r_out)
        for symbol, value, start in _pairs(experiment, layer, narrow):
            if growth == 1 or not (value and start):
                continue
            blocks = count(experiment, layer) / count(experiment, narrow)
            order = ORDERS[symbol](layer.r_in, layer.r_out, blocks=blocks)
            off = math.log(value / start / order) / math.log(growth)
            if abs(off) > FLAT and abs(off) > abs(worst.get(symbol, (0.0, ""))[0]):
                worst[symbol] = (off, layer.name)
    for symbol, (off, name) in worst.items():
        yield Finding(
            "unscaled-eps" if RIDGES[symbol] == "eps" else "unscaled-ridge",
            "warning",
            f"{RIDGES[symbol]} does not follow {SIZES[symbol]}: their ratio at {name} goes as "
            f"width^{off:+.2g}; under parametrization mup it is flat, and a relative damping rule needs no "
            "multiplier",
            off,
        )


def _pairs(
    experiment: Experiment, layer: Layer, base: Layer
) -> Iterator[tuple[str, float | None, float | None]]:
    rule = experiment.optimizer.damping_rule
    if layer.eps is not None:
        yield BESIDE_EPS.get(layer.optimizer, "v"), layer.eps, base.eps
    if rule == "absolute" and layer.optimizer in ONE_BLOCK:
        yield "F", layer.damping_B, base.damping_B
    elif rule == "absolute":
        A, B = ("R", "L") if layer.optimizer.startswith("shampoo") else ("A", "B")
        yield A, layer.damping_A, base.damping_A
        yield B, layer.damping_B, base.damping_B
    if rule == "exact":
        yield "AB", layer.damping_B, base.damping_B


def _zero_head(experiment: Experiment, parameters: Sequence[Parameter]) -> Iterator[Finding]:
    zero = [p.name for p in parameters if p.role == "output" and p.std == 0]
    if zero and experiment.optimizer.name in KRONECKER:
        yield Finding(
            "zero-head",
            "warning",
            f"{zero[0]} starts at zero under {experiment.optimizer.name}: one step lands on the NNGP "
            "kernel-ridge solution of the frozen features, which do not move (and δ = 0 below it); start "
            "it with std ∝ 1/fan_in",
        )


def _whitened_noise(experiment: Experiment, wide: Sequence[Layer]) -> Iterator[Finding]:
    """SOAP divides every direction by its own size, also those that earlier gradients had no part in."""
    optimizer, batch = experiment.optimizer, experiment.train.batch_size
    if not optimizer.name.startswith("soap") or 0 < optimizer.blocks <= batch:
        return
    names = [layer.name for layer in wide if len(layer.shape) == 2 and max(layer.shape) > batch]
    if names:
        yield Finding(
            "whitened-noise",
            "warning",
            f"{names[0]} is wider than the batch ({batch} examples; times their positions, where they have "
            "any): most directions of a gradient then lie outside those that made SOAP's basis, and Adam "
            "makes them as large as the rest, so the update leaves its order in width from the first steps "
            "on, also where its size is set otherwise; set optimizer.blocks (at most the batch)",
        )


def _clipping(experiment: Experiment) -> Iterator[Finding]:
    if experiment.train.grad_clip is not None:
        yield Finding(
            "norm-clipping",
            "warning",
            f"train.grad_clip {experiment.train.grad_clip:g}: the global gradient norm grows as width^½ "
            "under μP (the read-out's part), so wherever clipping acts it multiplies every learning rate "
            "by width^-½; leave it out, or clip only what never happens in a healthy run",
            -0.5,
        )


def forgotten(experiment: Experiment, examples: int) -> Iterator[Finding]:
    """Warn where factors are averaged so seldom that the average is in effect the last batch's.

    Args:
        experiment: With the steps of the run, or epochs.
        examples: Number of training examples.
    """
    optimizer, steps = experiment.optimizer, total_steps(experiment, examples)
    kind = find_optimizer(optimizer.name) if is_reference(optimizer.name) else OPTIMIZERS.load(optimizer.name)
    takes = signature(kind)
    # Without staleness the average is of every step (SOAP); a sum forgets nothing.
    if not {"ema", "staleness"} <= takes.keys() or ("accumulate" in takes and optimizer.accumulate == "sum"):
        return
    statistics = optimizer.statistics if "statistics" in takes else None
    interval = configured_interval(optimizer, steps, examples // experiment.train.batch_size)
    gap, ema = longest_gap(interval, statistics, steps), optimizer.ema
    if forgets(gap, ema):
        often = "optimizer.statistics" if "statistics" in takes else "optimizer.refresh"
        digits = 10 ** (len(str(gap)) + 1)
        enough = -((FORGOTTEN - gap) * digits // gap) / digits  # 1 − 2/gap, rounded up
        yield Finding(
            "forgotten-statistics",
            "warning",
            f"up to {gap:,} steps lie between two averagings of the factors, but optimizer.ema {ema:g} "
            f"remembers 1/(1 − ema) = {1 / (1 - ema):.3g}: a new batch weighs {1 - ema**gap:.1%}, so P is in "
            f"effect made of the last batch alone; set {often} to at most "
            f"{math.floor(round(FORGOTTEN / (1 - ema), 6))}, or optimizer.ema to at least {enough:.12g}",
        )


def _narrow(experiment: Experiment, classes: int) -> Iterator[Finding]:
    if experiment.scaling.base_width < classes:
        yield Finding(
            "proxy-narrower-than-classes",
            "warning",
            f"base width {experiment.scaling.base_width} is below the number of classes {classes}: the "
            "proxy's logits lie in a smaller space than the target's; use a base width well above it",
        )


def _differences(provenance: Mapping[str, Any]) -> Iterator[Finding]:
    for line in provenance.get("overrides", ()):
        yield Finding(
            "proxy-and-target-differ",
            "warning",
            f"{line}: changed after tuning; batch size, steps, data and schedule do not transfer by any "
            "width rule, so the tuned values need not be optimal",
        )
