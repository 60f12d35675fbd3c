"""A step without the gradients that it can do without is the step with them, however a weight is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from mupx.left_out import LeftOut
from mupx.lowrank import Thin
from mupx.optim.base import Base
from mupx.optim.kfac import KFAC
from mupx.optim.shampoo import LeftShampoo, Shampoo

WIDTH, BATCH, STEPS = 24, 4, 6
Net = nn.Sequential


@pytest.fixture(autouse=True)
def wide_means_small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("mupx.lowrank", "mupx.preconditioning", "mupx.optim.kronecker", "mupx.optim.shampoo"):
        monkeypatch.setattr(f"{module}.SMALLEST", 8)


class Tied(nn.Module):
    """Multiplies by one weight once more, past its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.hidden = nn.Linear(12, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.hidden(torch.tanh(self.first(x))))
        return self.last(torch.tanh(x @ self.hidden.weight))


class Twice(Tied):
    """Calls one layer twice."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.hidden(torch.tanh(self.first(x))))
        return self.last(torch.tanh(self.hidden(x)))


class Checkpointed(Tied):
    """Computes activations anew in the backward pass."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(checkpoint(lambda h: torch.tanh(self.hidden(h)), x, use_reentrant=self.reentrant))


class Reentrant(Checkpointed):
    """The same in the old way."""

    reentrant = True


class Edited(Tied):
    """Has a hook that puts something else in the place of a layer's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden.register_forward_hook(lambda module, args, output: 2 * output)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.hidden(torch.tanh(self.first(x)))))


class Functional(Tied):
    """Calls a layer with other tensors for its parameters."""

    def forward(self, x: Tensor) -> Tensor:
        scaled = {"weight": 2 * self.hidden.weight, "bias": self.hidden.bias}
        x = torch.func.functional_call(self.hidden, scaled, (torch.tanh(self.first(x)),))
        return self.last(torch.tanh(x))


class Differentiated(Tied):
    """Outputs a derivative with respect to its inputs."""

    again = True

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = torch.tanh(self.hidden(torch.tanh(self.first(x)))).sum()
            (slope,) = torch.autograd.grad(energy, x, create_graph=self.again)
        return self.last(torch.tanh(self.hidden(torch.tanh(self.first(x + slope)))))


class Attacked(Differentiated):
    """Moves its inputs along a derivative that is not differentiated again."""

    again = False


class Shared(Tied):
    """Has two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(WIDTH, WIDTH)
        self.other.weight = self.hidden.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.hidden(torch.tanh(self.first(x))))
        return self.last(torch.tanh(self.other(x)))


class Mapped(Tied):
    """Maps a layer over samples."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x)).unflatten(0, (-1, 2))
        return self.last(torch.tanh(torch.func.vmap(self.hidden)(x))).flatten(0, 1)


class Sequences(Tied):
    """Sees positions."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x.unflatten(1, (2, 6)).repeat(1, 1, 2)))
        return self.last(torch.tanh(self.hidden(x)).mean(1))


def plain() -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(12, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh()]
    return Net(*layers, nn.Linear(WIDTH, 3))


