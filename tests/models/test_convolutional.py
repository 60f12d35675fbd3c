"""ResNet and VGG: layer counts and shapes of the published nets at width 64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mupx.errors import UsageError
from mupx.models import resnet, vgg19

from .cases import CASES


def weights(model: nn.Module) -> int:
    """Number of convolutions and linear layers, without the projections of shortcuts."""
    return sum(isinstance(m, nn.Conv2d | nn.Linear) for n, m in model.named_modules() if "shortcut" not in n)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("depth", "expected"), [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032)])
def test_resnets_for_imagenet_are_the_published_ones(depth: int, expected: int) -> None:
    with torch.device("meta"):
        model = resnet.build(64, input_shape=(3, 224, 224), classes=1000, depth=depth)
    assert weights(model) == depth
    assert parameters(model) == expected  # torchvision's documented num_params


def test_vgg19_has_sixteen_convolutions_and_one_linear_layer() -> None:
    with torch.device("meta"):
        model = vgg19.build(64, input_shape=(3, 32, 32), classes=10, batch_norm=False)
    convolutions = [m for m in model if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 16
    assert parameters(model) == 20_024_384 + 512 * 10 + 10  # torchvision's features, then one read-out
    assert [c.out_channels for c in convolutions] == [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8


@pytest.mark.parametrize(
    ("side", "stem", "expected"),
    [(32, "auto", 32), (64, "auto", 64), (65, "auto", 17), (32, "large", 8), (128, "small", 128)],
)
def test_the_stem_follows_the_size_of_the_image(side: int, stem: str, expected: int) -> None:
    model = resnet.build(2, input_shape=(3, side, side), classes=4, stem=stem)
    assert model.get_submodule("stem")(torch.zeros(2, 3, side, side)).shape[-1] == expected


def test_every_stage_but_the_first_halves_the_image_and_doubles_the_channels() -> None:
    model = resnet.build(4, input_shape=(3, 32, 32), classes=4)
    x = model.get_submodule("stem")(torch.randn(2, 3, 32, 32))
    shapes = []
    for stage in range(1, 5):
        x = model.get_submodule(f"stage{stage}")(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(4, 32, 32), (8, 16, 16), (16, 8, 8), (32, 4, 4)]


def test_a_block_adds_its_branch_to_its_shortcut() -> None:
    model = resnet.build(4, input_shape=(3, 8, 8), classes=4, branch_scale=0.25).eval()
    for name in ("stage1.0", "stage2.0"):
        block = model.get_submodule(name)
        assert isinstance(block, resnet.Residual)
        x = torch.randn(2, 4, 8, 8)
        torch.testing.assert_close(block(x), (block.shortcut(x) + 0.25 * block.branch(x)).relu())


@pytest.mark.parametrize("name", ["resnet", "vgg19", "resnet-50"])
def test_evaluation_uses_the_running_statistics(name: str) -> None:
    model, inputs = CASES[name].build(), CASES[name].inputs(16)
    before = model.eval()(inputs)
    model.train()(inputs)
    assert not torch.equal(model.eval()(inputs), before)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"depth": 19}, "depth is 19, but resnet has the depths 18, 34, 50"),
        ({"depth": "50"}, "depth is '50'"),
        ({"depth": True}, "depth is True"),
        ({"stem": "tiny"}, "unknown stem 'tiny'"),
        ({"branch_scale": -1}, "branch_scale is -1"),
        ({"input_shape": (3, 7, 7)}, "at least 8×8 pixels"),
    ],
)
def test_bad_arguments_of_resnet(args: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CASES["resnet"].build(**args)


def test_vgg19_needs_32_pixels() -> None:
    with pytest.raises(UsageError, match="at least 32×32 pixels"):
        CASES["vgg19"].build(input_shape=(3, 28, 28))
