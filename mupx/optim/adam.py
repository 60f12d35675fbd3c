"""AdamW: running means of gradient and squared gradient, decoupled weight decay."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mupx.linalg import Scalar
from mupx.optim.base import DEFAULTS, Base, Groups


class AdamW(Base):
    """AdamW (arXiv:1412.6980, 1711.05101).

    Width rule (arXiv:2203.03466): lr × 1/r_in, eps × 1/r_out — eps follows the gradient's size.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        betas: Decay rates of the two running means.
        eps: Added to √v̂, in the units of the gradient.
        weight_decay: λ under ``weight_decay_mode``: ``independent``, ``adamw`` (lr·λ) or ``l2``.
        weight_decay_mode: The decay convention.
    """

    algorithm = "adamw"

    def __init__(
        self,
        params: Groups,
        lr: Scalar = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        weight_decay_mode: str = "independent",
    ) -> None:
        chosen = {
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "weight_decay_mode": weight_decay_mode,
        }
        super().__init__(params, {**DEFAULTS, "lr": lr, **chosen})

    def direction(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Return m̂ / (√v̂ + eps)."""
        return self.adam(parameter, gradient, group)

    def is_adam(self, group: dict[str, Any]) -> bool:
        """Whether the updates of a group are those of ``Base.adam``: of a subclass perhaps not."""
        return self.has_kept(AdamW, "direction", "adam", "step_size", "update_of", "move")

    def precondition(
        self, parameter: Tensor, vector: Tensor, group: dict[str, Any], *, inverse: bool = False
    ) -> Tensor | None:
        """Return v / (√v̂ + eps), or the inverse."""
        return self.adam_precondition(parameter, vector, group, inverse)
