"""Slopes and minima with intervals: the statistics behind every verdict (no torch).

All intervals are 95 % intervals of an ordinary least-squares fit over every (width, seed) point, from
Student's t with the fit's own degrees of freedom: two seeds at five widths give eight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ROUNDING = 1e-9  # losses that differ by less are equal: the curvature of their fit would be noise
# Two-sided 95 % quantiles of Student's t for 1 … 30 degrees of freedom; beyond that 1.96 + 2.4/ν.
STUDENT_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class Fit:
    """A fitted number and its 95 % interval; the interval is infinite where nothing bounds it."""

    value: float
    low: float
    high: float

    def shifted(self, by: float) -> Fit:
        """Return the fit plus a known number."""
        return Fit(self.value + by, self.low + by, self.high + by)

    def excludes(self, number: float) -> bool:
        """Whether a number lies outside the interval."""
        return not self.low <= number <= self.high


def student_t(degrees: int) -> float:
    """Return the two-sided 95 % quantile of Student's t; infinite without degrees of freedom."""
    if degrees < 1:
        return math.inf
    return STUDENT_T[degrees - 1] if degrees <= len(STUDENT_T) else 1.96 + 2.4 / degrees


def line(x: Sequence[float], y: Sequence[float]) -> Fit:
    """Fit y = a + b·x and return b.

    Raises:
        ValueError: Fewer than two different x.
    """
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    centred = xs - xs.mean()
    spread = float(centred @ centred)
    if spread == 0:
        raise ValueError("a slope needs at least two different x")
    slope = float(centred @ ys) / spread
    residual = ys - ys.mean() - slope * centred
    degrees = len(xs) - 2
    error = math.sqrt(float(residual @ residual) / degrees / spread) if degrees > 0 else 0.0
    half = student_t(degrees) * error if degrees > 0 else math.inf
    return Fit(slope, slope - half, slope + half)


def power_law(widths: Sequence[float], values: Sequence[float]) -> Fit:
    """Fit value ∝ width^s over positive values and return s.

    >>> round(power_law([64, 128, 256], [1.0, 2.0, 4.0]).value, 6)
    1.0
    """
    return line([math.log(w) for w in widths], [math.log(v) for v in values])


def parabola(x: Sequence[float], y: Sequence[float]) -> Fit | None:
    """Fit y = a + b·x + c·x² and return the x of its minimum, with a delta-method interval.

    Args:
        x: Positions, such as log2 of a learning rate; seeds repeat them.
        y: Losses.

    Returns:
        None where the fit has no minimum (c ≤ 0), the losses are all the same to rounding, or there are
        fewer than three different x.
    """
    if len(set(x)) < 3 or max(y) - min(y) <= ROUNDING * max(map(abs, y)):
        return None
    shift = float(np.mean(x))
    xs, ys = np.asarray(x, float) - shift, np.asarray(y, float)
    design = np.stack([np.ones_like(xs), xs, xs**2], axis=1)
    inverse = np.linalg.inv(design.T @ design)
    a, b, c = inverse @ design.T @ ys
    if c <= 0:
        return None
    vertex = float(-b / (2 * c))
    residual = ys - design @ np.array([a, b, c])
    degrees = len(xs) - 3
    if degrees < 1:
        return Fit(vertex + shift, -math.inf, math.inf)
    gradient = np.array([0.0, -1 / (2 * c), b / (2 * c**2)])
    variance = float(gradient @ inverse @ gradient) * float(residual @ residual) / degrees
    half = student_t(degrees) * math.sqrt(max(variance, 0.0))
    return Fit(vertex + shift, vertex + shift - half, vertex + shift + half)
