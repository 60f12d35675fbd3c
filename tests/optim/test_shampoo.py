"""Shampoo against stored float64 reference updates, a twin by singular values, and rotations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

from mupx.blocks import blocks_of
from mupx.errors import UsageError
from mupx.optim.shampoo import HalfShampoo, LeftShampoo, RightShampoo, Shampoo, moments, roots
from mupx.scaling import RULES, Power
from tests import oracles
from tests.factories import small_mlp
from tests.optim.own_slopes import TOLERANCE, largest_off, wrong_lr
from tests.optim.training import batches, make, train
from tests.strategies import rotation, seeds

ARRAYS = oracles.golden_arrays("shampoo_mlp")


def stored_update(**options: Any) -> dict[str, Tensor]:
    model = nn.Sequential(
        nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)
    ).double()
    model.load_state_dict(oracles.golden_state(ARRAYS))
    optimizer = Shampoo(model.named_parameters(), lr=1.0, damping=float(ARRAYS["rho"]), **options)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    F.cross_entropy(model(ARRAYS["x"]), ARRAYS["y"]).backward()
    optimizer.step()
    return {n: before[n] - p.detach() for n, p in model.named_parameters() if p.dim() > 1}


def distance(updates: dict[str, Tensor], prefix: str) -> float:
    return max(float((u - ARRAYS[f"{prefix}/{name}"]).abs().max()) for name, u in updates.items())


@pytest.mark.parametrize(("rule", "key"), [("absolute", "U_flat_abs"), ("relative", "U_flat_rel")])
def test_stored_reference(rule: str, key: str) -> None:
    updates = stored_update(damping_rule=rule)
    assert distance(updates, key) < 1e-10
    # For matrices the mode-wise variant is the same; with another exponent it is not.
    assert distance(updates, key.replace("flat", "nd")) < 1e-10
    assert distance(updates, "U_nd_abs_exp_half") > 1e-3


def test_statistics_hold_no_ridge() -> None:
    for name in ("0.weight", "2.weight", "4.weight"):
        L, R = moments(ARRAYS[f"grad/{name}"])
        torch.testing.assert_close(L, ARRAYS[f"L/{name}"], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(R, ARRAYS[f"R/{name}"], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("shape", [(3, 7), (5, 5), (6, 2)])
def test_twin_by_singular_values(shape: tuple[int, int], relative: bool) -> None:
    G = torch.randn(shape, dtype=torch.double)
    root_L, root_R = roots(*moments(G), 0.1, 0.1, "relative" if relative else "absolute")
    torch.testing.assert_close(root_L @ G @ root_R, oracles.shampoo_update(G, 0.1, relative))
    wrong = oracles.shampoo_update(G, 0.1, relative, power=-0.5)
    assert not torch.allclose(root_L @ G @ root_R, wrong)


def step(G: Tensor, kind: type[Shampoo] = Shampoo, **options: Any) -> Tensor:
    weight = nn.Parameter(torch.zeros_like(G))
    optimizer = kind([weight], lr=1.0, **options)
    weight.grad = G.clone()
    optimizer.step()
    return -weight.detach()


@pytest.mark.parametrize(("ratio", "agrees"), [(4.0, True), (0.25, False)])
def test_damping_ratio_is_input_side_over_output_side(ratio: float, agrees: bool) -> None:
    # With a single gradient the two sides have the same spectrum and could be swapped unseen.
    first, second = torch.randn(2, 3, 4, dtype=torch.double)
    weight = nn.Parameter(torch.zeros_like(first))
    optimizer = Shampoo([weight], lr=1.0, damping=0.1, damping_ratio=ratio, damping_rule="absolute")
    for G in (first, second):
        before = weight.detach().clone()
        weight.grad = G.clone()
        optimizer.step()
    L, R = ((a + b) / 2 for a, b in zip(moments(first), moments(second), strict=True))
    root_L, root_R = roots(L, R, 0.05, 0.2, "absolute")
    update = before - weight.detach()
    assert torch.allclose(update, root_L @ second @ root_R, rtol=1e-6) == agrees


def test_convolution_weights_are_flattened() -> None:
    G = torch.randn(4, 3, 2, 2, dtype=torch.double)
    torch.testing.assert_close(step(G).flatten(1), step(G.flatten(1)))


@pytest.mark.parametrize("size", [2, 3, 4, 100])
def test_blocks_are_independent_matrices(size: int) -> None:
    G = torch.randn(5, 7, dtype=torch.double)
    whole = step(G, blocks=size)
    for rows, columns in blocks_of(G.shape, size):
        torch.testing.assert_close(whole[rows, columns], step(G[rows, columns]))
    covered = torch.zeros_like(G)
    for rows, columns in blocks_of(G.shape, size):
        covered[rows, columns] += 1
    assert torch.equal(covered, torch.ones_like(G))


@pytest.mark.parametrize("bytes_", [1, 2**25])
def test_blocks_that_overflow_are_left_out_alone(bytes_: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mupx.tiles.AT_ONCE", bytes_)
    weights, gradients = {}, torch.randn(3, 4, 4)
    for spoilt in (False, True):
        weight = nn.Parameter(torch.zeros(4, 4))
        optimizer = Shampoo([weight], lr=1.0, blocks=2)
        for G in gradients:
            weight.grad = G.clone()
            if spoilt:
                weight.grad[:2, 2:] = 1e25
            optimizer.step()
        weights[spoilt] = weight.detach()
    same = torch.ones(4, 4, dtype=torch.bool)
    same[:2, 2:] = False
    assert torch.equal(weights[True][same], weights[False][same])
    assert not weights[True][~same].any()


VARIANTS = {"shampoo-half": HalfShampoo, "shampoo-left": LeftShampoo, "shampoo-right": RightShampoo}


@pytest.mark.parametrize("rule", ["relative", "absolute"])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_by_singular_values(name: str, rule: str) -> None:
    G = torch.randn(4, 6, dtype=torch.double)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    rho = 0.1 * (float(S[0]) ** 2 if rule == "relative" else 1.0)
    powers = {"shampoo-half": -1.0, "shampoo-left": -0.5, "shampoo-right": -0.5}
    wanted, wrong = (
        U @ torch.diag(S * (S**2 + rho) ** power) @ Vh for power in (powers[name], powers[name] / 2)
    )
    update = step(G, VARIANTS[name], damping=0.1, damping_rule=rule)
    torch.testing.assert_close(update, wanted)
    assert not torch.allclose(update, wrong, rtol=1e-2)


@pytest.mark.parametrize(("name", "own"), [("shampoo-left", "L"), ("shampoo-right", "R")])
def test_one_sided_variants_differ_by_their_side(name: str, own: str) -> None:
    # A second gradient tells the sides apart: with one both are the same function of its singular values.
    first, second = torch.randn(2, 4, 6, dtype=torch.double)
    weight = nn.Parameter(torch.zeros(4, 6, dtype=torch.double))
    optimizer = VARIANTS[name]([weight], lr=1.0, damping=0.1, damping_rule="absolute")
    for G in (first, second):
        before = weight.detach().clone()
        weight.grad = G.clone()
        optimizer.step()
    L, R = ((a + b) / 2 for a, b in zip(moments(first), moments(second), strict=True))
    eye_L, eye_R = 0.1 * torch.eye(4).double(), 0.1 * torch.eye(6).double()
    left = oracles.matrix_power(L + eye_L, -0.5) @ second
    right = second @ oracles.matrix_power(R + eye_R, -0.5)
    right_one, wrong = (left, right) if own == "L" else (right, left)
    update = before - weight.detach()
    torch.testing.assert_close(update, right_one)
    assert not torch.allclose(update, wrong, rtol=1e-2)
    assert set(optimizer.scales(weight, optimizer.param_groups[0])) == {own}


def test_one_sided_variants_cut_their_own_side_alone() -> None:
    G = torch.randn(5, 7, dtype=torch.double)
    for name, kind in VARIANTS.items():
        whole = step(G, kind, blocks=3)
        parts = list(blocks_of(G.shape, 3, RULES[name].sides))
        assert len(parts) == {"LR": 6, "L": 2, "R": 3}[kind.sides]
        for rows, columns in parts:
            torch.testing.assert_close(whole[rows, columns], step(G[rows, columns], kind))


# Variant → what its rule could be mistaken for; of left and right, which have Shampoo's E, by the default.
MISTAKEN = {"shampoo": "shampoo-half", "shampoo-half": "shampoo", "shampoo-left": "shampoo-half"}


@pytest.mark.parametrize(("blocks", "rule"), [(0, "relative"), (32, "absolute")])
@pytest.mark.parametrize("name", ["shampoo", *VARIANTS])
def test_one_step_has_its_order_in_width(name: str, blocks: int, rule: str) -> None:
    setup = (name, rule, 0.01, 1e-2 if rule == "relative" else 1e-4)
    assert largest_off(setup, optimizer__blocks=blocks) < TOLERANCE
    mistaken = RULES[MISTAKEN.get(name, "shampoo-half")]
    off = mistaken.lr * RULES[name].lr.inverse()
    with wrong_lr(name, off):
        assert largest_off(setup, optimizer__blocks=blocks) > 2 * TOLERANCE
    if blocks:
        with wrong_lr(name, Power(blocks=0.5)):
            assert largest_off(setup, optimizer__blocks=blocks) > 2 * TOLERANCE


@pytest.mark.parametrize("name", ["shampoo", *VARIANTS])
def test_a_batch_given_twice_changes_nothing(name: str) -> None:
    finals = []
    for copies in (1, 3):
        torch.manual_seed(2)
        model = small_mlp().double()
        optimizer = make(name, model, damping=0.1)
        data = batches(6, torch.double)
        train(model, optimizer, [(x.repeat(copies, 1), y.repeat(copies)) for x, y in data])
        finals.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*finals, rtol=1e-9, atol=1e-11)


def test_vectors_go_to_adamw() -> None:
    bias = nn.Parameter(torch.zeros(3))
    optimizer = Shampoo([bias], fallback_lr=0.25)
    bias.grad = torch.tensor([1.0, -2.0, 3.0])
    optimizer.step()
    torch.testing.assert_close(bias.detach(), torch.tensor([-0.25, 0.25, -0.25]))


def test_sum_and_average() -> None:
    gradients = [torch.randn(3, 4, dtype=torch.double) for _ in range(3)]
    kept = {}
    for accumulate in ("average", "sum"):
        weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.double))
        optimizer = Shampoo([weight], accumulate=accumulate)
        for G in gradients:
            weight.grad = G
            optimizer.step()
        kept[accumulate] = optimizer.state[weight]["L0"]
    torch.testing.assert_close(kept["sum"], sum(G @ G.T for G in gradients))
    # The first steps are a plain mean.
    torch.testing.assert_close(kept["average"], kept["sum"] / 3)


def test_a_gradient_that_overflows_gives_no_step_and_is_forgotten() -> None:
    weight = nn.Parameter(torch.zeros(3, 4))
    optimizer = Shampoo([weight], lr=1.0)
    weight.grad = 1e25 * torch.randn(3, 4)
    optimizer.step()
    assert not weight.any()
    weight.grad = torch.randn(3, 4)
    optimizer.step()
    assert weight.isfinite().all()
    assert weight.any()


@settings(max_examples=20)
@given(seeds)
def test_equivariant_to_rotations(seed: int) -> None:
    G = torch.randn(4, 6, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
    P, Q = rotation(4, seed), rotation(6, seed + 1)
    for rule in ("absolute", "relative"):
        torch.testing.assert_close(
            step(P @ G @ Q.T, damping_rule=rule), P @ step(G, damping_rule=rule) @ Q.T, rtol=1e-7, atol=1e-9
        )


def test_blocks_break_the_equivariance() -> None:
    G, P = torch.randn(4, 6, dtype=torch.double), rotation(4, 2)
    assert not torch.allclose(step(P @ G, blocks=2), P @ step(G, blocks=2), rtol=1e-3)


def test_wrong_options_are_refused() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    for options in ({"blocks": -1}, {"accumulate": "mean"}, {"damping_rule": "trace"}, {"ema": 1.0}):
        with pytest.raises(UsageError):
            Shampoo([weight], **options)
