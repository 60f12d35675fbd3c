"""The pure functions behind the shells, against plain Python and torch's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mupx.errors import UsageError
from mupx.optim.adam import AdamW
from mupx.optim.base import finite_or, over, running_average, sort_groups, split_ridge
from mupx.optim.sgd import SGD


@pytest.mark.parametrize("mode", ["adamw", "l2"])
def test_torch_optimizers_are_reproduced(mode: str) -> None:
    gradients = torch.randn(6, 4, 3, dtype=torch.double)
    decoupled = torch.optim.AdamW if mode == "adamw" else torch.optim.Adam
    pairs = [
        (AdamW, {"weight_decay_mode": mode}, decoupled, {}),
        (SGD, {"momentum": 0.9, "weight_decay_mode": "l2"}, torch.optim.SGD, {"momentum": 0.9}),
    ]
    for ours, options, theirs, reference in pairs:
        a, b = (nn.Parameter(torch.ones(4, 3, dtype=torch.double)) for _ in range(2))
        first = ours([a], lr=0.1, weight_decay=0.02, **options)
        second = theirs([b], lr=0.1, weight_decay=0.02, **reference)
        for gradient in gradients:
            a.grad, b.grad = gradient.clone(), gradient.clone()
            first.step()
            second.step()
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_over_shapes_hyperparameters() -> None:
    scalar, three = torch.tensor(2.0), torch.arange(3.0)
    assert over(0.5, torch.ones(3, 4)) == 0.5
    assert over(scalar, torch.ones(3, 4)) is scalar
    assert (torch.ones(3, 4, 5) * over(three, torch.ones(3, 4, 5)))[:, 0, 0].tolist() == [0, 1, 2]


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=8))
def test_running_average_starts_as_a_plain_mean(values: list[float]) -> None:
    average = None
    for seen, value in enumerate(values):
        average = running_average(average, torch.tensor(value, dtype=torch.double), 0.999, seen, 1)
    assert average is not None
    assert float(average) == pytest.approx(sum(values) / len(values), abs=1e-9)


def test_running_average_remembers_steps_not_refreshes() -> None:
    old, new = torch.tensor(0.0), torch.tensor(1.0)
    assert float(running_average(old, new, 0.9, 1000, 1)) == pytest.approx(0.1)
    assert float(running_average(old, new, 0.9, 1000, 10)) == pytest.approx(1 - 0.9**10)


def test_what_is_not_finite_stays_out() -> None:
    good, bad = torch.ones(2), torch.tensor([1.0, float("nan")])
    assert finite_or(good, None) is good
    assert finite_or(bad, good) is good
    assert finite_or(bad, None) is None


@given(st.floats(1e-9, 1e9), st.floats(1e-6, 1e6))
def test_split_ridge_keeps_product_and_ratio(damping: float, ratio: float) -> None:
    rho_A, rho_B = split_ridge(damping, ratio)
    assert rho_A * rho_B == pytest.approx(damping**2)
    assert rho_A / rho_B == pytest.approx(ratio)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_split_ridge_refuses(bad: float) -> None:
    with pytest.raises(UsageError, match="damping must be"):
        split_ridge(bad, 1.0)
    with pytest.raises(UsageError, match="damping_ratio must be"):
        split_ridge(1.0, bad)


def test_groups_that_state_their_algorithm_are_left_alone() -> None:
    a, b = torch.ones(2, 2), torch.ones(2)
    stated = {"params": [b], "algorithm": "kfac"}
    groups = sort_groups([stated, {"params": a, "lr": 1.0}], 0.5, lambda p: p.dim() == 2)
    assert groups[0] is stated
    assert groups[1]["lr"] == 1.0
    (split,) = sort_groups([b], 0.5, lambda p: p.dim() == 2)
    assert (split["algorithm"], split["lr"]) == ("adamw", 0.5)
