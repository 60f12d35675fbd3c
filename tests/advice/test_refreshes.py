"""How often a run refreshes, against the optimizer that does it, and the schedule that is advised."""

import pytest
import torch

from mupx.advice.refreshes import LATER, configured_interval, count_refreshes, recommended
from mupx.optim import OPTIMIZERS
from mupx.sections import OptimizerConfig


@pytest.mark.parametrize(
    ("refresh", "staleness", "steps"), [(10, 0.05, 80), (10, 1.0, 40), (3, 0.2, 30), (1, 0.05, 7)]
)
def test_refreshes_are_counted_as_the_optimizer_does_them(refresh, staleness, steps):
    weight = torch.nn.Parameter(torch.eye(3))
    optimizer = OPTIMIZERS.load("shampoo")([weight], refresh=refresh, staleness=staleness)
    done = set()
    for _ in range(steps):
        weight.grad = torch.eye(3)
        optimizer.step()
        done.add(optimizer.state[weight]["refreshed_at"])
    config = OptimizerConfig(refresh=refresh, staleness=staleness)
    assert count_refreshes(configured_interval(config, steps), steps) == len(done)


def test_a_long_run_is_given_the_posters_fractions_in_its_own_steps():
    phases = recommended(400_000)
    assert (phases.least, phases.safe, phases.first) == (400, 1200, 1200)
    assert phases.notation == "10:0.3%,100"
    assert phases.refreshes == 120 + (400_000 - 1200) // 100


def test_phases_are_counted_over_the_run():
    config = OptimizerConfig(refresh="10:0.3%,100")
    assert count_refreshes(configured_interval(config, 400_000), 400_000) == recommended(400_000).refreshes


def test_one_epoch_bounds_the_first_phase_of_a_short_run():
    assert recommended(1000, epoch=40).first == 40
    assert recommended(1000, epoch=4000).first == 200


def test_a_short_run_keeps_at_least_twenty_refreshes_in_the_first_phase():
    assert (recommended(1000).safe, recommended(1000).first) == (3, 200)
    assert recommended(50).first == 50
    assert recommended(50).refreshes == 5
    assert recommended(1).refreshes == 1


@pytest.mark.parametrize(("refresh", "later"), [(1e-4, 30), (1e-2, 300), (0.05, 1000), (50.0, 30_000)])
def test_the_later_interval_is_the_shortest_at_which_refreshes_cost_a_twentieth(refresh, later):
    assert recommended(10_000, step_seconds=1e-3, refresh_seconds=refresh).later == later
    assert later in LATER
    assert later == LATER[-1] or refresh / later <= 0.05 * 1e-3
