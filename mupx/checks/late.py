"""The late check: is the last update of a run as large, in operator norm, at every width?

Whitened and grafted updates can pass an early coordinate check and drift later, as the stable rank of
the gradient changes with width (arXiv:2512.05620). Measured on the last step of a run, for each matrix:
the RMS → RMS operator norm ‖ΔW‖₂·√(d_in/d_out), flat under a right parametrization, and the stable rank
‖ΔW‖_F²/‖ΔW‖₂².
"""

from __future__ import annotations

import math

import torch

from mupx.linalg import largest_eigenvalue
from mupx.training import Run


def read(run: Run) -> dict[str, tuple[float, float]]:
    """Train ``run`` to its end and return parameter → (operator norm, stable rank) of its last update.

    Empty when the run diverges. Learning rates of the last step include the schedule's factor, which is
    the same at every width.
    """
    while run.step < run.steps - 1:
        if not math.isfinite(run.advance()):
            return {}
    matrices = {n: p for n, p in run.model.named_parameters() if p.dim() > 1}
    before = {name: parameter.detach().clone() for name, parameter in matrices.items()}
    run.advance()
    with torch.no_grad():
        changes = {name: (p - before[name]).flatten(1).double() for name, p in matrices.items()}
    return {name: _size(change) for name, change in changes.items() if change.isfinite().all()}


def _size(change: torch.Tensor) -> tuple[float, float]:
    rows, columns = change.shape
    gram = change @ change.mT if rows <= columns else change.mT @ change
    squared = largest_eigenvalue(gram).item()
    rank = gram.diagonal().sum().item() / squared if squared else 0.0
    return math.sqrt(squared * columns / rows), rank
