from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from mupx.errors import UsageError
from mupx.models.mlp import build


def shapes(**args: Any) -> dict[str, tuple[int, ...]]:
    model = build(8, input_shape=(1, 3, 3), classes=5, **args)
    return {name: tuple(m.weight.shape) for name, m in model.named_children() if isinstance(m, nn.Linear)}


def test_names_in_order() -> None:
    model = build(8, input_shape=(9,), classes=5, depth=4)
    assert [name for name, _ in model.named_children()] == [
        "flatten", "input", "act0", "hidden1", "act1", "hidden2", "act2", "output",
    ]  # fmt: skip


def test_depth_counts_linear_layers() -> None:
    assert shapes(depth=2) == {"input": (8, 9), "output": (5, 8)}
    assert shapes() == {"input": (8, 9), "hidden1": (8, 8), "output": (5, 8)}


def test_ratios_make_hidden_widths_unequal() -> None:
    assert shapes(depth=4, ratios=(1, 0.5, 2.0)) == {
        "input": (8, 9), "hidden1": (4, 8), "hidden2": (16, 4), "output": (5, 16),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"depth": 1}, "depth is 1, but must be a whole number of at least 2"),
        ({"depth": 2.0}, "depth is 2.0"),
        ({"ratios": (1.0,)}, "must hold 2 finite numbers"),
        ({"ratios": (1.0, float("nan"))}, "must hold 2 finite numbers"),
        ({"ratios": (1.0, 0.01)}, r"hidden layers of \[8, 0\] units"),
    ],
)
def test_bad_arguments(args: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        shapes(**args)
