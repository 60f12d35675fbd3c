"""SOAP against a slow twin of the published algorithm, and what its width rule needs of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mupx
from mupx.blocks import blocks_of
from mupx.errors import UsageError
from mupx.linalg import largest_eigenvalue
from mupx.optim import OPTIMIZERS
from mupx.optim.soap import SOAP, LeftSOAP, RightSOAP, eigenbasis, followed, rotate, rotate_back
from mupx.scaling import RULES, Power
from mupx.tiles import tiles_of
from tests import oracles
from tests.factories import small_mlp
from tests.optim.own_slopes import TOLERANCE, largest_off, wrong_lr
from tests.optim.training import batches, train
from tests.strategies import rotation

BETAS, EPS, DECAY = (0.9, 0.8), 1e-3, 0.7  # an eps that is seen


def gradients(count: int = 7, shape: tuple[int, ...] = (5, 5), seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.double) for _ in range(count)]


def path(given: list[Tensor], kind: type[SOAP] = SOAP, **options: Any) -> list[Tensor]:
    """Updates at lr 1, one per gradient."""
    weight = nn.Parameter(torch.zeros_like(given[0]))
    settings = {"betas": BETAS, "eps": EPS, "ema": DECAY, **options}
    optimizer = kind([weight], lr=1.0, fallback_lr=1.0, **settings)
    updates = []
    for G in given:
        before = weight.detach().clone()
        weight.grad = G.clone()
        optimizer.step()
        updates.append(before - weight.detach())
    return updates


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x.double() - y.double()).abs().max()) for x, y in zip(a, b, strict=True))


def twin(given: list[Tensor], refresh: int, **wrong: bool) -> list[Tensor]:
    return oracles.soap_path(given, betas=BETAS, eps=EPS, decay=DECAY, refresh=refresh, **wrong)


@pytest.mark.parametrize("refresh", [1, 2, 10])
def test_follows_the_published_algorithm(refresh: int) -> None:
    given = gradients()
    assert distance(path(given, refresh=refresh), twin(given, refresh)) < 1e-10
    single = path([G.float() for G in given], refresh=refresh)
    assert distance(single, twin(given, refresh)) < 1e-4
    assert single[-1].dtype == torch.float32


@pytest.mark.parametrize(
    "wrong", [{"skip_first": False}, {"statistics_first": True}, {"carry_mean": False}, {"reorder": False}]
)
def test_other_orders_of_the_same_operations_differ(wrong: dict[str, bool]) -> None:
    given = gradients()
    assert distance(path(given, refresh=2), twin(given, 2, **wrong)) > 1e-3


def products(refresh: int) -> float:
    """How many products of square matrices of the weight's size a step takes."""
    d, given = 32, gradients(6, (32, 32))
    weight = nn.Parameter(torch.zeros_like(given[0]))
    optimizer = SOAP([weight], refresh=refresh)
    for G in given[:-1]:
        weight.grad = G.clone()
        optimizer.step()
    weight.grad = given[-1].clone()
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    return counter.get_total_flops() / (2 * d**3)


def test_the_mean_is_not_rotated_back_where_every_step_has_new_bases() -> None:
    """Three rotations, of g, of m and back, of two products each; L and R; and their images."""
    assert products(1) == 6 + 2 + 2
    assert products(10) == 4 + 2
    assert products(5) == 4 + 2 + 2 + 2  # m goes back, to be rotated into the new bases by the next step


