"""The transfer check: do the values that are best at the base width stay best at larger widths?

A *line* is a sweep of one hyperparameter in half-octave steps through a point; the loss is the training
loss of a run. From the lines at each width follow the best value (vertex of a parabola through the
points around the lowest one), its drift in octaves per doubling of width, and the *regret* of the base
choice: L(width; base choice) − L(width; best choice), each chosen on some seeds and judged on another,
so that the minimum of noise does not enter (a regret may come out negative).

Source: scaling rules of arXiv:2312.12226; telescoping arXiv:2505.02222; fast transfer arXiv:2512.22768.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mupx.checks import fits
from mupx.checks.fits import Fit

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

HALF_OCTAVE = 0.5
LONGEST = 30  # points after which a line that finds no minimum ends
INSIDE = 2  # steps from either end
FLAT = 0.002  # of what training gains: an octave that lowers the loss by less is not followed further
STILL = 0.25  # octaves: less is not told apart by parabolas through half-octave points
AROUND = 1.0  # octaves to either side of the lowest point that enter the parabola
FAST_TRANSFER_WIDTHS = 4
EXPONENTS = np.linspace(0.05, 4.0, 80)


P = TypeVar("P", bound="DataclassInstance")  # a run's place, with `seed` and the swept axes as fields
Losses = Callable[[P], float]


@dataclass(frozen=True)
class Line:
    """One hyperparameter swept at one width.

    Attributes:
        width: The width.
        values: log2 of the hyperparameter, ascending.
        losses: Seed → losses at ``values``; a diverged run counts with the untrained loss.
    """

    width: int
    values: tuple[float, ...]
    losses: Mapping[int, tuple[float, ...]]

    def mean(self, seeds: Sequence[int] | None = None) -> list[float]:
        """Return the mean loss over seeds at each value."""
        chosen = [self.losses[seed] for seed in seeds or list(self.losses)]
        return [sum(column) / len(column) for column in zip(*chosen, strict=True)]

    def lowest(self, seeds: Sequence[int] | None = None) -> float:
        """Return the value with the lowest mean loss."""
        means = self.mean(seeds)
        return self.values[means.index(min(means))]

    @property
    def beyond(self) -> int:
        """Where the mean over seeds has its minimum: 0 inside the line, −1 or +1 at or beyond that end."""
        index = self.values.index(self.lowest())
        return -1 if index < INSIDE else 1 if index >= len(self.values) - INSIDE else 0

    def at(self, value: float, seed: int) -> float:
        """Return the loss of one seed at a value of the line."""
        return self.losses[seed][self.values.index(value)]

    def best(self, seeds: Sequence[int] | None = None) -> Fit:
        """Return the vertex of the parabola around the lowest point, with its interval.

        Where the points have no minimum inside, the lowest point with an unbounded interval.
        """
        seeds = list(seeds or self.losses)
        lowest = self.lowest(seeds)
        near = [i for i, value in enumerate(self.values) if abs(value - lowest) <= AROUND]
        x = [self.values[i] for _ in seeds for i in near]
        y = [self.losses[seed][i] for seed in seeds for i in near]
        vertex = fits.parabola(x, y)
        inside = vertex is not None and self.values[near[0]] <= vertex.value <= self.values[near[-1]]
        return vertex if vertex is not None and inside else Fit(lowest, -math.inf, math.inf)


def sweep(
    losses: Losses[P], centre: P, axis: str, seeds: Sequence[int], reach: int, untrained: float | None = None
) -> list[P]:
    """Return the points of a half-octave line through ``centre``, each with the centre's seed.

    The line reaches ``reach`` steps to either side and grows, an octave at a time, until its lowest point is
    two steps inside, or until an octave lowers the loss by less than 0.2 % of what training gains: a damping
    that only has to be small enough has no minimum.

    Args:
        losses: Trains a point, or remembers it.
        centre: Where the line passes through.
        axis: The field that is swept, a log2.
        seeds: Seeds whose mean decides.
        reach: Steps to either side at first.
        untrained: Loss before the first step, which says what training gains; None follows every slope.
    """
    low, high, known = -reach, reach, math.inf
    while True:
        points = [at(centre, axis, getattr(centre, axis) + HALF_OCTAVE * i) for i in range(low, high + 1)]
        means = [mean_loss(losses, point, seeds) for point in points]
        lowest = min(means)
        best = means.index(lowest)
        if len(points) >= LONGEST or INSIDE <= best < len(points) - INSIDE:
            return points
        if untrained is not None and known - lowest < FLAT * (untrained - lowest):
            return points
        known = lowest
        low, high = (low - 2, high) if best < INSIDE else (low, high + 2)


def mean_loss(losses: Losses[P], point: P, seeds: Sequence[int]) -> float:
    """Return the mean loss of a point over seeds."""
    return sum(losses(at(point, "seed", seed)) for seed in seeds) / len(seeds)


def at(point: P, field: str, value: Any) -> P:
    """Return a place with one field replaced."""
    return replace(point, **{field: value})


def measured(losses: Losses[P], points: Sequence[P], axis: str, seeds: Sequence[int]) -> Line:
    """Collect the losses of a line's points."""
    return Line(
        getattr(points[0], "width"),  # noqa: B009  a place is any dataclass with that field
        tuple(getattr(point, axis) for point in points),
        {seed: tuple(losses(at(point, "seed", seed)) for point in points) for seed in seeds},
    )


