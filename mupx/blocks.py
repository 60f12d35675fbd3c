"""Cutting a matrix into preconditioner blocks: the same cut for the optimizers and for the width rules.

A side of d entries is cut into ⌈d/size⌉ parts that are equal to within one entry. Cutting off whole parts
of ``size`` and keeping the rest would give a width just above a multiple of ``size`` a block of a single
row, whose update is as large as that of a whole block: another algorithm for that row alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

BOTH = "LR"  # the output side (rows) and the input side (columns) of a weight [d_out, d_in]
Block = tuple[slice, slice]


def cuts(length: int, size: int) -> list[slice]:
    """Return the parts of one side, none longer than ``size``; the whole for size 0.

    >>> cuts(65, 64)
    [slice(0, 32, None), slice(32, 65, None)]
    """
    count = max(1, -(-length // size)) if size else 1  # a side without entries is one part
    edges = (length * i // count for i in range(count + 1))
    return [slice(start, stop) for start, stop in pairwise(edges)]


def blocks_of(shape: Sequence[int], size: int, sides: str = BOTH) -> Iterator[Block]:
    """Yield the (row, column) slices of the blocks of a tensor flattened to a matrix, row by row.

    Args:
        shape: Shape of the tensor, first axis first; the others are flattened.
        size: Longest edge of a block; 0 means one block.
        sides: Which sides are preconditioned, and so cut: ``LR``, ``L`` (rows) or ``R`` (columns).
    """
    rows, columns = shape[0], math.prod(shape[1:])
    for part in cuts(rows, size if "L" in sides else 0):
        for other in cuts(columns, size if "R" in sides else 0):
            yield part, other


def count_blocks(shape: Sequence[int], size: int, sides: str = BOTH) -> int:
    """Return how many blocks :func:`blocks_of` yields."""
    return sum(1 for _ in blocks_of(shape, size, sides))
