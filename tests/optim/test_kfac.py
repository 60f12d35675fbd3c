"""K-FAC against stored float64 reference updates, dense twins and its own symmetries."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

from mupx import patch_moments
from mupx.curvature import EagerCapture
from mupx.errors import UsageError
from mupx.factor_sums import FactorSums
from mupx.layer_rows import factorable_layers
from mupx.losses import LOSSES
from mupx.optim.kfac import KFAC
from mupx.parametrization import parametrize
from mupx.preconditioning import build_solver, precondition, precondition_bias, ridges
from tests import oracles
from tests.factories import small_cnn, small_mlp
from tests.optim.training import backward, make, one_update, train
from tests.optim.training import batches as make_batches
from tests.strategies import rotation, seeds

ARRAYS = {name: oracles.golden_arrays(name) for name in ("kfac_mlp_bias", "kfac_conv_nobias")}
FISHERS = {"empirical": "emp", "mc": "mc", "exact": "exact"}
TOLERANCE = 1e-10


def network(name: str) -> nn.Sequential:
    if name == "kfac_mlp_bias":
        model = nn.Sequential(
            nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)
        ).double()
    else:
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, bias=False),
            nn.Tanh(),
            nn.Conv2d(4, 6, 3, stride=2, bias=False),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(54, 5, bias=False),
        ).double()
    model.load_state_dict(oracles.golden_state(ARRAYS[name]))
    return model


def update(name: str, fisher: str, rule: str, **options: Any) -> dict[str, Tensor]:
    """One step at lr 1: the update, weights flattened to matrices."""
    arrays, model = ARRAYS[name], network(name)
    if rule == "absolute":
        rho_A, rho_B = float(arrays["rho_A"]), float(arrays["rho_B"])
        options |= {"damping": math.sqrt(rho_A * rho_B), "damping_ratio": rho_A / rho_B}
    options = {"damping": float(arrays["rho"]), "lr": 1.0, "damping_rule": rule, "fisher": fisher, **options}
    optimizer = KFAC(model.named_parameters(), model, **options)
    labels = arrays["y_mc"] if fisher == "mc" else None
    backward(model, optimizer, arrays["x"], arrays["y"], labels)
    return {k: u.flatten(1) if u.dim() > 1 else u for k, u in one_update(model, optimizer).items()}


def distance(updates: dict[str, Tensor], arrays: dict[str, Tensor], prefix: str, suffix: str = "") -> float:
    """Largest absolute difference over the parameters for which a reference is stored."""
    pairs = [
        (u, arrays[key])
        for name, u in updates.items()
        if (key := f"{prefix}/{name.removesuffix(suffix)}") in arrays
    ]
    assert pairs, prefix
    return max(float((u - v).abs().max()) for u, v in pairs)


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("fisher", FISHERS)
class TestStoredReference:
    def test_absolute_damping_with_biases_apart(self, name: str, fisher: str) -> None:
        updates = update(name, fisher, "absolute")
        assert distance(updates, ARRAYS[name], f"U_sep_{FISHERS[fisher]}") < TOLERANCE
        assert ("0.bias" in updates) == (f"U_sep_{FISHERS[fisher]}/0.bias" in ARRAYS[name])

    def test_pi_damping(self, name: str, fisher: str) -> None:
        updates = update(name, fisher, "pi")
        assert distance(updates, ARRAYS[name], f"U_heur_sep_{FISHERS[fisher]}", ".weight") < TOLERANCE

    def test_exact_damping(self, name: str, fisher: str) -> None:
        updates = update(name, fisher, "exact")
        assert distance(updates, ARRAYS[name], f"U_exactdamp_sep_{FISHERS[fisher]}", ".weight") < TOLERANCE

    def test_pi_ridges(self, name: str, fisher: str) -> None:
        arrays, key = ARRAYS[name], FISHERS[fisher]
        for layer in factorable_layers(network(name)):
            rho = float(arrays["rho"])
            found = ridges(arrays[f"A/{layer}"], arrays[f"B_{key}/{layer}"], rho, rho, "pi")
            for ridge, side in zip(found, "AB", strict=True):
                assert float(ridge) == pytest.approx(float(arrays[f"heur_rho{side}_sep_{key}/{layer}"]))

    def test_factors(self, name: str, fisher: str) -> None:
        arrays, found = ARRAYS[name], captured(name, fisher)
        for layer, (A, B) in found.items():
            assert float((A - arrays[f"A/{layer}"]).abs().max()) < TOLERANCE
            assert float((B - arrays[f"B_{FISHERS[fisher]}/{layer}"]).abs().max()) < TOLERANCE

    def test_trace_damping_against_whole_kronecker_products(self, name: str, fisher: str) -> None:
        updates, found = (
            update(name, fisher, "trace", damping=0.02, damping_ratio=4.0),
            captured(name, fisher),
        )
        gradients = {k[5:]: v for k, v in ARRAYS[name].items() if k.startswith("grad/")}
        for layer, (A, B) in found.items():
            if A.shape[0] * B.shape[0] > 400:
                continue  # the whole matrix is large; other layers suffice
            rho_A, rho_B = 0.04 * float(A.trace()), 0.01 * float(B.trace())
            G = gradients[f"{layer}.weight"].flatten(1)
            expected = oracles.kronecker_update(A, B, G, rho_A, rho_B)
            assert float((updates[f"{layer}.weight"] - expected).abs().max()) < TOLERANCE
            unscaled = oracles.kronecker_update(A, B, G, 0.04, 0.01)
            assert float((updates[f"{layer}.weight"] - unscaled).abs().max()) > 1e-3


@pytest.mark.parametrize("fisher", FISHERS)
def test_patches_that_are_not_laid_out_give_the_stored_factors(
    fisher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "kfac_conv_nobias"
    laid_out = captured(name, fisher)
    monkeypatch.setattr(patch_moments, "LEAST", 0.0)
    assert not torch.equal(captured(name, fisher)["0"][0], laid_out["0"][0])  # summed in another order
    TestStoredReference().test_factors(name, fisher)
    TestStoredReference().test_absolute_damping_with_biases_apart(name, fisher)


def captured(name: str, fisher: str) -> dict[str, tuple[Tensor, Tensor]]:
    arrays, model = ARRAYS[name], network(name)
    layers = factorable_layers(model)
    sums = {layer: FactorSums() for layer in layers}
    loss = LOSSES["cross_entropy"]
    with EagerCapture(layers, sums, loss, arrays["y"], 1.0, fisher == "empirical") as capture:
        outputs = model(arrays["x"])
        if fisher != "empirical":
            capture.add_fisher(outputs, fisher == "exact", labels=arrays["y_mc"])
        loss(outputs, arrays["y"]).backward()
    return {layer: sums[layer].factors() for layer in layers}


def joined(updates: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weight and bias of each layer side by side, as the folded reference has them."""
    return {
        k.removesuffix(".weight"): torch.cat([u, updates[k.replace("weight", "bias")][:, None]], 1)
        for k, u in updates.items()
        if k.endswith("weight")
    }


