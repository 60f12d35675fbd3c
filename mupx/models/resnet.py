"""Residual networks with batch normalisation: ResNet-18, -34 and -50.

*Source*: K. He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385;
the stride of a bottleneck sits in its 3×3 convolution, as in torchvision. Width 64 is the standard net.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor, nn

from mupx.errors import UsageError
from mupx.models.arguments import (
    activation_of,
    require_choice,
    require_image,
    require_positive,
    require_sizes,
)

Activation = Callable[[], nn.Module]
LEAST_SIDE = 8  # what the stages' three halvings leave something of
SMALL_SIDE = 64  # up to here images get the stem of the CIFAR variants
STEMS = ("auto", "small", "large")


class Residual(nn.Module):
    """act(shortcut x + s · branch x), s = ``branch_scale``."""

    def __init__(
        self, branch: nn.Module, shortcut: nn.Module, activation: Activation, branch_scale: float
    ) -> None:
        super().__init__()
        self.branch, self.shortcut, self.act = branch, shortcut, activation()
        self.branch_scale = float(branch_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``[N, C, H, W]``."""
        result: Tensor = self.act(self.shortcut(x) + self.branch_scale * self.branch(x))
        return result


class ResNet(nn.Sequential):
    """``stem → stage1 … stage4 → global pool → output``; see `build` for the arguments."""

    residual_blocks = "*.branch.*"  # the parameters inside residual branches


def basic(d_in: int, channels: int, stride: int, activation: Activation) -> nn.Sequential:
    """Return a branch of two 3×3 convolutions."""
    return nn.Sequential(
        OrderedDict(
            conv1=_convolution(d_in, channels, 3, stride),
            norm1=nn.BatchNorm2d(channels),
            act1=activation(),
            conv2=_convolution(channels, channels, 3, 1),
            norm2=nn.BatchNorm2d(channels),
        )
    )


def bottleneck(d_in: int, channels: int, stride: int, activation: Activation) -> nn.Sequential:
    """Return a branch of 1×1, 3×3 and 1×1 convolutions that ends in four times the channels."""
    return nn.Sequential(
        OrderedDict(
            conv1=_convolution(d_in, channels, 1, 1),
            norm1=nn.BatchNorm2d(channels),
            act1=activation(),
            conv2=_convolution(channels, channels, 3, stride),
            norm2=nn.BatchNorm2d(channels),
            act2=activation(),
            conv3=_convolution(channels, 4 * channels, 1, 1),
            norm3=nn.BatchNorm2d(4 * channels),
        )
    )


# Depth → branch, its expansion of the channels, and the number of blocks of each stage.
DEPTHS: Mapping[int, tuple[Callable[..., nn.Sequential], int, tuple[int, ...]]] = MappingProxyType(
    {18: (basic, 1, (2, 2, 2, 2)), 34: (basic, 1, (3, 4, 6, 3)), 50: (bottleneck, 4, (3, 4, 6, 3))}
)


def build(
    width: int,
    *,
    input_shape: tuple[int, ...],
    classes: int,
    depth: int = 18,
    stem: str = "auto",
    activation: str = "relu",
    branch_scale: float = 1.0,
) -> ResNet:
    """Build a ResNet with torch's default init.

    Args:
        width: Channels of the first stage; the others have 2, 4 and 8 times as many. 64 is standard.
        input_shape: ``[C, H, W]`` of one image.
        classes: Number of logits.
        depth: 18, 34 or 50.
        stem: ``small`` (a 3×3 convolution, for CIFAR), ``large`` (7×7 of stride 2 and max-pooling, for
            ImageNet) or ``auto``: small for images of at most 64×64 pixels.
        activation: A key of `mupx.models.arguments.ACTIVATIONS`.
        branch_scale: Factor on every residual branch; base depth / depth transfers over depth.

    Raises:
        UsageError: An argument is out of range.
    """
    require_sizes(width, input_shape, classes)
    require_image("resnet", input_shape, LEAST_SIDE)
    require_choice("stem", stem, STEMS)
    require_positive("branch_scale", branch_scale)
    activate = activation_of(activation)
    if isinstance(depth, bool) or depth not in DEPTHS:
        raise UsageError(f"depth is {depth!r}, but resnet has the depths {', '.join(map(str, DEPTHS))}")
    branch_of, expansion, counts = DEPTHS[depth]
    large = stem == "large" or (stem == "auto" and max(input_shape[1:]) > SMALL_SIDE)
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=_stem(input_shape[0], width, large, activate))
    d_in = width
    for stage, count in enumerate(counts):
        channels = width * 2**stage
        blocks = []
        for i in range(count):
            stride = 2 if stage and not i else 1
            branch = branch_of(d_in, channels, stride, activate)
            shortcut = _shortcut(d_in, expansion * channels, stride)
            blocks.append(Residual(branch, shortcut, activate, branch_scale))
            d_in = expansion * channels
        layers[f"stage{stage + 1}"] = nn.Sequential(*blocks)
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "output": nn.Linear(d_in, classes)}
    return ResNet(layers)


def _stem(channels: int, width: int, large: bool, activation: Activation) -> nn.Sequential:
    size, stride = (7, 2) if large else (3, 1)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=_convolution(channels, width, size, stride), norm=nn.BatchNorm2d(width), act=activation()
    )
    if large:
        layers["pool"] = nn.MaxPool2d(3, stride=2, padding=1)
    return nn.Sequential(layers)


def _shortcut(d_in: int, d_out: int, stride: int) -> nn.Module:
    if d_in == d_out and stride == 1:
        return nn.Identity()
    projection = OrderedDict(conv=_convolution(d_in, d_out, 1, stride), norm=nn.BatchNorm2d(d_out))
    return nn.Sequential(projection)


def _convolution(d_in: int, d_out: int, size: int, stride: int) -> nn.Conv2d:
    # No bias: the batch normalisation that follows would subtract it again.
    return nn.Conv2d(d_in, d_out, size, stride=stride, padding=size // 2, bias=False)
