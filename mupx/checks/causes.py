"""The likely cause of a failing row, told from the exponents of all rows and of the live table.

The signatures: a ridge that leaves its statistic is a damping fault; an initial read-out that does not
shrink is an init fault, which also changes the order of every δ below it; an update of the wrong order
with everything else in place is a learning-rate fault, by the power that is missing; input and output
with each other's exponents are a swap; a bias update that vanishes is a bias folded into A.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from mupx.checks import lint
from mupx.checks.coordinate import Moved
from mupx.checks.curvature_orders import ORDERS, SIZES, TRACES
from mupx.checks.rows import Evidence, Row, Status

SAME = 0.4  # exponents closer than this are taken for equal when two faults are told apart


def explain(rows: Sequence[Row], evidence: Evidence) -> list[Row]:
    """Return the rows with the cause of every failure filled in."""
    swapped = _swapped(rows, evidence)
    result = []
    for row in rows:
        if row.status != "fail":
            result.append(row)
            continue
        status, cause = _judged(row, rows, evidence, swapped)
        result.append(replace(row, cause=cause, status=status))
    return result


def _judged(row: Row, rows: Sequence[Row], evidence: Evidence, swapped: bool) -> tuple[Status, str]:
    if row.quantity != "Δh" and not evidence.grows(row.name):
        # Such a tensor has no multiplier that could be wrong: the read-out's bias follows the logits.
        return "warn", "no dimension of it grows with width: follows from the rest of the model"
    # A statistic of another order is a diagnosis; what counts is what the update does with it.
    return "warn" if row.quantity == "size" else "fail", _cause(row, rows, evidence, swapped)


def _cause(row: Row, rows: Sequence[Row], evidence: Evidence, swapped: bool) -> str:
    """Tell the likely cause of a failing row: the first that fits."""
    if row.quantity == "Δh":
        return _inherited(row, rows)
    if row.quantity == "decay":
        return f"weight decay per step goes as width^{row.off:+.2g}: its multiplier does not match its mode"
    if row.quantity == "init":
        return _init_cause(row)
    if row.quantity == "size":
        return _size_cause(row, rows)
    ridges = [r for r in rows if r.name == row.name and r.quantity == "ridge" and r.status == "fail"]
    if ridges:
        return _ridge_cause(ridges, evidence)
    return _own_cause(row, rows, evidence, swapped)


def _own_cause(row: Row, rows: Sequence[Row], evidence: Evidence, swapped: bool) -> str:
    optimizer = next(layer.optimizer for layer in evidence.layers if layer.name == row.name)
    if row.role == "vector" and optimizer in lint.KRONECKER and row.off < -0.5:
        return (
            "the bias update vanishes with width: it is folded into A as a homogeneous coordinate; "
            "precondition biases by B alone"
        )
    share = damped_share(row.name, evidence)
    if share is not None and share < lint.ENOUGH and row.off < 0:
        return (
            f"under-damped: ρ·N/tr is {share:.2g} (batch N), far below the noise of a batch-sized factor "
            f"(predicted slope {lint.under_damped(share):+.2f}); raise the damping or the batch"
        )
    disturbed = _disturbed(row, rows)
    if disturbed and row.role != "output":
        return f"follows from {disturbed}"
    return _lr_cause(row, evidence, swapped)


def _init_cause(row: Row) -> str:
    what = "grows" if row.off > 0 else "shrinks"
    if row.role == "output" and row.off > 0:
        return (
            f"output std not shrunk: the initial read-out goes as width^{row.slope:+.2f} instead of "
            f"width^{row.expected:+.2g}; its std must fall as 1/r_in"
        )
    return f"the initial signal {what} as width^{row.off:+.2f}: the init std multiplier is off by that power"


def _ridge_cause(rows: Sequence[Row], evidence: Evidence) -> str:
    worst = max(rows, key=lambda row: abs(row.off))
    if evidence.experiment.optimizer.damping_rule == "pi":
        return f"π-damping: {worst.label} goes as width^{worst.off:+.2f} here; use trace damping"
    ridge, _, unit = worst.label.partition("/")
    fan_in = evidence.exponent(worst.name, "r_in") or 0.0
    fan_out = evidence.exponent(worst.name, "r_out") or 0.0
    symbol = next(key for key in ORDERS if unit in (SIZES[key], TRACES.get(key)))
    wanted = ORDERS[symbol].r_in * fan_in + ORDERS[symbol].r_out * fan_out
    return (
        f"{ridge} not scaled with {SIZES[symbol]}: their ratio goes as width^{worst.off:+.2f}; as an "
        f"absolute value it needs the exponent {wanted:+.2g}, relative to trace or λmax none"
    )


def _size_cause(row: Row, rows: Sequence[Row]) -> str:
    disturbed = _disturbed(row, rows)
    follows = f"; follows from {disturbed}" if disturbed else ""
    return f"{row.label} goes as width^{row.slope:+.2f} instead of width^{row.expected:+.2g}{follows}"


def _disturbed(row: Row, rows: Sequence[Row]) -> str:
    """Name a wrong initial signal elsewhere: it changes the order of every δ below it."""
    for other in rows:
        if other.quantity == "init" and other.status == "fail" and other.name != row.name:
            return f"the init of {other.name}"
    return ""


def _inherited(row: Row, rows: Sequence[Row]) -> str:
    inside = f"{row.name}." if row.name else ""
    mine = [r for r in rows if r.quantity == "own" and r.status == "fail" and r.name.startswith(inside)]
    if mine:
        return f"its own {mine[0].name.rpartition('.')[2]}"
    for other in rows:
        if other.status == "fail" and other.quantity in ("own", "init"):
            return f"follows from {other.name}"
    direction = "shrinks" if row.off < 0 else "grows"
    return f"Δh {direction} with width although each tensor's own contribution keeps its order"


def _lr_cause(row: Row, evidence: Evidence, swapped: bool) -> str:
    if swapped and row.role != "vector":
        return "fan-in and fan-out swapped: input and output carry each other's lr exponents"
    live = round(evidence.exponent(row.name, "lr") or 0.0, 3) + 0.0  # + 0.0: no "-0"
    wanted = live - row.off
    what = "grows" if row.off > 0 else "shrinks"
    if row.role == "output" and row.off > 0:
        return (
            f"lr not divided at the output: its update grows as width^{row.off:+.2f} with lr exponent "
            f"{live:+.2g}; about {wanted:+.1f} keeps it flat"
        )
    return (
        f"the {row.role} update {what} as width^{row.off:+.2f} with lr exponent {live:+.2g}; "
        f"about {wanted:+.1f} keeps it flat"
    )


def _swapped(rows: Sequence[Row], evidence: Evidence) -> bool:
    """Whether input and output carry each other's live exponents and both fail by the difference."""
    found: dict[str, tuple[float, float]] = {}
    for row in rows:
        live = evidence.exponent(row.name, "lr") if row.quantity == "own" else None
        if row.role in ("input", "output") and live is not None:
            found.setdefault(row.role, (live, live - row.off))
    if set(found) != {"input", "output"}:
        return False
    (live_in, wanted_in), (live_out, wanted_out) = found["input"], found["output"]
    if min(abs(wanted_in - wanted_out), abs(live_in - live_out)) < SAME:
        return False  # nothing to exchange
    return abs(live_in - wanted_out) <= SAME and abs(live_out - wanted_in) <= SAME


