"""Factors that cannot be decomposed as they are: repaired, counted, and never a crash."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from mupx import linalg
from mupx.optim import OPTIMIZERS
from mupx.optim.base import Base
from tests.factories import small_mlp
from tests.optim.training import batches, make, train


def spoil(optimizer: Base) -> None:
    """Take a third of its trace from every factor, in one direction."""
    for state in optimizer.state.values():
        for factor in (state[key] for key in ("A", "B", "L0", "R0") if key in state):
            factor[0, 0] -= linalg.trace(factor) / 3 + factor[0, 0]


CASES = [
    ("kfac", {"damping_rule": rule, "solver": "dense", "refresh": 2, "staleness": 1.0, "damping": 0.01})
    for rule in ("trace", "absolute", "exact")
] + [("shampoo", {"damping": 1e-3, "solver": "dense", "refresh": 2, "staleness": 1.0})]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_indefinite_factors_are_repaired_and_counted_per_parameter(
    name: str, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = small_mlp()
    optimizer = make(name, model, lr=0.01, **options)
    train(model, optimizer, batches(2))
    assert not optimizer.repairs
    spoil(optimizer)
    train(model, optimizer, batches(3))  # refreshes once more
    weights = {f"{i}.weight" for i in (0, 2, 4)}
    assert optimizer.repairs.keys() == weights
    assert all(p.isfinite().all() for p in model.parameters())
    twin = make(name, copy.deepcopy(model), lr=0.01, **options)
    twin.load_state_dict(optimizer.state_dict())
    assert twin.repairs == optimizer.repairs == copy.deepcopy(optimizer).repairs


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_lapack_that_never_converges_crashes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(matrix: Tensor) -> Any:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    torch.manual_seed(0)
    model = small_mlp()
    extra = {"damping_rule": "exact"} if name == "kfac" else {}
    train(model, make(name, model, lr=0.01, **extra), batches(3))
    assert all(p.isfinite().all() for p in model.parameters())
