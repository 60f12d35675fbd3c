"""What passes leave behind of one layer: the sums behind A and B, or the rows themselves.

Conventions as in :mod:`mupx.curvature`, which fills them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from mupx.errors import UsageError
from mupx.layer_rows import UNFOLDED
from mupx.linalg import gram
from mupx.lowrank import Thin

SAMPLED = 8  # of so many rows one is looked at for edits, which are of whole matrices


def nothing_captured() -> UsageError:
    """Return the error for a refresh without the passes it needs."""
    return UsageError(
        "no curvature captured: run the forward and the backward pass inside `with opt.curvature():`"
        " (and call `opt.update_curvature(outputs)` for the Monte-Carlo and exact Fisher)"
    )


def joined(passes: list[Tensor]) -> Tensor:
    """Return the rows of several passes as one tensor, of a single pass as they are."""
    return passes[0] if len(passes) == 1 else torch.cat(passes)


@dataclass
class FactorSums:
    """Running sums behind one layer's A and B; adding micro-batches gives the factors of the batch."""

    inputs: Tensor | None = None
    input_count: Tensor | float = 0.0
    outputs: Tensor | None = None
    output_count: Tensor | float = 0.0
    arrived: torch.dtype | None = None  # what δ came in: under autocast a coarser one than the weight's
    at_once: ClassVar[int | None] = UNFOLDED  # bytes of patches laid out at a time; None: all of a pass
    holds: ClassVar[bool] = False  # whether rows are looked at again after the pass

    def takes(self, rows: int) -> bool:
        """Announce the N·T rows of one more pass and return whether they are wanted; asked before unfolding.

        Args:
            rows: N·T.
        """
        return True

    @property
    def keeps_rows(self) -> bool:
        """Whether the rows of the passes announced so far are wanted themselves, not only their sums."""
        return False

    def add_input_sum(self, total: Tensor, rows: int) -> None:
        """Add Σ h hᵀ ``[d_in, d_in]`` over so many rows."""
        self.inputs = total if self.inputs is None else self.inputs + total
        self.input_count = self.input_count + float(rows)

    def add_inputs(self, rows: Tensor, mask: Tensor | None) -> None:
        """Add Σ h hᵀ over the rows ``[N, T, d_in]`` that ``mask`` ([N, T] or [N, 1]) keeps."""
        flat = rows.flatten(0, 1)
        kept = flat
        count: Tensor | float = float(flat.shape[0])
        if mask is not None:
            weights = mask.to(rows.dtype).expand(rows.shape[:2]).reshape(-1, 1)
            kept, count = flat * weights, weights.sum()
        self._keep_inputs(kept)
        self.input_count = self.input_count + count

    def add_terms(self, terms: Tensor | float) -> None:
        """Count the loss's terms of one more pass; its inputs follow."""
        self.output_count = self.output_count + terms

    def add_outputs(self, rows: Tensor, scale: Tensor | float) -> None:
        """Add Σ δ δᵀ for δ = scale · rows, rows ``[N·T, d_out]``."""
        self._keep_outputs(rows * scale)

    def _keep_inputs(self, rows: Tensor) -> None:
        product = gram(rows)
        self.inputs = product if self.inputs is None else self.inputs + product

    def _keep_outputs(self, rows: Tensor) -> None:
        product = gram(rows)
        self.outputs = product if self.outputs is None else self.outputs + product

    def factor(self, side: str) -> Tensor:
        """Return A or B.

        Args:
            side: ``"A"`` or ``"B"``.

        Raises:
            UsageError: The layer saw no forward or no backward pass.
        """
        total, count = {"A": (self.inputs, self.input_count), "B": (self.outputs, self.output_count)}[side]
        if total is None:
            raise nothing_captured()
        return total / count

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (A, B), as :meth:`factor` does."""
        return self.factor("A"), self.factor("B")


@dataclass
class FactorRows(FactorSums):
    """The rows h and δ themselves, as long as there are at most ``limit`` of each; then their sums.

    With fewer rows than units both the factors and the gradient are products of thin matrices, and
    everything K-FAC and Shampoo do with them is cheaper before they are multiplied out. Where only the
    gradient is wanted (``summed`` False), too many rows are not taken: the rows of some passes alone are of
    no use, and for a convolution laying them out costs more than the step.
    """

    holds: ClassVar[bool] = True
    limit: int = 0
    summed: bool = True
    announced: int = 0
    h: list[Tensor] = field(default_factory=list)
    delta: list[Tensor] = field(default_factory=list)
    alone: set[str] = field(default_factory=set)  # sides whose solver was made of these rows and no others

    def takes(self, rows: int) -> bool:
        """Count the rows, and drop what there is when only the gradient is wanted and they are too many."""
        self.announced += rows
        if self.summed or self.announced <= self.limit:
            return True
        self.h.clear()
        self.delta.clear()
        return False

    @property
    def keeps_rows(self) -> bool:
        """Whether they are few enough so far."""
        return self.announced <= self.limit

    def add_input_sum(self, total: Tensor, rows: int) -> None:
        """Add Σ h hᵀ over more rows than are kept; what was kept of earlier passes is summed up too."""
        for each in self.h:
            super()._keep_inputs(each)
        self.h.clear()
        super().add_input_sum(total, rows)

    def _keep_inputs(self, rows: Tensor) -> None:
        self._keep(self.h, rows, super()._keep_inputs, self.inputs)

    def _keep_outputs(self, rows: Tensor) -> None:
        self._keep(self.delta, rows, super()._keep_outputs, self.outputs)

    def _keep(
        self, kept: list[Tensor], rows: Tensor, add: Callable[[Tensor], None], total: Tensor | None
    ) -> None:
        kept.append(rows)
        if total is not None or sum(map(len, kept)) > self.limit:
            for each in kept if self.summed else ():
                add(each)
            kept.clear()

    def sum_up(self) -> None:
        """Turn what is kept as rows into sums."""
        for rows, add in ((self.h, super()._keep_inputs), (self.delta, super()._keep_outputs)):
            for each in rows if self.summed else ():
                add(each)
            rows.clear()

    def unscaled(self, side: str) -> tuple[Tensor, Tensor] | None:
        """Return a thin F ``[d, n]`` and c with F Fᵀ / c = the factor, or None where rows were summed up."""
        rows, count = {"A": (self.h, self.input_count), "B": (self.delta, self.output_count)}[side]
        if not rows:
            return None
        F = joined(rows).mT
        return F, torch.as_tensor(count, dtype=F.dtype, device=F.device)

    def columns(self, side: str) -> Tensor | None:
        """Return a thin F ``[d, n]`` with F Fᵀ = the factor, or None where the rows were summed up."""
        found = self.unscaled(side)
        if found is None:
            return None
        F, count = found
        return F / count.sqrt()

    def factor(self, side: str) -> Tensor:
        """Return A or B, as :meth:`FactorSums.factor`."""
        F = self.columns(side)
        return super().factor(side) if F is None else gram(F.mT)

    def gradient(self, actual: Tensor) -> Thin | None:
        """Return the weight gradient as a thin product, or None.

        The rows give the gradient of this pass's loss up to one factor. A probe c·DᵀH v = G v finds the
        factor and tells whether it is all: clipping and loss scaling pass, a gradient that was averaged
        over ranks, decayed or otherwise edited does not. Under autocast G has the rounding errors of a
        coarser precision, among which a small edit would hide; but then its entries are no longer numbers
        of that precision.

        Args:
            actual: G as the optimizer sees it, ``[d_out, d_in]``.
        """
        if not (self.h and self.delta):
            return None
        H, D = joined(self.h), joined(self.delta)
        if len(H) != len(D):
            return None
        probe = torch.cos(torch.arange(1, H.shape[1] + 1, dtype=H.dtype, device=H.device))
        wanted, found = actual @ probe, D.mT @ (H @ probe)
        factor = (wanted @ found) / (found @ found)
        error = (wanted - factor * found).norm() / wanted.norm()
        scale, missed = torch.stack((factor, error)).tolist()
        allowed = 1000 * torch.finfo(H.dtype).eps
        if self.arrived not in (None, actual.dtype) and _only_rounded(actual[::SAMPLED], self.arrived):
            allowed = max(allowed, torch.finfo(self.arrived).eps)
        return Thin(D, H, scale) if missed < allowed else None


def _only_rounded(matrix: Tensor, dtype: torch.dtype) -> bool:
    """Whether all entries are numbers of a precision."""
    return torch.equal(matrix.to(dtype).to(matrix.dtype), matrix)
