"""Optimizers that cut matrices into blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from mupx.blocks import blocks_of
from mupx.distributed.assignment import cubes
from mupx.optim.blockwise import Blockwise
from mupx.optim.shampoo import LeftShampoo, RightShampoo, Shampoo
from mupx.optim.soap import SOAP, LeftSOAP

SHAPE, SIZE = (5, 8), 2
KINDS: dict[str, Callable[[list[nn.Parameter]], Blockwise]] = {
    "shampoo": lambda p: Shampoo(p, blocks=SIZE, refresh=4, staleness=1.0),
    "shampoo-left": lambda p: LeftShampoo(p, blocks=SIZE, refresh=4, staleness=1.0),
    "soap": lambda p: SOAP(p, blocks=SIZE, refresh=2),
    "soap-left": lambda p: LeftSOAP(p, blocks=SIZE, refresh=2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_with_a_key_per_block_is_read(kind: str) -> None:
    def train_on(steps: range) -> None:
        for step in steps:
            weight.grad = torch.randn(SHAPE, generator=torch.Generator().manual_seed(step)).double()
            optimizer.step()

    weight = nn.Parameter(torch.zeros(SHAPE, dtype=torch.double))
    optimizer = KINDS[kind]([weight])
    train_on(range(3))
    saved, start = copy.deepcopy(optimizer.state_dict()), weight.detach().clone()
    train_on(range(3, 9))
    wanted = weight.detach().clone()

    tiles, state = optimizer.tiles(weight), saved["state"][0]
    batches = {key: state.pop(key) for key in [key for key in state if key[-1].isdigit()]}
    for number, block in enumerate(blocks_of(SHAPE, SIZE, optimizer.sides)):
        index, tile = next((i, tile) for i, tile in enumerate(tiles) if block in tile.blocks)
        for name in [key[:-1] for key in batches if key.endswith(str(index))]:
            batch = batches[f"{name}{index}"]
            state[f"{name}{number}"] = batch[tile.blocks.index(block)] if batch.dim() == 3 else batch
    assert len(state) > len(batches)  # or it would not be another form

    with torch.no_grad():
        weight.copy_(start)
    optimizer = KINDS[kind]([weight])
    optimizer.load_state_dict(saved)
    train_on(range(3, 9))
    assert torch.equal(weight, wanted)


@pytest.mark.parametrize("kind", [Shampoo, RightShampoo, LeftSOAP])
def test_the_cost_counts_every_block(kind: type[Blockwise]) -> None:
    weight = nn.Parameter(torch.zeros(5, 4, 2))
    blocks = blocks_of((5, 8), 3, kind.sides)
    wanted = sum(cubes((r.stop - r.start, c.stop - c.start), kind.sides) for r, c in blocks)
    assert kind([weight], blocks=3).cost(weight) == wanted
