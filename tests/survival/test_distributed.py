"""Processes over gloo: replicated (DistributedDataParallel) and sharded (fully_shard) parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mupx
from mupx.distributed import joining
from mupx.distributed.communicator import Communicator, Ranks
from mupx.errors import MismatchError
from mupx.optim import OPTIMIZERS
from mupx.optim.divided import Divided
from tests.factories import small_mlp
from tests.optim.training import batches
from tests.survival import SENSITIVE, VALUES, optimizer_of

RANKS, STEPS = 2, 5
Structure = dict[str, Any]
# Where both solvers and updates can be sent, a long and a short interval make each happen.
OFTEN, SELDOM = {"refresh": 1}, {"refresh": 4, "staleness": 1.0}
SOLVERS: list[tuple[str, Structure]] = [
    *((name, {}) for name in OPTIMIZERS if name not in SENSITIVE),
    *((name, often) for name in ("kfac", "foof", "ekfac", "shampoo") for often in (OFTEN, SELDOM)),
    ("kfac", {"solver": "low-rank"}),
    ("kfac", {"fisher": "exact", **SELDOM}),
    ("kfac", {"damping_rule": "exact", **SELDOM}),
    ("kfac", {"statistics": 1, **SELDOM}),
    ("shampoo", {"solver": "dense", "blocks": 8}),
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


def alone(model: nn.Sequential) -> nn.Module:
    return model


def trained(
    name: str,
    structure: Structure,
    wrap: Callable[[Any], nn.Module],
    shares: bool,
    rank: int,
    ranks: int,
    uneven: int = 0,
) -> tuple[Tensor, dict[str, Any]]:
    """Train on this rank's part of every batch; return all weights and the optimizer's state."""
    torch.manual_seed(4)
    model, _ = mupx.parametrize(small_mlp, width=16, base_width=8, optimizer=name, **VALUES[name])
    model = model.double()
    wrapped = wrap(model)
    groups = mupx.param_groups(
        wrapped, build=small_mlp, width=16, base_width=8, optimizer=name, **VALUES[name]
    )
    optimizer = optimizer_of(name, groups, wrapped, **structure)
    if shares and isinstance(optimizer, Divided):
        optimizer.communicator = Ranks()
    for x, y in batches(STEPS, torch.float64):
        cuts = [0, *(len(x) * (r + 1) // ranks + uneven * (r + 1 < ranks) for r in range(ranks))]
        part = slice(cuts[rank], cuts[rank + 1])
        weight = len(x[part]) * ranks / len(x)  # the ranks' mean is then that over all samples
        optimizer.zero_grad()
        with optimizer.curvature(y[part], loss_scale=weight):
            outputs = wrapped(x[part])
            optimizer.update_curvature(outputs)
            (F.cross_entropy(outputs, y[part]) * weight).backward()
        optimizer.step()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    state = {} if wrap is sharded else optimizer.state_dict()["state"]
    return torch.cat([p.detach().flatten() for p in whole]), state


def _start(rank: int, folder: str, ranks: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    try:
        torch.save(work(*arguments, rank, ranks), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()
    joining.end(0)


def on_ranks(folder: Path, work: Callable[..., Any], *arguments: Any, ranks: int = RANKS) -> list[Any]:
    """Run ``work(*arguments, rank, ranks)`` in every process and return what each returned."""
    torch.multiprocessing.spawn(_start, (str(folder), ranks, work, arguments), nprocs=ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def every_solver(wrap: Callable[[Any], nn.Module], shares: bool, rank: int, ranks: int) -> list[Any]:
    return [
        trained(name, structure, wrap, shares, rank, ranks, uneven=2 if wrap is replicated else 0)
        for name, structure in SOLVERS
    ]


@pytest.mark.dist
@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("wrap", [replicated, sharded])
def test_ranks_keep_equal_weights_and_those_of_one_process(tmp_path: Path, wrap: Any, shares: bool) -> None:
    ended = on_ranks(tmp_path, every_solver, wrap, shares)
    for (name, structure), *ranks in zip(SOLVERS, *ended, strict=True):
        single, state = trained(name, structure, alone, False, 0, 1)
        for weights, _ in ranks:
            assert torch.equal(weights, ranks[0][0]), (name, structure)
        torch.testing.assert_close(ranks[0][0], single, rtol=1e-9, atol=1e-10, msg=f"{name} {structure}")
        if wrap is replicated:  # a sharded state is read by torch.distributed.checkpoint
            _assert_same(ranks[0][1], state, (name, structure))
    assert {name for name, _ in SOLVERS} | SENSITIVE == set(OPTIMIZERS)


def _assert_same(found: dict[int, Any], wanted: dict[int, Any], which: Any) -> None:
    assert found.keys() == wanted.keys(), which
    for index, state in wanted.items():
        assert found[index].keys() == state.keys(), (which, index)
        for key, value in state.items():
            if isinstance(value, Tensor) and key not in ("columns_A", "columns_B", "vectors_A", "vectors_B"):
                torch.testing.assert_close(
                    found[index][key], value, rtol=1e-7, atol=1e-9, msg=f"{which} {key}"
                )
            elif not isinstance(value, Tensor):
                assert found[index][key] == value, (which, key)


def full_rank(name: str, wrap: Callable[[Any], nn.Module], shares: bool, rank: int, ranks: int) -> Tensor:
    """Train square layers by regression: every factor has full rank, so SOAP's bases are determined."""
    torch.manual_seed(4)
    model = small_mlp(width=6, d_in=6, classes=6).double()
    wrapped = wrap(model)
    optimizer = OPTIMIZERS.load(name)(wrapped.named_parameters(), lr=0.01, refresh=2)
    if shares:
        optimizer.communicator = Ranks()
    for x, _ in batches(STEPS, torch.float64, size=24):
        part = slice(rank * len(x) // ranks, (rank + 1) * len(x) // ranks)
        optimizer.zero_grad()
        (wrapped(x[part]) - x[part].sin()).square().mean().backward()
        optimizer.step()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in whole])


