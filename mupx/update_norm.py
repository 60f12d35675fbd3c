"""How large an update is, apart from its direction: grafting and spectral normalisation.

Grafting Q1#Q2 (arXiv:2002.11803) takes the direction of an optimizer Q2 and, tensor by tensor, the
Frobenius norm of the update that Q1 would make of the same gradients: U = ‖U₁‖_F · U₂/‖U₂‖_F. The norm is
that of the whole tensor also where Q2 works in blocks, since Q1 knows no blocks. Q1 is one of

* ``sgd``: the gradient itself;
* ``adam``: m̂/(√v̂ + eps) with eps 1e-8 of the gradient's own RMS, which needs no width multiplier;
* ``rms``: entries of root mean square one (the ``normalize_grads`` of SOAP's authors).

Normalisation ``spectral`` makes the largest singular value one instead: U = U₂/‖U₂‖₂. It decides the size
alone, so beside it a graft changes nothing and is not computed. A zero update stays zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mupx.linalg import over

RELATIVE_EPS = 1e-8
STEPS, FIRST_STEPS = 20, 50  # power iterations from the last update's vector, and from a random one
State = dict[str, Any]


def frobenius(matrix: Tensor) -> Tensor:
    """Return ‖M‖_F ``[...]`` of ``[..., m, n]``."""
    norm: Tensor = torch.linalg.vector_norm(matrix, dim=(-2, -1))
    return norm


def spectral_norm(matrix: Tensor, vector: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return ‖M‖₂ ``[...]``, approached from below, and the right singular vector ``[..., n, 1]``.

    Args:
        matrix: M, ``[..., m, n]``.
        vector: What this returned for a matrix close to M; None starts from a fixed random vector.
    """
    steps = FIRST_STEPS if vector is None else STEPS
    if vector is None:
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(matrix.shape[-1], 1, generator=generator).to(matrix)
        vector = start.expand(*matrix.shape[:-2], *start.shape)
    for _ in range(steps):
        image = matrix.mT @ (matrix @ vector)
        length = frobenius(image)[..., None, None]
        # Where the matrix is zero the vector stays, to be of use at the next step.
        vector = torch.where(length > 0, image / length, vector)
    return frobenius(matrix @ vector) / frobenius(vector), vector


def rescaled(update: Tensor, old: Tensor, new: Tensor | float) -> Tensor:
    """Return the update times new/old, norms ``[...]``; zero where the old norm is zero."""
    factor = torch.where(old > 0, new / old, 0.0)
    return update * over(factor, update)


def _gradient_norm(gradient: Tensor, state: State, betas: tuple[float, float]) -> Tensor:
    return frobenius(gradient)


def _adam_norm(gradient: Tensor, state: State, betas: tuple[float, float]) -> Tensor:
    zeros, (beta1, beta2) = torch.zeros_like(gradient), betas
    step = state["graft_step"] = state.get("graft_step", 0) + 1
    mean = state["graft_exp_avg"] = torch.lerp(state.get("graft_exp_avg", zeros), gradient, 1 - beta1)
    square = torch.lerp(state.get("graft_exp_avg_sq", zeros), gradient.square(), 1 - beta2)
    state["graft_exp_avg_sq"] = square
    corrected = square / (1 - beta2**step)
    root = corrected.sqrt() + RELATIVE_EPS * corrected.mean((-2, -1), keepdim=True).sqrt()
    return frobenius(torch.where(root > 0, mean / (1 - beta1**step) / root, 0.0))


def _unit_entries(gradient: Tensor, state: State, betas: tuple[float, float]) -> Tensor:
    rows, columns = gradient.shape[-2:]
    return torch.full(gradient.shape[:-2], (rows * columns) ** 0.5).to(gradient)


# Name → the norm of that update, from (gradient [..., m, n], the tensor's state, betas).
GRAFTS: Mapping[str, Callable[[Tensor, State, tuple[float, float]], Tensor]] = {
    "sgd": _gradient_norm,
    "adam": _adam_norm,
    "rms": _unit_entries,
}
NONE = "none"
SIZES: Mapping[str, tuple[str, ...]] = {"graft": (NONE, *GRAFTS), "normalise": (NONE, "spectral")}


def asks_for_size(group: Mapping[str, Any]) -> bool:
    """Whether a group's updates are to have another size than their own."""
    return any(group.get(key, NONE) != NONE for key in SIZES)


def sized(update: Tensor, gradient: Tensor, state: State, group: Mapping[str, Any]) -> Tensor:
    """Return the update in the size that its group asks for.

    Args:
        update: U₂, any shape; flattened to a matrix, a vector to one column.
        gradient: What a graft's norm is made from, of the same shape.
        state: Of the tensor; holds the graft's means and the singular vector.
        group: ``graft``, ``normalise`` and ``betas``.
    """
    matrix = _as_matrix(update)
    if group.get("normalise", NONE) != NONE:
        norm, state["top_vector"] = spectral_norm(matrix, state.get("top_vector"))
        return rescaled(matrix, norm, 1.0).view_as(update)
    if group.get("graft", NONE) != NONE:
        new = GRAFTS[group["graft"]](_as_matrix(gradient), state, group["betas"])
        return rescaled(matrix, frobenius(matrix), new).view_as(update)
    return update


def _as_matrix(tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if tensor.dim() > 1 else tensor.reshape(-1, 1)
