"""How large the statistics behind an update are, and the ridge beside each: what a verification reads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mupx import linalg
from mupx.linalg import largest_eigenvalue, trace
from mupx.optim.base import Base
from mupx.optim.kfac import KFAC
from mupx.optim.shampoo import moments
from mupx.preconditioning import precondition, precondition_bias
from mupx.tiles import tiles_of
from tests.factories import small_cnn, small_mlp
from tests.optim.training import batches, make, train
from tests.strategies import rotation, seeds

STEPS = 3
DOUBLE = torch.double
CLOSE = 1e-3


def exact(factor: Tensor) -> float:
    return float(torch.linalg.eigvalsh(factor.double())[..., -1].max())  # of the largest of a batch


def image_batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(12, 2, 6, 6, generator=generator, dtype=DOUBLE),
            torch.randint(0, 4, (12,), generator=generator),
        )
        for _ in range(count)
    ]


def trained(name: str, model: nn.Module | None = None, steps: int = STEPS, **options: Any) -> Base:
    """Train a small float64 network for a few steps and return the optimizer."""
    model = small_mlp().double() if model is None else model
    optimizer = make(name, model, **options)
    images = isinstance(next(model.children()), nn.Conv2d)
    train(model, optimizer, image_batches(steps) if images else batches(steps, DOUBLE))
    return optimizer


def entries(optimizer: Base) -> list[tuple[nn.Parameter, dict[str, Any]]]:
    return [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]


def weights(optimizer: Base) -> list[tuple[nn.Parameter, dict[str, Any]]]:
    return [(parameter, group) for parameter, group in entries(optimizer) if parameter.dim() > 1]


# The largest eigenvalue


def psd(values: list[float], seed: int) -> Tensor:
    """Return a symmetric matrix with these eigenvalues and random eigenvectors."""
    Q = rotation(len(values), seed)
    return (Q * torch.tensor(values, dtype=DOUBLE)) @ Q.T


@given(seeds, st.integers(1, 12), st.floats(0, 0.5), st.floats(1e-6, 1e6))
def test_a_gap_below_the_largest_eigenvalue_finds_it(seed: int, d: int, rest: float, scale: float) -> None:
    M = scale * psd([1.0, *[rest] * (d - 1)], seed)
    assert float(largest_eigenvalue(M)) == pytest.approx(scale, rel=CLOSE)


@given(seeds, st.integers(1, 10), st.integers(1, 12))
def test_the_largest_eigenvalue_is_never_overstated(seed: int, d: int, rows: int) -> None:
    X = torch.randn(rows, d, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
    M = X.T @ X / rows
    found = float(largest_eigenvalue(M))
    assert float(trace(M)) / d * (1 - 1e-9) <= found <= exact(M) * (1 + 1e-9)


@given(seeds, st.integers(1, 10))
def test_a_tighter_tolerance_comes_closer(seed: int, d: int) -> None:
    M = psd([1.0, *[0.9] * (d - 1)], seed)
    assert float(largest_eigenvalue(M, tolerance=1e-9)) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("rows", [8, 64, 600])
def test_a_factor_too_large_to_decompose_is_close_too(rows: int) -> None:
    """Batch-sized factors have a flat top, where a single vector would settle on the wrong plateau."""
    d = linalg.DECOMPOSED + 44
    for seed in range(5):
        X = torch.randn(rows, d, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
        M = X.T @ X / rows
        assert float(largest_eigenvalue(M)) == pytest.approx(exact(M), rel=CLOSE)


@pytest.mark.parametrize("d", [4, linalg.DECOMPOSED + 4])
def test_a_tiny_factor_does_not_underflow(d: int) -> None:
    M = 1e-25 * torch.diag(torch.linspace(0.1, 1.0, d))
    assert float(largest_eigenvalue(M)) == pytest.approx(1e-25, rel=2e-3)


def test_a_batch_of_factors_equals_its_members() -> None:
    M = torch.stack([psd([3.0 + i, 1.0, 0.5, 0.0], i) for i in range(6)]).view(2, 3, 4, 4)
    found = largest_eigenvalue(M)
    assert found.shape == (2, 3)
    torch.testing.assert_close(found, torch.linalg.eigvalsh(M)[..., -1], rtol=CLOSE, atol=0)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_factor_that_is_zero_or_not_finite_has_none_and_spares_the_others(bad: float) -> None:
    M = torch.stack([psd([2.0, 1.0, 0.0], i) for i in range(3)])
    M[1] = bad
    assert largest_eigenvalue(M).tolist() == pytest.approx([2.0, 0.0, 2.0], rel=CLOSE)
    assert float(largest_eigenvalue(M[1])) == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_entry_is_a_bad_factor(bad: float) -> None:
    M = psd([2.0, 1.0, 0.5], 0)
    M[0, 2] = bad
    assert float(largest_eigenvalue(M)) == 0.0


def test_a_factor_orthogonal_to_the_ones_vector_is_no_zero_factor() -> None:
    # δ of a softmax sums to zero over classes, so B maps the vector of ones to zero.
    delta = torch.randn(20, 5, dtype=DOUBLE)
    delta -= delta.mean(1, keepdim=True)
    B = delta.T @ delta / 20
    ones = torch.ones(5, 1, dtype=DOUBLE)
    assert float((B @ ones).abs().max()) < 1e-12  # what a start with ones would end with
    assert float(largest_eigenvalue(B)) == pytest.approx(exact(B), rel=CLOSE)
    v = torch.tensor([[1.0, -1.0, 0.0, 0.0]], dtype=DOUBLE)
    assert float(largest_eigenvalue(3.0 * v.T @ v)) == pytest.approx(6.0)  # 3·‖v‖²


def test_single_precision_is_kept_and_gradients_of_small_size_are_no_zero() -> None:
    M = (1e-12 * psd([1.0, 0.3, 0.1], 0)).float()
    found = largest_eigenvalue(M)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(1e-12, rel=CLOSE)


# K-FAC


@pytest.mark.parametrize(("model", "close"), [(small_mlp, CLOSE), (small_cnn, CLOSE)])
@pytest.mark.parametrize("rule", ["trace", "absolute", "pi", "exact"])
def test_kfac_sizes_are_the_largest_eigenvalues_of_its_factors(
    model: Callable[[], nn.Sequential], close: float, rule: str
) -> None:
    optimizer = trained("kfac", model().double(), damping_rule=rule)
    for weight, group in weights(optimizer):
        state, scales = optimizer.state[weight], optimizer.scales(weight, group)
        for symbol in "AB":
            assert scales[symbol].size == pytest.approx(exact(state[symbol]), rel=close)
            assert scales[symbol].trace == pytest.approx(float(trace(state[symbol])))
        assert exact(state["A"]) != pytest.approx(exact(state["B"]), rel=0.1)  # could not be swapped unseen


def ridge_used(inverse: Tensor, factor: Tensor) -> float:
    """Recover ρ from (M + ρ I)⁻¹ and M, which also tells whether that is what the solver holds."""
    rest = torch.linalg.inv(inverse) - factor
    rho = float(rest.diagonal().mean())
    torch.testing.assert_close(rest, rho * torch.eye(len(rest), dtype=DOUBLE), rtol=1e-6, atol=1e-6 * rho)
    return rho


@pytest.mark.parametrize("ratio", [1.0, 16.0])
@pytest.mark.parametrize("rule", ["trace", "absolute", "pi"])
def test_kfac_ridges_are_those_of_its_solver(rule: str, ratio: float) -> None:
    optimizer = trained("kfac", damping_rule=rule, damping=0.02, damping_ratio=ratio)
    for weight, group in weights(optimizer):
        state, scales = optimizer.state[weight], optimizer.scales(weight, group)
        used = {s: ridge_used(state[f"inverse_{s}"], state[s]) for s in "AB"}
        assert {s: scales[s].ridge for s in "AB"} == pytest.approx(used, rel=1e-6)
        assert set(scales) == {"A", "B"}


def test_kfac_ridges_by_hand() -> None:
    # damping 0.02 and ratio 16: ρ_A = 0.02·4, ρ_B = 0.02/4; π has one ρ and ignores the ratio.
    for rule in ("trace", "absolute", "pi"):
        optimizer = trained("kfac", damping_rule=rule, damping=0.02, damping_ratio=16.0)
        for weight, group in weights(optimizer):
            A, B = optimizer.state[weight]["A"], optimizer.state[weight]["B"]
            mean_A, mean_B = float(trace(A)) / len(A), float(trace(B)) / len(B)
            pi = math.sqrt(mean_A / mean_B)
            wanted = {
                "trace": (0.08 * float(trace(A)), 0.005 * float(trace(B))),
                "absolute": (0.08, 0.005),
                "pi": (math.sqrt(0.02) * pi, math.sqrt(0.02) / pi),
            }[rule]
            scales = optimizer.scales(weight, group)
            assert (scales["A"].ridge, scales["B"].ridge) == pytest.approx(wanted)


def test_exact_damping_adds_one_ridge_to_the_product_of_the_factors() -> None:
    optimizer = trained("kfac", damping_rule="exact", damping=0.02)
    for weight, group in weights(optimizer):
        state, scales = optimizer.state[weight], optimizer.scales(weight, group)
        assert set(scales) == {"A", "B", "AB"}
        assert (scales["A"].ridge, scales["B"].ridge, scales["AB"].ridge) == (None, None, 0.02)
        product = torch.kron(state["A"], state["B"])
        assert scales["AB"].size == pytest.approx(exact(product), rel=CLOSE)
        assert scales["AB"].trace == pytest.approx(float(trace(product)))
        # The largest eigenvalue of A⊗B is damped by that ridge and no other: u = g/(λ + ρ).
        top = torch.outer(state["vectors_B"][:, -1], state["vectors_A"][:, -1])
        shrunk = float(precondition(top, state).norm())
        assert 1 / shrunk == pytest.approx(scales["AB"].size + 0.02, rel=CLOSE)


@pytest.mark.parametrize("rule", ["trace", "absolute", "pi"])
def test_a_kfac_bias_has_the_output_factor_of_its_layer_alone(rule: str) -> None:
    model = small_mlp().double()
    optimizer = trained("kfac", model, damping_rule=rule)
    groups = {id(parameter): group for parameter, group in entries(optimizer)}
    for layer in model:
        if isinstance(layer, nn.Linear):
            scales = optimizer.scales(layer.bias, groups[id(layer.bias)])
            assert scales == {"B": optimizer.scales(layer.weight, groups[id(layer.weight)])["B"]}


def test_a_bias_under_exact_damping_has_a_ridge_of_its_own() -> None:
    model = small_mlp().double()
    groups = [
        {"params": [p], "algorithm": "kfac", "damping_B": 0.03 if p.dim() > 1 else 0.07}
        for p in model.parameters()
    ]
    optimizer = KFAC(groups, model, damping_rule="exact")
    train(model, optimizer, batches(STEPS, DOUBLE))
    for parameter, group in entries(optimizer):
        scales = optimizer.scales(parameter, group)
        if parameter.dim() > 1:
            assert scales["AB"].ridge == 0.03
            continue
        assert (set(scales), scales["B"].ridge) == ({"B"}, 0.07)
        owner = next(m for m in model if isinstance(m, nn.Linear) and m.bias is parameter)
        state = optimizer.state[owner.weight]
        top = state["vectors_B"][:, -1]
        shrunk = float(precondition_bias(top, state).norm())
        assert 1 / shrunk == pytest.approx(scales["B"].size + 0.07, rel=CLOSE)


def test_the_ridge_of_a_group_is_its_own() -> None:
    model = small_mlp().double()
    groups = [
        {"params": [p], "algorithm": "kfac", "damping_A": 0.1 * (i + 1), "damping_B": 0.01 * (i + 1)}
        for i, p in enumerate(model.parameters())
    ]
    optimizer = KFAC(groups, model, damping_rule="absolute")
    train(model, optimizer, batches(1, DOUBLE))
    for i, (parameter, group) in enumerate(entries(optimizer)):
        scales = optimizer.scales(parameter, group)
        if parameter.dim() > 1:
            assert (scales["A"].ridge, scales["B"].ridge) == pytest.approx((0.1 * (i + 1), 0.01 * (i + 1)))
        else:  # preconditioned by the inverse of its weight, which stands before it
            assert scales["B"].ridge == pytest.approx(0.01 * i)


# Shampoo


@pytest.mark.parametrize("blocks", [0, 3])
@pytest.mark.parametrize("rule", ["relative", "absolute"])
def test_shampoo_sizes_and_ridges(rule: str, blocks: int) -> None:
    optimizer = trained("shampoo", damping_rule=rule, damping=0.02, damping_ratio=16.0, blocks=blocks)
    for weight, group in weights(optimizer):
        state, scales = optimizer.state[weight], optimizer.scales(weight, group)
        count = len(tiles_of(weight.flatten(1).shape, blocks))
        assert set(scales) == {"L", "R"}
        for symbol, rho in (("L", 0.02 / 4), ("R", 0.02 * 4)):
            largest = max(exact(state[f"{symbol}{index}"]) for index in range(count))
            assert scales[symbol].size == pytest.approx(largest, rel=CLOSE)
            assert scales[symbol].ridge == pytest.approx(
                rho * largest if rule == "relative" else rho, rel=CLOSE
            )
            traces = [float(trace(state[f"{symbol}{index}"]).max()) for index in range(count)]
            assert scales[symbol].trace == pytest.approx(max(traces))


@pytest.mark.parametrize("rule", ["relative", "absolute"])
def test_shampoo_ridges_are_those_of_its_roots(rule: str) -> None:
    optimizer = trained("shampoo", damping_rule=rule, damping=0.02, damping_ratio=16.0)
    for weight, group in weights(optimizer):
        state, scales = optimizer.state[weight], optimizer.scales(weight, group)
        for symbol in "LR":
            damped = torch.linalg.matrix_power(torch.linalg.inv(state[f"root_{symbol}0"]), 4)
            assert exact(damped) == pytest.approx(
                scales[symbol].size + (scales[symbol].ridge or 0.0), rel=CLOSE
            )
            rho = float((damped - state[f"{symbol}0"]).diagonal().mean())
            assert scales[symbol].ridge == pytest.approx(rho, rel=CLOSE)


def test_shampoo_after_one_step_has_the_moments_of_its_gradient() -> None:
    weight = nn.Parameter(torch.zeros(3, 4, dtype=DOUBLE))
    optimizer = make("shampoo", nn.ParameterDict({"weight": weight}))
    weight.grad = torch.randn(3, 4, dtype=DOUBLE)
    optimizer.step()
    L, R = moments(weight.grad)
    scales = optimizer.scales(weight, optimizer.param_groups[0])
    largest = float(torch.linalg.matrix_norm(weight.grad, 2)) ** 2
    assert (exact(L), exact(R)) == pytest.approx((largest, largest))
    assert (scales["L"].size, scales["R"].size) == pytest.approx((largest, largest), rel=CLOSE)


# Adam and the rest


@pytest.mark.parametrize("steps", [1, STEPS])
def test_adams_v_is_the_root_mean_square_of_the_root_of_v_hat(steps: int) -> None:
    optimizer = trained("adamw", steps=steps, betas=(0.9, 0.75), eps=1e-5)
    for parameter, group in entries(optimizer):
        root = (optimizer.state[parameter]["exp_avg_sq"] / (1 - 0.75**steps)).sqrt()
        rms = float(root.square().mean().sqrt())
        assert root.numel() == 1 or rms != pytest.approx(float(root.mean()), rel=1e-6)  # nor its mean
        scale = optimizer.scales(parameter, group)["v"]
        assert scale.size == pytest.approx(rms)
        assert (scale.ridge, scale.trace) == (1e-5, None)


def test_adams_v_after_one_step_is_the_size_of_the_gradient() -> None:
    weight = nn.Parameter(torch.zeros(2, dtype=DOUBLE))
    optimizer = make("adamw", nn.ParameterDict({"weight": weight}))
    weight.grad = torch.tensor([3.0, -4.0], dtype=DOUBLE)
    optimizer.step()
    scale = optimizer.scales(weight, optimizer.param_groups[0])["v"]
    assert scale.size == pytest.approx(math.sqrt((9 + 16) / 2))


def test_what_shampoo_leaves_to_adam_has_adams_scale() -> None:
    optimizer = trained("shampoo", eps=1e-6)
    biases = [(p, g) for p, g in entries(optimizer) if p.dim() == 1]
    assert biases
    for bias, group in biases:
        scales = optimizer.scales(bias, group)
        assert (set(scales), scales["v"].ridge) == ({"v"}, 1e-6)


def test_what_kfac_leaves_to_adam_has_adams_scale() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)).double()
    optimizer = trained("kfac", model)
    scales = {id(p): set(optimizer.scales(p, g)) for p, g in entries(optimizer)}
    assert {name: scales[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": {"A", "B"},
        "0.bias": {"B"},
        "1.weight": {"v"},
        "1.bias": {"v"},
        "2.weight": {"A", "B"},
        "2.bias": {"B"},
    }


def test_sgd_divides_by_nothing() -> None:
    optimizer = trained("sgd")
    assert [optimizer.scales(p, g) for p, g in entries(optimizer)] == [{}] * 6


@pytest.mark.parametrize("name", ["sgd", "adamw", "kfac", "shampoo"])
def test_before_the_first_step_there_is_nothing_to_tell_and_asking_leaves_no_trace(name: str) -> None:
    optimizer = make(name, small_mlp())
    assert [optimizer.scales(p, g) for p, g in entries(optimizer)] == [{}] * 6
    assert not optimizer.state


@pytest.mark.parametrize("name", ["adamw", "kfac", "shampoo"])
def test_asking_changes_no_training(name: str) -> None:
    trajectories = []
    for ask in (False, True):
        torch.manual_seed(0)
        model = small_mlp()
        optimizer = make(name, model)
        losses = []
        for batch in batches(4):
            losses += train(model, optimizer, [batch])
            if ask:
                for parameter, group in entries(optimizer):
                    optimizer.scales(parameter, group)
        trajectories.append(losses)
    assert trajectories[0] == trajectories[1]
