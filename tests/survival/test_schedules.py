"""Learning-rate schedulers of torch over groups of different rates, and what weight decay makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import mupx
from mupx.optim import OPTIMIZERS, SGD
from mupx.optim.base import Base
from mupx.scaling import RULES
from tests.factories import small_mlp
from tests.optim.training import batches, train
from tests.survival import VALUES, optimizer_of

schedulers = torch.optim.lr_scheduler


def rates(optimizer: Base) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


SCHEDULES: dict[str, Callable[[Base], Any]] = {
    "lambda": lambda o: schedulers.LambdaLR(o, lambda step: 0.5**step),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, T_max=8),
    "one cycle": lambda o: schedulers.OneCycleLR(
        o, max_lr=rates(o), total_steps=8, cycle_momentum=False, div_factor=10
    ),
    "warm-up, then cosine": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=3), schedulers.CosineAnnealingLR(o, T_max=5)], [3]
    ),
}


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_schedules_keep_the_ratios_of_the_groups(name: str, schedule: str, tensor: bool) -> None:
    values = {**VALUES[name], "lr": torch.tensor(0.05) if tensor else 0.05}
    model, groups = mupx.parametrize(small_mlp, width=32, base_width=8, optimizer=name, **values)
    optimizer = optimizer_of(name, groups, model)
    table = [group["table_lr"] for group in optimizer.param_groups]
    # K-FAC has one rate for every layer: nothing to keep apart.
    assert len(set(table)) > 1 or RULES[name].lr(r_in=4, r_out=4) == RULES[name].lr(r_out=4) == 1
    scheduler = SCHEDULES[schedule](optimizer)
    factors = []
    for batch in batches(5):
        train(model, optimizer, [batch])
        scheduler.step()
        factors.append(mupx.lr_factor(optimizer))  # a warning, that is an error, where groups part
        assert rates(optimizer) == pytest.approx([factors[-1] * lr for lr in table], rel=1e-5)
    assert len(set(factors)) == 5


@pytest.mark.parametrize("reference", ["reference_lr", "initial_lr"])
@pytest.mark.parametrize("tensor", [False, True])
def test_one_cycle_leaves_independent_weight_decay_to_the_schedule(tensor: bool, reference: str) -> None:
    """OneCycleLR writes its first rate, max_lr/div_factor, over initial_lr: that is no reference."""
    weight = nn.Parameter(torch.ones(3, 3))
    optimizer = SGD([weight], lr=torch.tensor(0.1) if tensor else 0.1, weight_decay=0.1)
    cycle = schedulers.OneCycleLR(optimizer, max_lr=[0.1], total_steps=10, div_factor=5, cycle_momentum=False)
    (group,) = optimizer.param_groups
    group["reference_lr"] = group[reference]
    expected = 1.0
    for _ in range(4):
        expected *= 1 - 0.1 * float(group["lr"]) / 0.1
        weight.grad = torch.zeros(3, 3)
        optimizer.step()
        cycle.step()
    assert torch.allclose(weight.detach(), torch.full((3, 3), expected)) == (reference == "reference_lr")
