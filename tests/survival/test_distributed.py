"""Two processes over gloo: replicated (DistributedDataParallel) and sharded (fully_shard) parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mupx
from mupx.errors import UsageError
from mupx.optim import OPTIMIZERS
from tests.factories import small_mlp
from tests.optim.training import CAPTURED, batches
from tests.survival import SENSITIVE, VALUES, optimizer_of

RANKS, STEPS = 2, 4
SOLVERS = [
    ("adamw", {}),
    ("adam-atan2", {}),
    ("lion", {}),
    ("muon", {}),
    ("psgd", {}),
    ("sgd", {}),
    ("shampoo", {"solver": "dense"}),
    ("shampoo", {"solver": "low-rank"}),
]


def replicated(model: nn.Sequential) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def sharded(model: nn.Sequential) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    return model


def trained(
    name: str, structure: dict[str, Any], wrap: Callable[[Any], nn.Module], rank: int, ranks: int
) -> Tensor:
    """Train on this rank's part of every batch; return all weights."""
    torch.manual_seed(4)
    model, _ = mupx.parametrize(small_mlp, width=16, base_width=8, optimizer=name, **VALUES[name])
    wrapped = wrap(model)
    groups = mupx.param_groups(
        wrapped, build=small_mlp, width=16, base_width=8, optimizer=name, **VALUES[name]
    )
    optimizer = optimizer_of(name, groups, wrapped, **structure)
    for x, y in batches(STEPS):
        part = slice(rank * len(x) // ranks, (rank + 1) * len(x) // ranks)
        optimizer.zero_grad()
        with optimizer.curvature(y[part]):
            F.cross_entropy(wrapped(x[part]), y[part]).backward()
        optimizer.step()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in whole])


def _start(rank: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    try:
        torch.save(work(*arguments, rank, RANKS), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def on_ranks(folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run ``work(*arguments, rank, ranks)`` in every process and return what each returned."""
    torch.multiprocessing.spawn(_start, (str(folder), work, arguments), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def every_solver(wrap: Callable[[Any], nn.Module], rank: int, ranks: int) -> list[Tensor]:
    return [trained(name, structure, wrap, rank, ranks) for name, structure in SOLVERS]


@pytest.mark.dist
@pytest.mark.parametrize("wrap", [replicated, sharded])
def test_ranks_keep_equal_weights_and_those_of_one_process(tmp_path: Path, wrap: Any) -> None:
    first, second = on_ranks(tmp_path, every_solver, wrap)
    for (name, structure), a, b in zip(SOLVERS, first, second, strict=True):
        assert torch.equal(a, b), (name, structure)
        # An averaged gradient is no product of one rank's rows, so low-rank factors are dense here.
        dense = dict.fromkeys(structure, "dense")
        alone = trained(name, dense, lambda model: model, 0, 1)
        torch.testing.assert_close(a, alone, rtol=1e-4, atol=1e-5)
    variants = {"shampoo-half", "shampoo-left", "shampoo-right"}  # of exponent and sides alone
    assert {name for name, _ in SOLVERS} | set(CAPTURED) | SENSITIVE | variants == set(OPTIMIZERS)


def refusal(wrap: Callable[[Any], nn.Module], rank: int, ranks: int) -> str:
    with pytest.raises(UsageError) as caught:
        trained("kfac", {}, wrap, rank, ranks)
    return str(caught.value)


@pytest.mark.dist
@pytest.mark.parametrize(("wrap", "said"), [(replicated, "2 ranks"), (sharded, "sharded parameters")])
def test_kfac_refuses_several_processes_and_says_what_works(tmp_path: Path, wrap: Any, said: str) -> None:
    for message in on_ranks(tmp_path, refusal, wrap):
        assert message.startswith(f"kfac cannot train with {said}: ")
        assert "use shampoo, adamw or sgd" in message


def without_refusal(rank: int, ranks: int) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mupx.optim.captured.require_whole", lambda *_: None)
        return trained("kfac", {}, replicated, rank, ranks)


@pytest.mark.dist
def test_without_the_refusal_the_ranks_would_part(tmp_path: Path) -> None:
    first, second = on_ranks(tmp_path, without_refusal)
    assert not torch.allclose(first, second, rtol=1e-2)
