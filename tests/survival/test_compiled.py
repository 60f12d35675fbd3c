"""torch.compile around the model, in its place, inside it, and around a whole step.

The backend ``aot_eager`` traces as the real one does and needs no compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mupx
from mupx.errors import UsageError
from mupx.optim import OPTIMIZERS
from tests.factories import small_mlp
from tests.optim.training import batches
from tests.survival import VALUES, optimizer_of, parametrized

Call = Callable[[Tensor], Tensor]
X = torch.ones(12, 6)


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def whole(model: nn.Sequential) -> Call:
    result: Call = torch.compile(model, backend="aot_eager")
    return result


def in_place(model: nn.Sequential) -> Call:
    model.compile(backend="aot_eager")
    return model


def one_layer(model: nn.Sequential) -> Call:
    model[2].compile(backend="aot_eager")
    return model


def weights(name: str, compiled: Callable[[nn.Sequential], Call] | None, before: bool = False) -> Tensor:
    """Train for six steps, compiled or not; ``before``: the model ran, and was compiled, before the first."""
    structure = {"solver": "low-rank"} if name == "shampoo" else {}
    model, optimizer = parametrized(name, **structure)
    call = model if compiled is None else compiled(model)
    if before:
        call(X)
    for x, y in batches(6):
        optimizer.zero_grad()
        with optimizer.curvature(y):
            F.cross_entropy(call(x), y).backward()
        call(x)  # an evaluation, outside
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("compiled", [whole, in_place, one_layer])
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_compiled_model_trains_as_the_plain_one(name: str, compiled: Any, before: bool) -> None:
    torch.testing.assert_close(weights(name, compiled, before), weights(name, None), rtol=1e-5, atol=1e-6)


def test_compiled_code_would_not_run_the_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "set_stance", lambda _: nullcontext())
    with pytest.raises(UsageError, match="no curvature captured"):
        weights("kfac", whole, before=True)


def test_outside_of_the_capture_the_compiled_code_runs() -> None:
    calls = 0

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            return graph(*args)

        return run

    model, optimizer = parametrized("kfac", refresh=4)
    call = torch.compile(model, backend=backend)
    for x, y in batches(5):
        optimizer.zero_grad()
        due = optimizer.refresh_due  # type: ignore[attr-defined]
        before = calls
        with optimizer.curvature(y):
            F.cross_entropy(call(x), y).backward()
        assert (calls == before) == due
        optimizer.step()
    assert calls


@pytest.mark.parametrize("name", ["sgd", pytest.param("kfac", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")  # graph breaks inside the optimizer are reported
def test_a_compiled_step_is_the_plain_one(name: str) -> None:
    results = []
    for compiled in (False, True):
        model, optimizer = parametrized(name)

        def step(x: Tensor, y: Tensor, model: Any = model, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            with optimizer.curvature(y):
                F.cross_entropy(model(x), y).backward()
            optimizer.step()

        run = torch.compile(step, backend="aot_eager") if compiled else step
        for x, y in batches(3):
            run(x, y)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_groups_and_kfac_for_a_model_that_is_compiled_already() -> None:
    model = small_mlp(16)
    compiled: Any = torch.compile(model, backend="aot_eager")
    groups = mupx.param_groups(
        compiled, build=small_mlp, width=16, base_width=8, optimizer="kfac", **VALUES["kfac"]
    )
    optimizer: Any = optimizer_of("kfac", groups, compiled)
    (x, y), before = batches(1)[0], model[0].weight.detach().clone()
    with optimizer.curvature(y):
        F.cross_entropy(compiled(x), y).backward()
    optimizer.step()
    assert optimizer.fallback == []
    assert not torch.equal(model[0].weight, before)