def every_soap(rank: int, ranks: int) -> list[Tensor]:
    return [
        full_rank(name, wrap, shares, rank, ranks)
        for name in sorted(SENSITIVE)
        for wrap in (replicated, sharded)
        for shares in (False, True)
    ]


@pytest.mark.dist
def test_soap_follows_one_process_where_its_bases_are_determined(tmp_path: Path) -> None:
    first, second = on_ranks(tmp_path, every_soap)
    singles = [full_rank(name, alone, False, 0, 1) for name in sorted(SENSITIVE) for _ in range(4)]
    for a, b, single in zip(first, second, singles, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, single, rtol=1e-8, atol=1e-9)


def with_own_statistics(rank: int, ranks: int) -> Tensor:
    """Train as if each rank's samples were all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mupx.optim.captured.pool", lambda *_: None)
        return trained("kfac", {}, replicated, False, rank, ranks)[0]


@pytest.mark.dist
def test_without_pooled_statistics_the_ranks_would_part(tmp_path: Path) -> None:
    first, second = on_ranks(tmp_path, with_own_statistics)
    assert not torch.allclose(first, second, rtol=1e-2)


def two_models(rank: int, ranks: int) -> str:
    model = small_mlp(8 + rank)
    optimizer = optimizer_of("muon", model.named_parameters(), model)
    optimizer.communicator = Ranks()  # type: ignore[attr-defined]
    model(torch.ones(2, 6)).sum().backward()
    with pytest.raises(MismatchError) as caught:
        optimizer.step()
    optimizer.communicator = Communicator()  # type: ignore[attr-defined]
    optimizer.step()
    return str(caught.value)


@pytest.mark.dist
def test_ranks_with_models_of_their_own_are_told_how_to_train_them(tmp_path: Path) -> None:
    for message in on_ranks(tmp_path, two_models):
        assert "different parameters" in message
        assert "optimizer.communicator = mupx.distributed.communicator.Communicator()" in message
