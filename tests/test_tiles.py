"""Blocks in batches of equal shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mupx import tiles
from mupx.blocks import blocks_of
from mupx.tiles import in_parts, tiles_of

LENGTHS = st.integers(1, 40)


@given(LENGTHS, LENGTHS, st.integers(0, 12), st.sampled_from(["LR", "L", "R"]))
def test_every_block_is_in_one_batch(rows: int, columns: int, size: int, sides: str) -> None:
    found = tiles_of((rows, columns), size, sides)
    blocks = [block for tile in found for block in tile.blocks]
    order = list(blocks_of((rows, columns), size, sides))
    assert len(found) <= 4
    assert blocks[0] == order[0]
    assert sorted((r.start, r.stop, c.start, c.stop) for r, c in blocks) == sorted(
        (r.start, r.stop, c.start, c.stop) for r, c in order
    )


@given(LENGTHS, LENGTHS, st.integers(0, 12), st.sampled_from([(), (3,)]))
def test_what_is_cut_is_pasted_back(rows: int, columns: int, size: int, leading: tuple[int, ...]) -> None:
    matrix = torch.arange(rows * columns * max(1, *leading, 1)).reshape(*leading, rows, columns)
    result = torch.full_like(matrix, -1)
    for tile in tiles_of((rows, columns), size):
        batch = tile.cut(matrix)
        assert batch.dim() == len(leading) + (3 if len(tile.blocks) > 1 else 2)
        for index, (r, c) in enumerate(tile.blocks):
            one = batch[..., index, :, :] if len(tile.blocks) > 1 else batch
            assert torch.equal(one, matrix[..., r, c])
        tile.paste(batch, result)
    assert torch.equal(result, matrix)


@pytest.mark.parametrize(("bytes_", "parts"), [(1, 5), (2 * 6 * 8, 3), (2**20, 1)])
def test_a_batch_is_decomposed_in_parts(bytes_: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "AT_ONCE", bytes_)
    batch = torch.randn(5, 2, 3, dtype=torch.double)
    found = list(in_parts(batch))
    assert len(found) == parts
    assert torch.equal(torch.cat([batch[part] for part in found]), batch)
    assert [batch[0][part].shape for part in in_parts(batch[0])] == [(2, 3)]
