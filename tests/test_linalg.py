"""Damped inverses and roots: against dense solves, over leading dimensions, and where they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mupx.linalg import (
    add_ridge,
    counting_repairs,
    damped_inverse,
    eigh,
    finite,
    gram,
    inverse_root,
    largest_eigenvalue,
    trace,
    usable,
)
from tests import oracles
from tests.strategies import seeds

FUNCTIONS: dict[str, Callable[[Tensor, Any], tuple[Tensor, Tensor]]] = {
    "inverse": damped_inverse,
    "absolute root": lambda M, rho: inverse_root(M, 4.0, rho, False),
    "relative root": lambda M, rho: inverse_root(M, 4.0, rho, True),
}


def factor(d: int, seed: int = 0, rank: int | None = None, dtype: torch.dtype = torch.double) -> Tensor:
    X = torch.randn(rank or 2 * d, d, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
    return (X.T @ X / len(X)).to(dtype)


@given(seeds, st.integers(1, 8), st.floats(1e-4, 10))
def test_damped_inverse(seed: int, d: int, rho: float) -> None:
    M = factor(d, seed)
    inverse, ok = damped_inverse(M, rho)
    assert bool(ok)
    expected = torch.linalg.solve(add_ridge(M, rho), torch.eye(d, dtype=torch.double))
    torch.testing.assert_close(inverse, expected, rtol=1e-8, atol=1e-10)


@given(seeds, st.floats(1e-3, 1), st.booleans(), st.sampled_from([2.0, 4.0]))
def test_inverse_root(seed: int, rho: float, relative: bool, root: float) -> None:
    M = factor(5, seed)
    result, ok = inverse_root(M, root, rho, relative)
    assert bool(ok)
    unit = float(torch.linalg.matrix_norm(M, 2)) if relative else 1.0
    damped = M + rho * unit * torch.eye(5, dtype=torch.double)
    torch.testing.assert_close(result, oracles.matrix_power(damped, -1 / root), rtol=1e-8, atol=1e-10)


def test_a_relative_ridge_is_homogeneous_and_an_absolute_one_is_not() -> None:
    M = factor(4)
    for relative in (True, False):
        a, _ = inverse_root(M, 4.0, 0.1, relative)
        b, _ = inverse_root(16 * M, 4.0, 0.1, relative)
        assert torch.allclose(a, 2 * b) == relative


def test_trace_and_ridge_over_leading_dimensions() -> None:
    M = torch.stack([factor(3, i) for i in range(4)]).view(2, 2, 3, 3)
    rho = torch.rand(2, 2, dtype=torch.double)
    damped = add_ridge(M, rho)
    for i in range(2):
        for j in range(2):
            assert float(trace(M)[i, j]) == pytest.approx(float(M[i, j].diagonal().sum()))
            assert torch.equal(damped[i, j], M[i, j] + rho[i, j] * torch.eye(3, dtype=torch.double))
    assert torch.equal(M, M.clone())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_batch_equals_its_members(name: str) -> None:
    M, rho = torch.stack([factor(4, i) for i in range(3)]), torch.tensor([0.1, 1.0, 3.0], dtype=torch.double)
    batch, ok = FUNCTIONS[name](M, rho)
    assert ok.tolist() == [True] * 3
    for i in range(3):
        single, _ = FUNCTIONS[name](M[i], float(rho[i]))
        torch.testing.assert_close(batch[i], single, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_an_unusable_member_is_dropped_and_spares_the_others(name: str, bad: float) -> None:
    M = torch.stack([factor(4, i) for i in range(3)])
    M[1] = bad
    batch, ok = FUNCTIONS[name](M, torch.tensor([0.1, 0.1, 0.1], dtype=torch.double))
    assert ok.tolist() == [True, False, True]
    assert not batch[1].any()
    torch.testing.assert_close(batch[2], FUNCTIONS[name](M[2], 0.1)[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rho", [float("nan"), float("inf")])
def test_a_ridge_that_overflows_takes_no_step(rho: float) -> None:
    inverse, ok = damped_inverse(factor(3), rho)
    assert not bool(ok)
    assert not inverse.any()


def test_one_bad_entry_is_enough() -> None:
    M = factor(4)
    assert bool(usable(M))
    M[0, 3] = float("nan")
    assert not bool(usable(M))


def test_finite_is_asked_of_entries_and_not_of_their_sum() -> None:
    large = torch.full((3, 2, 2), 3e38)
    assert bool(large.sum((-2, -1)).isinf().all())
    assert finite(large).tolist() == [True] * 3
    large[0, 1, 0], large[1] = float("nan"), torch.tensor([[1.0, float("inf")], [-float("inf"), 1.0]])
    assert finite(large).tolist() == [False, False, True]
    assert finite(torch.zeros(2, 0, 0)).tolist() == [True, True]


def test_rounding_beyond_the_ridge_is_solved_in_double_precision() -> None:
    M = factor(40, rank=3, dtype=torch.float32)
    rho = 1e-9
    assert bool(torch.linalg.cholesky_ex(add_ridge(M, rho)).info)  # float32 alone fails
    inverse, ok = damped_inverse(M, rho)
    if bool(ok):
        residual = inverse.double() @ add_ridge(M.double(), rho) - torch.eye(40)
        assert float(residual.norm()) < 40
    else:
        assert not inverse.any()
    assert inverse.dtype == torch.float32


def test_an_indefinite_matrix_is_refused() -> None:
    """No tenfold, hundredfold or thousandfold ridge makes it definite."""
    with counting_repairs() as found:
        inverse, ok = damped_inverse(torch.diag(torch.tensor([3.0, -1.0])), 1e-4)
    assert not bool(ok)
    assert not inverse.any()
    assert found.factors == 0


def test_a_factor_that_is_not_definite_gets_ten_times_more_damping_until_it_is() -> None:
    M = torch.stack([factor(3, dtype=torch.float32), torch.diag(torch.tensor([3.0, 1.0, -0.05]))])
    with counting_repairs() as found:
        inverse, ok = damped_inverse(M, 0.01)
    assert ok.all()
    assert found.factors == 1
    torch.testing.assert_close(inverse[0], torch.linalg.inv(add_ridge(M[0], 0.01)))
    torch.testing.assert_close(inverse[1], torch.diag(1 / torch.tensor([3.1, 1.1, 0.05])))
    with counting_repairs() as found:  # without a ridge the least one is a rounding error
        inverse, ok = damped_inverse(factor(20, rank=2, dtype=torch.float32), 0.0)
    assert bool(ok)
    assert bool(inverse.isfinite().all())


def test_a_ridge_that_float32_loses_is_added_in_float64() -> None:
    M = torch.ones(2, 2)
    assert bool(torch.linalg.cholesky_ex(add_ridge(M, 1e-9)).info)
    with counting_repairs() as found:
        inverse, _ = damped_inverse(M, 1e-9)
    exact = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.double) / 2e-9
    torch.testing.assert_close(inverse.double(), exact, rtol=1e-6, atol=0.5)
    assert found.factors == 1


@pytest.mark.parametrize(("lowest", "ridge"), [(-1e-5, 0.01), (-0.05, 0.1), (-3.9, 10.0)])
def test_an_inverse_root_of_an_indefinite_matrix_has_more_damping(lowest: float, ridge: float) -> None:
    with counting_repairs() as found:
        result, ok = inverse_root(torch.diag(torch.tensor([3.0, 1.0, lowest])), 4.0, 0.01, False)
    assert bool(ok)
    assert found.factors == 1
    expected = (torch.tensor([3.0, 1.0, 0.0]) + ridge) ** -0.25
    torch.testing.assert_close(result, torch.diag(expected))


def test_rounding_is_no_reason_to_repair() -> None:
    with counting_repairs() as found:
        for seed, d, rank in ((0, 8, 1), (1, 64, 1), (2, 64, 4), (3, 256, 16)):
            M = factor(d, seed, rank, torch.float32)
            assert bool(inverse_root(M, 4.0, 1e-3, True)[1])
            assert bool(eigh(M)[2])
            assert bool(damped_inverse(M, 1e-3)[1])
    assert found.factors == 0


def test_repairs_are_counted_where_they_happen() -> None:
    M = torch.diag(torch.tensor([3.0, -0.05]))
    damped_inverse(M, 0.01)  # nobody listens
    with counting_repairs() as outer:
        eigh(M)
        with counting_repairs() as inner:
            eigh(M)
            damped_inverse(M, 0.01)
    assert (outer.factors, inner.factors) == (1, 2)


def test_what_no_precision_decomposes_takes_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(matrix: Tensor) -> Any:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    monkeypatch.setattr(torch.linalg, "eigvalsh", broken)
    root, ok = inverse_root(factor(4), 4.0, 0.1, True)
    assert not bool(ok)
    assert not root.any()
    assert float(largest_eigenvalue(factor(4))) == 0.0


def test_what_converges_only_when_moved_is_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    M, original = factor(4, dtype=torch.float32), torch.linalg.eigh
    expected, calls = eigh(M)[0], []

    def stubborn(matrix: Tensor) -> Any:
        calls.append(matrix)
        if len(calls) < 4:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return original(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", stubborn)
    with counting_repairs() as found:
        torch.testing.assert_close(eigh(M)[0], expected)
    assert [matrix.dtype for matrix in calls] == [torch.float32] + [torch.float64] * 3
    assert found.factors == 1


def test_eigenvalues_are_never_negative() -> None:
    values, vectors, ok = eigh(factor(30, rank=2, dtype=torch.float32))
    assert bool(ok)
    assert float(values.min()) >= 0.0
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(30), atol=1e-5, rtol=0)


def test_what_lapack_gives_up_on_in_float32_is_decomposed_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    M = factor(6, rank=2, dtype=torch.float32)
    expected = eigh(M)[0], largest_eigenvalue(M), inverse_root(M, 4.0, 0.1, True)[0]

    def fragile(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def call(matrix: Tensor) -> Any:
            if matrix.dtype == torch.float32:
                raise torch.linalg.LinAlgError("the algorithm failed to converge")
            return function(matrix)

        return call

    for name in ("eigh", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, name, fragile(getattr(torch.linalg, name)))
    for found, wanted in zip(
        (eigh(M)[0], largest_eigenvalue(M), inverse_root(M, 4.0, 0.1, True)[0]), expected, strict=True
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(40, 9), (1024, 191), (1024, 192), (300, 401), (2, 300, 401)])
def test_a_gram_matrix_is_whole(
    shape: tuple[int, ...], transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # more need larger products
    C = torch.randn(*shape, dtype=torch.double)
    C = C.mT.contiguous().mT if transposed else C
    found = gram(C)
    torch.testing.assert_close(found, C.mT @ C)
    torch.testing.assert_close(found, found.mT)
    spoilt = C.clone()
    spoilt[..., 3, -1] = torch.nan
    assert not finite(gram(spoilt)).any()


def test_a_gram_matrix_can_be_differentiated() -> None:
    C = torch.randn(300, 401, dtype=torch.double, requires_grad=True)
    gram(C).sum().backward()
    assert C.grad is not None
    torch.testing.assert_close(C.grad, 2 * C.detach().sum(1, keepdim=True).expand_as(C))