@pytest.mark.parametrize("refresh", [1, 3])
def test_a_state_that_holds_the_mean_in_its_bases_goes_on_alike(refresh: int) -> None:
    """As states did that were written before it waited for new ones in the basis of the weights."""
    given, paths = gradients(9), []
    for older in (False, True):
        weight = nn.Parameter(torch.zeros_like(given[0]))
        optimizer = SOAP([weight], lr=1.0, betas=BETAS, eps=EPS, ema=DECAY, refresh=refresh)
        for G in given:
            weight.grad = G.clone()
            optimizer.step()
            state = optimizer.state[weight]
            assert ("mean" in state) != ("exp_avg" in state) or state["step"] == 0
            if older and "mean" in state:
                state["exp_avg"] = rotate(state.pop("mean"), state["Q_L0"], state["Q_R0"])
        paths.append(weight.detach())
    torch.testing.assert_close(*paths, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("blocks", [0, 4])
def test_bases_stay_column_major_and_hold_no_border(blocks: int) -> None:
    for side in (8, 256):
        weight, given = nn.Parameter(torch.zeros(side, 8)), gradients(3, (side, 8))
        optimizer = SOAP([weight], refresh=1, blocks=blocks)
        for G in given:
            weight.grad = G.float()
            optimizer.step()
        for name, basis in optimizer.state[weight].items():
            if name.startswith("Q_"):
                assert blocks or basis.mT.is_contiguous()
                assert basis.untyped_storage().nbytes() == basis.numel() * basis.element_size()


def test_eps_is_added_before_the_bias_correction() -> None:
    given = gradients(2)
    P, Q = (torch.linalg.svd(M)[0] for M in (given[0] @ given[0].T, given[0].T @ given[0]))
    rotated = P.T @ given[1] @ Q
    after = P @ (rotated / (rotated.abs() + EPS)) @ Q.T  # Adam's own place for eps
    before = P @ (rotated / (rotated.abs() + EPS / math.sqrt(1 - BETAS[1]))) @ Q.T
    assert distance([path(given)[1]], [before]) < 1e-10
    assert distance([after], [before]) > 1e-4


def test_vectors_follow_the_same_steps_without_a_basis() -> None:
    given = gradients(5, (4,))
    updates = path(given)
    assert not updates[0].any()  # the authors leave the first gradient out for every tensor
    m = v = torch.zeros(4, dtype=torch.double)
    for t, (G, update) in enumerate(zip(given[1:], updates[1:], strict=True), start=1):
        m, v = BETAS[0] * m + (1 - BETAS[0]) * G, BETAS[1] * v + (1 - BETAS[1]) * G**2
        size = math.sqrt(1 - BETAS[1] ** t) / (1 - BETAS[0] ** t)
        torch.testing.assert_close(update, size * m / (v.sqrt() + EPS), rtol=1e-10, atol=0)


def test_a_side_that_is_not_rotated_is_adams() -> None:
    given = gradients(5, (4, 6))
    short = path(given, max_precond_dim=4)  # the columns are too many
    assert distance(short, path(given, LeftSOAP)) < 1e-12
    assert distance(path([G.T.contiguous() for G in given], RightSOAP), [u.T for u in short]) < 1e-10
    neither = path(given, max_precond_dim=3)
    assert distance(neither, [u.view(4, 6) for u in path([G.flatten() for G in given])]) < 1e-12
    assert distance(short, neither) > 1e-2
    assert distance(path(given, max_precond_dim=0), path(given)) == 0


def test_a_growing_side_beyond_the_limit_is_another_algorithm_and_refused() -> None:
    def group(role: str, r_in: float, r_out: float) -> list[dict[str, Any]]:
        weight = nn.Parameter(torch.zeros(8, 8))
        return [{"params": [weight], "algorithm": "soap", "role": role, "r_in": r_in, "r_out": r_out}]

    for role, r_in, r_out in (("hidden", 2.0, 2.0), ("output", 2.0, 1.0)):
        with pytest.raises(UsageError, match="max_precond_dim = 7 and grew"):
            SOAP(group(role, r_in, r_out), max_precond_dim=7)
        SOAP(group(role, r_in, r_out), max_precond_dim=8)
        SOAP(group(role, r_in, r_out), max_precond_dim=7, blocks=4)
    for role in ("hidden", "output", "input"):
        SOAP(group(role, 1.0, 1.0), max_precond_dim=7)


@pytest.mark.parametrize("kind", [SOAP, LeftSOAP, RightSOAP])
def test_blocks_are_independent_matrices(kind: type[SOAP], monkeypatch: pytest.MonkeyPatch) -> None:
    given = gradients(6, (5, 7))
    whole = path(given, kind, blocks=3, refresh=2)
    parts = list(blocks_of((5, 7), 3, kind.sides))
    assert len(parts) == {"LR": 6, "L": 2, "R": 3}[kind.sides]
    monkeypatch.setattr("mupx.tiles.AT_ONCE", 1)
    assert distance(path(given, kind, blocks=3, refresh=2), whole) == 0.0  # block by block
    for rows, columns in parts:
        alone = path([G[rows, columns] for G in given], kind, refresh=2)
        # Null directions of a block that lacks rank are fixed by rounding alone.
        if alone[0].shape[0] == alone[0].shape[1] or kind is not SOAP:
            assert distance([u[rows, columns] for u in whole], alone) < 1e-9


def test_convolution_weights_are_flattened() -> None:
    given = gradients(5, (12, 3, 2, 2))
    flat = path([G.flatten(1) for G in given])
    assert distance([u.flatten(1) for u in path(given)], flat) < 1e-12


def test_equivariant_to_rotations() -> None:
    given, P, Q = gradients(6), rotation(5, 3), rotation(5, 4)
    turned = path([P @ G @ Q.T for G in given], refresh=2)
    assert distance(turned, [P @ u @ Q.T for u in path(given, refresh=2)]) < 1e-8
    adam = path([P @ G @ Q.T for G in given], max_precond_dim=1)
    assert distance(adam, [P @ u @ Q.T for u in path(given, max_precond_dim=1)]) > 1e-2


def test_a_batch_given_twice_or_in_parts_changes_nothing() -> None:
    finals = []
    for copies, parts in ((1, 1), (3, 1), (1, 4)):
        torch.manual_seed(2)
        model = nn.Linear(6, 6, bias=False).double()
        optimizer = SOAP(model.parameters(), lr=0.1, refresh=2)
        for seed in range(6):
            batch = torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(seed)).double()
            x, y = batch.repeat(1, copies, 1)
            optimizer.zero_grad()
            for x_k, y_k in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (F.mse_loss(model(x_k), y_k) / parts).backward()
            optimizer.step()
        finals.append(model.weight.detach())
    for other in finals[1:]:
        torch.testing.assert_close(other, finals[0], rtol=1e-9, atol=1e-11)


