"""A fully connected network: the model most width-transfer claims are first tested on."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from mupx.errors import UsageError
from mupx.models.arguments import activation_of, require_integer, require_sizes


def build(
    width: int,
    *,
    input_shape: tuple[int, ...],
    classes: int,
    depth: int = 3,
    activation: str = "relu",
    bias: bool = True,
    ratios: Sequence[float] | None = None,
) -> nn.Sequential:
    """Build ``flatten → input → act0 → hidden1 → act1 → … → output`` with torch's default init.

    Args:
        width: Number of units in a hidden layer.
        input_shape: Shape of one input, flattened to ``[d]``.
        classes: Number of logits.
        depth: Number of linear layers, input and output included.
        activation: A key of `mupx.models.arguments.ACTIVATIONS`.
        bias: Whether the linear layers have biases.
        ratios: One number for each of the ``depth - 1`` hidden layers; layer i then has
            ``round(width * ratios[i])`` units.

    Raises:
        UsageError: An argument is out of range.
    """
    require_sizes(width, input_shape, classes)
    require_integer("depth", depth, least=2)
    activate = activation_of(activation)
    sizes = [math.prod(input_shape), *_hidden_sizes(width, depth, ratios), classes]
    names = ["input", *(f"hidden{i}" for i in range(1, depth - 1)), "output"]
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for i, (name, (d_in, d_out)) in enumerate(zip(names, pairwise(sizes), strict=True)):
        layers[name] = nn.Linear(d_in, d_out, bias=bias)
        if name != "output":
            layers[f"act{i}"] = activate()
    return nn.Sequential(layers)


def _hidden_sizes(width: int, depth: int, ratios: Sequence[float] | None) -> list[int]:
    if ratios is None:
        return [width] * (depth - 1)
    if len(ratios) != depth - 1 or not all(math.isfinite(ratio) for ratio in ratios):
        raise UsageError(
            f"ratios is {tuple(ratios)} at depth {depth}, but must hold {depth - 1} finite numbers: "
            "give one for each hidden layer"
        )
    sizes = [round(width * ratio) for ratio in ratios]
    if min(sizes) < 1:
        raise UsageError(
            f"ratios {tuple(ratios)} at width {width} give hidden layers of {sizes} units, "
            "but each needs one at least; use larger ratios or a larger width"
        )
    return sizes