@pytest.mark.parametrize("rule", ["pi", "exact"])
def test_a_single_damping_ignores_the_ratio(rule: str) -> None:
    plain, split = (update("kfac_mlp_bias", "empirical", rule, damping_ratio=r) for r in (1.0, 9.0))
    assert all(torch.equal(plain[name], split[name]) for name in plain)
    plain, split = (update("kfac_mlp_bias", "empirical", "trace", damping_ratio=r) for r in (1.0, 9.0))
    assert not torch.allclose(plain["2.weight"], split["2.weight"])


class TestWrongVariants:
    """Each stored variant of another convention is told apart from ours."""

    @pytest.mark.parametrize("fisher", FISHERS)
    def test_bias_folded_into_the_input(self, fisher: str) -> None:
        name, key = "kfac_mlp_bias", FISHERS[fisher]
        updates = joined(update(name, fisher, "absolute"))
        assert distance(updates, ARRAYS[name], f"U_joint_{key}") > 1e-3
        # The same comparison accepts the right one.
        apart = {
            k.removeprefix("U_sep_" + key + "/"): v for k, v in ARRAYS[name].items() if f"U_sep_{key}/" in k
        }
        assert distance(updates, {f"U/{k}": v for k, v in joined(apart).items()}, "U") < TOLERANCE

    @pytest.mark.parametrize("fisher", FISHERS)
    def test_positions_counted_as_samples(self, fisher: str) -> None:
        name = "kfac_conv_nobias"
        updates = update(name, fisher, "absolute")
        assert distance(updates, ARRAYS[name], f"U_sepkfc_{FISHERS[fisher]}") > 1e-3

    def test_positions_summed_before_the_outer_product(self) -> None:
        arrays, found = ARRAYS["kfac_conv_nobias"], captured("kfac_conv_nobias", "exact")
        for layer in ("0", "2"):
            assert float((found[layer][1] - arrays[f"B_exact_reduce/{layer}"]).abs().max()) > 1e-4


