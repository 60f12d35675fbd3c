"""Gauss–Newton against explicit Jacobians and the loss's Hessian, solved with whole matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from mupx import samples
from mupx.config import parse
from mupx.errors import UsageError
from mupx.layers import derive
from mupx.losses import LOSSES
from mupx.optim.gauss_newton import Block, GaussNewton, solve
from mupx.parametrization import build_optimizer, resolved
from mupx.roles import describe
from mupx.samples import SampleRows
from tests.factories import small_cnn, small_mlp
from tests.optim.training import batches, make, one_update, train

DOUBLE = torch.double
NAMES = {"layer": "gauss-newton", "network": "gauss-newton-full"}
CASES = [
    ("mlp", "cross_entropy"),
    ("mlp", "squared_error"),
    ("cnn", "cross_entropy"),
    ("cnn", "squared_error"),
    ("tokens", "cross_entropy"),
]
N, CLASSES, TOLERANCE = 5, 3, 1e-10


class Tokens(nn.Module):
    """A layer over positions, mixed by a second one, and an output per position."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mix, self.head = nn.Linear(4, 5), nn.Linear(3, 3, bias=False), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).tanh()
        result: Tensor = self.head(hidden + self.mix(hidden.mT).mT)
        return result


def network(which: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    if which == "tokens":
        return Tokens().double(), torch.randn(N, 3, 4, dtype=DOUBLE), torch.randint(0, CLASSES, (N, 3))
    if which == "mlp":
        return small_mlp(6, 5, CLASSES).double(), torch.randn(N, 5, dtype=DOUBLE), torch.arange(N) % CLASSES
    return small_cnn(3, CLASSES).double(), torch.randn(N, 2, 5, 5, dtype=DOUBLE), torch.arange(N) % CLASSES


def step_of(
    model: nn.Module, name: str, x: Tensor, y: Tensor, loss: str, labels: Tensor | None = None, **options: Any
) -> dict[str, Tensor]:
    """Return the update of one step at lr 1."""
    optimizer = make(name, model, lr=1.0, loss=loss, generator=torch.Generator().manual_seed(7), **options)
    optimizer.zero_grad()
    with optimizer.curvature(y):
        outputs = model(x)
        optimizer.update_curvature(outputs, labels)
        LOSSES[loss](outputs, y).backward()
    return one_update(model, optimizer)


def one_loss(loss: str, output: Tensor, target: Tensor) -> Tensor:
    """Loss of one term, written out."""
    if loss == "cross_entropy":
        return output.exp().sum().log() - output[target]
    wanted = torch.zeros_like(output)
    wanted[target] = 1.0
    return 0.5 * (output - wanted).square().sum()


def curvature(loss: str, fisher: str, outputs: Tensor, y: Tensor, labels: Tensor) -> Tensor:
    """What stands between Jᵀ and J for the flattened outputs, ``[N·S·C, N·S·C]``."""
    flat, targets, drawn = outputs.reshape(-1, CLASSES), y.flatten(), labels.flatten()
    noise = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(7), dtype=DOUBLE)
    blocks, rows = [], []
    for i, output in enumerate(flat):
        blocks.append(jacrev(jacrev(lambda f, t=targets[i]: one_loss(loss, f, t)))(output))
        label = targets[i] if fisher == "empirical" else drawn[i]
        row = jacrev(lambda f, t=label: one_loss(loss, f, t))(output)
        sampled = fisher == "mc" and loss == "squared_error"
        rows.append(noise.reshape(-1, CLASSES)[i] if sampled else row)
    if fisher == "exact":
        return torch.block_diag(*blocks)
    # One row per sample, its positions together.
    size = len(rows) // len(outputs)
    per_sample = [torch.cat(rows[n * size : (n + 1) * size]) for n in range(len(outputs))]
    return torch.block_diag(*[torch.outer(row, row) for row in per_sample])


