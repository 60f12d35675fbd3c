"""Adam-atan2: Adam whose quotient is an arc tangent, so that it needs no eps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mupx.errors import UsageError
from mupx.linalg import Scalar
from mupx.optim.base import DEFAULTS, Base, Groups, Scale
from mupx.running_means import adam_means, running


def atan2_direction(
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    step: int,
    betas: Sequence[float],
    a: float,
    b: float,
) -> Tensor:
    """Return u = a · atan2(m̂, b √v̂), arguments as for :func:`mupx.running_means.adam_means`.

    Args:
        gradient: g.
        mean: m; overwritten.
        square: v; overwritten.
        step: Steps including this one.
        betas: Decay rates.
        a: Factor on the angle; the largest entry is a·π/2.
        b: Factor on √v̂; Adam's update is the limit b → ∞ at a = b.
    """
    corrected, root = adam_means(gradient, mean, square, step, betas)
    return corrected.atan2_(root.mul_(b)).mul_(a)


class AdamAtan2(Base):
    """Adam-atan2: u = a · atan2(m̂, b √v̂), the same for a gradient times any constant.

    Nothing is compared with an absolute number, so a gradient that shrinks with width needs no multiplier
    and cannot fall below one. With a = 4/π and b = 1 the update is 1 where m̂ = √v̂, as Adam's is.
    Width rule (arXiv:2407.05872, 2203.03466): lr × 1/r_in.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        betas: Decay rates of the two running means.
        a: Factor on the angle.
        b: Factor on √v̂.
        weight_decay: λ under ``weight_decay_mode``: ``independent``, ``adamw`` (lr·λ) or ``l2``.
        weight_decay_mode: The decay convention.

    Raises:
        UsageError: ``a`` or ``b`` is not a finite positive number.

    Source: K. Everett et al., "Scaling Exponents Across Parameterizations and Optimizers", arXiv:2407.05872.
    """

    algorithm = "adam-atan2"
    kept = ("a", "b")

    def __init__(
        self,
        params: Groups,
        lr: Scalar = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        a: float = 4 / math.pi,
        b: float = 1.0,
        weight_decay: float = 0.0,
        weight_decay_mode: str = "independent",
    ) -> None:
        for name, value in (("a", a), ("b", b)):
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name} must be a finite number > 0, got {value}")
        self.a, self.b = a, b
        chosen = {"betas": betas, "weight_decay": weight_decay, "weight_decay_mode": weight_decay_mode}
        super().__init__(params, {**DEFAULTS, "lr": lr, **chosen})

    def direction(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Return a · atan2(m̂, b √v̂)."""
        state = self.state[parameter]
        step = state["step"] = state.get("step", 0) + 1
        mean, square = (running(state, key, gradient) for key in ("exp_avg", "exp_avg_sq"))
        return atan2_direction(gradient, mean, square, step, group["betas"], self.a, self.b)

    def scales(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Scale]:
        """Return the RMS of √v̂, which nothing is added to."""
        found = super().scales(parameter, group)
        return {symbol: scale._replace(ridge=None) for symbol, scale in found.items()}
