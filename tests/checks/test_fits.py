"""Slopes and minima: exact without noise, and intervals that cover as often as they say."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mupx.checks import fits
from mupx.checks.fits import Fit

WIDTHS = [64, 128, 256, 512, 1024]
SIMULATED = 400
COVERED = range(int(0.92 * SIMULATED), int(0.98 * SIMULATED) + 1)  # 368 … 392 of 400
# Two-sided 95 % quantiles: every textbook's table.
QUANTILES = {1: 12.706, 2: 4.303, 5: 2.571, 8: 2.306, 10: 2.228, 30: 2.042, 60: 2.000, 120: 1.980}

exponents = st.floats(-3, 3)
widths = st.lists(st.integers(1, 4096), min_size=2, max_size=8, unique=True)


def covered(simulate: Callable[[np.random.Generator], tuple[Fit | None, float]], seed: int) -> int:
    """Count how often a simulated fit's interval holds the number that was put in."""
    generator = np.random.default_rng(seed)
    pairs = [simulate(generator) for _ in range(SIMULATED)]
    return sum(fit is not None and not fit.excludes(truth) for fit, truth in pairs)


@given(exponents, st.floats(1e-6, 1e6), widths)
def test_the_slope_of_a_power_law_is_exact(slope: float, factor: float, widths: list[int]) -> None:
    fit = fits.power_law(widths, [factor * width**slope for width in widths])
    assert fit.value == pytest.approx(slope, abs=1e-8)
    assert fit.low <= fit.value <= fit.high


def test_a_power_law_without_noise_has_an_interval_without_width() -> None:
    fit = fits.power_law([64, 128, 256], [3.0, 6.0, 12.0])  # doubles with width
    assert (fit.value, fit.low, fit.high) == pytest.approx((1.0, 1.0, 1.0))
    assert fit.excludes(1.1)
    assert not Fit(1.0, 0.9, 1.1).excludes(1.1)


def test_the_interval_of_a_line_by_hand() -> None:
    fit = fits.line([0.0, 1.0, 2.0], [0.0, 2.0, 2.0])
    # Slope (2 − 0)/2 = 1, residuals −1/3, 2/3, −1/3, one degree of freedom: s² = 6/9, Σ(x − x̄)² = 2.
    half = 12.706 * math.sqrt(6 / 9 / 2)
    assert (fit.value, fit.low, fit.high) == pytest.approx((1.0, 1.0 - half, 1.0 + half))


def noisy_slope(x: np.ndarray, seeds: int) -> Callable[[np.random.Generator], tuple[Fit, float]]:
    def simulate(generator: np.random.Generator) -> tuple[Fit, float]:
        slope = generator.uniform(-1, 1)
        places = np.repeat(x, seeds)
        values = slope * places + 0.3 * generator.standard_normal(len(places))
        return fits.line(places.tolist(), values.tolist()), slope

    return simulate


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_interval_of_a_slope_covers_it_in_95_of_100_fits(seeds: int) -> None:
    assert covered(noisy_slope(np.log(WIDTHS), seeds), seed=seeds) in COVERED


def test_an_interval_of_the_normal_distribution_covers_too_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fits, "student_t", lambda degrees: 1.96)  # wrong: three degrees of freedom
    assert covered(noisy_slope(np.log(WIDTHS), 1), seed=1) < COVERED.start


@pytest.mark.parametrize(("degrees", "quantile"), QUANTILES.items())
def test_students_t_is_that_of_the_tables(degrees: int, quantile: float) -> None:
    assert fits.student_t(degrees) == pytest.approx(quantile, abs=3e-3)


def test_students_t_falls_towards_that_of_the_normal_distribution() -> None:
    values = [fits.student_t(degrees) for degrees in range(1, 200)]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == len(values)
    assert 1.96 < values[-1] < 1.98


@pytest.mark.parametrize("degrees", [0, -1])
def test_no_degrees_of_freedom_bound_nothing(degrees: int) -> None:
    assert fits.student_t(degrees) == math.inf


def test_two_points_have_a_slope_and_no_interval() -> None:
    fit = fits.power_law([64, 128], [1.0, 4.0])
    assert fit.value == pytest.approx(2.0)
    assert (fit.low, fit.high) == (-math.inf, math.inf)
    assert not fit.excludes(1e9)


