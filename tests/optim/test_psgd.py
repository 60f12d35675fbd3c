"""PSGD: a dense twin with whole Kronecker matrices, what the fit converges to, and its order in width."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mupx.errors import UsageError
from mupx.optim.psgd import POWER_STEPS, PSGD, cut, fitted, preconditioned, spectral_norm, started
from tests import oracles
from tests.optim.slopes import WRONG, flat, slopes

DOUBLE = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def triangular(d: int, seed: int) -> Tensor:
    return torch.eye(d, dtype=DOUBLE) + 0.3 * draw(d, d, seed=seed).triu()


def probes(seed: int, step: int, shape: tuple[int, ...], count: int) -> list[Any]:
    """The numbers that a step of training draws, by the same two generators."""
    choice = np.random.default_rng((seed, step))
    if step > 1:
        choice.random()
    generator = torch.Generator().manual_seed(int(choice.integers(2**32)))
    return [torch.empty(shape, dtype=DOUBLE).normal_(generator=generator).numpy() for _ in range(count)]


@pytest.mark.parametrize("shape", [(4, 3), (3, 5), (1, 4), (4, 1), (1, 1)])
def test_one_step_of_the_fit_is_its_twin(shape: tuple[int, int]) -> None:
    G, V = draw(*shape, seed=1), draw(*shape, seed=2)
    Q_L, Q_R = triangular(shape[0], 3), triangular(shape[1], 4)
    arrays = [tensor.numpy() for tensor in (Q_L, Q_R, G, V)]
    found = fitted(G, Q_L, Q_R, V, 0.2)
    for ours, twin in zip(found, oracles.psgd_fit(*arrays, 0.2, POWER_STEPS), strict=True):
        np.testing.assert_allclose(ours.numpy(), twin, rtol=0, atol=1e-12)
    for ours, wrong in zip(found, oracles.psgd_fit(*arrays[:2], arrays[3], arrays[2], 0.2, 1), strict=True):
        assert np.abs(ours.numpy() - wrong).max() > 1e-3 or shape == (1, 1)
    np.testing.assert_allclose(
        preconditioned(G, Q_L, Q_R).numpy(), oracles.psgd_update(*arrays[:3]), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("iterations", [1, 3])
def test_a_float64_run_is_its_twin(iterations: int) -> None:
    shape, clip = (4, 3), 0.7
    weight = nn.Parameter(torch.zeros(shape, dtype=DOUBLE))
    optimizer = PSGD([weight], lr=0.1, momentum=0.5, iterations=iterations, clip=clip, seed=5)
    W = buffer = np.zeros(shape)
    Q_L = Q_R = np.zeros((1, 1))
    clipped = 0
    for step in range(1, 7):
        gradient = 10.0**-step * draw(*shape, seed=step)
        weight.grad, G = gradient.clone(), gradient.numpy()
        optimizer.step()
        if step == 1:
            size = oracles.psgd_norm(G, POWER_STEPS) ** -0.25
            Q_L, Q_R = size * np.eye(4), size * np.eye(3)
        for V in probes(5, step, shape, iterations):
            Q_L, Q_R = oracles.psgd_fit(Q_L, Q_R, G, V, 0.1, POWER_STEPS)
        U = oracles.psgd_update(Q_L, Q_R, G)
        norm = oracles.psgd_norm(U, POWER_STEPS)
        clipped += norm > clip
        buffer = 0.5 * buffer + U * min(1.0, clip / norm)
        W = W - 0.1 * buffer
        np.testing.assert_allclose(weight.detach().numpy(), W, rtol=0, atol=1e-12)
        applied = optimizer.precondition(weight, gradient, optimizer.param_groups[0])
        np.testing.assert_allclose(applied.numpy(), U, rtol=1e-9, atol=1e-12)
    assert 0 < clipped < 6


def test_a_small_step_goes_down_the_criterion() -> None:
    G, V, Q_L, Q_R = draw(4, 3, seed=1), draw(4, 3, seed=2), triangular(4, 3), triangular(3, 4)
    found = fitted(G, Q_L, Q_R, V, 1e-3)
    start, after = (
        oracles.psgd_criterion(*(t.numpy() for t in (*factors, G, V))) for factors in ((Q_L, Q_R), found)
    )
    assert after < start
    # The first order of the decrease: the inner product of step and gradient, 2 (A Aᵀ − B Bᵀ) and alike.
    A = Q_L @ G @ Q_R.mT
    B = torch.linalg.inv(Q_L).mT @ V @ torch.linalg.inv(Q_R)
    expected = 0.0
    for whitened, probed in ((A @ A.mT, B @ B.mT), (A.mT @ A, B.mT @ B)):
        norm = float(spectral_norm(whitened + probed))
        expected += 2e-3 * float(torch.triu(whitened - probed).square().sum()) / norm
    assert start - after == pytest.approx(expected, rel=1e-2)


def test_the_fixed_point_whitens_the_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    C_L, C_R = triangular(3, 5) @ triangular(3, 5).mT, triangular(4, 6) @ triangular(4, 6).mT
    root_L, root_R = (torch.linalg.cholesky(C) for C in (C_L, C_R))

    def sample() -> Tensor:
        noise = torch.randn(3, 4, generator=generator, dtype=DOUBLE)
        return 1e-3 * root_L @ noise @ root_R.mT

    Q_L, Q_R = started(sample())
    for step in range(3000):
        V = torch.randn(3, 4, generator=generator, dtype=DOUBLE)
        Q_L, Q_R = fitted(sample(), Q_L, Q_R, V, max(0.3 / (1 + step / 100), 0.01))
    P = np.kron(*((Q.mT @ Q).numpy() for Q in (Q_L, Q_R)))
    wanted = np.linalg.inv(np.kron(*(_root(C.numpy()) for C in (C_L, C_R)))) / 1e-3
    assert np.linalg.norm(P - wanted) < 0.1 * np.linalg.norm(wanted)
    identity = np.eye(12) * np.trace(wanted) / 12
    assert np.linalg.norm(identity - wanted) > 0.3 * np.linalg.norm(wanted)


def _root(C: Any) -> Any:
    values, vectors = np.linalg.eigh(C)
    return vectors @ np.diag(np.sqrt(values)) @ vectors.T


@pytest.mark.parametrize("shape", [(8, 8), (40, 25), (5, 60), (1, 7), (7, 1)])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_the_estimate_of_a_spectral_norm_is_close_and_from_below(
    shape: tuple[int, int], scale: float
) -> None:
    matrix = (scale * draw(*shape)).float()
    exact = float(torch.linalg.matrix_norm(matrix.double() / scale, 2)) * scale
    assert 0.85 * exact <= float(spectral_norm(matrix)) <= exact * (1 + 1e-5)
    assert float(spectral_norm(torch.zeros(shape))) == 0.0


def test_an_update_is_cut_and_a_smaller_one_left_alone() -> None:
    update = draw(5, 4)
    norm = float(spectral_norm(update))
    assert float(spectral_norm(cut(update, 0.5 * norm))) == pytest.approx(0.5 * norm)
    assert torch.equal(cut(update, 2 * norm), update)
    assert not cut(torch.zeros(5, 4), 1.0).any()


def run(steps: int, **options: Any) -> tuple[nn.Parameter, PSGD]:
    weight = nn.Parameter(torch.zeros(4, 3, dtype=DOUBLE))
    optimizer = PSGD([weight], **options)
    for step in range(steps):
        weight.grad = draw(4, 3, seed=step)
        optimizer.step()
    return weight, optimizer


def test_the_first_update_has_norm_one_whatever_the_gradients_size() -> None:
    for scale in (1e-12, 1.0, 1e12):
        weight = nn.Parameter(torch.zeros(6, 5, dtype=DOUBLE))
        weight.grad = scale * draw(6, 5)
        PSGD([weight], lr=1.0, preconditioner_lr=1e-9).step()
        assert float(torch.linalg.matrix_norm(weight.detach(), 2)) == pytest.approx(1.0, rel=0.1)


def test_nothing_but_its_seed_decides_its_random_numbers() -> None:
    torch.manual_seed(0)
    first, _ = run(4, seed=1)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again, optimizer = run(4, seed=1)
    assert torch.equal(first, again)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first, run(4, seed=2)[0])
    # A state brings its seed along.
    resumed = PSGD([nn.Parameter(again.detach().clone())], seed=9)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.param_groups[0]["seed"] == 1


def test_with_a_probability_some_steps_do_not_fit() -> None:
    fits = []
    weight, optimizer = run(1, update_probability=0.3)
    for step in range(60):
        before = optimizer.state[weight]["Q_L"]
        weight.grad = draw(4, 3, seed=step)
        optimizer.step()
        fits.append(not torch.equal(before, optimizer.state[weight]["Q_L"]))
    assert 8 <= sum(fits) <= 28  # 18 ± 3.5 expected


def test_more_iterations_fit_faster() -> None:
    G, errors = draw(4, 3), []
    for iterations in (1, 10):
        weight = nn.Parameter(torch.zeros(4, 3, dtype=DOUBLE))
        optimizer = PSGD([weight], iterations=iterations)
        for _ in range(10):
            weight.grad = G.clone()
            optimizer.step()
        Q_L, Q_R = (optimizer.state[weight][key].numpy() for key in ("Q_L", "Q_R"))
        draws = [oracles.psgd_criterion(Q_L, Q_R, G.numpy(), draw(4, 3, seed=s).numpy()) for s in range(200)]
        errors.append(np.mean(draws))
    assert errors[1] < 0.9 * errors[0]


def test_precondition_changes_nothing_has_an_inverse_and_says_where_there_is_nothing() -> None:
    weight, optimizer = run(3)
    group = optimizer.param_groups[0]
    before = copy.deepcopy(optimizer.state_dict())
    found = optimizer.precondition(weight, draw(4, 3), group)
    assert found is not None
    state = optimizer.state[weight]
    assert torch.equal(found, preconditioned(draw(4, 3), state["Q_L"], state["Q_R"]))
    for key, value in before["state"][0].items():
        assert torch.equal(value, state[key]) if isinstance(value, Tensor) else value == state[key]
    back = optimizer.precondition(weight, found, group, inverse=True)
    torch.testing.assert_close(back, draw(4, 3), rtol=1e-9, atol=1e-9)
    untrained = nn.Parameter(torch.zeros(2, 3, 2))
    fresh = PSGD([untrained])
    assert fresh.precondition(untrained, torch.ones(2, 3, 2), fresh.param_groups[0]) is None


def test_a_gradient_of_zeros_starts_nothing() -> None:
    weight = nn.Parameter(torch.ones(4, 3))
    optimizer = PSGD([weight])
    weight.grad = torch.zeros(4, 3)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(4, 3))
    assert "Q_L" not in optimizer.state[weight]
    weight.grad = torch.ones(4, 3)
    optimizer.step()
    assert weight.detach().isfinite().all()
    assert (weight < 1).all()


def test_directions_without_any_gradient_do_not_run_away() -> None:
    """A pixel that is always dark: its column of the gradient stays zero, for thousands of steps."""
    gradient = torch.cat([draw(4, 2), torch.zeros(4, 1, dtype=DOUBLE)], 1).float()
    Q_L, Q_R = started(gradient)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3000):
        probe = torch.empty(4, 3).normal_(generator=generator)
        Q_L, Q_R = fitted(gradient, Q_L, Q_R, probe, 0.1)
    assert Q_L.abs().max() < 1e4
    assert Q_R.abs().max() < 1e4
    assert preconditioned(gradient, Q_L, Q_R).isfinite().all()


def test_convolutions_are_matrices_and_vectors_go_to_adamw() -> None:
    layer = nn.Conv2d(3, 4, 2).double()
    optimizer = PSGD(layer.named_parameters(), lr=0.1, fallback_lr=0.25)
    twin = nn.Parameter(layer.weight.detach().flatten(1).clone())
    flat_ = PSGD([twin], lr=0.1)
    bias = layer.bias.detach().clone()
    for seed in range(3):
        layer.weight.grad, layer.bias.grad = draw(4, 3, 2, 2, seed=seed), torch.ones(4, dtype=DOUBLE)
        twin.grad = layer.weight.grad.flatten(1)
        optimizer.step()
        flat_.step()
    assert torch.equal(layer.weight.flatten(1), twin)
    torch.testing.assert_close(bias - layer.bias.detach(), torch.full((4,), 0.75, dtype=DOUBLE))


@pytest.mark.parametrize(
    "options",
    [
        {"preconditioner_lr": 1.0},
        {"preconditioner_lr": 0.0},
        {"iterations": 0},
        {"update_probability": 0.0},
        {"update_probability": 1.1},
        {"clip": 0.0},
        {"clip": float("nan")},
        {"seed": -1},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    (key,) = options
    with pytest.raises(UsageError, match=f"{key}=?.*{str(options[key]).replace('.', '[.]')}"):
        PSGD([nn.Parameter(torch.zeros(2, 2))], **options)


def test_leading_dimensions_are_members_of_a_population() -> None:
    G, V = draw(3, 4, 5, seed=1), draw(3, 4, 5, seed=2)
    Q_L, Q_R = started(G)
    rates = torch.tensor([0.1, 0.2, 0.3], dtype=DOUBLE)
    found = fitted(G, Q_L, Q_R, V, rates)
    updates = cut(preconditioned(G, *found), torch.tensor([0.1, 1.0, 10.0], dtype=DOUBLE))
    for member, limit in enumerate((0.1, 1.0, 10.0)):
        start = started(G[member])
        alone = fitted(G[member], *start, V[member], float(rates[member]))
        for a, b in zip(found, alone, strict=True):
            torch.testing.assert_close(a[member], b, rtol=1e-12, atol=1e-12)
        update = cut(preconditioned(G[member], *alone), limit)
        torch.testing.assert_close(updates[member], update, rtol=1e-12, atol=1e-12)


# --- width ----------------------------------------------------------------------------------------


def test_the_first_step_moves_every_layer_alike_at_every_width() -> None:
    assert flat(slopes("psgd", 0.02))
    assert not any(flat(slopes("psgd", 0.02, wrong=wrong, widths=(64, 256))) for wrong in WRONG)


def test_without_the_cut_an_unfinished_fit_grows_with_width() -> None:
    short = {"steps": 20, "widths": (48, 144)}
    assert flat(slopes("psgd", 0.02, **short))  # type: ignore[arg-type]
    free = slopes("psgd", 0.02, clip=1e9, **short)  # type: ignore[arg-type]
    assert min(free) > 0.15
