"""The transfer check on losses written down by hand: sweeps, drift, honest regret, speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mupx.checks import transfer
from mupx.checks.transfer import LONGEST, Line

WIDTHS = (64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Place:
    width: int = 64
    log2_lr: float = -4.0
    log2_damping: float = -8.0
    seed: int = 0


def bowl(place: Place, optimum: float) -> float:
    """A parabola in log2 lr; each seed adds its own constant, which moves no optimum."""
    return 0.5 + 0.1 * (place.log2_lr - optimum) ** 2 + 0.01 * place.seed


def swept(losses: Callable[[Place], float], reach: int = 4, seeds: Sequence[int] = (0, 1)) -> list[float]:
    return [p.log2_lr for p in transfer.sweep(losses, Place(), "log2_lr", seeds, reach)]


def line(width: int, optimum: float, seeds: Sequence[int] = (0, 1), centre: float = -4.0) -> Line:
    """Half octaves over ±3 octaves, with the minimum anywhere inside."""
    points = [Place(width, centre + 0.5 * i) for i in range(-6, 7)]
    return transfer.measured(lambda place: bowl(place, optimum), points, "log2_lr", seeds)


def by_hand(width: int, *losses: Sequence[float], start: float = 0.0) -> Line:
    """One line, seeds 0, 1 …, values in half octaves from ``start``."""
    values = tuple(start + 0.5 * i for i in range(len(losses[0])))
    return Line(width, values, {seed: tuple(column) for seed, column in enumerate(losses)})


# Sweeps


def test_a_sweep_goes_in_half_octaves_through_its_centre() -> None:
    points = transfer.sweep(lambda place: bowl(place, -4.0), Place(seed=1), "log2_lr", (0, 1), 2)
    assert [p.log2_lr for p in points] == [-5.0, -4.5, -4.0, -3.5, -3.0]
    assert {replace(p, log2_lr=0.0) for p in points} == {Place(log2_lr=0.0, seed=1)}


@pytest.mark.parametrize("optimum", [-11.0, -7.0, -5.0, -4.0, -2.5, -1.0, 3.0])
@pytest.mark.parametrize("reach", [2, 4])
def test_a_sweep_grows_until_its_lowest_point_is_two_steps_inside(optimum: float, reach: int) -> None:
    values = swept(lambda place: bowl(place, optimum), reach)
    lowest = min(range(len(values)), key=lambda i: abs(values[i] - optimum))
    assert 2 <= lowest < len(values) - 2
    assert min(values) <= -4.0 - 0.5 * reach
    assert max(values) >= -4.0 + 0.5 * reach
    assert values == sorted(values)
    assert np.diff(values) == pytest.approx(0.5)


def test_a_sweep_whose_optimum_is_inside_stays_short() -> None:
    assert len(swept(lambda place: bowl(place, -3.0))) == 9  # ±4 half octaves
    assert len(swept(lambda place: bowl(place, -2.5))) == 11  # one step from the edge is not inside


@pytest.mark.parametrize("slope", [-1.0, 1.0])
def test_a_sweep_without_a_minimum_stops(slope: float) -> None:
    values = swept(lambda place: slope * place.log2_lr)
    assert LONGEST <= len(values) <= LONGEST + 2
    assert (max(values) > 5.0) == (slope < 0)  # it grew towards lower losses


def test_a_tail_that_only_flattens_is_not_followed() -> None:
    def tail(place: Place) -> float:  # a damping that only has to be small enough
        return 0.8 + 0.5 * 2.0 ** (0.8 * place.log2_lr)

    def ends(untrained: float | None) -> list[float]:
        return [p.log2_lr for p in transfer.sweep(tail, Place(), "log2_lr", (0,), 4, untrained)]

    assert len(ends(None)) >= LONGEST
    values = ends(2.3)
    octaves = zip(values[:-2:2], values[2::2], strict=True)
    gains = [tail(Place(log2_lr=high)) - tail(Place(log2_lr=low)) for low, high in octaves]
    least = transfer.FLAT * (2.3 - tail(Place(log2_lr=values[0])))
    assert gains[0] < least < gains[1]
    assert tail(Place(log2_lr=values[0])) - 0.8 < 0.01 * 1.5  # what is left beyond would not fail a width


@pytest.mark.parametrize("optimum", [-11.0, -7.0])
def test_a_slope_is_followed_out_of_divergence(optimum: float) -> None:
    """Runs that diverge count with the untrained loss: a line that starts among them finds its minimum."""

    def valley(place: Place) -> float:
        return 2.3 - 2.0 * max(0.0, 1.0 - abs(place.log2_lr - optimum) / 4.0)

    points = transfer.sweep(valley, Place(), "log2_lr", (0,), 2, 2.3)
    assert min(points, key=valley).log2_lr == optimum


def test_the_mean_over_seeds_decides_how_far_a_sweep_goes() -> None:
    def losses(place: Place) -> float:
        return 0.1 * (place.log2_lr - (-4.0 if place.seed == 0 else 0.0)) ** 2

    assert max(swept(losses, 2, (0,))) == -3.0
    assert max(swept(losses, 2, (0, 1))) >= -2.0 + 1.0  # the mean's optimum is -2


def test_a_sweep_asks_only_for_points_of_its_line() -> None:
    asked = set()

    def losses(place: Place) -> float:
        asked.add(place)
        return bowl(place, 0.0)

    values = swept(losses, 2, (0, 3))
    assert {(p.width, p.log2_damping) for p in asked} == {(64, -8.0)}
    assert asked == {Place(log2_lr=value, seed=seed) for value in values for seed in (0, 3)}


def test_a_line_holds_the_losses_of_each_seed() -> None:
    points = [Place(128, value) for value in (-5.0, -4.5)]
    found = transfer.measured(lambda p: p.log2_lr + 100 * p.seed, points, "log2_lr", (0, 2))
    assert found == Line(128, (-5.0, -4.5), {0: (-5.0, -4.5), 2: (195.0, 195.5)})
    assert found.mean() == [95.0, 95.5]
    assert found.mean([2]) == [195.0, 195.5]
    assert found.at(-4.5, 2) == 195.5


@pytest.mark.parametrize(
    ("reach", "doublings", "axes", "expected"),
    [
        (4, 0, 2, 4),  # the base width keeps all of it
        (16, 1, 1, 4),  # 16 / 4
        (16, 1, 2, 8),  # 16 / √4
        (16, 2, 2, 4),
        (4, 1, 2, 2),
        (4, 3, 1, 2),  # 4 / 64, but never below two
    ],
)
def test_a_telescoped_line_shrinks_by_four_per_doubling_over_its_axes(
    reach: int, doublings: float, axes: int, expected: int
) -> None:
    assert transfer.telescoped(reach, doublings, axes) == expected


# The best value of a line


@given(st.floats(-6.5, -1.5))
def test_the_best_value_lies_between_the_points(optimum: float) -> None:
    best = line(64, optimum).best([1])
    assert best.value == pytest.approx(optimum, abs=1e-9)
    assert not best.excludes(best.value)


@pytest.mark.parametrize("optimum", [-9.0, 1.0])
def test_an_optimum_beyond_the_edge_is_the_lowest_point_and_bounds_nothing(optimum: float) -> None:
    found = line(64, optimum)
    best = found.best()
    assert best.value == found.lowest() == (found.values[0] if optimum < -4 else found.values[-1])
    assert (best.low, best.high) == (-math.inf, math.inf)


def test_a_cliff_beside_the_optimum_does_not_move_the_best_value_out_of_its_neighbourhood() -> None:
    found = by_hand(64, [0.9, 0.8, 0.7, 0.6, 2.3, 2.3, 2.3], [0.9, 0.8, 0.7, 0.6, 2.3, 2.3, 2.3])
    assert found.lowest() == 1.5
    assert 0.5 <= found.best().value <= 2.5


@pytest.mark.parametrize(
    ("optimum", "beyond"), [(-9.0, -1), (-6.5, -1), (-6.0, 0), (-4.0, 0), (-2.0, 0), (-1.5, 1), (1.0, 1)]
)
def test_a_minimum_is_known_where_two_points_lie_beyond_it(optimum: float, beyond: int) -> None:
    assert line(64, optimum).beyond == beyond  # of −7 … −1


# Drift


@pytest.mark.parametrize("octaves", [-1.0, -0.5, -0.13, 0.0, 0.25])
def test_a_drift_of_the_optimum_is_read_in_octaves_per_doubling(octaves: float) -> None:
    lines = [line(64 * 2**k, -4.0 + octaves * k, centre=-4.0 + octaves * k) for k in range(5)]
    drift = transfer.drift(lines)
    assert drift.value == pytest.approx(octaves, abs=1e-6)
    assert (drift.low, drift.high) == pytest.approx((octaves, octaves), abs=1e-6)


def test_the_lowest_grid_point_instead_of_the_vertex_would_see_no_slow_drift() -> None:
    lines = [line(64 * 2**k, -4.0 + 0.06 * k) for k in range(5)]  # 0.24 octaves in all
    assert {each.lowest() for each in lines} == {-4.0}
    assert transfer.drift(lines).value == pytest.approx(0.06, abs=1e-6)


def test_drift_is_per_doubling_and_not_per_step_of_the_list() -> None:
    lines = [line(width, -4.0 + 0.5 * math.log2(width / 64)) for width in (64, 256, 1024)]
    assert transfer.drift(lines).value == pytest.approx(0.5, abs=1e-6)


def test_every_seed_has_its_own_best_value_in_the_drift() -> None:
    # Optima ±0.25 around −4 at every width: no drift, and an interval from 5 widths × 2 seeds.
    def losses(place: Place) -> float:
        return (place.log2_lr + 4.0 - (0.25 if place.seed else -0.25)) ** 2

    points = {w: [Place(w, -4.0 + 0.5 * i) for i in range(-4, 5)] for w in WIDTHS}
    lines = [transfer.measured(losses, points[w], "log2_lr", (0, 1)) for w in WIDTHS]
    drift = transfer.drift(lines)
    # Residuals ±0.25, 8 degrees of freedom, Σ(x − x̄)² = 2·(4 + 1 + 0 + 1 + 4) = 20.
    half = 2.306 * math.sqrt(10 * 0.25**2 / 8 / 20)
    assert (drift.value, drift.high) == pytest.approx((0.0, half), abs=1e-6)


# Regret

BASE = by_hand(64, [3.0, 1.0, 2.0], [3.0, 1.0, 2.0])  # chooses 0.5 on either seed


def test_nothing_is_lost_where_nothing_moves() -> None:
    assert transfer.regret(BASE, BASE) == [0.0, 0.0]
    assert transfer.regret(line(64, -3.9), line(1024, -3.9)) == [0.0, 0.0]


def test_regret_is_the_loss_at_the_base_choice_minus_that_at_the_best() -> None:
    wide = by_hand(128, [3.0, 1.5, 1.0], [3.0, 1.75, 1.0])
    assert transfer.regret(BASE, wide) == [1.5 - 1.0, 1.75 - 1.0]


def test_neither_choice_sees_the_seed_it_is_judged_on() -> None:
    # Seed 0 is best at 1.0, seed 1 at 0.5; judged on the other one each choice loses against 0.5.
    wide = by_hand(128, [9.0, 0.7, 0.2], [9.0, 0.3, 0.4])
    assert transfer.regret(BASE, wide) == [
        0.7 - 0.7,  # judged on seed 0: seed 1 chose 0.5, which is the base's choice too
        pytest.approx(0.3 - 0.4),  # judged on seed 1: seed 0 chose 1.0, and the base's choice is better
    ]


def test_the_base_choice_is_made_without_the_judge_too() -> None:
    base = by_hand(64, [1.0, 2.0, 3.0], [3.0, 2.0, 1.0])  # seed 0 chooses 0.0, seed 1 chooses 1.0
    wide = by_hand(128, [5.0, 0.0, 7.0], [6.0, 0.0, 8.0])  # both best at 0.5
    assert transfer.regret(base, wide) == [7.0, 6.0]  # judge 0 pays seed 1's choice, judge 1 seed 0's


def noise_only(generator: np.random.Generator, width: int) -> Line:
    """Losses in which no value is better than another."""
    return by_hand(width, *generator.standard_normal((4, 9)).tolist())


def test_noise_alone_gives_no_regret_on_average_but_does_when_judged_on_its_own_minimum() -> None:
    generator = np.random.default_rng(0)
    pairs = [(noise_only(generator, 64), noise_only(generator, 128)) for _ in range(200)]
    honest = [np.mean(transfer.regret(base, wide)) for base, wide in pairs]
    assert abs(np.mean(honest)) < 0.15
    assert min(honest) < 0
    seeds = range(4)
    greedy = [
        np.mean([wide.at(base.lowest(), s) - wide.at(wide.lowest([s]), s) for s in seeds])
        for base, wide in pairs
    ]
    assert np.mean(greedy) > 1.0  # the mean of the lowest of nine normal numbers is −1.49


def test_one_seed_is_judged_on_itself_and_never_loses_less_than_nothing() -> None:
    generator = np.random.default_rng(1)
    for _ in range(50):
        base, wide = (by_hand(w, generator.standard_normal(9).tolist()) for w in (64, 128))
        (lost,) = transfer.regret(base, wide)
        assert lost >= 0


def test_a_choice_outside_a_line_is_taken_to_its_nearest_value() -> None:
    wide = by_hand(128, [2.0, 1.0, 3.0], start=1.0)  # 1.0, 1.5, 2.0: the base's 0.5 is not on it
    base = by_hand(64, [3.0, 1.0, 2.0])
    assert transfer.regret(base, wide) == [2.0 - 1.0]
    assert transfer.nearest((1.0, 1.5, 2.0), 1.6) == 1.5


# Fast transfer


def family(alpha: float, beta: float | None, widths: Sequence[int] = WIDTHS) -> list[Line]:
    """Best loss 0.5 + 2 (n/n₀)^-alpha at log2 value −4 + (n/n₀)^-beta, or at −4 for all widths.

    Every line has its optimum on the grid, so that the lowest point is the best loss.
    """
    lines = []
    for width in widths:
        ratio = width / widths[0]
        optimum = -4.0 + (0.0 if beta is None else ratio**-beta)
        values = tuple(optimum + 0.5 * i for i in range(-6, 7))
        losses = tuple(0.5 + 2.0 * ratio**-alpha + 0.1 * (value - optimum) ** 2 for value in values)
        lines.append(Line(width, values, {0: losses, 1: losses}))
    return lines


@pytest.mark.parametrize("count", [1, 2, 3])
def test_three_widths_say_nothing_about_speed(count: int) -> None:
    assert transfer.speed(family(0.5, None)[:count]) is None


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0, 2.0])
def test_alpha_is_the_exponent_with_which_the_best_loss_approaches_its_limit(alpha: float) -> None:
    speed = transfer.speed(family(alpha, None))
    assert speed is not None
    assert speed.alpha == pytest.approx(alpha, abs=1e-9)


def test_transfer_pays_where_the_optimum_stands_still() -> None:
    speed = transfer.speed(family(1.0, None))
    assert speed is not None
    assert speed.pays
    assert speed.beta == math.inf
    assert (speed.fit_error, speed.extrapolation) == pytest.approx((0.0, 0.0), abs=1e-9)
    assert speed.penalty == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(("beta", "pays"), [(0.2, False), (0.4, False), (0.6, True), (1.0, True)])
def test_transfer_pays_where_the_optimum_settles_faster_than_half_as_fast_as_the_loss(
    beta: float, pays: bool
) -> None:
    speed = transfer.speed(family(1.0, beta))
    assert speed is not None
    assert speed.beta == pytest.approx(beta, abs=1e-9)
    assert speed.alpha == pytest.approx(1.0, abs=1e-9)
    assert speed.pays == pays


def test_an_optimum_that_drifts_for_ever_does_not_pay() -> None:
    lines = [line(64 * 2**k, -4.0 - 0.5 * k, centre=-4.0 - 0.5 * k) for k in range(5)]
    falling = [
        Line(
            each.width,
            each.values,
            {s: tuple(v + 64 / each.width for v in c) for s, c in each.losses.items()},
        )
        for each in lines
    ]
    speed = transfer.speed(falling)
    assert speed is not None
    assert not speed.pays


def test_the_audit_numbers_by_hand() -> None:
    # Best values 0, 1, 2, 3 and, at the fifth width, 9 instead of 4.
    places = (0.0, 1.0, 2.0, 3.0, 9.0)
    lines = [line(w, p, centre=p) for w, p in zip(WIDTHS, places, strict=True)]
    speed = transfer.speed(lines)
    assert speed is not None
    # The line through the first four goes to 4. Over all: slope (−2·0 − 1 + 3 + 2·9)/10 = 2, mean 3,
    # so it says −1, 1, 3, 5, 7 and is off by 1, 0, −1, −2, 2.
    assert speed.extrapolation == pytest.approx(9.0 - 4.0, abs=1e-6)
    assert speed.fit_error == pytest.approx(math.sqrt((1 + 0 + 1 + 4 + 4) / 5), abs=1e-6)


def test_the_penalty_is_what_the_base_choice_loses_in_the_limit() -> None:
    # From the second width on the optimum is one octave lower: 0.1·1² is lost for ever.
    lines = [line(64, -4.0), *(line(width, -5.0) for width in WIDTHS[1:])]
    speed = transfer.speed(lines)
    assert speed is not None
    assert speed.penalty == pytest.approx(0.1, abs=0.01)


@given(st.integers(1, 80), st.floats(-5, 5), st.floats(0.1, 5))
def test_a_power_law_approaching_a_limit_is_found_again(step: int, limit: float, scale: float) -> None:
    exponent = 0.05 * step
    found = transfer.approach(WIDTHS, [limit + scale * (w / 64) ** -exponent for w in WIDTHS])
    assert found == pytest.approx((limit, exponent), abs=1e-6)


def test_a_line_on_which_every_run_diverged_has_no_best_value() -> None:
    values = tuple(-4 + 0.5 * i for i in range(-4, 5))
    best = Line(64, values, {0: (2.3,) * 9, 1: (2.3,) * 9}).best()
    assert (best.low, best.high) == (-math.inf, math.inf)
