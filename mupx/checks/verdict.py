"""From readings at several widths to a verdict: which order each layer keeps, and what breaks it.

A *row* is one power law: a quantity of one parameter or layer against width, its fitted exponent with a
95 % interval, and the exponent theory asks for. A row fails when it is off by more than
:data:`TOLERANCE`; README, "How sure is it?", has the false-alarm rates behind that number. The cause is
told by :mod:`mupx.checks.causes`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from mupx.checks import fits
from mupx.checks.causes import explain
from mupx.checks.curvature_orders import ORDERS, RIDGES, SIZES, TRACES
from mupx.checks.fits import Fit
from mupx.checks.late import Reading
from mupx.checks.rows import Evidence, Key, Quantity, Row, Status
from mupx.layers import Layer

TOLERANCE = 0.25
FIRM = 0.1  # the interval of a failing row lies at least this far from the expected exponent
CURVATURE_TOLERANCE = 0.3  # batch-sized factors approach their order slowly
LATE_TOLERANCE = 0.3  # at the end of a run the last update is that of one batch
NOISY = 4.0  # a passing row is noted when its interval is wider than this many tolerances
EXACT = 0.02  # exponents of the table itself carry no noise


def judge(evidence: Evidence) -> list[Row]:
    """Return every row, with verdict and cause, in the order of the model's parameters."""
    rows = [*_initial(evidence), *_movement(evidence), *_curvature(evidence), *_decay(evidence)]
    explained = [*explain(rows, evidence), *_unmoved(evidence)]
    order = {layer.name: i for i, layer in enumerate(evidence.layers)}
    return sorted(explained, key=lambda row: (_place(order, row.name), row.step))


def _place(order: Mapping[str, int], name: str) -> int:
    inside = [i for parameter, i in order.items() if parameter == name or parameter.startswith(f"{name}.")]
    return min(inside, default=len(order))


def _initial(evidence: Evidence) -> Iterable[Row]:
    for layer in evidence.layers:
        series = [
            (w, s, r.init[layer.name]) for (w, s), r in evidence.readings.items() if layer.name in r.init
        ]
        fan_in = evidence.exponent(layer.name, "r_in") or 0.0
        expected = -0.5 * fan_in if layer.role == "output" else 0.0
        yield from _row(layer.name, layer.role, "init", "|W h| at init", 0, series, expected, TOLERANCE)


def _movement(evidence: Evidence) -> Iterable[Row]:
    modules: dict[str, str] = {}
    for layer in evidence.layers:
        module = layer.name.rpartition(".")[0]
        if module not in modules or modules[module] == "vector":
            modules[module] = layer.role
    for step in _steps(evidence):
        for module, role in modules.items():
            series = _series(evidence, step, lambda moved, name=module: moved.layers.get(name))
            yield from _row(module, role, "Δh", "Δh", step, series, 0.0, TOLERANCE)
        for layer in evidence.layers:
            series = _series(evidence, step, lambda moved, name=layer.name: moved.own.get(name))
            yield from _row(layer.name, layer.role, "own", "own Δh", step, series, 0.0, TOLERANCE)


def _curvature(evidence: Evidence) -> Iterable[Row]:
    for step in _steps(evidence):
        for layer in evidence.layers:
            fan_in = evidence.exponent(layer.name, "r_in") or 0.0
            fan_out = evidence.exponent(layer.name, "r_out") or 0.0
            first = next(r for r in evidence.readings.values() if step in r.moved)
            for symbol in first.moved[step].curvature.get(layer.name, {}):
                order = ORDERS[symbol]
                expected = (
                    order.r_in * fan_in + order.r_out * fan_out + order.blocks * evidence.blocks(layer.name)
                )
                sizes = _series(evidence, step, lambda m, n=layer.name, s=symbol: m.curvature[n][s][0])
                start = (layer.name, layer.role)
                yield from _row(*start, "size", SIZES[symbol], step, sizes, expected, CURVATURE_TOLERANCE)
                yield from _ridge(evidence, step, layer, symbol)


