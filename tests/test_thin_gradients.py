"""A gradient is left as a thin product where the rows of the pass make it, in whatever precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mupx import curvature, factor_sums
from mupx.factor_sums import FactorRows

N, WIDTH = 12, 64


def passed(dtype: torch.dtype | None) -> tuple[FactorRows, Tensor, Tensor]:
    """Return rows, gradient and weight of a layer after a pass, under autocast where a dtype is given."""
    torch.manual_seed(0)
    layer, rows = nn.Linear(WIDTH, WIDTH), FactorRows(limit=N, summed=False)
    x = torch.randn(N, WIDTH)
    with curvature.EagerCapture({"layer": layer}, {"layer": rows}):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            outputs = layer(x)
        outputs.float().square().sum().backward()
    assert layer.weight.grad is not None
    return rows, layer.weight.grad, layer.weight.detach()


EDITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "as it is": lambda G, W: G,
    "a loss scale undone": lambda G, W: G / 1024,
    "decay": lambda G, W: G + 2e-3 * G.norm() / W.norm() * W,
    "noise": lambda G, W: G + 2e-3 * G.norm() / WIDTH * torch.randn(WIDTH, WIDTH),
    "another gradient": lambda G, W: G.flip(0),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_edits_are_seen_and_rounding_is_none(dtype: torch.dtype | None, edit: str) -> None:
    rows, G, W = passed(dtype)
    actual = EDITS[edit](G, W)
    thin = rows.gradient(actual)
    assert (thin is not None) == (edit in ("as it is", "a loss scale undone"))
    if thin is not None:
        error = (thin.factor * thin.D.mT @ thin.H - actual).norm() / actual.norm()
        assert error < (1e-6 if dtype is None else 4e-3)


def test_a_small_edit_would_hide_among_rounding_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, G, W = passed(torch.bfloat16)
    decayed = EDITS["decay"](G, W)
    assert rows.gradient(decayed) is None
    monkeypatch.setattr(factor_sums, "_only_rounded", lambda matrix, dtype: True)
    assert rows.gradient(decayed) is not None


def test_no_gradient_is_a_product_of_coarse_rows_to_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, G, _ = passed(torch.bfloat16)
    monkeypatch.setattr(factor_sums, "_only_rounded", lambda matrix, dtype: False)
    assert rows.gradient(G) is None
