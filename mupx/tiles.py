"""The blocks of a matrix in batches of equal shape, so that one call treats a batch.

:func:`mupx.blocks.cuts` makes parts that are equal to within one entry: a side has at most two lengths of
them, a matrix at most four shapes of blocks, however many blocks there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mupx.blocks import BOTH, Block, cuts

AT_ONCE = 2**25  # bytes of blocks that are decomposed in one call: their workspace is a few times as large


class Tiles(NamedTuple):
    """The blocks of one shape ``[r, c]``, row by row.

    Attributes:
        rows: The parts of the rows.
        columns: The parts of the columns; a block is where one of each meet.
    """

    rows: tuple[slice, ...]
    columns: tuple[slice, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(r, c) of a block."""
        row, column = self.rows[0], self.columns[0]
        return row.stop - row.start, column.stop - column.start

    @property
    def blocks(self) -> list[Block]:
        """The blocks in the order that :meth:`cut` has them in."""
        return [(rows, columns) for rows in self.rows for columns in self.columns]

    def cut(self, matrix: Tensor) -> Tensor:
        """Return the blocks of ``[..., m, n]`` as ``[..., count, r, c]``, a single one as ``[..., r, c]``."""
        chosen = _chosen(_chosen(matrix, -2, self.rows), -1, self.columns)
        down, across = len(self.rows), len(self.columns)
        if down == across == 1:
            return chosen
        grid: Tensor = chosen.unflatten(-2, (down, -1)).unflatten(-1, (across, -1))
        return grid.transpose(-3, -2).flatten(-4, -3)

    def paste(self, blocks: Tensor, matrix: Tensor) -> None:
        """Write the blocks, as :meth:`cut` returns them, to their places in ``[..., m, n]``."""
        down, across = len(self.rows), len(self.columns)
        if down * across > 1:
            blocks = blocks.unflatten(-3, (down, across)).transpose(-3, -2).flatten(-4, -3).flatten(-2, -1)
        rows, columns = _run(self.rows), _run(self.columns)
        if isinstance(rows, slice) and isinstance(columns, slice):
            matrix[..., rows, columns] = blocks
        else:
            matrix[..., _numbers(self.rows, matrix)[:, None], _numbers(self.columns, matrix)] = blocks


@lru_cache(maxsize=1024)
def tiles_of(shape: tuple[int, int], size: int, sides: str = BOTH) -> tuple[Tiles, ...]:
    """Return the blocks of :func:`mupx.blocks.blocks_of` by their shape, that of the first block first.

    Args:
        shape: (m, n) of the matrix.
        size: Longest edge of a block; 0 means one block.
        sides: The sides that are cut.
    """
    rows, columns = (
        _by_length(cuts(length, size if side in sides else 0))
        for side, length in zip(BOTH, shape, strict=True)
    )
    return tuple(Tiles(part, other) for part in rows for other in columns)


def gather(state: dict[str, Any], names: Sequence[str], tiles: Sequence[Tiles]) -> None:
    """Put blocks that a state holds one by one, as it once did, into batches.

    Args:
        state: Holds tensors by name and number of the block, such as ``L0``; then by number of the batch.
        names: The names.
        tiles: All blocks.
    """
    blocks = [(rows.start, columns.start) for tile in tiles for rows, columns in tile.blocks]
    if len(blocks) == len(tiles) or not any(f"{name}{len(tiles)}" in state for name in names):
        return
    number = {block: index for index, block in enumerate(sorted(blocks))}
    for name in names:
        keys = [f"{name}{index}" for index in range(len(blocks))]
        old = [state.pop(key) for key in keys if key in state]
        for index, tile in enumerate(tiles if old else ()):
            batch = [old[number[rows.start, columns.start]] for rows, columns in tile.blocks]
            state[f"{name}{index}"] = torch.stack(batch) if len(batch) > 1 else batch[0]


def in_parts(factor: Tensor) -> Iterator[slice]:
    """Yield the parts of a batch ``[count, d, d]`` to decompose in one call; all of a single ``[d, d]``."""
    if factor.dim() == 2:
        yield slice(None)
        return
    step = max(1, AT_ONCE // max(1, factor[0].numel() * factor.element_size()))
    yield from (slice(start, start + step) for start in range(0, len(factor), step))


def _by_length(parts: list[slice]) -> list[tuple[slice, ...]]:
    found: dict[int, list[slice]] = {}
    for part in parts:
        found.setdefault(part.stop - part.start, []).append(part)
    return [tuple(each) for each in found.values()]


def _chosen(matrix: Tensor, axis: int, parts: tuple[slice, ...]) -> Tensor:
    run = _run(parts)
    if run is None:
        return matrix.index_select(axis, _numbers(parts, matrix))
    return matrix.narrow(axis, run.start, run.stop - run.start)


def _run(parts: tuple[slice, ...]) -> slice | None:
    """Return parts that follow one another as one, else None."""
    together = all(one.stop == other.start for one, other in pairwise(parts))
    return slice(parts[0].start, parts[-1].stop) if together else None


def _numbers(parts: tuple[slice, ...], like: Tensor) -> Tensor:
    return torch.cat([torch.arange(part.start, part.stop, device=like.device) for part in parts])
