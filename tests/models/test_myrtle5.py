from __future__ import annotations

import pytest
import torch
from torch import nn

from mupx.errors import UsageError
from mupx.models.myrtle5 import build


def test_five_layers() -> None:
    model = build(8, input_shape=(3, 32, 32), classes=10)
    weights = {
        n: tuple(m.weight.shape) for n, m in model.named_children() if isinstance(m, nn.Conv2d | nn.Linear)
    }
    convolutions = {f"conv{i}": (8, 3 if i == 1 else 8, 3, 3) for i in range(1, 5)}
    assert weights == {**convolutions, "output": (10, 8)}


def test_names_in_order() -> None:
    names = "conv1 act1 conv2 act2 pool2 conv3 act3 pool3 conv4 act4 pool4 flatten output"
    model = build(8, input_shape=(3, 32, 32), classes=10)
    assert [name for name, _ in model.named_children()] == names.split()


@pytest.mark.parametrize("side", [4, 14, 28, 32])
def test_feature_maps_shrink_by_four(side: int) -> None:
    model = build(2, input_shape=(1, side, side), classes=3)
    features = model[: list(dict(model.named_children())).index("pool4")]
    assert features(torch.zeros(1, 1, side, side)).shape == (1, 2, side // 4, side // 4)


@pytest.mark.parametrize("shape", [(784,), (1, 3, 8), (1, 8, 3), (2, 1, 8, 8)])
def test_only_images_large_enough(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"myrtle5 takes images \[C, H, W\] of at least 4×4"):
        build(8, input_shape=shape, classes=3)
