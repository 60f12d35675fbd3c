"""Running moments of gradients, updated in place: the heavy ball's buffer, Adam's means.

In place, because a new tensor for every state and every intermediate result would take most of a step's
time where there are few examples to a weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam as torch_adam

from mupx.linalg import Scalar, over

FUSED_FROM = 2**14  # entries from which torch's one kernel is quicker than calls for each operation


def running(state: dict[str, Any], key: str, like: Tensor) -> Tensor:
    """Return an entry of a state that is updated in place; zeros at first."""
    if key not in state:
        state[key] = torch.zeros_like(like)
    entry: Tensor = state[key]
    return entry


def heavy_ball(update: Tensor, buffer: Tensor | None, momentum: Scalar) -> Tensor:
    """Return the new momentum buffer v ← μ v + u, in the place of the old one; the first is a copy of u."""
    return update.clone() if buffer is None else buffer.mul_(over(momentum, buffer)).add_(update)


def adam_means(
    gradient: Tensor, mean: Tensor, square: Tensor, step: int, betas: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Return (m̂, √v̂), new tensors, with m, v the running means of g and g² (arXiv:1412.6980).

    Args:
        gradient: g, ``[..., *shape]``.
        mean: m before this step, zeros at first; overwritten.
        square: v before this step, zeros at first; overwritten.
        step: Steps including this one, from 1.
        betas: Decay rates of m and v.
    """
    beta1, beta2 = betas
    mean.lerp_(gradient, 1 - beta1)
    square.lerp_(gradient.square(), 1 - beta2)
    return mean / (1 - beta1**step), square.sqrt().div_(math.sqrt(1 - beta2**step))


def adam_direction(
    gradient: Tensor, mean: Tensor, square: Tensor, step: int, betas: Sequence[float], eps: Scalar
) -> Tensor:
    """Return u = m̂ / (√v̂ + eps), arguments as for :func:`adam_means`.

    Args:
        gradient: g.
        mean: m; overwritten.
        square: v; overwritten.
        step: Steps including this one.
        betas: Decay rates.
        eps: In the units of the gradient, broadcastable against ``[...]``.
    """
    if _fused(gradient, mean, square, eps):
        # One pass over the entries in place of ten. From weights of zero a step of length −1 is u itself.
        update = torch.zeros_like(gradient)
        torch_adam(
            [update],
            [gradient],
            [mean],
            [square],
            [],
            [torch.tensor(float(step - 1))],
            beta1=betas[0],
            beta2=betas[1],
            eps=float(eps),
            lr=-1.0,
            weight_decay=0.0,
            amsgrad=False,
            maximize=False,
            fused=True,
        )
        return update
    corrected, root = adam_means(gradient, mean, square, step, betas)
    return corrected.div_(root.add_(over(eps, root)))


def _fused(gradient: Tensor, mean: Tensor, square: Tensor, eps: Scalar) -> bool:
    """Whether torch's kernel can do it: on a CPU, where its step counter costs no transfer to a device."""
    tensors = (gradient, mean, square)
    return (
        isinstance(eps, float)
        and gradient.numel() >= FUSED_FROM
        and all(type(tensor) is Tensor and tensor.device.type == "cpu" for tensor in tensors)
        and all(tensor.stride() == gradient.stride() and tensor.dtype == gradient.dtype for tensor in tensors)
    )