# --- factors against loops ------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("which", ["mlp", "cnn"])
def test_factors_equal_loops_over_samples_and_positions(which: str, fisher: str) -> None:
    model = (small_mlp() if which == "mlp" else small_cnn()).double()
    x = torch.randn(5, *((6,) if which == "mlp" else (2, 5, 5)), dtype=torch.double)
    y, drawn = torch.randint(0, 4, (5,)), torch.randint(0, 4, (5,))
    layers = factorable_layers(model)
    sums = {name: FactorSums() for name in layers}
    loss = LOSSES["cross_entropy"]
    with EagerCapture(layers, sums, loss, y, 1.0, fisher == "empirical") as capture:
        outputs = model(x)
        if fisher != "empirical":
            capture.add_fisher(outputs, fisher == "exact", labels=drawn)
        loss(outputs, y).backward()
    signals = {
        "empirical": oracles.label_signals(y),
        "mc": oracles.label_signals(drawn),
        "exact": oracles.exact_signals,
    }[fisher]
    for name in layers:
        for ours, twin in zip(sums[name].factors(), oracles.factors(model, name, x, signals), strict=True):
            torch.testing.assert_close(ours, twin, rtol=1e-12, atol=1e-14)


def test_exact_solver_equals_the_dense_twin_for_weights() -> None:
    A, B = (torch.randn(20, d, dtype=torch.double) for d in (4, 3))
    A, B, G = A.T @ A / 20, B.T @ B / 20, torch.randn(3, 4, dtype=torch.double)
    solver, ok = build_solver(A, B, None, 0.1, 0.2, "exact")
    assert bool(ok)
    torch.testing.assert_close(precondition(G, solver), oracles.exact_update(A, B, G, 0.1))
    g = torch.randn(3, dtype=torch.double)
    expected = torch.linalg.solve(B + 0.2 * torch.eye(3, dtype=torch.double), g)
    torch.testing.assert_close(precondition_bias(g, solver), expected)


# --- edges ----------------------------------------------------------------------------------------


def test_a_zero_head_stops_the_layers_below_and_is_counted() -> None:
    for rule in ("absolute", "trace", "pi", "exact"):
        model = small_mlp()
        nn.init.zeros_(model[4].weight)
        optimizer = KFAC(model.named_parameters(), model, damping_rule=rule, lr=1.0)
        (batch,) = make_batches(1)
        backward(model, optimizer, *batch)
        updates = one_update(model, optimizer)
        for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
            assert not updates[name].any(), (rule, name)
        assert updates["4.weight"].any()
        assert optimizer.skipped == {"0": 1, "2": 1, "4": 0}
        # Once the head has moved, the layers below move too.
        train(model, optimizer, make_batches(2, seed=1))
        backward(model, optimizer, *batch)
        assert one_update(model, optimizer)["0.weight"].any(), rule