def twin(
    model: nn.Module, scope: str, x: Tensor, y: Tensor, H: Tensor, loss: str, damping: float, rule: str
) -> dict[str, Tensor]:
    """(JᵀHJ/M + D)⁻¹ g with the Jacobian of every output by every parameter."""
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    terms = y.numel() if loss == "cross_entropy" else len(y)

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(model, parameters, (x,)).flatten()

    jacobians = {name: J.flatten(1) for name, J in jacrev(outputs)(values).items()}
    gradients = {name: p.grad.flatten() for name, p in model.named_parameters()}
    ridges = {}
    for name, J in jacobians.items():
        unit = float((J.T @ H @ J).trace()) / terms if rule == "trace" else 1.0
        ridges[name] = torch.full((J.shape[1],), damping * unit, dtype=DOUBLE)
    result: dict[str, Tensor] = {}
    for names in [list(values)] if scope == "network" else [[name] for name in values]:
        J = torch.cat([jacobians[name] for name in names], 1)
        D = torch.diag(torch.cat([ridges[name] for name in names]))
        u = torch.linalg.solve(J.T @ H @ J / terms + D, torch.cat([gradients[name] for name in names]))
        parts = u.split([values[name].numel() for name in names])
        result |= {name: part.view_as(values[name]) for name, part in zip(names, parts, strict=True)}
    return result


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("scope", NAMES)
@pytest.mark.parametrize(("which", "loss"), CASES)
def test_updates_equal_the_explicit_jacobians(which: str, scope: str, fisher: str, loss: str) -> None:
    labels = torch.randint(0, CLASSES, (N, 3) if which == "tokens" else (N,))
    for rule, damping in (("trace", 0.05), ("absolute", 0.02)):
        model, x, y = network(which)
        found = step_of(
            model,
            NAMES[scope],
            x,
            y,
            loss,
            labels if loss == "cross_entropy" else None,
            damping=damping,
            damping_rule=rule,
            fisher=fisher,
        )
        model, _, _ = network(which)
        outputs = model(x)
        LOSSES[loss](outputs, y).backward()
        H = curvature(loss, fisher, outputs.detach(), y, labels)
        expected = twin(model, scope, x, y, H, loss, damping, rule)
        other = twin(model, "layer" if scope == "network" else "network", x, y, H, loss, damping, rule)
        for name, update in found.items():
            torch.testing.assert_close(update, expected[name], rtol=TOLERANCE, atol=TOLERANCE)
        assert any(float((found[k] - other[k]).abs().max()) > 1e-3 for k in found)


def test_a_whole_step_without_damping_solves_the_linearised_least_squares() -> None:
    """lr 1, ρ → 0, squared error: the outputs land on the targets to first order."""
    model, x, y = network("mlp")
    before, start = model(x).detach(), {k: p.detach().clone() for k, p in model.named_parameters()}
    u = step_of(
        model,
        "gauss-newton-full",
        x,
        y,
        "squared_error",
        damping=1e-10,
        damping_rule="absolute",
        fisher="exact",
    )
    J = jacrev(lambda p: functional_call(model, p, (x,)))(start)
    moved = sum(J[key].flatten(2) @ u[key].flatten() for key in u)
    wanted = torch.nn.functional.one_hot(y, CLASSES)
    torch.testing.assert_close(before - moved, wanted.double(), rtol=1e-5, atol=1e-5)


