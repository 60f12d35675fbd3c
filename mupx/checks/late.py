"""The late check: is the last update of a run as large, in operator norm, at every width?

Whitened and grafted updates can pass an early coordinate check and drift later, as the stable rank of
the gradient changes with width (arXiv:2512.05620). Measured on the last step of a run, for each matrix:
the RMS → RMS operator norm ‖ΔW‖₂·√(d_in/d_out), flat under a right parametrization, and the stable rank
‖ΔW‖_F²/‖ΔW‖₂². Beside them, of each statistic with a trace that preconditions the matrix, the effective
rank tr/λmax: where a narrow network has too few heads, channels or classes to fill a factor, it grows with
width, and a ridge in units of the trace then damps another part of the spectrum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from mupx.checks import curvature_orders
from mupx.layers import Parameter
from mupx.linalg import largest_eigenvalue
from mupx.run import Run


class Reading(NamedTuple):
    """One matrix after the last step.

    Attributes:
        norm: RMS → RMS operator norm of the last update, ‖ΔW‖₂·√(d_in/d_out).
        rank: Its stable rank.
        effective: Statistic that preconditions the matrix (``A``, ``B``, ``L``, …) → its tr/λmax.
    """

    norm: float
    rank: float
    effective: Mapping[str, float] = {}


class LastUpdate:
    """Reads the last update of a run that somebody else trains: call it after every step.

    Learning rates of the last step include the schedule's factor, which is the same at every width.

    Args:
        run: A run before its last step.
        parameters: Which axes of each tensor are fan-in and fan-out: an embedding is stored as
            ``[d_in, d_out]``, a transposed convolution as ``[d_in, d_out, k, k]``.
    """

    def __init__(self, run: Run, parameters: Sequence[Parameter]) -> None:
        self._run = run
        self._described = {p.name: p for p in parameters if p.in_axes and p.out_axes}
        self._before: dict[str, torch.Tensor] = {}
        self._keep()

    def __call__(self, step: int, steps: int, loss: float) -> None:
        """Keep the weights where the coming step is the last."""
        self._keep()

    def _keep(self) -> None:
        if self._run.step == self._run.steps - 1:
            self._before = {name: matrix.detach().clone() for name, matrix in self._matrices()}

    def _matrices(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self._run.model.named_parameters():
            if name in self._described:
                yield name, parameter

    def reading(self) -> dict[str, Reading]:
        """Return parameter → what its last update was like; empty when the run did not reach its end."""
        if self._run.step < self._run.steps:
            return {}
        with torch.no_grad():
            changes = {
                n: _matrix(p - self._before[n], self._described[n]).double() for n, p in self._matrices()
            }
        statistics = curvature_orders.read(self._run.optimizer)
        return {
            name: Reading(*_size(change), _effective_ranks(statistics.get(name, {})))
            for name, change in changes.items()
            if change.isfinite().all()
        }


def read(run: Run, parameters: Sequence[Parameter]) -> dict[str, Reading]:
    """Train ``run`` to its end and return its last update, as :class:`LastUpdate` reads it."""
    last = LastUpdate(run, parameters)
    while run.step < run.steps:
        loss = run.advance()
        if not math.isfinite(loss):
            return {}
        last(run.step, run.steps, loss)
    return last.reading()


def _effective_ranks(scales: Mapping[str, tuple[float | None, ...]]) -> dict[str, float]:
    return {symbol: trace / size for symbol, (size, _, trace) in scales.items() if size and trace}


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
