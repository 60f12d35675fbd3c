"""Which optimizer to try first, and how often to refresh its curvature."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mupx.advice.estimates import Estimate
from mupx.advice.refreshes import FREQUENT, LATER, SHARE, Phases
from mupx.advice.statements import DERIVED, IK, MEASURED, P, Q, Sizes, Statement
from mupx.refresh import FLOOR

SECOND, FIRST = ("kfac", "shampoo"), "adamw"  # in the order they are tried
MOSTLY = 0.5  # part of the parameters that an optimizer must treat itself
AFFORDABLE = 1.5  # times AdamW's time per step, where the ratio does not decide
PADDED = 1.25  # how much closer than the memory that is free a peak may come


def first_choice(
    sizes: Sizes, estimates: Mapping[str, Estimate], free: float | None
) -> tuple[str, list[Statement]]:
    """Return the optimizer to try first, and why.

    Args:
        sizes: Of the run.
        estimates: By name; empty where nothing could be modelled.
        free: Bytes free on the device, where they are known.
    """
    if sizes.regime == "unlikely":
        return FIRST, [_because("the data set is very large for the batch: begin with what costs least", P)]
    reasons: list[Statement] = []
    for name in SECOND:
        found = estimates.get(name)
        if found is None or found.memory is None or found.seconds is None:
            continue
        base = estimates[FIRST].seconds or found.seconds
        if found.treated < MOSTLY:
            reasons.append(
                _because(f"not {name}: it treats {found.treated:.0%} of the parameters itself", DERIVED)
            )
        elif free is not None and found.memory.peak * PADDED > free:
            reasons.append(_because(f"not {name}: its memory does not fit", MEASURED))
        elif sizes.regime == "open" and found.seconds > AFFORDABLE * base:
            text = (
                f"not {name}: its steps take {found.seconds / base:.2g} times AdamW's, and the ratio of "
                f"batch to data does not decide (more than {AFFORDABLE:g}: a convention of mupx)"
            )
            reasons.append(_because(text, MEASURED))
        else:
            return name, [*_why(name, found, base), *reasons]
    if not estimates:
        name = SECOND[0] if sizes.regime == "likely" else FIRST
        return name, [_because("by the ratio alone, as nothing is known about costs", P)]
    return FIRST, [*reasons, _because("no second-order optimizer is left at this size", DERIVED)]


def _why(name: str, found: Estimate, base: float) -> Iterator[Statement]:
    texts = {
        "kfac": ("kfac: its learning rate and trace damping need no multiplier over width", IK),
        "shampoo": (
            "shampoo: its relative ridge needs no multiplier over width, and it treats every matrix",
            Q,
        ),
    }
    yield _because(*texts[name])
    assert found.seconds is not None
    ratio = found.seconds / base
    yield _because(
        f"{name}: its steps take {ratio:.2g} times AdamW's: it must save more steps than that", MEASURED
    )


def _because(text: str, source: str) -> Statement:
    return Statement("first", "why", "note", text, source)


def about_refreshes(phases: Phases, sizes: Sizes, chosen: Estimate | None) -> Iterator[Statement]:
    """Say why this schedule, in the steps of this run."""
    yield Statement(
        "refresh",
        "first-phase",
        "note",
        f"every {FREQUENT} steps for the first {phases.first:,} of {sizes.steps:,}, then every "
        f"{phases.later:,}: a first phase of at least 0.1 % of the training always trained (here "
        f"{phases.least:,} steps), 0.3 % was safe for every later interval up to {LATER[-1]:,} (here "
        f"{phases.safe:,}); seen with Shampoo on DeiT-small and ImageNet",
        P,
    )
    if phases.first > phases.safe:
        text = (
            f"0.3 % of this run is {phases.safe:,} steps, too few: the first phase has at least "
            f"{FLOOR} refreshes or one epoch; the default, an age of at most 5 % of the steps done, suits "
            "short runs as well (benchmarks/refresh.py)"
        )
        yield Statement("refresh", "short-run", "note", text, MEASURED)
    if chosen is not None and chosen.seconds and chosen.step and chosen.refresh:
        later = chosen.step + chosen.refresh * phases.refreshes / sizes.steps
        yield Statement(
            "refresh",
            "refresh-cost",
            "note",
            f"{chosen.optimizer} then refreshes {phases.refreshes:,} times and takes {1e3 * later:.3g} ms "
            f"per step (configured: {chosen.refreshes:,} times, {1e3 * chosen.seconds:.3g} ms); "
            f"{phases.later:,} is {_why_later(phases, chosen.step, chosen.refresh)}",
            MEASURED,
        )


def _why_later(phases: Phases, step: float, refresh: float) -> str:
    if refresh <= SHARE * phases.later * step:
        return f"the shortest interval at which refreshes then cost at most {SHARE:.0%} of a step"
    return "the longest interval that was tried"


def about_memory(estimates: Sequence[Estimate], free: float | None, where: str) -> Iterator[Statement]:
    """Warn of what does not fit."""
    for found in estimates:
        if found.memory is not None and free is not None and found.memory.peak > free:
            yield Statement(
                "cost",
                "does-not-fit",
                "warning",
                f"{found.optimizer} needs {found.memory.peak / 2**30:.1f} GiB at its peak; "
                f"{free / 2**30:.1f} GiB "
                f"are free ({where}): raise train.accumulate, or take a smaller batch or width",
                MEASURED,
            )