def rows(positions: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    h = torch.randn(2, 4, positions, 3, dtype=DOUBLE, generator=generator)
    delta = torch.randn(2, 2, 4, positions, 5, dtype=DOUBLE, generator=generator)
    return h, delta, torch.randn(2, 5, 3, dtype=DOUBLE, generator=generator)


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("at_once", [2**23, 1])
def test_the_products_never_form_what_they_stand_for(
    positions: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "ENTRIES", at_once)
    h, delta, G = rows(positions)
    J = samples.sample_gradients(h, delta).flatten(1, 2).flatten(2)  # [population, rows, entries]
    torch.testing.assert_close(samples.gram(h, delta), J @ J.mT)
    torch.testing.assert_close(samples.project(h, delta, G), (J @ G.flatten(1).unsqueeze(-1)).squeeze(-1))
    c = torch.arange(1.0, 17.0, dtype=DOUBLE).view(2, 8)
    torch.testing.assert_close(samples.combine(h, delta, c).flatten(1), (c.unsqueeze(1) @ J).squeeze(1))


@pytest.mark.parametrize("rule", ["trace", "absolute"])
def test_a_population_equals_its_members(rule: str) -> None:
    h, delta, G = rows(3)
    damping = torch.tensor([0.1, 0.7], dtype=DOUBLE)
    terms = torch.tensor(4.0, dtype=DOUBLE)
    (together,), ok = solve([Block(G, h, delta, damping)], terms, rule)
    assert ok.tolist() == [True, True]
    for p in range(2):
        (alone,), _ = solve([Block(G[p], h[p], delta[p], float(damping[p]))], terms, rule)
        torch.testing.assert_close(together[p], alone, rtol=1e-10, atol=1e-12)


def test_max_rows_and_the_rows_come_from_the_configuration() -> None:
    changes = {"name": "gauss-newton", "fisher": "exact", "args": {"max_rows": 7}}
    experiment = resolved(parse({"optimizer": changes, "scaling": {"base_width": 8, "width": 8}}))
    model = small_mlp(8)
    optimizer = build_optimizer(model, derive(describe(small_mlp, 8), experiment), experiment)
    assert isinstance(optimizer, GaussNewton)
    assert (optimizer.max_rows, optimizer.fisher) == (7, "exact")
    wrong = experiment.updated({"optimizer.args": {"max_row": 7}})
    with pytest.raises(UsageError, match="takes no argument 'max_row'"):
        build_optimizer(model, derive(describe(small_mlp, 8), wrong), wrong)


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("name", NAMES.values())
def test_duplicating_the_batch_leaves_the_update(name: str, fisher: str) -> None:
    updates = []
    for copies in (1, 3):
        model, x, y = network("cnn")
        x, y = torch.cat([x] * copies), torch.cat([y] * copies)
        updates.append(step_of(model, name, x, y, "cross_entropy", fisher=fisher))
    for key, update in updates[0].items():
        torch.testing.assert_close(updates[1][key], update, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NAMES.values())
def test_micro_batches_of_unlike_length_and_ignored_targets_are_one_batch(name: str) -> None:
    class Pooled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            keep = x.abs().sum(-1, keepdim=True).gt(0)
            hidden = torch.tanh(self[0](x)) * keep
            result: Tensor = self[1](hidden.sum(1))
            return result

    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, 4, 3, dtype=DOUBLE, generator=generator)
    x[3:, 2:] = 0.0  # padding
    y = torch.tensor([0, 1, -100, 2, 0, 1])
    updates = []
    for split in (False, True):
        torch.manual_seed(1)
        model = Pooled(nn.Linear(3, 5), nn.Linear(5, 3)).double()
        optimizer = make(name, model, lr=1.0, fisher="exact")
        parts = [(x[:3], y[:3]), (x[3:, :2], y[3:])] if split else [(x, y)]
        for x_k, y_k in parts:
            share = int((y_k >= 0).sum()) / 5
            with optimizer.curvature(y_k, loss_scale=share):
                outputs = model(x_k)
                optimizer.update_curvature(outputs)
                (share * LOSSES["cross_entropy"](outputs, y_k)).backward()
        updates.append(one_update(model, optimizer))
    for key, update in updates[0].items():
        torch.testing.assert_close(updates[1][key], update, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NAMES.values())
def test_an_l2_decay_is_part_of_the_gradient(name: str) -> None:
    model, x, y = network("mlp")
    decayed = step_of(model, name, x, y, "cross_entropy", weight_decay=0.3, weight_decay_mode="l2")
    model, _, _ = network("mlp")
    optimizer = make(name, model, lr=1.0)
    with optimizer.curvature(y):
        LOSSES["cross_entropy"](model(x), y).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad += 0.3 * parameter.detach()
    for key, update in one_update(model, optimizer).items():
        torch.testing.assert_close(decayed[key], update, rtol=1e-9, atol=1e-11)