@pytest.mark.parametrize("rule", ["absolute", "trace", "pi", "exact"])
def test_a_factor_that_overflows_never_reaches_lapack(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for function in ("cholesky_ex", "eigh"):
        original = getattr(torch.linalg, function)

        def guarded(matrix: Tensor, original: Any = original) -> Any:
            assert matrix.isfinite().all()
            return original(matrix)

        monkeypatch.setattr(torch.linalg, function, guarded)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4))
    optimizer = KFAC(model.named_parameters(), model, damping_rule=rule, lr=1.0)
    ((x, y),) = make_batches(1)
    backward(model, optimizer, 1e25 * x, y)  # h hᵀ is infinite in float32, h is not
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    updates = one_update(model, optimizer)
    assert not updates["0.weight"].any()
    assert not updates["0.bias"].any()
    assert optimizer.skipped == {"0": 1, "2": 0}
    assert updates["2.weight"].any()
    # The running average is not poisoned: the next batch brings the layer back.
    backward(model, optimizer, x, y)
    updates = one_update(model, optimizer)
    assert all(u.isfinite().all() for u in updates.values())
    assert updates["0.weight"].any()


def test_forgetting_to_capture_on_a_refresh_step_says_so() -> None:
    model = small_mlp()
    optimizer = make("kfac", model)
    ((x, y),) = make_batches(1)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(UsageError, match=r"with opt\.curvature\(\)"):
        optimizer.step()


def test_forgetting_the_model_distribution_says_so() -> None:
    model = small_mlp()
    optimizer = make("kfac", model, fisher="mc")
    ((x, y),) = make_batches(1)
    with optimizer.curvature(y):
        F.cross_entropy(model(x), y).backward()
    with pytest.raises(UsageError, match="update_curvature"):
        optimizer.step()


def test_an_error_inside_the_capture_leaves_nothing_behind() -> None:
    model = small_mlp()
    clean, broken = make("kfac", model), make("kfac", model)
    ((x, y),) = make_batches(1)

    def fails() -> None:
        with broken.curvature(y):
            model(100 * x)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert not any(m._forward_hooks for m in model.modules())
    for optimizer in (clean, broken):
        backward(model, optimizer, x, y)
        optimizer.before_step()
    weight = model[0].weight
    assert torch.equal(clean.state[weight]["A"], broken.state[weight]["A"])


def test_what_cannot_be_factored_goes_to_adamw() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 1, groups=2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4 * 25, 4, bias=False)
    )
    optimizer = KFAC(model.named_parameters(), model, fallback_lr=0.5)
    assert optimizer.fallback == ["0.weight", "0.bias", "1.weight", "1.bias"]
    x, y = torch.randn(6, 2, 5, 5), torch.randint(0, 4, (6,))
    backward(model, optimizer, x, y)
    updates = one_update(model, optimizer)
    # Adam's first step is sign-like: lr in every entry with a gradient well above eps.
    assert float(updates["1.weight"].abs().max()) == pytest.approx(0.5, rel=1e-3)


def test_a_layer_whose_weight_is_computed_goes_to_adamw() -> None:
    model = small_mlp()
    torch.nn.utils.parametrizations.orthogonal(model[2])
    optimizer = KFAC(model.named_parameters(), model)
    assert optimizer.fallback == ["2.bias", "2.parametrizations.weight.original"]
    before = model[2].weight.detach().clone()
    train(model, optimizer, make_batches(3))
    assert not torch.equal(before, model[2].weight)


def test_a_frozen_layer_neither_moves_nor_forces_refreshes() -> None:
    model = small_mlp()
    model[2].weight.requires_grad_(False)
    optimizer = make("kfac", model, refresh=5, staleness=1.0)
    assert optimizer.fallback == ["2.bias"]
    before = model[2].weight.clone()
    due = []
    for x, y in make_batches(12):
        due.append(optimizer.refresh_due)
        train(model, optimizer, [(x, y)])
    assert due == [step in (0, 1, 6, 11) for step in range(12)]
    assert torch.equal(before, model[2].weight)


