"""Myrtle-5: four 3×3 convolutions and a linear read-out, the smallest CNN of its family.

*Source*: V. Shankar et al., "Neural Kernels Without Tangents", ICML 2020 (after D. Page's Myrtle
networks), with global average pooling before the read-out.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from mupx.models.arguments import activation_of, require_image, require_sizes

LEAST_SIDE = 4  # what two 2×2 poolings leave something of


def build(
    width: int,
    *,
    input_shape: tuple[int, ...],
    classes: int,
    activation: str = "relu",
    bias: bool = True,
) -> nn.Sequential:
    """Build ``conv1 → conv2 → pool → conv3 → pool → conv4 → global pool → output`` with torch's default init.

    Args:
        width: Number of channels of every convolution.
        input_shape: ``[C, H, W]`` of one image.
        classes: Number of logits.
        activation: A key of `mupx.models.arguments.ACTIVATIONS`, applied after each convolution.
        bias: Whether convolutions and read-out have biases.

    Raises:
        UsageError: An argument is out of range, or the input is no image of at least 4×4 pixels.
    """
    require_sizes(width, input_shape, classes)
    require_image("myrtle5", input_shape, LEAST_SIDE)
    activate = activation_of(activation)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, channels in enumerate([input_shape[0], width, width, width], start=1):
        layers[f"conv{i}"] = nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=bias)
        layers[f"act{i}"] = activate()
        if i in (2, 3):
            layers[f"pool{i}"] = nn.AvgPool2d(2)
    layers["pool4"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["output"] = nn.Linear(width, classes, bias=bias)
    return nn.Sequential(layers)