# --- edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES.values())
def test_below_a_zero_head_layers_stand_still_and_are_counted(name: str) -> None:
    model = small_mlp()
    nn.init.zeros_(model[4].weight)
    optimizer = make(name, model, lr=1.0)
    assert isinstance(optimizer, GaussNewton)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, batches(1))
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert moved == [False, False, False, False, True, True]
    assert optimizer.skipped == {"0": 1, "2": 1, "4": 0}
    train(model, optimizer, batches(2, seed=1))
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), 1e25])
@pytest.mark.parametrize("name", NAMES.values())
def test_a_batch_that_overflows_moves_nothing(name: str, bad: float) -> None:
    model, ((x, y),) = small_mlp(), batches(1)
    optimizer = make(name, model, lr=1.0)
    with optimizer.curvature(y):
        LOSSES["cross_entropy"](model(bad * x), y).backward()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    updates = one_update(model, optimizer)
    assert not updates["0.weight"].any()
    assert all(u.isfinite().all() for u in updates.values())


@pytest.mark.parametrize("name", NAMES.values())
def test_too_many_rows_are_refused_before_the_passes_with_what_to_set(name: str) -> None:
    model, x, y = network("mlp")
    with pytest.raises(UsageError, match=rf"{name}.*15 rows.*max_rows = 14.*fisher to mc \(5 rows\)"):
        step_of(model, name, x, y, "cross_entropy", fisher="exact", max_rows=14)
    step_of(model, name, x, y, "cross_entropy", fisher="exact", max_rows=15)
    with pytest.raises(UsageError, match=r"5 rows.*: lower train\.batch_size, or raise max_rows"):
        step_of(model, name, x, y, "cross_entropy", max_rows=4)
    with pytest.raises(UsageError, match="max_rows must be"):
        make(name, model, max_rows=0)


def test_tokens_taken_for_samples_are_refused_for_the_whole_network_alone() -> None:
    class Flat(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self[1](self[0](x.flatten(0, 1)).tanh().unflatten(0, x.shape[:2]).sum(1))
            return result

    x, y = torch.randn(4, 3, 5), torch.tensor([0, 1, 2, 0])
    model = Flat(nn.Linear(5, 6), nn.Linear(6, 3))
    with pytest.raises(UsageError, match="there are 4 and 12 of them"):
        step_of(model, "gauss-newton-full", x, y, "cross_entropy")
    step_of(model, "gauss-newton", x, y, "cross_entropy")


@pytest.mark.parametrize("name", NAMES.values())
def test_a_group_without_damping_is_refused(name: str) -> None:
    model, x, y = network("mlp")
    optimizer = make(name, model)
    optimizer.param_groups[0]["damping_B"] = 0.0
    with optimizer.curvature(y):
        LOSSES["cross_entropy"](model(x), y).backward()
    with pytest.raises(UsageError, match=r"damping of gauss-newton.* must be > 0"):
        optimizer.step()


def test_forgetting_the_capture_says_so() -> None:
    model, x, y = network("mlp")
    for fisher in ("empirical", "exact"):
        optimizer = make("gauss-newton", model, fisher=fisher)
        LOSSES["cross_entropy"](model(x), y).backward()
        with pytest.raises(UsageError, match=r"with opt\.curvature\(\)"):
            optimizer.step()
        with optimizer.curvature(y):
            LOSSES["cross_entropy"](model(x), y).backward()
        if fisher == "exact":
            with pytest.raises(UsageError, match="update_curvature"):
                optimizer.step()


@pytest.mark.parametrize("name", NAMES.values())
def test_scales_are_those_of_the_block(name: str) -> None:
    model, x, y = network("mlp")
    optimizer = make(name, model, damping=0.02)
    assert isinstance(optimizer, GaussNewton)
    with optimizer.curvature(y):
        LOSSES["cross_entropy"](model(x), y).backward()
    collected = optimizer._sums["2"]
    assert isinstance(collected, SampleRows)
    J = samples.sample_gradients(*collected.rows()).flatten(0, 1).flatten(1)
    optimizer.step()
    group = next(g for g in optimizer.param_groups if any(p is model[2].weight for p in g["params"]))
    found = optimizer.scales(model[2].weight, group)["F"]
    values = torch.linalg.eigvalsh(J.T @ J / N)
    assert found.size == pytest.approx(float(values[-1]))
    assert found.trace == pytest.approx(float(values.sum()))
    assert found.ridge == pytest.approx(0.02 * float(values.sum()))
    optimizer.zero_grad()
    assert optimizer.scales(model[2].weight, group) == {}
