"""Shampoo: precondition a matrix gradient by inverse roots of its row and column second moments.

Update: U = (L + ridge)^(-1/p) G (R + ridge)^(-1/p), L = average of G Gᵀ ``[d_out, d_out]``, R = average
of Gᵀ G ``[d_in, d_in]``, p = 4 (Gupta et al. 2018, arXiv:1802.09568). The ridge is ρ·λmax of the factor
(``relative``) or ρ itself (``absolute``); it is never added into the running statistics. Convolution
weights are flattened to ``[out, in·k·k]``. Large matrices may be cut into blocks, each with its own
factors. What is not a matrix (biases, gains) goes to AdamW.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from mupx.errors import UsageError
from mupx.linalg import Scalar, inverse_root, largest_eigenvalue, trace
from mupx.optim.base import (
    DEFAULTS,
    Base,
    Groups,
    Scale,
    finite_or,
    refresh_interval,
    require_choice,
    require_damping_rule,
    require_refresh,
    running_average,
    sort_groups,
    split_ridge,
)

ROOT = 4.0


def moments(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return (G Gᵀ, Gᵀ G) of ``[..., d_out, d_in]``."""
    return gradient @ gradient.mT, gradient.mT @ gradient


def roots(L: Tensor, R: Tensor, damping_L: Scalar, damping_R: Scalar, rule: str) -> tuple[Tensor, Tensor]:
    """Return the damped inverse fourth roots of L and R; zero where a factor is zero or not finite."""
    relative = rule == "relative"
    root_L, _ = inverse_root(L, ROOT, damping_L, relative)
    root_R, _ = inverse_root(R, ROOT, damping_R, relative)
    return root_L, root_R


def blocks_of(matrix: Tensor, size: int) -> Iterator[tuple[slice, slice]]:
    """Yield the (row, column) slices of blocks of at most ``size`` × ``size``; one block for size 0."""
    rows, columns = matrix.shape[-2:]
    for top in range(0, rows, size or rows):
        for left in range(0, columns, size or columns):
            yield slice(top, top + (size or rows)), slice(left, left + (size or columns))


class Shampoo(Base):
    """Shampoo with exponent ¼ on each side.

    Width rule (arXiv:2312.12226; 2512.05620): lr × (r_out/r_in)^½ · n_blocks^-½; an absolute ridge ×
    r_in/(r_out · n_blocks); a relative ridge × 1.

    Args:
        params: Parameters or groups; tensors with fewer than two axes go to AdamW.
        lr: Learning rate.
        damping: ρ of the ridge.
        damping_ratio: ρ_R/ρ_L, split as for K-FAC's ρ_A/ρ_B.
        damping_rule: ``relative`` (in units of λmax) or ``absolute``.
        refresh: Longest interval between updates of the statistics and their roots, in steps.
        staleness: Largest age of the roots as a fraction of the steps done; what decides early on.
        accumulate: ``average`` (running average with ``ema``) or ``sum``, as in the original.
        ema: Decay of the running average, per step.
        blocks: Largest block edge; 0 means one block.
        momentum: Heavy-ball momentum on the preconditioned update.
        fallback_lr: AdamW's learning rate for biases and gains.
        betas: AdamW's betas for the same.
        eps: AdamW's eps for the same.
        weight_decay: λ under ``weight_decay_mode``.
        weight_decay_mode: ``independent``, ``adamw`` or ``l2``.
    """

    algorithm = "shampoo"

    def __init__(
        self,
        params: Groups,
        lr: Scalar = 0.05,
        *,
        damping: float = 1e-3,
        damping_ratio: float = 1.0,
        damping_rule: str = "relative",
        refresh: int = 10,
        staleness: float = 0.05,
        accumulate: str = "average",
        ema: float = 0.95,
        blocks: int = 0,
        momentum: float = 0.0,
        fallback_lr: Scalar = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        weight_decay_mode: str = "independent",
    ) -> None:
        self.damping_rule = require_damping_rule("shampoo", damping_rule)
        self.accumulate = require_choice("accumulate", accumulate, ("average", "sum"))
        require_refresh(refresh, staleness, ema)
        if blocks < 0:
            raise UsageError(f"blocks must be ≥ 0 (0: one block), got {blocks}")
        self.refresh, self.staleness = refresh, staleness
        self.ema, self.blocks = ema, blocks
        ridge_R, ridge_L = split_ridge(damping, damping_ratio)
        defaults = {
            **DEFAULTS,
            "lr": lr,
            "damping_A": ridge_R,
            "damping_B": ridge_L,
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "weight_decay_mode": weight_decay_mode,
        }
        super().__init__(sort_groups(params, fallback_lr, lambda p: p.dim() >= 2), defaults)

    def direction(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the momentum of L^-¼ G R^-¼, block by block."""
        state = self.state[parameter]
        step = state.get("step", 0)
        age = step - state.get("refreshed_at", -self.refresh)
        stale = age >= refresh_interval(step, self.refresh, self.staleness)
        matrix = gradient.flatten(1)
        update = matrix.new_empty(matrix.shape)
        for index, (rows, columns) in enumerate(blocks_of(matrix, self.blocks)):
            block = matrix[rows, columns]
            if stale:
                self._refresh(state, index, block, group, age)
            update[rows, columns] = state[f"root_L{index}"] @ block @ state[f"root_R{index}"]
        if stale:
            state["refreshes"], state["refreshed_at"] = state.get("refreshes", 0) + 1, step
        state["step"] = step + 1
        return self.momentum(parameter, update.view_as(gradient), group)

    def scales(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Scale]:
        """Return λmax and trace of L and R, the largest over blocks, with their ridges."""
        state = self.state.get(parameter, {})
        result = dict(super().scales(parameter, group))
        for side, key in (("L", "damping_B"), ("R", "damping_A")):
            factors = [state[name] for name in state if name.startswith(side) and name[1:].isdigit()]
            if factors and all(factor is not None for factor in factors):
                size = max(largest_eigenvalue(factor).item() for factor in factors)
                unit = size if self.damping_rule == "relative" else 1.0
                largest = max(trace(factor).item() for factor in factors)
                result[side] = Scale(size, float(group[key]) * unit, largest)
        return result

    def _refresh(
        self, state: dict[str, Any], index: int, block: Tensor, group: dict[str, Any], gap: int
    ) -> None:
        seen = state.get("refreshes", 0)
        factors = {}
        for side, new in zip("LR", moments(block), strict=True):
            old = state.get(f"{side}{index}")
            if self.accumulate == "sum":
                factors[side] = new if old is None else old + new
            else:
                factors[side] = running_average(old, new, self.ema, seen, gap)
            state[f"{side}{index}"] = finite_or(factors[side], old)
        state[f"root_L{index}"], state[f"root_R{index}"] = roots(
            factors["L"], factors["R"], group["damping_B"], group["damping_A"], self.damping_rule
        )
