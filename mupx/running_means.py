"""Running moments of gradients, updated in place: the heavy ball's buffer, Adam's means.

In place, because a new tensor for every state and every intermediate result would take most of a step's
time where there are few examples to a weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam as torch_adam

from mupx.linalg import Scalar, over

FUSED_FROM = 2**14  # entries of one tensor from which torch's kernel is quicker than a call per operation
PLAIN = (Tensor, nn.Parameter)


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
    large = gradient.numel() >= FUSED_FROM
    if large and isinstance(eps, float) and can_fuse(gradient, mean, square):
        # One pass over the entries in place of ten. From weights of zero a step of length −1 is u itself.
        update = torch.zeros_like(gradient)
        adam_steps([(update, gradient, mean, square)], step, betas, eps, lr=-1.0)
        return update
    corrected, root = adam_means(gradient, mean, square, step, betas)
    return corrected.div_(root.add_(over(eps, root)))


def adam_steps(
    tensors: Iterable[Sequence[Tensor]], step: int, betas: Sequence[float], eps: float, lr: float
) -> None:
    """Do W ← W − lr m̂ / (√v̂ + eps) for many tensors by one call of torch's fused kernel.

    Args:
        tensors: (W, g, m, v) of each, such as :func:`can_fuse` allows; all but g overwritten.
        step: Steps including this one.
        betas: Decay rates.
        eps: In the units of the gradient.
        lr: Length of the step.
    """
    weights, gradients, means, squares = (list(each) for each in zip(*tensors, strict=True))
    torch_adam(
        weights,
        gradients,
        means,
        squares,
        [],
        list(torch.full((len(weights),), step - 1.0).unbind()),
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        lr=lr,
        weight_decay=0.0,
        amsgrad=False,
        maximize=False,
        fused=True,
    )


def can_fuse(*tensors: Tensor) -> bool:
    """Whether torch's kernel takes them: plain, alike, and on a CPU, where its counter costs no transfer."""
    stride, dtype = tensors[0].stride(), tensors[0].dtype
    for tensor in tensors:
        if type(tensor) not in PLAIN or not tensor.is_cpu:
            return False
        if tensor.dtype != dtype or tensor.stride() != stride:
            return False
    return True