def telescoped(reach: int, doublings: float, axes: int) -> int:
    """Return the reach of a line ``doublings`` above the base width: points × 4^(-doublings/axes).

    At least two steps to either side stay, which a parabola and an optimum inside need.
    """
    return max(2, round(reach * math.pow(4.0, -doublings / axes)))


def drift(lines: Sequence[Line]) -> Fit:
    """Return the drift of the best value in octaves per doubling of width, over widths and seeds."""
    pairs = [(math.log2(line.width), line.best([seed]).value) for line in lines for seed in line.losses]
    return fits.line([x for x, _ in pairs], [y for _, y in pairs])


def regret(base: Line, wide: Line) -> list[float]:
    """Return one honest regret per seed of the base line's choice at the wide line's width.

    With several seeds both choices are made without the seed they are judged on.
    """
    result = []
    for judge in wide.losses:
        others = [seed for seed in wide.losses if seed != judge] or [judge]
        chosen = nearest(wide.values, base.lowest(others))
        result.append(wide.at(chosen, judge) - wide.at(wide.lowest(others), judge))
    return result


def nearest(values: Sequence[float], wanted: float) -> float:
    """Return the value of a line closest to the wanted one."""
    return min(values, key=lambda value: abs(value - wanted))


@dataclass(frozen=True)
class Speed:
    """Whether transfer pays (arXiv:2512.22768) and how far the fits can be trusted.

    Attributes:
        alpha: Best loss(n) − its limit ∝ n^-alpha.
        beta: |best log2 value(n) − its limit| ∝ n^-beta; infinite where the value does not move.
        pays: beta > alpha/2, so that transfer beats tuning at width in the limit.
        fit_error: RMS residual of best log2 value = a + b·log2 width, in octaves.
        extrapolation: Error at the largest width of that line fitted to the smaller ones, in octaves.
        penalty: Limit of the loss at the base choice minus the limit of the best loss.
    """

    alpha: float
    beta: float
    pays: bool
    fit_error: float
    extrapolation: float
    penalty: float


def speed(lines: Sequence[Line]) -> Speed | None:
    """Return the fast-transfer exponents and the audit numbers; None below four widths."""
    if len(lines) < FAST_TRANSFER_WIDTHS:
        return None
    widths = [line.width for line in lines]
    best = [min(line.mean()) for line in lines]
    choice = lines[0].lowest()
    carried = [line.mean()[line.values.index(nearest(line.values, choice))] for line in lines]
    places = [line.best().value for line in lines]
    limit, alpha = approach(widths, best)
    still = max(places) - min(places) < STILL
    beta = math.inf if still else approach(widths, places)[1]
    x, y = np.log2(widths), np.asarray(places)
    slope, offset = np.polyfit(x, y, 1)
    early = np.polyfit(x[:-1], y[:-1], 1)
    return Speed(
        alpha,
        beta,
        beta > alpha / 2,
        float(np.sqrt(np.mean((slope * x + offset - y) ** 2))),
        float(abs(np.polyval(early, x[-1]) - y[-1])),
        approach(widths, carried)[0] - limit,
    )


def approach(widths: Sequence[int], values: Sequence[float]) -> tuple[float, float]:
    """Fit value = limit + a·(n/n₀)^-s by least squares over a grid of s; return (limit, s)."""
    n, y = np.asarray(widths, float) / widths[0], np.asarray(values, float)
    fitted = []
    for exponent in EXPONENTS:
        design = np.stack([np.ones_like(n), n**-exponent], axis=1)
        solution, *_ = np.linalg.lstsq(design, y, rcond=None)
        fitted.append((float(np.sum((design @ solution - y) ** 2)), float(solution[0]), float(exponent)))
    _, limit, exponent = min(fitted)
    return limit, exponent
