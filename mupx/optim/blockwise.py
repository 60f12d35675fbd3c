"""What the optimizers share that cut a matrix into blocks with factors of their own (:mod:`mupx.blocks`)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from mupx.blocks import BOTH
from mupx.distributed.assignment import cubes
from mupx.optim.divided import Divided
from mupx.tiles import Tiles, gather, tiles_of


class Blockwise(Divided):
    """An optimizer whose matrices may be cut into blocks.

    Attributes:
        sides: The sides that are preconditioned, and so cut: ``LR``, ``L`` (rows) or ``R`` (columns).
        of_blocks: What a parameter's state holds of its blocks, all of one shape in one tensor: ``L`` says
            that ``L0``, ``L1`` … are ``[count, d, d]``, a single block ``[d, d]``.
        blocks: Longest block edge; 0 means one block.
    """

    sides: ClassVar[str] = BOTH
    of_blocks: ClassVar[tuple[str, ...]]
    blocks: int

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state, also one that holds each block by itself."""
        super().__setstate__(state)
        for parameter, kept in self.state.items():
            if any(f"{name}0" in kept for name in self.of_blocks):
                gather(kept, self.of_blocks, self.tiles(parameter))

    def tiles(self, parameter: Tensor) -> tuple[Tiles, ...]:
        """Return the blocks of a parameter, flattened to a matrix, in batches of one shape."""
        rows, columns = parameter.flatten(1).shape
        return tiles_of((rows, columns), self.blocks, self.sides)

    def cost(self, parameter: Tensor) -> float:
        """Return Σ d³ over the preconditioned sides of all blocks."""
        return sum(len(tile.blocks) * cubes(tile.shape, self.sides) for tile in self.tiles(parameter))
