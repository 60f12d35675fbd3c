"""EKFAC against per-sample gradients by autograd, and against the K-FAC it corrects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mupx import samples
from mupx.errors import UsageError
from mupx.optim.ekfac import EKFAC
from mupx.samples import squares, turned
from tests import oracles
from tests.factories import small_cnn, small_mlp
from tests.optim.training import backward, batches, make, one_update, train
from tests.strategies import rotation

DOUBLE = torch.double
Signals = Callable[[Tensor, int], list[Tensor]]


def network(which: str) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(2)
    model = (small_mlp() if which == "mlp" else small_cnn()).double()
    x = torch.randn(7, *((6,) if which == "mlp" else (2, 5, 5)), dtype=DOUBLE)
    return model, x, torch.randint(0, 4, (7,))


def sample_gradients(model: nn.Module, tensor: Tensor, x: Tensor, signals: Signals) -> Tensor:
    """Every (sample, direction)'s gradient of one tensor by autograd, [R, d_out, ...]."""
    rows = []
    for n in range(len(x)):
        output = model(x[n : n + 1])
        for signal in signals(output, n):
            rows += torch.autograd.grad(output, tensor, signal, retain_graph=True)
    return torch.stack(rows)


def signals_of(fisher: str, y: Tensor, drawn: Tensor) -> Signals:
    if fisher == "exact":
        return oracles.exact_signals
    return oracles.label_signals(y if fisher == "empirical" else drawn)


def twin(model: nn.Module, name: str, x: Tensor, signals: Signals, damping: float, rule: str) -> list[Tensor]:
    """(weight update, bias update) with every matrix written out."""
    layer = model.get_submodule(name)
    _, Q_A, _, Q_B = (part for M in oracles.factors(model, name, x, signals) for part in torch.linalg.eigh(M))
    G = sample_gradients(model, layer.weight, x, signals).flatten(2)
    g = sample_gradients(model, layer.bias, x, signals)
    S = sum((Q_B.T @ each @ Q_A) ** 2 for each in G) / len(x)
    s = sum((Q_B.T @ each) ** 2 for each in g) / len(x)
    rho, rho_bias = (damping * float(m.sum()) if rule == "trace" else damping for m in (S, s))
    basis = torch.kron(Q_B, Q_A)
    F_weight = basis @ torch.diag(S.flatten() + rho) @ basis.T
    weight = torch.linalg.solve(F_weight, layer.weight.grad.flatten()).view_as(layer.weight)
    return [weight, torch.linalg.solve(Q_B @ torch.diag(s + rho_bias) @ Q_B.T, layer.bias.grad)]