def _ridge(evidence: Evidence, step: int, layer: Layer, symbol: str) -> list[Row]:
    """Return the row of a ridge over λmax or over the trace, whichever it follows better.

    Both are right units for a ridge, and a finite width parts them: λmax of an activation covariance
    grows more slowly than its trace until the mean activation dominates.
    """
    units = ((0, SIZES[symbol]), (2, TRACES.get(symbol, "")))
    rows: list[Row] = []
    for index, unit in units:
        series = _series(evidence, step, lambda m, i=index: _ratio(m.curvature[layer.name][symbol], i))
        label = f"{RIDGES[symbol]}/{unit}"
        rows += _row(layer.name, layer.role, "ridge", label, step, series, 0.0, CURVATURE_TOLERANCE)
    return sorted(rows, key=lambda row: abs(row.off))[:1]


def _decay(evidence: Evidence) -> Iterable[Row]:
    """Weight decay per step: λ if it is independent of the lr, lr·λ otherwise; from the table alone."""
    expected = 0.0 if evidence.experiment.optimizer.weight_decay_scaling == "constant" else -1.0
    independent = evidence.experiment.optimizer.weight_decay_mode == "independent"
    for layer in evidence.layers:
        decay = evidence.exponent(layer.name, "weight_decay")
        lr = 0.0 if independent else evidence.exponent(layer.name, "lr")
        if decay is not None and lr is not None:
            total = decay + lr
            status: Status = "pass" if abs(total - expected) <= EXACT else "fail"
            label = "decay per step"
            yield Row(layer.name, layer.role, "decay", label, 0, total, total, total, expected, status)


def _steps(evidence: Evidence) -> list[int]:
    return sorted({step for readings in evidence.readings.values() for step in readings.moved})


def _ratio(entry: Sequence[float | None], unit: int) -> float | None:
    size, ridge = entry[unit], entry[1]
    return None if not size or ridge is None else ridge / size


def _series(evidence: Evidence, step: int, pick: Any) -> list[tuple[int, int, float]]:
    found = []
    for (width, seed), readings in evidence.readings.items():
        value = pick(readings.moved[step]) if step in readings.moved else None
        if value is not None:
            found.append((width, seed, value))
    return found


def _row(
    name: str,
    role: str,
    quantity: Quantity,
    label: str,
    step: int,
    series: Sequence[tuple[int, int, float]],
    expected: float,
    tolerance: float,
) -> Iterable[Row]:
    positive = [point for point in series if 0 < point[2] < math.inf]
    if len({width for width, _, _ in positive}) < 2:
        return  # zero everywhere: a constant, a head that starts at zero, a tensor that has not moved yet
    fit = fits.power_law([p[0] for p in positive], [p[2] for p in positive])
    status, cause = _status(fit, expected, tolerance)
    yield Row(
        name,
        role,
        quantity,
        label,
        step,
        fit.value,
        fit.low,
        fit.high,
        expected,
        status,
        cause,
        tuple(positive),
    )


def _status(fit: Fit, expected: float, tolerance: float) -> tuple[Status, str]:
    """Fail what is off by more than the tolerance beyond doubt; note what cannot be told."""
    nearest = max(fit.low - expected, expected - fit.high)  # distance of the interval from the order
    bounded = math.isfinite(fit.high - fit.low)
    interval = f"{fit.low:+.2f} … {fit.high:+.2f}"
    if abs(fit.value - expected) > tolerance:
        if nearest > FIRM or not bounded:
            return "fail", ""
        return "warn", f"may be off, but the interval {interval} does not tell: add seeds or widths"
    if bounded and fit.high - fit.low > NOISY * tolerance:
        return "warn", f"the interval {interval} is wide: add seeds or widths"
    return "pass", ""


