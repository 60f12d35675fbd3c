"""Lion and Adam-atan2: plain Python twins, what needs no eps, and the width rule on one step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mupx.errors import UsageError
from mupx.optim.adam_atan2 import AdamAtan2, atan2_direction
from mupx.optim.base import Base
from mupx.optim.lion import Lion, lion_direction
from mupx.scaling import RULES, Power
from tests import oracles
from tests.optim.slopes import WRONG, flat, slopes

BETAS = (0.8, 0.95)
GRADIENTS = [[0.5, -2.0, 0.0], [-0.1, -2.5, 0.0], [-3.0, 0.5, 1e-12], [0.2, 0.1, -1e-12]]


def directions(kind: type[Base], gradients: list[Any], **options: Any) -> list[Tensor]:
    """Return what is subtracted in each step at lr 1."""
    weight = nn.Parameter(torch.zeros(torch.tensor(gradients[0]).shape, dtype=torch.float64))
    optimizer = kind([weight], lr=1.0, betas=BETAS, **options)  # type: ignore[call-arg]
    found = []
    for gradient in gradients:
        before = weight.detach().clone()
        weight.grad = torch.as_tensor(gradient, dtype=torch.float64)
        optimizer.step()
        found.append(before - weight.detach())
    return found


def test_lion_is_its_twin() -> None:
    expected = torch.tensor(oracles.lion_entries(GRADIENTS, BETAS), dtype=torch.float64)
    torch.testing.assert_close(torch.stack(directions(Lion, GRADIENTS)), expected, rtol=0, atol=1e-12)
    swapped = torch.tensor(oracles.lion_entries(GRADIENTS, BETAS[::-1]), dtype=torch.float64)
    assert not torch.equal(expected, swapped)


@pytest.mark.parametrize(("a", "b"), [(4 / math.pi, 1.0), (1.0, 2.0)])
def test_adam_atan2_is_its_twin(a: float, b: float) -> None:
    found = torch.stack(directions(AdamAtan2, GRADIENTS, a=a, b=b))
    for other, close in (((a, b), True), ((a, 1.1 * b), False), ((1.1 * a, b), False)):
        twin = torch.tensor(oracles.atan2_entries(GRADIENTS, BETAS, *other), dtype=torch.float64)
        assert torch.allclose(found, twin, rtol=1e-12, atol=1e-14) == close


def test_adam_atan2_moves_by_one_where_adam_does() -> None:
    weight = nn.Parameter(torch.zeros(3))
    weight.grad = torch.tensor([2.0, -1e-12, 0.0])
    AdamAtan2([weight], lr=0.5).step()
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.5, 0.5, 0.0]))


def test_adam_atan2_tends_to_adam() -> None:
    found = directions(AdamAtan2, GRADIENTS, a=1e6, b=1e6)
    expected = oracles.adam_entries([g[:2] for g in GRADIENTS], BETAS, 0.0)  # without the 0/0 of the third
    for row, adam in zip(found, expected, strict=True):
        torch.testing.assert_close(row[:2], torch.tensor(adam, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", [Lion, AdamAtan2])
@pytest.mark.parametrize("power", [-40, 40])
def test_a_factor_on_the_gradient_changes_nothing(kind: type[Base], power: int) -> None:
    plain = torch.stack(directions(kind, GRADIENTS))
    scaled = torch.stack(directions(kind, [[g * 2.0**power for g in row] for row in GRADIENTS]))
    assert torch.equal(plain, scaled)


@pytest.mark.parametrize(("a", "b"), [(0.0, 1.0), (1.0, -1.0), (math.nan, 1.0), (1.0, math.inf)])
def test_constants_out_of_range_are_refused(a: float, b: float) -> None:
    with pytest.raises(UsageError, match="must be a finite number > 0"):
        AdamAtan2([nn.Parameter(torch.zeros(2))], a=a, b=b)


def test_leading_dimensions_are_members_of_a_population() -> None:
    gradient, mean = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    square = torch.rand(3, 4, 5, dtype=torch.float64)

    def found(part: slice | int) -> list[torch.Tensor]:
        g, signs, first, second = gradient[part], *(x[part].clone() for x in (mean, mean, square))
        updates = lion_direction(g, signs, BETAS), atan2_direction(g, first, second, 3, BETAS, 1.0, 2.0)
        return [*updates, signs, first, second]

    for member in range(3):
        for a, b in zip(found(slice(None)), found(member), strict=True):
            torch.testing.assert_close(a[member], b, rtol=1e-14, atol=1e-15)


def test_neither_rule_has_an_eps() -> None:
    for name in ("lion", "adam-atan2"):
        assert RULES[name].eps is None
        assert RULES[name].lr == Power(r_in=-1)
    weight = nn.Parameter(torch.zeros(3))
    optimizer = AdamAtan2([weight])
    weight.grad = torch.ones(3)
    optimizer.step()
    scale = optimizer.scales(weight, optimizer.param_groups[0])["v"]
    assert scale.size == pytest.approx(1.0)
    assert scale.ridge is None


@pytest.mark.parametrize(("name", "lr"), [("lion", 0.002), ("adam-atan2", 0.003)])
def test_the_first_step_moves_every_layer_alike_at_every_width(name: str, lr: float) -> None:
    assert flat(slopes(name, lr))
    assert not any(flat(slopes(name, lr, wrong=wrong)) for wrong in WRONG)
