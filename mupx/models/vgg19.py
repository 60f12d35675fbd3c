"""VGG-19: sixteen 3×3 convolutions in five groups and a linear read-out.

*Source*: K. Simonyan, A. Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
arXiv:1409.1556, in the form usual for CIFAR: global average pooling and one linear layer instead of three.
Width 64 is the standard net.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from mupx.models.arguments import activation_of, require_image, require_sizes

GROUPS = ((1, 2), (2, 2), (4, 4), (8, 4), (8, 4))  # channels over width, number of convolutions
LEAST_SIDE = 2 ** len(GROUPS)


def build(
    width: int,
    *,
    input_shape: tuple[int, ...],
    classes: int,
    batch_norm: bool = True,
    activation: str = "relu",
) -> nn.Sequential:
    """Build ``(conv → norm → act)… → pool`` five times, then ``global pool → output``, torch's default init.

    Args:
        width: Channels of the first group; the others have 2, 4, 8 and 8 times as many. 64 is standard.
        input_shape: ``[C, H, W]`` of one image.
        classes: Number of logits.
        batch_norm: Normalise after each convolution; its bias is then left out, as it has no effect.
        activation: A key of `mupx.models.arguments.ACTIVATIONS`.

    Raises:
        UsageError: An argument is out of range, or the image is smaller than 32×32.
    """
    require_sizes(width, input_shape, classes)
    require_image("vgg19", input_shape, LEAST_SIDE)
    activate = activation_of(activation)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    d_in, i = input_shape[0], 0
    for group, (multiple, count) in enumerate(GROUPS, start=1):
        for _ in range(count):
            i, d_out = i + 1, multiple * width
            layers[f"conv{i}"] = nn.Conv2d(d_in, d_out, kernel_size=3, padding=1, bias=not batch_norm)
            if batch_norm:
                layers[f"norm{i}"] = nn.BatchNorm2d(d_out)
            layers[f"act{i}"] = activate()
            d_in = d_out
        layers[f"pool{group}"] = nn.MaxPool2d(2)
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "output": nn.Linear(d_in, classes)}
    return nn.Sequential(layers)
