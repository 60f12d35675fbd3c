"""The late check: is the last update of a run as large, in operator norm, at every width?

Whitened and grafted updates can pass an early coordinate check and drift later, as the stable rank of
the gradient changes with width (arXiv:2512.05620). Measured on the last step of a run, for each matrix:
the RMS → RMS operator norm ‖ΔW‖₂·√(d_in/d_out), flat under a right parametrization, and the stable rank
‖ΔW‖_F²/‖ΔW‖₂².
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mupx.layers import Parameter
from mupx.linalg import largest_eigenvalue
from mupx.training import Run


def read(run: Run, parameters: Sequence[Parameter]) -> dict[str, tuple[float, float]]:
    """Train ``run`` to its end and return parameter → (operator norm, stable rank) of its last update.

    Empty when the run diverges. Learning rates of the last step include the schedule's factor, which is
    the same at every width.

    Args:
        run: A run that has not begun.
        parameters: Which axes of each tensor are fan-in and fan-out: an embedding is stored as
            ``[d_in, d_out]``, a transposed convolution as ``[d_in, d_out, k, k]``.
    """
    while run.step < run.steps - 1:
        if not math.isfinite(run.advance()):
            return {}
    described = {p.name: p for p in parameters if p.in_axes and p.out_axes}
    matrices = {n: p for n, p in run.model.named_parameters() if n in described}
    before = {name: parameter.detach().clone() for name, parameter in matrices.items()}
    run.advance()
    with torch.no_grad():
        changes = {n: _matrix(p - before[n], described[n]).double() for n, p in matrices.items()}
    return {name: _size(change) for name, change in changes.items() if change.isfinite().all()}


def _matrix(change: torch.Tensor, parameter: Parameter) -> torch.Tensor:
    """Lay a tensor out as ``[d_out, d_in]``; axes that are neither (groups) count as fan-in."""
    out = parameter.out_axes
    others = [axis for axis in range(change.dim()) if axis not in out]
    return change.permute(*out, *others).reshape(math.prod(change.shape[axis] for axis in out), -1)


def _size(change: torch.Tensor) -> tuple[float, float]:
    rows, columns = change.shape
    gram = change @ change.mT if rows <= columns else change.mT @ change
    squared = largest_eigenvalue(gram).item()
    rank = gram.diagonal().sum().item() / squared if squared else 0.0
    return math.sqrt(squared * columns / rows), rank