def without_biases() -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(12, WIDTH, bias=False), nn.Tanh()]
    return Net(*layers, nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh(), nn.Linear(WIDTH, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "without biases": without_biases,
    **{kind.__name__: kind for kind in (Tied, Twice, Checkpointed, Reentrant, Edited, Functional)},
    **{kind.__name__: kind for kind in (Differentiated, Attacked, Shared, Mapped, Sequences)},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "average": {"refresh": 3, "staleness": 1.0},
    "every step": {"refresh": 1, "damping_rule": "absolute"},
    "batch only": {"refresh": 1, "ema": 0.0},
    "sketch": {"refresh": 2, "staleness": 1.0, "solver": "sketch"},
    "dense": {"refresh": 2, "solver": "dense"},
    "sampled": {"refresh": 2, "fisher": "mc"},
    "momentum": {"momentum": 0.9},
    "decay": {"weight_decay": 0.1},
    "l2": {"weight_decay": 0.1, "weight_decay_mode": "l2"},
    "graft": {"graft": "sgd"},
    "shampoo": {"refresh": 3, "staleness": 1.0},
    "shampoo every step": {"refresh": 1, "damping_rule": "absolute", "accumulate": "sum"},
    "shampoo left": {"refresh": 2, "weight_decay": 0.1, "weight_decay_mode": "l2"},
    "shampoo statistics": {"refresh": 4, "statistics": 2, "solver": "auto", "momentum": 0.9},
    "shampoo blocks": {"refresh": 2, "blocks": 8},
}


def batch(step: int, count: int = BATCH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(count, 12, generator=generator, dtype=torch.double)
    return x, torch.randint(0, 3, (count,), generator=generator)


def built(model: str, options: str) -> tuple[nn.Module, Base]:
    torch.manual_seed(0)
    net = MODELS[model]().double()
    more = {"solver": "low-rank", **OPTIONS[options]}
    if options.startswith("shampoo"):
        kind = LeftShampoo if options == "shampoo left" else Shampoo
        return net, kind(net.named_parameters(), 0.05, damping=0.05, model=net, **more)
    generator = torch.Generator().manual_seed(1)
    return net, KFAC(net.named_parameters(), net, 0.05, damping=0.05, generator=generator, **more)


def pieces_of(step: int, sizes: tuple[int, ...], ignored: bool) -> list[tuple[Tensor, Tensor, float]]:
    x, y = batch(step, sum(sizes))
    y = y.where(torch.arange(len(y)) % 3 > 0, -100) if ignored else y
    counts = [int((part != -100).sum()) for part in y.split(sizes)]
    shares = [count / sum(counts) for count in counts]
    return list(zip(x.split(sizes), y.split(sizes), shares, strict=True))


def trained(
    gradients: bool,
    model: str = "plain",
    options: str = "average",
    sizes: tuple[int, ...] = (BATCH,),
    ignored: bool = False,
    again: bool = False,
    reused: bool = False,
) -> tuple[list[Tensor], list[set[str]]]:
    """Return the weights after some steps, and the weights without a gradient in each step."""
    net, optimizer = built(model, options)
    missing, buffer = [], torch.empty(max(sizes), 12, dtype=torch.double)
    for step in range(STEPS):
        optimizer.zero_grad()
        for x, y, share in pieces_of(step, sizes, ignored):
            x = buffer[: len(x)].copy_(x) if reused else x
            with optimizer.curvature(y, loss_scale=share, gradients=gradients):
                outputs = net(x)
                optimizer.update_curvature(outputs)
                loss = F.cross_entropy(outputs, y) * share
                if again:  # in two halves, through the same graph
                    (0.5 * loss).backward(retain_graph=True)
                    loss = 0.5 * loss
                loss.backward()
        missing.append({name for name, p in net.named_parameters() if p.grad is None})
        optimizer.step()
    return [p.detach() for p in net.parameters()], missing


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((p - q).abs().max()) for p, q in zip(a, b, strict=True))


BOTH, FIRST = {"0.weight", "2.weight"}, {"first.weight"}
CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    **{
        name: ({"options": name}, BOTH)
        for name in ("average", "every step", "batch only", "sketch", "momentum", "decay", "l2", "graft")
    },
    **{name: ({"options": name}, BOTH) for name in ("shampoo", "shampoo every step", "shampoo left")},
    "shampoo statistics": ({"options": "shampoo statistics"}, BOTH),
    "shampoo blocks": ({"options": "shampoo blocks"}, set()),
    "shampoo, another use": ({"options": "shampoo", "model": "Tied"}, FIRST),
    "shampoo, micro-batches": ({"options": "shampoo", "sizes": (3, 1)}, BOTH),
    "dense": ({"options": "dense"}, set()),
    "sampled": ({"options": "sampled"}, set()),
    "without biases": ({"model": "without biases"}, BOTH),
    "another use": ({"model": "Tied"}, FIRST),
    "two calls": ({"model": "Twice", "options": "batch only"}, FIRST | {"hidden.weight"}),
    "checkpoint": ({"model": "Checkpointed"}, FIRST | {"hidden.weight"}),
    "checkpoint, reentrant": ({"model": "Reentrant"}, FIRST | {"hidden.weight"}),
    "outputs edited": ({"model": "Edited", "options": "batch only"}, FIRST | {"hidden.weight"}),
    "differentiated again": ({"model": "Differentiated"}, set()),
    "differentiated for an input": ({"model": "Attacked"}, FIRST | {"hidden.weight"}),
    "a shared weight": ({"model": "Shared"}, FIRST),
    "shampoo, a shared weight": ({"model": "Shared", "options": "shampoo"}, FIRST),
    "shampoo, mapped": ({"model": "Mapped", "options": "shampoo"}, FIRST),
    "positions": ({"model": "Sequences", "options": "batch only"}, FIRST | {"hidden.weight"}),
    "called with other tensors": ({"model": "Functional"}, FIRST),
    "micro-batches": ({"sizes": (3, 1)}, BOTH),
    "micro-batches of a batch alone": ({"sizes": (3, 1), "options": "batch only"}, BOTH),
    "more rows than units": ({"sizes": (4,) * 7}, set()),
    # As many as do not pay where the gradient is made in any case.
    "nearly as many rows as units": ({"sizes": (20,)}, {"2.weight"}),
    "shampoo, nearly as many": ({"sizes": (20,), "options": "shampoo"}, {"2.weight"}),
    "ignored targets": ({"sizes": (6,), "ignored": True, "options": "batch only"}, BOTH),
    "two backward passes": ({"again": True, "options": "batch only"}, BOTH),
    "data overwritten": ({"sizes": (3, 1), "reused": True}, BOTH),
}


