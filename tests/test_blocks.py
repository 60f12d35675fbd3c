"""The cut that optimizers and width rules share."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mupx.blocks import blocks_of, count_blocks, cuts


@given(st.integers(1, 200), st.integers(1, 70))
def test_parts_cover_a_side_in_equal_lengths(length: int, size: int) -> None:
    parts = cuts(length, size)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(length))
    lengths = {part.stop - part.start for part in parts}
    assert len(parts) == math.ceil(length / size)
    assert max(lengths) <= size
    assert max(lengths) - min(lengths) <= 1


def test_a_remainder_of_one_row_would_be_a_block_of_its_own() -> None:
    assert [part.stop - part.start for part in cuts(65, 64)] == [32, 33]
    remainder = [min(64, 65 - start) for start in range(0, 65, 64)]  # whole parts, then the rest
    assert max(remainder) - min(remainder) > 1


@pytest.mark.parametrize(
    ("shape", "size", "sides", "count"),
    [
        ((8, 8), 0, "LR", 1),
        ((8, 8), 8, "LR", 1),
        ((9, 8), 8, "LR", 2),
        ((32, 4, 3, 3), 16, "LR", 6),
        ((32, 4, 3, 3), 16, "L", 2),
        ((32, 4, 3, 3), 16, "R", 3),
        ((3, 3), 100, "LR", 1),
    ],
)
def test_only_preconditioned_sides_are_cut(shape: tuple[int, ...], size: int, sides: str, count: int) -> None:
    assert count_blocks(shape, size, sides) == len(list(blocks_of(shape, size, sides))) == count
