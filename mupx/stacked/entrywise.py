"""SGD and the optimizers that treat every entry by itself, for several models at once."""

from __future__ import annotations

from torch import Tensor

from mupx.optim.adam_atan2 import AdamAtan2, atan2_direction
from mupx.optim.lion import lion_direction
from mupx.running_means import running
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
        return lion_direction(gradient, running(self.state[name], "exp_avg", gradient), group["betas"])


class StackedAdamAtan2(Stacked):
    """Adam-atan2."""

    shell: AdamAtan2

    def direction(self, name: str, gradient: Tensor, group: Group) -> Tensor:
        """Return a · atan2(m̂, b √v̂)."""
        mean, square = (running(self.state[name], key, gradient) for key in ("exp_avg", "exp_avg_sq"))
        step, a, b = self.clock["step"] + 1, self.shell.a, self.shell.b
        return atan2_direction(gradient, mean, square, step, group["betas"], a, b)