def damped_share(name: str, evidence: Evidence) -> float | None:
    """Return ρ·N/tr of a parameter's factors that are wider than the batch of N; None without such.

    The geometric mean over A and B, as their ridges make up for each other; the smallest over the seeds
    at the largest width.
    """
    widest, batch = evidence.widths[-1], evidence.experiment.train.batch_size
    row = next(layer for layer in evidence.tables[widest] if layer.name == name)
    spans = {"A": math.prod(row.shape[1:]), "B": row.shape[0]}
    means = []
    for (width, _), readings in evidence.readings.items():
        if width != widest or not readings.moved:
            continue
        moved: Moved = readings.moved[min(readings.moved)]
        shares = [
            ridge * batch / trace
            for symbol, (_, ridge, trace) in moved.curvature.get(name, {}).items()
            if trace and ridge is not None and spans.get(symbol, 0) > batch
        ]
        if shares:
            means.append(math.prod(shares) ** (1 / len(shares)))
    return min(means, default=None)


def root_causes(rows: Sequence[Row]) -> list[str]:
    """Return the causes of failing rows that do not merely follow from another one, the worst step's."""
    failing = [row for row in rows if row.status == "fail"]
    roots = [row for row in failing if row.quantity != "Δh" and "follows from" not in row.cause]
    worst: dict[tuple[str, str], Row] = {}
    for row in roots or failing:
        kept = worst.setdefault((row.name, row.quantity), row)
        if abs(row.off) > abs(kept.off):
            worst[row.name, row.quantity] = row
    return list(dict.fromkeys(f"{row.name}: {row.cause}" for row in worst.values()))