def test_leading_dimensions_are_a_population() -> None:
    factors = torch.stack([G @ G.T for G in gradients(3)])
    bases = eigenbasis(factors)
    new, order = followed(factors + torch.eye(5), bases.roll(1, 0))
    G = torch.stack(gradients(3, seed=9))
    turned = rotate(G, bases, new)
    torch.testing.assert_close(rotate_back(turned, bases, new), G)
    for i in range(3):
        one, own = followed(factors[i] + torch.eye(5), eigenbasis(factors[i - 1]))
        assert torch.equal(own, order[i])
        torch.testing.assert_close(new[i] @ new[i].T, one @ one.T, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(turned[i].abs(), rotate(G[i], eigenbasis(factors[i]), one).abs())


def test_an_overflowing_gradient_is_not_kept_in_the_statistics() -> None:
    weight = nn.Parameter(torch.zeros(3, 4))
    optimizer = SOAP([weight], lr=1.0, refresh=1)
    for scale in (1.0, 1e25, 1.0):
        weight.grad = scale * torch.randn(3, 4)
        optimizer.step()
    state = optimizer.state[weight]
    assert all(state[key].isfinite().all() for key in ("L0", "R0", "Q_L0", "Q_R0"))


@pytest.mark.parametrize("blocks", [0, 4])
def test_scales_are_those_of_the_statistics(blocks: int) -> None:
    model = small_mlp().double()
    optimizer = SOAP(model.named_parameters(), eps=1e-6, betas=(0.9, 0.8), blocks=blocks)
    group, fallback = optimizer.param_groups
    train(model, optimizer, batches(1, torch.double))
    assert all(optimizer.scales(p, g) == {} for g in optimizer.param_groups for p in g["params"])
    train(model, optimizer, batches(3, torch.double))
    for weight in group["params"]:
        state, scales = optimizer.state[weight], optimizer.scales(weight, group)
        assert set(scales) == {"L", "R", "w"}
        v_hat = state["exp_avg_sq"] / (1 - 0.8**3)
        largest = torch.stack([v_hat[block].max() for block in blocks_of(weight.shape, blocks)])
        assert scales["w"][:2] == pytest.approx((float(largest.mean().sqrt()), 1e-6))
        for side in "LR":
            factors = [state[f"{side}{i}"] for i in range(len(tiles_of(weight.flatten(1).shape, blocks)))]
            largest = max(float(largest_eigenvalue(f).max()) for f in factors)
            assert scales[side].size == pytest.approx(largest)
            assert scales[side].ridge is None
    assert set(optimizer.scales(fallback["params"][0], fallback)) == {"v"}


@pytest.mark.parametrize("options", [{"refresh": 0}, {"ema": 1.0}, {"blocks": -1}, {"max_precond_dim": -1}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        SOAP([nn.Parameter(torch.zeros(2, 2))], **options)


# The first gradient makes the basis; on the same batch the second is the first, so that the update has its
# singular vectors. On fresh batches smaller than a layer it has not: benchmarks/late_drift.py shows that.
@pytest.mark.parametrize("blocks", [0, 32])
@pytest.mark.parametrize("name", ["soap", "soap-left", "soap-right"])
def test_the_first_update_has_its_order_in_width(name: str, blocks: int) -> None:
    setup = (name, None, 0.01, 0.01)
    assert largest_off(setup, step=2, optimizer__blocks=blocks) < TOLERANCE
    others = {"soap": "soap-right", "soap-left": "soap", "soap-right": "soap"}
    wrong = RULES[others[name]].lr * RULES[name].lr.inverse()
    with wrong_lr(name, wrong):
        assert largest_off(setup, step=2, optimizer__blocks=blocks) > 2 * TOLERANCE
    if blocks:
        with wrong_lr(name, Power(blocks=0.5)):
            assert largest_off(setup, step=2, optimizer__blocks=blocks) > 2 * TOLERANCE


def test_registered_under_three_names() -> None:
    kinds = {name: OPTIMIZERS.load(name) for name in ("soap", "soap-left", "soap-right")}
    assert [(kind.algorithm, kind.sides) for kind in kinds.values()] == [
        (name, RULES[name].sides) for name in kinds
    ]


class Words(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(12, width)
        self.up = nn.ConvTranspose1d(width, width, 3)
        self.head = nn.Linear(width, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.up(self.table(ids).mT).mean(-1))


@pytest.mark.parametrize(("name", "turned"), [("soap", True), ("soap-left", False), ("soap-right", False)])
def test_one_side_is_rotated_only_of_what_has_its_output_side_first(name: str, turned: bool) -> None:
    # An embedding and a transposed convolution have it second: their left side is the rule's right one.
    _, groups = mupx.parametrize(Words, width=32, base_width=16, optimizer=name, lr=0.1)
    treated = {n: group["algorithm"] == name for group in groups for n, _ in group["params"]}
    weights = {n: own for n, own in treated.items() if n.endswith("weight")}
    assert weights == {"table.weight": turned, "up.weight": turned, "head.weight": True}
