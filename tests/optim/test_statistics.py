"""Factors averaged at other steps than their inverses and roots are refreshed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mupx import refresh
from mupx.curvature import EagerCapture
from mupx.errors import UsageError
from mupx.optim.base import Base
from mupx.optim.kfac import KFAC
from mupx.optim.shampoo import Shampoo
from tests import oracles
from tests.factories import small_mlp
from tests.optim.training import backward, batches, make, train

EMA, LR, DAMPING = 0.8, 0.05, 0.1
NAMES = ["kfac", "shampoo"]


def plain(interval: int) -> refresh.Intervals:
    return refresh.Intervals((), (interval,))


def averaged(old: Tensor | None, new: Tensor, seen: int, gap: int) -> Tensor:
    """The running average as it is documented, in plain arithmetic."""
    if old is None:
        return new
    weight = max(1 - EMA**gap, 1 / (seen + 1))
    return (1 - weight) * old + weight * new


def naive(
    model: nn.Module, data: list[Any], statistics: int, interval: int, factors: Any, update: Any
) -> list[Tensor]:
    """Train by whole matrices: new factors every ``statistics`` steps, used as of every ``interval``-th."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    used: dict[str, tuple[Tensor, Tensor]] = {}
    for step, (x, y) in enumerate(data):
        gradients = dict(
            zip(
                layers,
                torch.autograd.grad(
                    F.cross_entropy(model(x), y), [layer.weight for layer in layers.values()]
                ),
                strict=True,
            )
        )
        for name in layers:
            if step % statistics == 0:
                new = factors(model, name, x, y, gradients[name])
                seen = step // statistics
                old = kept.get(name, (None, None))
                kept[name] = tuple(averaged(a, b, seen, statistics) for a, b in zip(old, new, strict=True))
            if step % interval == 0:
                used[name] = kept[name]
        with torch.no_grad():
            for name, layer in layers.items():
                layer.weight -= LR * update(*used[name], gradients[name])
    return [layer.weight.detach() for layer in layers.values()]


def kfac_factors(model: nn.Module, name: str, x: Tensor, y: Tensor, gradient: Tensor) -> Any:
    return oracles.factors(model, name, x, oracles.label_signals(y))


def kfac_update(A: Tensor, B: Tensor, gradient: Tensor) -> Tensor:
    return oracles.kronecker_update(A, B, gradient, DAMPING, DAMPING)


def shampoo_factors(model: nn.Module, name: str, x: Tensor, y: Tensor, gradient: Tensor) -> Any:
    return gradient @ gradient.T, gradient.T @ gradient


def shampoo_update(L: Tensor, R: Tensor, gradient: Tensor) -> Tensor:
    eye_L, eye_R = (DAMPING * torch.eye(len(M), dtype=M.dtype) for M in (L, R))
    left, right = oracles.matrix_power(L + eye_L, -0.25), oracles.matrix_power(R + eye_R, -0.25)
    return left @ gradient @ right


TWINS: dict[str, Any] = {"kfac": (kfac_factors, kfac_update), "shampoo": (shampoo_factors, shampoo_update)}


def unbiased() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 4, bias=False)).double()


