"""Running moments equal their formulas, in whatever way they are computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mupx import running_means
from mupx.running_means import FUSED_FROM, adam_direction, heavy_ball, running
from tests import oracles

BETAS = (0.8, 0.95)
SIDE = 2 * int(FUSED_FROM**0.5)


def test_adam_equals_plain_python() -> None:
    gradients = torch.randn(5, 3, dtype=torch.double)
    mean, square = torch.zeros(2, 3, dtype=torch.double)
    expected = oracles.adam_entries(gradients.tolist(), BETAS, 0.01)
    for step, gradient in enumerate(gradients, start=1):
        update = adam_direction(gradient, mean, square, step, BETAS, 0.01)
        assert update.tolist() == pytest.approx(expected[step - 1], rel=1e-12)
    wrong = oracles.adam_entries(gradients.tolist(), (0.8, 0.9), 0.01)
    assert update.tolist() != pytest.approx(wrong[-1], rel=1e-3)


def large(layout: str, dtype: torch.dtype) -> Tensor:
    """Return a tensor that is large enough for the fused kernel."""
    if layout == "channels-last":
        return torch.randn(SIDE, SIDE // 9, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
    matrix = torch.randn(SIDE, SIDE, dtype=dtype)
    return matrix.t() if layout == "transposed" else matrix


def after(gradients: list[Tensor], means: str, first_step: int = 1) -> list[Tensor]:
    """Return the last update and the means after some gradients."""
    kept = torch.preserve_format if means == "alike" else torch.contiguous_format
    mean, square = (torch.zeros_like(gradients[0], memory_format=kept) for _ in "mv")
    for step, gradient in enumerate(gradients, start=first_step):
        update = adam_direction(gradient, mean, square, step, BETAS, 0.01)
    return [update, mean, square]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kept", ["alike", "contiguous"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels-last"])
def test_the_fused_kernel_is_adam_in_any_layout(
    layout: str, kept: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = running_means.torch_adam
    monkeypatch.setattr(running_means, "torch_adam", lambda *a, **k: (calls.append(a), original(*a, **k)))
    gradients = [large(layout, dtype) for _ in range(3)]
    fused, off_by_one = after(gradients, kept), after(gradients, kept, first_step=2)
    assert bool(calls) == (kept == "alike" or layout == "contiguous")
    monkeypatch.setattr(running_means, "FUSED_FROM", SIDE**3)
    calls.clear()
    plain = after(gradients, kept)
    assert not calls
    tolerance = 100 * torch.finfo(dtype).eps
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert not torch.allclose(off_by_one[0], plain[0], rtol=1e-3)


def test_hyperparameters_of_several_members_are_not_fused() -> None:
    gradient, eps = torch.randn(2, SIDE, SIDE), torch.tensor([1e-3, 1.0])
    together = adam_direction(gradient, *torch.zeros(2, 2, SIDE, SIDE), 1, BETAS, eps)
    for member in range(2):
        zeros = torch.zeros(2, SIDE, SIDE)
        alone = adam_direction(gradient[member], *zeros, 1, BETAS, float(eps[member]))
        torch.testing.assert_close(together[member], alone)


def test_heavy_ball() -> None:
    updates = torch.randn(4, 3, dtype=torch.double)
    buffer = None
    for update in updates:
        buffer = heavy_ball(update, buffer, 0.5)
    assert buffer is not None
    torch.testing.assert_close(buffer, sum(0.5 ** (3 - t) * u for t, u in enumerate(updates)))


def test_the_first_buffer_does_not_alias_the_gradient() -> None:
    update = torch.ones(2)
    heavy_ball(update, None, 0.9).mul_(2)
    assert update.tolist() == [1, 1]


def test_running_entries_are_the_state_s_own() -> None:
    state: dict[str, Tensor] = {}
    first, second = (running(state, key, torch.ones(3)) for key in "mv")
    first.add_(1)
    assert running(state, "m", torch.ones(3)) is first
    assert (state["m"].tolist(), second.tolist()) == ([1.0] * 3, [0.0] * 3)