def test_loading_a_state_brings_its_damping_along() -> None:
    ((x, y),) = make_batches(1)
    updates = []
    for _ in range(2):
        torch.manual_seed(5)
        model = small_mlp()
        optimizer = make("kfac", model, damping=1.0)
        other = make("kfac", model, damping=1e-3).state_dict()
        if not updates:
            optimizer = make("kfac", model, damping=1e-3)
        else:
            optimizer.load_state_dict(other)
        backward(model, optimizer, x, y)
        updates.append(one_update(model, optimizer)["2.weight"])
    assert torch.equal(*updates)


def test_ema_zero_keeps_the_current_batch_only() -> None:
    model = small_mlp().double()
    optimizer = make("kfac", model, ema=0.0)
    train(model, optimizer, make_batches(3, torch.double))
    ((x, y),) = make_batches(1, torch.double, seed=9)
    backward(model, optimizer, x, y)
    optimizer.before_step()
    torch.testing.assert_close(optimizer.state[model[0].weight]["A"], x.T @ x / len(x))


# --- symmetry -------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(seeds)
def test_equivariant_to_permuting_hidden_units(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(8, generator=generator)
    states = []
    for permuted in (False, True):
        torch.manual_seed(seed)
        model = small_mlp().double()
        if permuted:
            permute(model, order)
        optimizer = make("kfac", model, damping=0.1, damping_rule="absolute", momentum=0.5)
        train(model, optimizer, make_batches(3, torch.double, seed))
        states.append(model)
    permute(states[0], order)
    for a, b in zip(states[0].parameters(), states[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def permute(model: nn.Sequential, order: Tensor) -> None:
    """Reorder the units of the first hidden layer."""
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight[order])
        model[0].bias.copy_(model[0].bias[order])
        model[2].weight.copy_(model[2].weight[:, order])


def test_adam_is_not_equivariant_to_rotating_inputs_but_kfac_is() -> None:
    Q = rotation(6, 3)
    data = make_batches(3, torch.double)
    for name, equivariant in (("kfac", True), ("adamw", False)):
        finals = []
        for rotated in (False, True):
            torch.manual_seed(1)
            model = small_mlp().double()
            if rotated:
                with torch.no_grad():
                    model[0].weight.copy_(model[0].weight @ Q.T)
            options = {"damping": 0.1, "damping_rule": "absolute"} if name == "kfac" else {}
            optimizer = make(name, model, lr=0.1, **options)
            train(model, optimizer, [(x @ Q.T, y) for x, y in data] if rotated else data)
            finals.append(model[0].weight.detach() if rotated else model[0].weight.detach() @ Q.T)
        assert torch.allclose(*finals, rtol=1e-6, atol=1e-8) == equivariant


@pytest.mark.parametrize("rule", ["absolute", "exact"])
def test_biases_under_the_values_of_their_own_group(rule: str) -> None:
    def build(width: int) -> nn.Module:
        return small_mlp(width).double()

    values = {"optimizer": "kfac", "lr": 1.0, "damping": 0.3, "damping_rule": rule}
    model, groups = parametrize(build, width=32, base_width=8, **values)
    optimizer = KFAC(groups, model, damping_rule=rule)
    ridge = {g["param_names"][0]: g["damping_B"] for g in optimizer.param_groups}
    # The weight's single ρ of `exact` follows A⊗B; its bias has B alone.
    assert (ridge["2.weight"], ridge["2.bias"]) == (0.3 if rule == "exact" else 0.075, 0.075)
    ((x, y),) = make_batches(1, torch.double)
    backward(model, optimizer, x, y)
    g = model[2].bias.grad.clone()
    updates = one_update(model, optimizer)
    B = optimizer.state[model[2].weight]["B"]
    expected = torch.linalg.solve(B + 0.075 * torch.eye(32, dtype=torch.double), g)
    torch.testing.assert_close(updates["2.bias"], expected, rtol=1e-8, atol=1e-10)
