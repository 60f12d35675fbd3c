"""SGD and the optimizers that treat every entry by itself, for several models at once."""

from __future__ import annotations

import torch
from torch import Tensor

from mupx.optim.adam_atan2 import AdamAtan2, atan2_direction
from mupx.optim.lion import lion_direction
from mupx.stacked.base import Group, Stacked


class StackedSGD(Stacked):
    """SGD with momentum."""

    def direction(self, name: str, gradient: Tensor, group: Group) -> Tensor:
        """Return the momentum buffer."""
        return self.momentum(name, gradient, group)


class StackedAdamW(Stacked):
    """AdamW."""

    def direction(self, name: str, gradient: Tensor, group: Group) -> Tensor:
        """Return m̂ / (√v̂ + eps)."""
        return self.adam(name, gradient, group)


class StackedLion(Stacked):
    """Lion."""

    def direction(self, name: str, gradient: Tensor, group: Group) -> Tensor:
        """Return the sign of the interpolation."""
        state = self.state[name]
        mean = state.get("exp_avg", torch.zeros_like(gradient))
        update, state["exp_avg"] = lion_direction(gradient, mean, group["betas"])
        return update


class StackedAdamAtan2(Stacked):
    """Adam-atan2."""

    shell: AdamAtan2

    def direction(self, name: str, gradient: Tensor, group: Group) -> Tensor:
        """Return a · atan2(m̂, b √v̂)."""
        state, zeros, step = self.state[name], torch.zeros_like(gradient), self.clock["step"] + 1
        mean, square = state.get("exp_avg", zeros), state.get("exp_avg_sq", zeros)
        update, state["exp_avg"], state["exp_avg_sq"] = atan2_direction(
            gradient, mean, square, step, group["betas"], self.shell.a, self.shell.b
        )
        return update
