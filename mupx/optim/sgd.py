"""Stochastic gradient descent with heavy-ball momentum: v ← μ v + G, W ← W − lr·v."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mupx.linalg import Scalar
from mupx.optim.base import DEFAULTS, Base, Groups


class SGD(Base):
    """SGD with momentum.

    Width rule (arXiv:2203.03466, table 8; a = 0 form): lr × r_out / r_in.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        momentum: μ of the heavy ball, in [0, 1).
        weight_decay: λ under ``weight_decay_mode``: ``independent``, ``adamw`` (lr·λ) or ``l2``.
        weight_decay_mode: The decay convention.
    """

    algorithm = "sgd"

    def __init__(
        self,
        params: Groups,
        lr: Scalar = 0.1,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        weight_decay_mode: str = "independent",
    ) -> None:
        chosen = {"momentum": momentum, "weight_decay": weight_decay, "weight_decay_mode": weight_decay_mode}
        super().__init__(params, {**DEFAULTS, "lr": lr, **chosen})

    def direction(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the momentum buffer, or the gradient itself without momentum."""
        return self.momentum(parameter, gradient, group)

    def precondition(
        self, parameter: Tensor, vector: Tensor, group: dict[str, Any], *, inverse: bool = False
    ) -> Tensor | None:
        """Return v: P is the identity."""
        return vector
