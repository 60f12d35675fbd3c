"""Shampoo and its variants, for several models at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mupx.optim.base import Base, running_average
from mupx.optim.shampoo import Shampoo
from mupx.refresh import averaged_at, averages, needs_refresh, needs_statistics
from mupx.stacked.base import Factors, Group, Stacked


class StackedShampoo(Stacked):
    """Shampoo and its variants, all blocks of one shape at once."""

    shell: Shampoo

    def __init__(self, model: nn.Module, optimizers: Sequence[Base], values: dict[str, Tensor]) -> None:
        super().__init__(model, optimizers, values)
        self.seen = self.gap = 0
        self.new = self.stale = False

    def refresh(self, factors: Factors) -> None:
        """Decide whether this step's directions average new statistics in and take new roots."""
        clock, shell, step = self.clock, self.shell, self.clock["step"]
        self.seen, self.gap = averages(clock), step - averaged_at(clock)
        self.new = needs_statistics(clock, shell.refresh, shell.staleness, shell.statistics)
        if self.new:
            clock |= {"averages": self.seen + 1, "averaged_at": step}
        self.stale = needs_refresh(clock, shell.refresh, shell.staleness)
        if self.stale:
            clock["refreshed_at"] = step

    def direction(self, name: str, gradient: Tensor, group: Group) -> Tensor:
        """Return the momentum of L^-e G R^-e."""
        matrix, shell = gradient.flatten(2), self.shell
        update = torch.empty_like(matrix)
        for index, tile in enumerate(shell.tiles(matrix[0])):
            block = product = tile.cut(matrix)
            if "L" in shell.sides:
                product = self._root(name, f"L{index}", block, group["damping_B"]) @ product
            if "R" in shell.sides:
                product = product @ self._root(name, f"R{index}", block.mT, group["damping_A"])
            tile.paste(product, update)
        return self.momentum(name, update.view_as(gradient), group)

    def _root(self, name: str, side: str, block: Tensor, damping: Tensor) -> Tensor:
        state, shell = self.state[name], self.shell
        if self.new:
            old, new = state.get(side), block @ block.mT
            if old is not None and shell.accumulate == "sum":
                state[side] = old + new
            else:
                state[side] = running_average(old, new, shell.ema, self.seen, self.gap)
        if self.stale:
            if block.dim() == 4:
                damping = damping.unsqueeze(-1)  # of a member, for each of its blocks
            state[f"root_{side}"] = shell.root(state[side], damping)
        return state[f"root_{side}"]
