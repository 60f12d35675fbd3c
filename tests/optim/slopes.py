"""How the first step of an optimizer moves each layer's output, over width: slopes that a right rule makes 0.

Setting: tanh MLP 24–M–M–10 without biases, float64, synthetic classification, batch 64, base width 32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import mupx
from mupx.optim import OPTIMIZERS
from mupx.scaling import Power
from tests.optim.training import backward

BASE, WIDTHS, SEEDS = 32, (64, 128, 256, 512), (0, 1)
INPUTS, CLASSES, BATCH = 24, 10, 64
ONE = Power()
NOTHING: Mapping[str, float] = {}


def build(width: int) -> nn.Sequential:
    sizes = (INPUTS, width, width, CLASSES)
    layers = [nn.Linear(a, b, bias=False).double() for a, b in pairwise(sizes)]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, INPUTS, generator=generator, dtype=torch.float64)
    teacher = torch.randn(INPUTS, CLASSES, generator=generator, dtype=torch.float64)
    return x, (x @ teacher).argmax(1)


def movements(
    name: str,
    width: int,
    seed: int,
    lr: float,
    steps: int,
    wrong: Power,
    without: str,
    values: Mapping[str, float],
    arguments: dict[str, Any],
) -> list[float]:
    """Return mean |Δh_l| of the three layers after ``steps``.

    ``wrong`` multiplies the rule's lr; the groups are stripped of the key ``without``.
    """
    torch.manual_seed(seed)
    model, groups = mupx.parametrize(build, width=width, base_width=BASE, optimizer=name, lr=lr, **values)
    for group in groups:
        group["lr"] = group["lr"] * wrong(group["r_in"], group["r_out"])
        group.pop(without, None)
    optimizer = OPTIMIZERS.load(name)(groups, **arguments)
    x, y = batch(seed)
    before = outputs(model, x)
    for step in range(steps):
        backward(model, optimizer, *(batch(100 * seed + step) if step else (x, y)))
        optimizer.step()
    return [float((a - b).abs().mean()) for a, b in zip(outputs(model, x), before, strict=True)]


@torch.no_grad()
def outputs(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    found = []
    for layer in model:
        x = layer(x)
        if isinstance(layer, nn.Linear):
            found.append(x)
    return found


def slopes(
    name: str,
    lr: float,
    *,
    steps: int = 1,
    wrong: Power = ONE,
    without: str = "",
    values: Mapping[str, float] = NOTHING,
    widths: Sequence[int] = WIDTHS,
    **arguments: Any,
) -> list[float]:
    """Return the slope of log mean |Δh_l| against log M of the input, hidden and output layer.

    Args:
        name: The optimizer.
        lr: At the base width.
        steps: Steps done.
        wrong: What the rule's lr is multiplied by.
        without: Key that the groups are stripped of.
        values: Further hyperparameters.
        widths: M.
        **arguments: Of the optimizer's constructor.
    """
    moved = [
        np.mean(
            [np.log(movements(name, width, s, lr, steps, wrong, without, values, arguments)) for s in SEEDS],
            axis=0,
        )
        for width in widths
    ]
    return [float(slope) for slope in np.polyfit(np.log(widths), np.array(moved), 1)[0]]


def flat(found: Sequence[float], tolerance: float = 0.1) -> bool:
    return all(abs(slope) <= tolerance for slope in found)


# Factors on a right rule's lr, half a power of width each.
WRONG = (Power(r_out=0.5), Power(r_in=0.5), Power(r_in=-0.5), Power(r_in=0.5, r_out=-0.5))
