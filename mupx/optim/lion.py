"""Lion: the sign of an interpolation between momentum and gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mupx.linalg import Scalar
from mupx.optim.base import DEFAULTS, Base, Groups
from mupx.running_means import running


def lion_direction(gradient: Tensor, mean: Tensor, betas: Sequence[float]) -> Tensor:
    """Return u = sign(β₁ m + (1 − β₁) g), then m ← β₂ m + (1 − β₂) g.

    Args:
        gradient: g, ``[..., *shape]``.
        mean: m before this step, zeros at first; overwritten.
        betas: β₁ of the interpolation, β₂ of the running mean.
    """
    beta1, beta2 = betas
    update = torch.lerp(mean, gradient, 1 - beta1).sign_()
    mean.lerp_(gradient, 1 - beta2)
    return update


class Lion(Base):
    """Lion, with one state per weight and no eps.

    Every entry of the update is −1, 0 or 1, so that a good lr is 3 to 10 times smaller than AdamW's. Width
    rule: lr × 1/r_in, that of every entrywise update of order one (arXiv:2203.03466, 2407.05872).

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        betas: β₁ of the interpolation whose sign is taken, β₂ of the momentum that is kept.
        weight_decay: λ under ``weight_decay_mode``: ``independent``, ``adamw`` (lr·λ) or ``l2``.
        weight_decay_mode: The decay convention.

    Source: X. Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675, algorithm 2.
    """

    algorithm = "lion"

    def __init__(
        self,
        params: Groups,
        lr: Scalar = 1e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        weight_decay_mode: str = "independent",
    ) -> None:
        chosen = {"betas": betas, "weight_decay": weight_decay, "weight_decay_mode": weight_decay_mode}
        super().__init__(params, {**DEFAULTS, "lr": lr, **chosen})

    def direction(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the sign of the interpolation."""
        mean = running(self.state[parameter], "exp_avg", gradient)
        return lion_direction(gradient, mean, group["betas"])