MADE = ("dense", "sampled", "shampoo blocks")  # where every gradient is


@pytest.mark.parametrize("case", CASES)
def test_weights_train_as_with_all_gradients(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, expected = CASES[case]
    with_all, nothing = trained(True, **settings)
    without, missing = trained(False, **settings)
    assert not any(nothing)
    assert missing == [expected] * STEPS
    assert distance(with_all, without) < 1e-12
    add = LeftOut.add
    # One row alone: to a factor on all of them Shampoo is blind.
    monkeypatch.setattr(LeftOut, "add", lambda self, call, h, g: add(self, call, h, _last_doubled(g)))
    wrong, _ = trained(False, **settings)
    assert (distance(with_all, wrong) > 1e-4) == (case not in MADE)


def _last_doubled(rows: Tensor) -> Tensor:
    return torch.cat([rows[:-1], 2 * rows[-1:]])


def test_another_use_is_seen_only_because_it_is_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = trained(True, "Tied")
    monkeypatch.setattr(LeftOut, "multiply_out", lambda self: self._parts.clear())
    found, _ = trained(False, "Tied")
    assert distance(expected, found) > 1e-4


def after_a_step(options: str = "average") -> tuple[nn.Module, Base]:
    net, optimizer = built("plain", options)
    passed(net, optimizer, batch(0))
    optimizer.step()
    optimizer.zero_grad()
    return net, optimizer


def passed(net: nn.Module, optimizer: Base, data: tuple[Tensor, Tensor]) -> None:
    with optimizer.curvature(data[1], gradients=False):
        F.cross_entropy(net(data[0]), data[1]).backward()


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_gradient_that_somebody_waits_for_is_made(kind: str) -> None:
    net, optimizer = after_a_step()
    seen: list[Any] = []
    getattr(net[2].weight, kind)(lambda *args: seen.append(args) and None)  # type: ignore[index]
    passed(net, optimizer, batch(1))
    assert len(seen) == 1


def test_an_input_that_is_changed_before_it_is_needed_is_refused_as_ever() -> None:
    net, optimizer = after_a_step()
    x, y = batch(1)
    with optimizer.curvature(y, gradients=False):
        hidden = torch.exp(net[0](x))  # type: ignore[index]
        outputs = net[2](hidden)  # type: ignore[index]
        with torch.no_grad():
            hidden.mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            outputs.sum().backward()


def test_under_autocast_rows_have_the_precision_of_the_weight() -> None:
    weights = {}
    for gradients in (True, False):
        net, optimizer = built("plain", "batch only")
        net.float()
        for step in range(STEPS):
            x, y = batch(step)
            optimizer.zero_grad()
            with optimizer.curvature(y, gradients=gradients), torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(net(x.float()), y)
                loss.backward()
            assert (net[2].weight.grad is None) == (not gradients)  # type: ignore[index]
            optimizer.step()
        weights[gradients] = [p.detach() for p in net.parameters()]
    start = [p.detach().float() for p in built("plain", "batch only")[0].parameters()]
    assert {p.dtype for p in weights[False]} == {torch.float32}
    assert distance(weights[True], weights[False]) < 0.02 * distance(weights[True], start)


@pytest.mark.parametrize("engine", [None, "none"])
def test_what_cannot_be_known_is_made(engine: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine is None:  # as in a version of torch that does not say what a backward pass is for
        monkeypatch.setattr("mupx.passes._runs", None)
    net, optimizer = after_a_step()
    passed(net, optimizer, batch(1))
    assert (net[2].weight.grad is None) == (engine is not None)  # type: ignore[index]


class Largest(TorchDispatchMode):
    """Remembers the entries of the largest tensor that was made, views of others aside."""

    entries = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = {a.untyped_storage().data_ptr() for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
        result = operation(*args, **(kwargs or {}))
        for made in (r for r in tree_leaves(result) if isinstance(r, Tensor)):
            if made.untyped_storage().data_ptr() not in given:
                self.entries = max(self.entries, made.numel())
        return result


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("kind", [KFAC, Shampoo])
def test_no_tensor_of_a_weight_s_size_is_made(
    kind: type[Base], gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # what is small is small here
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    net = Net(nn.Linear(700, 800), nn.Tanh(), nn.Linear(800, 900))
    optimizer = kind(net.parameters(), model=net, lr=0.01, refresh=2, staleness=1.0)  # type: ignore[call-arg]
    with Largest() as largest:
        for step in range(5):
            x, y = torch.randn(16, 700), torch.randint(0, 900, (16,))
            optimizer.zero_grad()
            with optimizer.curvature(y, gradients=gradients):
                F.cross_entropy(net(x), y).backward()
            optimizer.step()
            if step == 0:
                first = largest.entries
    assert (first >= 700 * 800, largest.entries >= 700 * 800) == (gradients, gradients)
    assert first >= 16 * 900  # it sees what is made: the outputs


def test_a_gradient_that_is_asked_for_by_itself_is_returned() -> None:
    net, optimizer = after_a_step()
    x, y = batch(1)
    weight = net[2].weight  # type: ignore[index]
    (expected,) = torch.autograd.grad(F.cross_entropy(net(x), y), weight)
    with optimizer.curvature(y, gradients=False):
        loss = F.cross_entropy(net(x), y)
        (found,) = torch.autograd.grad(loss, weight, retain_graph=True)
        assert optimizer.gradient_of(weight) is None
        loss.backward()
    torch.testing.assert_close(found, expected)
    assert weight.grad is None
    left = optimizer.gradient_of(weight)
    assert isinstance(left, Thin)
    torch.testing.assert_close(left.product, expected)


def test_after_the_passes_layers_are_as_they_were() -> None:
    net, optimizer = after_a_step()
    passed(net, optimizer, batch(1))
    assert not any("forward" in module.__dict__ for module in net.modules())
    x, y = batch(1)
    with pytest.raises(ValueError, match="batch_size"):
        passed(net, optimizer, (x, y[:-1]))
    assert not any("forward" in module.__dict__ for module in net.modules())
    assert all(optimizer.gradient_of(p) is p.grad for p in net.parameters())  # of broken passes nothing stays


def test_rows_that_are_not_finite_skip_the_step() -> None:
    net, optimizer = after_a_step()
    before = [p.detach().clone() for p in net.parameters()]
    x, y = batch(1)
    with optimizer.curvature(y, gradients=False):
        hidden = net[2](net[0](x))  # type: ignore[index]
        hidden.register_hook(lambda g: g.index_fill(1, torch.tensor([0]), torch.inf))
        (F.cross_entropy(net[4](hidden), y)).backward()  # type: ignore[index]
    for layer in (net[0], net[2]):  # type: ignore[index]
        layer.bias.grad = None
    net[0].weight.grad = None  # type: ignore[index]
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert distance(before, [p.detach() for p in net.parameters()]) == 0.0


def test_zero_grad_forgets_what_was_left_out() -> None:
    net, optimizer = after_a_step()
    passed(net, optimizer, batch(1))
    weight = net[2].weight  # type: ignore[index]
    assert weight.grad is None
    assert optimizer.gradient_of(weight) is not None
    optimizer.zero_grad()
    assert optimizer.gradient_of(weight) is None