def test_a_slope_over_one_width_is_refused() -> None:
    with pytest.raises(ValueError, match="two different x"):
        fits.power_law([64, 64], [1.0, 2.0])


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_power_law_of_what_is_not_positive_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"math domain|positive"):
        fits.power_law([64, 128], [1.0, value])


@given(st.floats(-12, 4), st.floats(0.01, 100), st.floats(-5, 5), st.integers(1, 4))
def test_the_vertex_of_a_parabola_is_exact(vertex: float, bend: float, level: float, reach: int) -> None:
    x = [-4.0 + 0.5 * i for i in range(-reach, reach + 1)]
    fit = fits.parabola(x, [level + bend * (place - vertex) ** 2 for place in x])
    assert fit is not None
    assert fit.value == pytest.approx(vertex, abs=1e-5)


@given(st.floats(-100, 100))
def test_a_parabola_moves_with_its_points(by: float) -> None:
    x, y = [0.0, 0.5, 1.0, 1.5], [1.0, 0.4, 0.5, 0.9]
    fit, moved = fits.parabola(x, y), fits.parabola([place + by for place in x], y)
    assert fit is not None
    assert moved is not None
    wanted = fit.shifted(by)
    assert (moved.value, moved.low, moved.high) == pytest.approx((wanted.value, wanted.low, wanted.high))


def test_shifting_moves_the_interval_too() -> None:
    assert Fit(1.0, 0.5, 2.0).shifted(-0.5) == Fit(0.5, 0.0, 1.5)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([-1.0, 0.0, 1.0], [-1.0, 0.0, -1.0]),  # a maximum
        ([0.0, 1.0, 0.0, 1.0], [1.0, 2.0, 1.1, 2.1]),  # two places only
        ([0.0, 0.0, 0.0], [1.0, 2.0, 3.0]),  # one place
    ],
)
def test_without_a_minimum_there_is_no_vertex(x: list[float], y: list[float]) -> None:
    assert fits.parabola(x, y) is None


def test_three_points_have_a_vertex_and_no_interval() -> None:
    fit = fits.parabola([0.0, 1.0, 2.0], [1.0, 0.0, 1.0])
    assert fit is not None
    assert fit.value == pytest.approx(1.0)
    assert (fit.low, fit.high) == (-math.inf, math.inf)


def test_the_interval_of_a_vertex_is_that_of_the_losses_carried_through_its_derivatives() -> None:
    x = np.array([0.0, 0.5, 1.0, 1.5, 3.0])  # not symmetric, so that b and c are correlated
    y = (x - 2.0) ** 2 + np.array([0.02, -0.03, 0.01, 0.02, -0.01])

    def vertex(losses: np.ndarray) -> float:
        fit = fits.parabola(x.tolist(), losses.tolist())
        assert fit is not None
        return fit.value

    step = 1e-5 * np.eye(len(x))
    slopes = [(vertex(y + d) - vertex(y - d)) / 2e-5 for d in step]
    residual = y - np.polyval(np.polyfit(x, y, 2), x)
    half = fits.student_t(2) * math.sqrt(residual @ residual / 2 * np.square(slopes).sum())
    found = fits.parabola(x.tolist(), y.tolist())
    assert found is not None
    assert (found.high - found.value, found.value - found.low) == pytest.approx((half, half), rel=1e-4)


def noisy_vertex(generator: np.random.Generator) -> tuple[Fit | None, float]:
    vertex = generator.uniform(-0.25, 0.25)
    x = np.tile(np.arange(-1.0, 1.5, 0.5), 2)  # five half octaves, two seeds: seven degrees of freedom
    losses = (x - vertex) ** 2 + 0.05 * generator.standard_normal(len(x))
    return fits.parabola(x.tolist(), losses.tolist()), vertex


def test_the_interval_of_a_vertex_covers_it_in_95_of_100_fits() -> None:
    assert covered(noisy_vertex, seed=0) in COVERED


def test_a_cubic_part_of_the_loss_is_seen_as_a_vertex_that_does_not_fit() -> None:
    x = [-1.0, -0.5, 0.0, 0.5, 1.0]
    skewed = fits.parabola(x, [place**2 + 0.5 * place**3 for place in x])
    even = fits.parabola(x, [place**2 for place in x])
    assert skewed is not None
    assert even is not None
    assert skewed.high - skewed.low > 0.1 > even.high - even.low
