"""What Adam moves, moves in one call for each lr and eps, and to where it would by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mupx import running_means
from mupx.linalg import Scalar
from mupx.optim import base
from mupx.optim.adam import AdamW
from mupx.optim.base import Base
from mupx.optim.muon import Muon
from mupx.optim.soap import SOAP

SHAPES = [(4, 3), (3,), (2, 3, 3, 3), (), (1, 5), (6, 2)]


def net(dtype: torch.dtype = torch.double) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in SHAPES]
    made[2].data = made[2].data.to(memory_format=torch.channels_last)
    made[5].data = made[5].data.t().contiguous().t()
    return made


def groups_of(parameters: list[nn.Parameter], mode: str, decay: float) -> list[dict[str, Any]]:
    more = {"weight_decay": decay, "weight_decay_mode": mode, "algorithm": "adamw"}
    lrs, eps = [0.1, 0.02, 0.1, 0.1, 0.02, 0.1], [1e-8, 1e-8, 1e-2, 1e-8, 1e-8, 1e-8]
    return [
        {"params": [p], "lr": lr, "eps": e, **more} for p, lr, e in zip(parameters, lrs, eps, strict=True)
    ]


def trained(kind: type[Base], mode: str, decay: float, **more: Any) -> list[Tensor]:
    parameters = net()
    optimizer = kind(groups_of(parameters, mode, decay), **more)  # type: ignore[call-arg]
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        for index, parameter in enumerate(parameters):
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.double)
            parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
            if (step, index) == (1, 4):  # from here on its counter is behind
                parameter.grad = None
        optimizer.step()
    return [p.detach() for p in parameters]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the tensors of every call of torch's kernel."""
    found: list[int] = []
    original = running_means.torch_adam

    def counting(weights: list[Tensor], *rest: Any, **more: Any) -> None:
        found.append(len(weights))
        original(weights, *rest, **more)

    monkeypatch.setattr(running_means, "torch_adam", counting)
    return found


@pytest.mark.parametrize(
    ("mode", "decay"), [("adamw", 0.0), ("adamw", 0.1), ("independent", 0.1), ("l2", 0.1)]
)
@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_together_is_one_by_one(
    kind: type[Base], mode: str, decay: float, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = trained(kind, mode, decay)
    # Two lrs, of the first one parameter with an eps of its own; then one with a counter of its own.
    assert calls == [3, 2, 1] + [3, 1, 1] + [3, 1, 1, 1] * 2
    monkeypatch.setattr(base, "can_fuse", lambda *tensors: False)
    alone = trained(kind, mode, decay)
    assert len(calls) == 14
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    other = trained(kind, mode, decay + 0.05)
    assert not any(torch.allclose(a, b, rtol=1e-6) for a, b in zip(together, other, strict=True))


class Halved(AdamW):
    def direction(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        return super().direction(parameter, gradient, group) / 2


class Quartered(Muon):
    def adam(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        return super().adam(parameter, gradient, group) / 4


class Shortened(AdamW):
    def step_size(self, parameter: Tensor, group: dict[str, Any]) -> Scalar:
        return super().step_size(parameter, group) / 3


@pytest.mark.parametrize(
    ("kind", "plain", "part"), [(Shortened, AdamW, 3), (Halved, AdamW, 2), (Quartered, Muon, 4)]
)
def test_a_subclass_that_changes_the_update_is_asked(kind: type[Base], plain: type[Base], part: int) -> None:
    start = net()
    found, whole = trained(kind, "adamw", 0.0), trained(plain, "adamw", 0.0)
    for first, a, b in zip(start, found, whole, strict=True):
        torch.testing.assert_close(part * (a - first), b - first)


def test_soap_s_own_fallback_leaves_out_the_first_gradient(calls: list[int]) -> None:
    bias = nn.Parameter(torch.zeros(3))
    optimizer = SOAP([bias])
    bias.grad = torch.ones(3)
    optimizer.step()
    assert not bias.any()
    optimizer.step()
    assert bias.all()
    assert not calls


def test_a_learning_rate_that_is_a_tensor_and_a_gradient_laid_out_otherwise(calls: list[int]) -> None:
    weights = [nn.Parameter(torch.ones(4, 3)) for _ in range(3)]
    lr = torch.tensor(0.1)
    optimizer = AdamW([{"params": weights[:1], "lr": lr}, {"params": weights[1:], "lr": 0.1}])
    gradient = torch.arange(1.0, 13.0).view(4, 3)
    weights[0].grad, weights[1].grad = gradient.clone(), gradient.clone()
    weights[2].grad = gradient.t().contiguous().t()
    optimizer.step()
    assert calls == [1]
    for other in weights[1:]:
        torch.testing.assert_close(weights[0], other)