def _unmoved(evidence: Evidence) -> Iterable[Row]:
    """Parameters that have not moved by the last step at any width."""
    steps = _steps(evidence)
    for layer in evidence.layers if steps else ():
        values = [p[2] for p in _series(evidence, steps[-1], lambda m, n=layer.name: m.own.get(n))]
        if values and not any(values):
            cause = f"does not move in {steps[-1]} steps: its gradient or its update is zero"
            nan = math.nan
            yield Row(layer.name, layer.role, "own", "own Δh", steps[-1], nan, nan, nan, 0.0, "fail", cause)


Late = Mapping[Key, Mapping[str, Reading]]


def judge_late(readings: Late, layers: Sequence[Layer]) -> list[Row]:
    """Return the rows of a run's last update: its operator norm must be flat, the ranks are reported.

    Args:
        readings: (width, seed) → parameter → what its last update was like.
        layers: The table, for names and roles.
    """
    rows: list[Row] = []
    for layer in layers:
        found = [(w, s, named[layer.name]) for (w, s), named in readings.items() if layer.name in named]
        norms = [(w, s, reading.norm) for w, s, reading in found]
        ranks = [(w, s, reading.rank) for w, s, reading in found]
        start = (layer.name, layer.role)
        rows += _row(*start, "norm", "last update, RMS norm", -1, norms, 0.0, LATE_TOLERANCE)
        rows += _row(*start, "rank", "last update, stable rank", -1, ranks, 0.0, LATE_TOLERANCE)
        for symbol in dict.fromkeys(symbol for _, _, reading in found for symbol in reading.effective):
            series = [(w, s, r.effective[symbol]) for w, s, r in found if symbol in r.effective]
            label = f"{TRACES[symbol]}/{SIZES[symbol]}"
            rows += _row(*start, "effective", label, -1, series, 0.0, LATE_TOLERANCE)
    return [_late_cause(row, rows) for row in rows]


def _late_cause(row: Row, rows: Sequence[Row]) -> Row:
    if row.status != "fail":
        return row
    if row.quantity == "effective":
        advice = (
            "a wider base fills it better" if row.off > 0 else "its damping acts otherwise at every width"
        )
        return replace(row, status="warn", cause=f"{_filling(row)}: {advice}")
    if row.quantity == "rank":
        cause = "the stable rank of the late update depends on width: watch whitened and grafted updates"
        return replace(row, status="warn", cause=cause)
    direction = "grows" if row.off > 0 else "shrinks"
    cause = (
        f"the last update {direction} as width^{row.off:+.2f} in operator norm: late drift, which an early "
        "coordinate check does not see"
    )
    ranks = [r for r in rows if r.name == row.name and r.quantity == "effective" and r.status == "fail"]
    most = max(ranks, key=lambda r: r.off, default=None)
    if most is not None and most.off > 0:
        cause += (
            f"; {_filling(most)}, so its damping acts on another part of the spectrum at every width: the "
            "base is too narrow to fill it, take a wider one, or more heads in the same width if it has any"
        )
    return replace(row, cause=cause)


def _filling(row: Row) -> str:
    widths = [width for width, _, _ in row.series]
    first, last = (fmean(v for w, _, v in row.series if w == end) for end in (min(widths), max(widths)))
    return f"its effective rank {row.label} goes from {first:.2g} to {last:.2g} (width^{row.off:+.2f})"


def too_narrow(rows: Sequence[Row]) -> list[str]:
    """Name parameters whose order holds among the larger widths and not between the two smallest."""
    narrow = []
    for row in rows:
        widths = sorted({width for width, _, _ in row.series})
        if row.quantity != "own" or len(widths) < 4:
            continue
        start = _fit([p for p in row.series if p[0] in widths[:2]])
        rest = _fit([p for p in row.series if p[0] in widths[1:]])
        off = _status(start, row.expected, TOLERANCE)[0] == "fail"
        if off and abs(rest.value - row.expected) <= TOLERANCE:
            narrow.append(row.name)
    return list(dict.fromkeys(narrow))


def _fit(series: Sequence[tuple[int, int, float]]) -> Fit:
    return fits.power_law([p[0] for p in series], [p[2] for p in series])
