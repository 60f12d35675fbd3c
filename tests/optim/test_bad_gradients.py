"""Gradients that no update is defined for: a step is done as a whole or not at all."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mupx.errors import UsageError
from mupx.gradients import all_finite
from mupx.optim import OPTIMIZERS
from mupx.optim.adapter import Adapter
from mupx.optim.base import Base
from mupx.scaling import find_rule
from tests.factories import small_mlp
from tests.optim.training import CAPTURED, backward, batches, make, train

BAD = [math.nan, math.inf, -math.inf]


@pytest.fixture(params=sorted(OPTIMIZERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def poisoned(model: nn.Module, value: float, where: int = -1) -> None:
    """Put one bad entry into one gradient; the others stay good."""
    gradient = list(model.parameters())[where].grad
    assert gradient is not None
    gradient.view(-1)[0] = value


def spoiled_run(name: str, where: int, value: float = math.nan, forget: bool = True) -> tuple[Any, Any]:
    """Train with one bad batch among good ones, and the same without it."""
    runs = []
    for spoil in (True, False):
        torch.manual_seed(0)
        model = small_mlp()
        optimizer = make(name, model, lr=0.05)
        data = batches(5)
        train(model, optimizer, data[:2])
        if spoil:
            backward(model, optimizer, *batches(1, seed=9)[0])
            poisoned(model, value, where)
            before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
            optimizer.step()
            assert_same(before, (model.state_dict(), optimizer.state_dict()["state"]))
            # As a loop of one's own does it, which knows nothing of what the optimizer captured.
            model.zero_grad()
        train(model, optimizer, data[2:])
        runs.append((model, optimizer))
    return runs[0], runs[1]


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("where", [0, -1])
@pytest.mark.parametrize("value", BAD)
def test_a_step_with_one_bad_entry_is_skipped_as_a_whole(name: str, value: float, where: int) -> None:
    (model, optimizer), (twin, plain) = spoiled_run(name, where, value)
    assert_same(model.state_dict(), twin.state_dict())
    assert_same(optimizer.state_dict()["state"], plain.state_dict()["state"])
    assert (optimizer.skipped_steps, plain.skipped_steps) == (1, 0)
    assert optimizer.skipped_in_a_row == 0


def test_without_the_check_one_bad_entry_spoils_the_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mupx.optim.base.all_finite", lambda gradients: True)
    with pytest.raises(AssertionError):
        spoiled_run(name, 0)


def test_the_count_survives_saving_and_copying(name: str) -> None:
    model = small_mlp()
    optimizer = make(name, model, lr=0.05)
    for _ in range(3):
        backward(model, optimizer, *batches(1)[0])
        poisoned(model, math.nan)
        optimizer.step()
    twin = make(name, small_mlp(), lr=0.05)
    twin.load_state_dict(optimizer.state_dict())
    for each in (optimizer, twin, copy.deepcopy(optimizer)):
        assert (each.skipped_steps, each.skipped_in_a_row) == (3, 3)
    state = optimizer.state_dict()
    for group in state["param_groups"]:  # written before steps were counted
        del group["skipped_steps"], group["skipped_in_a_row"]
    twin.load_state_dict(state)
    train(small_mlp(), twin, [])
    twin.step()
    assert twin.skipped_steps == 0


def test_an_optimizer_from_elsewhere_is_guarded_too() -> None:
    model = small_mlp()
    weights, biases = ([p for p in model.parameters() if (p.dim() == 2) == flat] for flat in (True, False))
    optimizer = Adapter(torch.optim.Adam(weights, lr=0.1), make_adam(biases))
    (x, y), before = batches(1)[0], copy.deepcopy(model.state_dict())
    backward(model, optimizer, x, y)  # type: ignore[arg-type]
    poisoned(model, math.inf)  # in AdamW's part, beside it
    optimizer.step()
    assert_same(model.state_dict(), before)
    twin = Adapter(torch.optim.Adam(weights, lr=0.1), make_adam(biases))
    twin.load_state_dict(optimizer.state_dict())
    assert (twin.skipped_steps, twin.skipped_in_a_row) == (1, 1)
    backward(model, optimizer, x, y)  # type: ignore[arg-type]
    optimizer.step()
    assert (optimizer.skipped_steps, optimizer.skipped_in_a_row) == (1, 0)
    assert not torch.equal(model[0].weight, before["0.weight"])


def make_adam(parameters: list[nn.Parameter]) -> Base:
    result: Base = OPTIMIZERS.load("adamw")(parameters)
    return result


def test_large_is_not_infinite() -> None:
    huge = torch.full((3, 3), 1e30)  # the sum of squares overflows, no entry does
    assert all_finite([huge, torch.zeros(0, 2), torch.zeros(4, dtype=torch.float64)])
    assert all_finite([torch.full((4,), 6e4, dtype=torch.float16)])
    assert all_finite([])
    assert all_finite([huge, huge.flatten()])
    for value in BAD:
        assert not all_finite([torch.zeros(2), torch.tensor([1.0, value])])
        assert not all_finite([torch.tensor([1.0, value]), torch.zeros(2, dtype=torch.float64)])


def test_finiteness_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look from the host makes a GPU finish its queue: one per step, whatever the number of tensors."""
    looks = 0

    def counting(name: str) -> Callable[[Tensor], object]:
        original = getattr(Tensor, name)

        def counted(tensor: Tensor) -> object:
            nonlocal looks
            looks += 1
            return original(tensor)

        return counted

    for name in ("__bool__", "__float__", "item"):
        monkeypatch.setattr(Tensor, name, counting(name))
    assert all_finite([torch.ones(3, 3) for _ in range(20)])
    assert looks == 1
    assert all_finite([torch.ones(3, 3), torch.ones(3, dtype=torch.float64)])
    assert looks == 2