@pytest.mark.parametrize("fisher", ["empirical", "mc", "exact"])
@pytest.mark.parametrize("rule", ["trace", "absolute"])
@pytest.mark.parametrize("which", ["mlp", "cnn"])
def test_updates_equal_the_dense_twin(which: str, rule: str, fisher: str) -> None:
    model, x, y = network(which)
    drawn = torch.randint(0, 4, (7,), generator=torch.Generator().manual_seed(1))
    optimizer = make("ekfac", model, lr=1.0, damping=0.01, damping_rule=rule, fisher=fisher)
    backward(model, optimizer, x, y, drawn if fisher == "mc" else None)
    found = one_update(model, optimizer)
    model, _, _ = network(which)
    F.cross_entropy(model(x), y).backward()
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            weight, bias = twin(model, name, x, signals_of(fisher, y, drawn), 0.01, rule)
            torch.testing.assert_close(found[f"{name}.weight"], weight, rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(found[f"{name}.bias"], bias, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("which", ["mlp", "cnn"])
def test_it_is_closer_to_the_fisher_block_than_kfac_and_nothing_diagonal_is_closer(which: str) -> None:
    model, x, y = network(which)
    optimizer = make("ekfac", model)
    backward(model, optimizer, x, y)
    optimizer.before_step()
    for name in ("0", "2"):
        weight = model.get_submodule(name).weight
        state = optimizer.state[weight]
        G = sample_gradients(model, weight, x, oracles.label_signals(y)).flatten(1)
        block = G.T @ G / len(x)
        basis = torch.kron(state["vectors_B"], state["vectors_A"])

        def distance(diagonal: Tensor, basis: Tensor = basis, block: Tensor = block) -> float:
            return float((basis @ torch.diag(diagonal) @ basis.T - block).norm())

        ours = state["S"].flatten()
        assert distance(ours) < 0.999 * float((torch.kron(state["B"], state["A"]) - block).norm())
        for seed in range(3):
            other = torch.rand(len(ours), dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
            assert distance(ours) < distance(ours * (1 + 0.1 * other))
        assert state["S"].sum() == pytest.approx(float(block.trace()))


def test_it_is_no_kfac_with_exact_damping() -> None:
    updates = []
    for name, rule in (("ekfac", "absolute"), ("kfac", "exact")):
        model, x, y = network("mlp")
        optimizer = make(name, model, lr=1.0, damping=0.01, damping_rule=rule)
        backward(model, optimizer, x, y)
        updates.append(one_update(model, optimizer)["2.weight"])
    assert float((updates[0] - updates[1]).norm()) > 0.05 * float(updates[1].norm())


# --- second moments -------------------------------------------------------------------------------


def rows(positions: int, directions: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    h = torch.randn(2, 6, positions, 4, dtype=DOUBLE, generator=generator)
    return h, torch.randn(2, directions, 6, positions, 3, dtype=DOUBLE, generator=generator)


@pytest.mark.parametrize("positions", [1, 5])
@pytest.mark.parametrize("at_once", [2**23, 1])
def test_squares_by_loops(positions: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "ENTRIES", at_once)
    h, delta = rows(positions)
    expected = torch.zeros(2, 3, 4, dtype=DOUBLE)
    apart = torch.zeros(2, 3, 4, dtype=DOUBLE)
    for p in range(2):
        for n in range(6):
            for k in range(3):
                outer = [torch.outer(delta[p, k, n, t], h[p, n, t]) for t in range(positions)]
                expected[p] += sum(outer) ** 2
                apart[p] += sum(o**2 for o in outer)
    torch.testing.assert_close(squares(h, delta), expected, rtol=1e-12, atol=1e-12)
    # Positions taken for samples are another curvature.
    assert torch.allclose(squares(h, delta), apart) == (positions == 1)


def test_moments_turn_with_the_basis_and_keep_their_sum() -> None:
    S = torch.rand(3, 4, dtype=DOUBLE)
    P, Q = rotation(3, 1), rotation(4, 2)
    basis = torch.kron(P, Q)
    expected = (basis.T @ torch.diag(S.flatten()) @ basis).diagonal().view(3, 4)
    torch.testing.assert_close(turned(S, P, Q), expected)
    assert float(turned(S, P, Q).sum()) == pytest.approx(float(S.sum()))
    assert not torch.allclose(S, expected)


def test_the_average_keeps_what_earlier_batches_had() -> None:
    model, x, y = network("mlp")
    optimizer = make("ekfac", model, lr=1e-12, ema=0.5, refresh=1)
    traces = []
    for scale in (1.0, 3.0):
        single = make("ekfac", model, lr=1e-12)
        for each in (optimizer, single):
            backward(model, each, scale * x, y)
            each.step()
        traces.append(single.state[model[2].weight]["S"].sum())
    assert float(optimizer.state[model[2].weight]["S"].sum()) == pytest.approx(float(sum(traces) / 2))


# --- edges ----------------------------------------------------------------------------------------


def test_duplicating_the_batch_leaves_the_update() -> None:
    updates = []
    for copies in (1, 3):
        model, x, y = network("cnn")
        optimizer = make("ekfac", model, lr=1.0)
        backward(model, optimizer, torch.cat([x] * copies), torch.cat([y] * copies))
        updates.append(one_update(model, optimizer))
    for name, update in updates[0].items():
        torch.testing.assert_close(updates[1][name], update, rtol=1e-8, atol=1e-10)


def test_a_zero_head_stops_the_layers_below_and_is_counted() -> None:
    model = small_mlp()
    nn.init.zeros_(model[4].weight)
    optimizer = make("ekfac", model, lr=1.0)
    assert isinstance(optimizer, EKFAC)
    (batch,) = batches(1)
    backward(model, optimizer, *batch)
    updates = one_update(model, optimizer)
    assert not any(updates[f"{i}.{kind}"].any() for i in (0, 2) for kind in ("weight", "bias"))
    assert updates["4.weight"].any()
    assert optimizer.skipped == {"0": 1, "2": 1, "4": 0}
    train(model, optimizer, batches(2, seed=1))
    backward(model, optimizer, *batch)
    assert one_update(model, optimizer)["0.weight"].any()


def test_an_overflow_does_not_stay_in_the_averages() -> None:
    model, (x, y) = small_mlp(), batches(1)[0]
    optimizer = make("ekfac", model, refresh=1)
    train(model, optimizer, [(x, y)])
    backward(model, optimizer, 1e25 * x, y)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert not one_update(model, optimizer)["0.weight"].any()
    backward(model, optimizer, x, y)
    updates = one_update(model, optimizer)
    assert all(u.isfinite().all() for u in updates.values())
    assert updates["0.weight"].any()


class Reusing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.body(self.body(x).tanh()).tanh())
        return result


def test_a_layer_that_runs_twice_is_refused_and_kfac_takes_it() -> None:
    (batch,) = batches(1)
    model = Reusing()
    with pytest.raises(UsageError, match=r"more than once in one forward pass.*use kfac"):
        backward(model, make("ekfac", model), *batch)
    train(model, make("kfac", model), [batch])


@pytest.mark.parametrize("options", [{"damping_rule": "pi"}, {"damping_rule": "exact"}])
def test_damping_of_two_factors_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="damping_rule of ekfac must be one of trace, absolute"):
        make("ekfac", small_mlp(), **options)