def ours(name: str, statistics: int | None, interval: int, data: list[Any]) -> list[Tensor]:
    model = unbiased()
    optimizer = make(
        name,
        model,
        lr=LR,
        damping=DAMPING,
        damping_rule="absolute",
        ema=EMA,
        refresh=plain(interval),
        statistics=statistics,
    )
    train(model, optimizer, data)
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("statistics", "interval"), [(1, 4), (2, 4), (1, 1), (2, 6)])
def test_both_intervals_equal_a_naive_twin(name: str, statistics: int, interval: int) -> None:
    data = batches(9, torch.double)
    found = ours(name, statistics, interval, data)
    twin = naive(unbiased(), data, statistics, interval, *TWINS[name])
    for a, b in zip(found, twin, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    for other in ((statistics, interval + 1), (statistics + 1, interval)):
        wrong = naive(unbiased(), data, *other, *TWINS[name])
        assert not torch.allclose(found[0], wrong[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_left_out_or_equal_the_two_go_together(name: str) -> None:
    data = batches(9, torch.double)
    together, equal, often = (ours(name, statistics, 3, data) for statistics in (None, 3, 1))
    assert all(torch.equal(a, b) for a, b in zip(together, equal, strict=True))
    assert not torch.equal(together[0], often[0])


@pytest.mark.parametrize("name", NAMES)
def test_statistics_rarer_than_refreshes_decide_when_there_is_something_new(name: str) -> None:
    data = batches(9, torch.double)
    for a, b in zip(ours(name, 4, 1, data), ours(name, None, 4, data), strict=True):
        assert torch.equal(a, b)


def test_curvature_is_captured_on_steps_of_statistics_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[int] = []
    plain_enter: Callable[[EagerCapture], EagerCapture] = EagerCapture.__enter__

    def enter(capture: EagerCapture) -> EagerCapture:
        captured.append(step)
        return plain_enter(capture)

    monkeypatch.setattr(EagerCapture, "__enter__", enter)
    model = small_mlp()
    optimizer = make("kfac", model, lr=0.01, refresh=plain(4), statistics=3)
    for step, (x, y) in enumerate(batches(10)):
        assert optimizer.refresh_due == (step % 3 == 0)  # type: ignore[attr-defined]
        backward(model, optimizer, x, y)
        optimizer.step()
    assert captured == [0, 3, 6, 9]
    # Inverses follow every fourth step: factors of step 3 at 4, of 6 at 8.
    assert optimizer.state[model[0].weight]["refreshed_at"] == 8


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cut", range(1, 8))
def test_continuing_is_bitwise_the_uninterrupted_run(name: str, cut: int) -> None:
    data = batches(10)
    options: dict[str, Any] = {"lr": LR, "refresh": plain(5), "statistics": 2}
    torch.manual_seed(4)
    model = small_mlp()
    whole, twin = copy.deepcopy(model), copy.deepcopy(model)
    train(whole, make(name, whole, **options), data)
    first = make(name, model, **options)
    train(model, first, data[:cut])
    twin.load_state_dict(model.state_dict())
    second = make(name, twin, **options)
    second.load_state_dict(first.state_dict())
    train(twin, second, data[cut:])
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_state_from_before_there_were_statistics_goes_on(name: str) -> None:
    data, finals = batches(10), []
    for old in (False, True):
        torch.manual_seed(4)
        model = small_mlp()
        train(model, first := make(name, model, lr=LR, refresh=plain(3)), data[:5])
        state = first.state_dict()
        for entry in state["state"].values() if old else ():
            if "averages" in entry:
                entry["refreshes"] = entry.pop("averages")
                del entry["averaged_at"]
        second = make(name, model, lr=LR, refresh=plain(3))
        second.load_state_dict(state)
        train(model, second, data[5:])
        finals.append(model)
    assert all(torch.equal(p, q) for p, q in zip(*(m.parameters() for m in finals), strict=True))


def wide(name: str, **options: Any) -> tuple[nn.Sequential, Base]:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 600), nn.Tanh(), nn.Linear(600, 4))
    kind: Any = {"kfac": KFAC, "shampoo": Shampoo}[name]
    return model, kind(model.named_parameters(), model=model, lr=0.01, refresh=plain(4), **options)


@pytest.mark.parametrize("name", NAMES)
def test_wide_factors_are_dense_and_columns_from_before_are_taken_over(name: str) -> None:
    data = batches(7)
    model, together = wide(name)
    train(model, together, data[:2])
    weight = model[0].weight
    assert any(key.startswith("columns") for key in together.state[weight])
    twin, apart = wide(name, statistics=1)
    twin.load_state_dict(model.state_dict())
    apart.load_state_dict(together.state_dict())
    losses = train(twin, apart, data[2:])
    assert not any(key.startswith("columns") for key in apart.state[twin[0].weight])
    assert losses[-1] < 2 * losses[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [0, -1, 2.0, True])
def test_an_interval_of_statistics_out_of_range_is_refused(name: str, bad: Any) -> None:
    with pytest.raises(UsageError, match="statistics must be a whole number"):
        make(name, small_mlp(), statistics=bad)


@pytest.mark.parametrize("name", NAMES)
def test_columns_and_statistics_of_their_own_do_not_go_together(name: str) -> None:
    with pytest.raises(UsageError, match="low-rank; use auto or dense"):
        make(name, small_mlp(), statistics=2, solver="low-rank")


def test_a_batch_that_is_not_finite_leaves_the_average_as_it_was() -> None:
    model = unbiased()
    optimizer = make("shampoo", model, lr=LR, refresh=plain(4), statistics=1)
    weight = model[0].weight
    for step, bad in enumerate([False, True, False]):
        weight.grad = torch.full_like(weight, torch.nan if bad else 1.0)
        with torch.no_grad():
            before = weight.clone()
        optimizer.step()
        assert optimizer.state[weight]["L0"].isfinite().all(), step
        with torch.no_grad():
            weight.copy_(before)