def test_sparse_gradients_are_refused_by_name(name: str) -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 4))
    optimizer = make(name, model)
    model(torch.tensor([0, 1])).sum().backward()
    with pytest.raises(UsageError, match=r"0\.weight is sparse.*sparse=False"):
        optimizer.step()


@pytest.mark.parametrize("named", [True, False])
def test_complex_parameters_are_refused(name: str, named: bool) -> None:
    weight = nn.Parameter(torch.ones(2, 3, dtype=torch.complex64))
    extra = (nn.Linear(2, 2),) if name in CAPTURED else ()
    with pytest.raises(UsageError, match=rf"{'phase' if named else '2, 3'}.* is complex.*view_as_real"):
        OPTIMIZERS.load(name)([("phase", weight)] if named else [weight], *extra)


def parameters_of(name: str) -> set[str]:
    """Every keyword that an optimizer's constructor, or one it hands keywords on to, takes."""
    found: set[str] = set()
    for kind in OPTIMIZERS.load(name).__mro__:
        takes = signature(kind.__init__).parameters
        found |= takes.keys()
        if not any(one.kind is one.VAR_KEYWORD for one in takes.values()):
            break
    return found


# A key may have another name in another optimizer; what is one of these must be positive in all of them.
@pytest.mark.parametrize("key", ["damping", "damping_ratio", "refresh", "staleness", "interval"])
@pytest.mark.parametrize("value", [0, -1])
def test_damping_and_intervals_that_are_not_positive_are_refused(name: str, key: str, value: int) -> None:
    if key not in parameters_of(name):
        assert key != "damping" or not find_rule(name).damping, f"{name} has no {key} to refuse"
        return
    with pytest.raises(UsageError, match=key):
        make(name, nn.Linear(2, 2), **{key: value})


@pytest.mark.parametrize("key", ["damping_A", "damping_B"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_a_group_cannot_bring_damping_that_is_none(name: str, key: str, value: float) -> None:
    layer = nn.Linear(2, 2)
    groups = [{"params": list(layer.parameters()), "algorithm": name, key: value}]
    with pytest.raises(UsageError, match=f"{key} must be a finite number ≥ 0"):
        OPTIMIZERS.load(name)(groups, *((layer,) if name in CAPTURED else ()))


class Hollow(nn.Module):
    """Layers and parameters without a single entry, beside others that have some."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.down, self.up = nn.Linear(4, 0), nn.Linear(0, 4)
        self.nothing, self.matrix = nn.Parameter(torch.zeros(0)), nn.Parameter(torch.zeros(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return h + self.up(self.down(h)) + self.nothing.sum() + self.matrix.sum()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_tensors_without_entries_are_passed_over(name: str) -> None:
    torch.manual_seed(0)
    model = Hollow()
    losses = train(model, make(name, model, lr=0.05), batches(1) * 5)
    assert losses[-1] < losses[0]
