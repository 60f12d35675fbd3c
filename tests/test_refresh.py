"""When curvature is refreshed: reading schedules, their course over a run, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mupx.config import parse
from mupx.errors import UsageError
from mupx.optim.base import Base
from mupx.parametrization import build_optimizer, resolved
from mupx.parts import describe as describe_experiment
from mupx.recipe import Recipe, read
from mupx.refresh import Intervals, Schedule, forgets, longest_gap, parse_refresh, refresh_interval
from mupx.roles import describe
from mupx.run import Run
from mupx.training import load_data
from tests.factories import mlp3, small_mlp
from tests.optim.training import batches, make, train


def refreshed_at(refresh: Any, staleness: float, steps: int) -> list[int]:
    """The steps at which an interval rule refreshes."""
    found = [0]
    for step in range(1, steps):
        if step - found[-1] >= refresh_interval(step, refresh, staleness):
            found.append(step)
    return found


@given(st.integers(0, 10**6), st.integers(1, 1000), st.floats(0.001, 1))
def test_the_age_rule_is_bounded_and_never_shrinks(step: int, refresh: int, staleness: float) -> None:
    first, second = (refresh_interval(s, refresh, staleness) for s in (step, step + 1))
    assert 1 <= first <= second <= refresh
    assert first == 1 or first <= staleness * step


def test_under_the_age_rule_refreshes_thin_out() -> None:
    gaps = [b - a for a, b in pairwise(refreshed_at(10, 0.05, 400))]
    assert gaps[0] == 1
    assert gaps[-1] == 10
    assert gaps == sorted(gaps)


@pytest.mark.parametrize("name", ["kfac", "shampoo"])
@pytest.mark.parametrize(
    ("refresh", "statistics", "steps", "gap"),
    [
        (7, None, 40, 7),
        (100, None, 40, 16),  # the age rule with a staleness of a half: at 0, 1, 2, 4, 8, 16 and 32
        (Intervals((10,), (2, 9)), None, 40, 9),
        (Intervals((10,), (2, 90)), None, 40, 2),  # refreshed once in ten steps and never again
        (7, 3, 40, 3),
        (2, 11, 40, 11),
        (7, 50, 40, 0),
    ],
)
def test_the_longest_gap_between_averagings_is_the_optimizers(
    name: str, refresh: Any, statistics: int | None, steps: int, gap: int
) -> None:
    model = small_mlp()
    optimizer = make(name, model, refresh=refresh, statistics=statistics, staleness=0.5)
    averaged = []
    for data in batches(steps):
        train(model, optimizer, [data])
        averaged.append(optimizer.state[model[0].weight]["averaged_at"])
    found = longest_gap(lambda step: refresh_interval(step, refresh, 0.5), statistics, steps)
    assert found == gap == max((b - a for a, b in pairwise(sorted(set(averaged)))), default=0)


def test_an_average_forgets_after_more_than_two_memories() -> None:
    assert [forgets(gap, 0.95) for gap in (1, 20, 40, 41, 100)] == [False, False, False, True, True]
    assert [forgets(gap, 0.9) for gap in (20, 21)] == [False, True]
    assert not forgets(1000, 0.0)  # the last batch alone is what was asked for


def test_phases_are_fractions_of_the_run() -> None:
    schedule = parse_refresh("10:0.3%,100")
    assert isinstance(schedule, Schedule)
    for steps in (100_000, 1_000_000):
        run = schedule.over(steps)
        assert [run(0), run(steps * 3 // 1000 - 1), run(steps * 3 // 1000), run(steps - 1)] == [
            10,
            10,
            100,
            100,
        ]
    # 30 refreshes in the first 300 steps, then 7 in the next 700.
    assert refreshed_at(schedule.over(100_000), 0.05, 1000) == [*range(0, 300, 10), *range(390, 1000, 100)]


@pytest.mark.parametrize(
    ("text", "steps", "epoch", "ends"),
    [
        ("10:0.3%,100", 1000, None, (200,)),  # twenty refreshes, as 0.3 % are three steps
        ("10:0.3%,100", 1000, 39, (39,)),  # or one epoch, where that is shorter
        ("10:0.3%,100", 1000, 500, (200,)),
        ("10:0.3%,100", 10**6, 500, (3000,)),
        ("10:0.3%,100!", 1000, 500, (3,)),  # as it is written
        ("10:0%,100!", 1000, 500, (0,)),
        ("1:1%,10:10%,100", 4000, None, (40, 400)),
        ("1:1%,10:10%,100", 200, None, (20, 220)),  # each phase has its least length
        ("1:33.3%,10", 1000, None, (333,)),  # 33.3 % of 1000 is 333 in decimals, not a little more
    ],
)
def test_a_phase_has_a_least_length_unless_forced(
    text: str, steps: int, epoch: int | None, ends: tuple[int, ...]
) -> None:
    schedule = parse_refresh(text)
    assert isinstance(schedule, Schedule)
    assert schedule.over(steps, epoch).ends == ends


def test_a_number_keeps_the_age_rule_and_a_forced_one_is_the_plain_interval() -> None:
    assert parse_refresh("10") == parse_refresh(10) == 10
    forced = parse_refresh("10!")
    assert isinstance(forced, Schedule)
    assert refreshed_at(forced.over(100), 0.05, 40) == [0, 10, 20, 30]
    assert refreshed_at(10, 0.05, 40) == list(range(40))


@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=4).map(sorted),
    st.lists(st.decimals("0.1", "99.9", places=2), min_size=3, max_size=3, unique=True).map(sorted),
    st.booleans(),
    st.integers(1, 10**6),
)
def test_schedules_survive_their_text(intervals: Any, ends: Any, exact: bool, steps: int) -> None:
    pairs = list(zip(intervals, ends, strict=False))[: len(intervals) - 1]
    text = ",".join([*(f"{i}:{e}%" for i, e in pairs), str(intervals[-1])]) + ("!" if exact else "")
    schedule = parse_refresh(text)
    assert parse_refresh(str(schedule)) == schedule
    if isinstance(schedule, Schedule):
        run = schedule.over(steps)
        assert [run(step) for step in sorted({0, steps // 2, steps})] == sorted(
            run(step) for step in {0, steps // 2, steps}
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (0, "a whole number of steps ≥ 1"),
        (-3, "a whole number"),
        (True, "a whole number"),
        (2.5, "a whole number"),
        (None, "a whole number"),
        ("", "a whole number"),
        ("often", "a whole number"),
        ("10:0.3,100", "a whole number"),
        ("10:1e-3%,100", "a whole number"),
        ("0:1%,10", "a whole number"),
        ("10,100", "every phase of refresh but the last needs an end"),
        ("10:1%", "every phase of refresh but the last needs an end"),
        ("1:10%,2:1%,3", "one after the other"),
        ("1:100%,2", "before 100 %"),
        ("100:1%,10", "must not shrink"),
    ],
)
def test_what_is_no_schedule_is_refused(given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_refresh(given)
    assert repr(given) in str(caught.value)
    with pytest.raises(UsageError, match=r"optimizer\.refresh: .*" + message):
        parse({"optimizer": {"refresh": given}})


def test_too_short_a_first_phase_is_refused_with_the_evidence_unless_forced() -> None:
    for text in ("10:0.05%,300", "10:0%,300", "10:0.0999%,300"):
        with pytest.raises(UsageError, match=r"0\.1 % or more always trained .*ICLR Tiny 2024") as caught:
            parse_refresh(text)
        assert f"'{text}!'" in str(caught.value)
        assert isinstance(parse_refresh(f"{text}!"), Schedule)
    assert isinstance(parse_refresh("10:0.1%,300"), Schedule)


def test_the_configuration_keeps_numbers_and_plain_text() -> None:
    for stated, kept in ((7, 7), ("7", 7), (" 10:0.30%, 100 ", "10:0.3%,100"), ("1:5%,9!", "1:5%,9!")):
        experiment = parse({"optimizer": {"refresh": stated}})
        assert experiment.optimizer.refresh == kept
        assert parse(experiment.model_dump(mode="json")) == experiment


def test_a_recipe_carries_the_schedule(tmp_path: Any) -> None:
    experiment = resolved(parse({"optimizer": {"refresh": "10:0.3%,100"}, "scaling": {"base_width": 8}}))
    Recipe(experiment, describe(mlp3, 8)).write(tmp_path / "recipe.toml")
    assert read(tmp_path / "recipe.toml").experiment.optimizer.refresh == "10:0.3%,100"


@pytest.mark.parametrize("name", ["kfac", "shampoo"])
def test_an_optimizer_follows_a_function(name: str) -> None:
    torch.manual_seed(0)
    model = small_mlp()
    optimizer = make(name, model, lr=0.01, refresh=lambda step: 1 if step < 3 else 4)
    seen = []
    for batch in batches(12):
        train(model, optimizer, [batch])
        seen.append(optimizer.state[model[0].weight]["refreshed_at"])
    assert sorted(set(seen)) == [0, 1, 2, 6, 10]


@pytest.mark.parametrize("name", ["kfac", "shampoo"])
@pytest.mark.parametrize(
    ("refresh", "message"),
    [
        ("10:0.3%,100", r"parse_refresh\('10:0.3%,100'\).over\(steps=…\)"),
        (parse_refresh("10!"), "length of the training"),
        (True, "refresh must be"),
        (0, "refresh must be"),
        (2.0, "refresh must be"),
        (lambda step: 0, r"refresh\(\d\) returned 0"),
        (lambda step: 2.5, r"refresh\(\d\) returned 2\.5"),
    ],
)
def test_an_optimizer_refuses_what_gives_no_interval(name: str, refresh: Any, message: str) -> None:
    model = small_mlp()
    with pytest.raises(UsageError, match=message):
        train(model, make(name, model, refresh=refresh), batches(2))


def built(changes: dict[str, Any]) -> Any:
    experiment = resolved(parse({}).updated({"data.name": "synthetic", "train.batch_size": 64, **changes}))
    data = load_data(experiment)
    return Run(experiment, data, describe_experiment(experiment, data)).optimizer


@pytest.mark.parametrize("name", ["kfac", "shampoo"])
def test_the_training_loop_says_how_long_the_run_is(name: str) -> None:
    lengths = {}
    for steps in (2000, 4000):
        optimizer = built({"optimizer.name": name, "optimizer.refresh": "1:5%,20", "train.steps": steps})
        assert isinstance(optimizer, Base)
        lengths[steps] = optimizer.refresh  # type: ignore[attr-defined]
    assert lengths == {steps: Intervals((steps // 20,), (1, 20)) for steps in (2000, 4000)}


def test_an_optimizer_without_curvature_needs_no_length() -> None:
    assert not hasattr(built({"optimizer.name": "sgd", "optimizer.refresh": "1:5%,20"}), "refresh")


def test_outside_the_loop_a_schedule_needs_the_steps() -> None:
    experiment = resolved(
        parse({"optimizer": {"refresh": "1:5%,20"}, "scaling": {"base_width": 8, "width": 8}})
    )
    recipe, model = Recipe(experiment, describe(mlp3, 8)), mlp3(8)
    with pytest.raises(UsageError, match="depends on the length of the run"):
        build_optimizer(model, recipe.layers, experiment)
    optimizer = build_optimizer(model, recipe.layers, experiment, steps=400)
    assert optimizer.refresh == Intervals((20,), (1, 20))  # type: ignore[union-attr]
