"""Functions of a factor kept as columns, against the same functions of the dense matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mupx import linalg
from mupx.lowrank import (
    CHOLESKY,
    EIGH,
    Columns,
    Thin,
    alone,
    alone_pays,
    averaged,
    factor_in,
    function_in,
    inverse,
    inverse_root,
    pays,
    state_of,
    truncated,
)
from mupx.preconditioning import own_update

D = 30


def columns(seed: int, n: int = 5, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    decay = torch.logspace(0, -3, n, dtype=torch.double)
    return scale * torch.randn(D, n, generator=generator, dtype=torch.double) * decay


def dense(factor: Columns) -> Tensor:
    return factor.columns @ factor.columns.mT


@pytest.mark.parametrize("rho", [1e-6, 0.1, 100.0])
@pytest.mark.parametrize("power", [1, 2, 4])
def test_functions_equal_the_dense_ones(power: int, rho: float) -> None:
    F, X = columns(0), columns(1, 7)
    factor = averaged(None, F, 0.0, 1.0)
    ridge = torch.tensor(rho, dtype=torch.double)
    function, ok = inverse(factor, ridge) if power == 1 else inverse_root(factor, power, ridge)
    values, vectors = torch.linalg.eigh(linalg.add_ridge(F @ F.mT, rho))
    wanted = (vectors * values.clamp_min(rho) ** (-1 / power)) @ vectors.mT @ X
    assert bool(ok)
    torch.testing.assert_close(function @ X, wanted, rtol=1e-7, atol=1e-9 * float(wanted.abs().max()))
    wrong, _ = inverse_root(factor, power + 1, ridge)
    assert not torch.allclose(wrong @ X, wanted, rtol=1e-3)


@pytest.mark.parametrize(("keep", "weight"), [(0.6, 0.4), (1.0, 1.0)])
def test_the_average_is_that_of_the_products(keep: float, weight: float) -> None:
    first = averaged(None, columns(0), 0.0, 1.0)
    second = averaged(first, columns(1), keep, weight)
    wanted = keep * columns(0) @ columns(0).mT + weight * columns(1) @ columns(1).mT
    torch.testing.assert_close(dense(second), wanted)
    torch.testing.assert_close(second.trace, wanted.trace())
    gram = second.columns.mT @ second.columns
    torch.testing.assert_close(gram, torch.diag(second.values))
    assert not torch.allclose(dense(averaged(first, columns(1), weight, keep)), wanted) or keep == weight


@settings(deadline=None, max_examples=30)
@given(
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=8),
    rho=st.sampled_from([1e-4, 1e-2, 1.0]),
    tolerance=st.sampled_from([1e-3, 0.02, 0.3]),
    weight=st.sampled_from([0.05, 0.4, 0.9]),
)
def test_the_error_stays_within_its_budget_over_the_whole_average(
    seeds: list[int], rho: float, tolerance: float, weight: float
) -> None:
    ridge = torch.tensor(rho, dtype=torch.double)
    factor, exact = None, torch.zeros(D, D, dtype=torch.double)
    for i, seed in enumerate(seeds):
        w = 1.0 if i == 0 else weight
        factor = truncated(averaged(factor, columns(seed), 1 - w, w), tolerance * ridge)
        exact = (1 - w) * exact + w * columns(seed) @ columns(seed).mT
    assert factor is not None
    error = float(torch.linalg.eigvalsh(exact - dense(factor)).abs().max())
    assert error <= float(factor.dropped) + 1e-12
    assert float(factor.dropped) <= tolerance * rho
    torch.testing.assert_close(factor.trace, exact.trace())
    for power, (function, _) in ((1, inverse(factor, ridge)), (4, inverse_root(factor, 4, ridge))):
        values, vectors = torch.linalg.eigh(linalg.add_ridge(exact, rho))
        wanted = (vectors * values.clamp_min(rho) ** (-1 / power)) @ vectors.mT
        got = function @ torch.eye(D, dtype=torch.double)
        bound = tolerance / power * rho ** (-1 / power)
        assert float(torch.linalg.matrix_norm(got - wanted, 2)) <= bound * (1 + 1e-6) + 1e-9 * rho ** (
            -1 / power
        )


def test_truncation_drops_something_and_no_more_than_allowed() -> None:
    factor = averaged(None, columns(0, 8), 0.0, 1.0)
    budget = factor.values[3] * 1.0000001
    assert truncated(factor, budget).columns.shape[-1] == 4
    assert truncated(factor, factor.values[0] * 0.99) is factor


@pytest.mark.parametrize("power", [1, 4])
def test_a_ridge_far_above_every_eigenvalue_is_all_there_is(power: int) -> None:
    """Then every column may go, but a factor without any would be taken for zero and stop the layer."""
    factor = averaged(None, columns(0), 0.0, 1.0)
    ridge = 1e4 * factor.trace
    kept = truncated(factor, 0.02 * ridge)
    assert kept.columns.shape[-1] == 1
    function, ok = inverse(kept, ridge) if power == 1 else inverse_root(kept, power, ridge)
    assert bool(ok)
    identity = torch.eye(D, dtype=torch.double)
    torch.testing.assert_close(function @ identity * ridge ** (1 / power), identity, rtol=0, atol=1e-3)


@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf])
def test_a_zero_or_broken_factor_has_zero_functions_and_loses_nothing(bad: float) -> None:
    X, rho = columns(2), torch.tensor(0.1, dtype=torch.double)
    for old in (None, averaged(None, columns(0), 0.0, 1.0)):
        factor = averaged(old, torch.full((D, 5), bad, dtype=torch.double), 0.5, 0.5)
        if bad == 0.0 and old is not None:
            torch.testing.assert_close(dense(factor), 0.5 * dense(old))
            continue
        for function, ok in (inverse(factor, rho), inverse_root(factor, 4, rho)):
            assert not bool(ok)
            assert not (function @ X).any()
        kept = factor_in(state_of("A", factor, inverse(factor, rho)[0]), "A")
        assert (kept is None) == (old is not None)  # a state that had good values keeps them


@pytest.mark.parametrize("rho", [0.0, torch.nan, torch.inf])
def test_a_ridge_that_is_no_positive_number_takes_no_step(rho: float) -> None:
    factor = averaged(None, columns(0), 0.0, 1.0)
    function, ok = inverse(factor, torch.tensor(rho, dtype=torch.double))
    assert not bool(ok)
    assert not (function @ columns(1)).any()


def test_the_state_gives_back_what_it_was_given() -> None:
    factor = averaged(None, columns(0), 0.0, 1.0)
    function, _ = inverse(factor, torch.tensor(0.1, dtype=torch.double))
    state = state_of("A", factor, function)
    assert factor_in(state, "B") is None
    assert function_in(state, "B") is None
    again = factor_in(state, "A")
    assert again is not None
    assert all(torch.equal(a, b) for a, b in zip(again, factor, strict=True))
    restored = function_in(state, "A")
    assert restored is not None
    assert torch.equal(restored @ columns(1), function @ columns(1))


def test_columns_pay_where_the_batch_is_small_and_the_layer_wide() -> None:
    assert pays(4096, 64, 128, CHOLESKY)
    assert not pays(4096, 2048, 2048, CHOLESKY)
    assert not pays(128, 1, 1, CHOLESKY)  # too small to be worth a call
    # An eigendecomposition costs more than Cholesky: columns pay for longer.
    assert [pays(2048, 256, r, EIGH) for r in (0, 600, 1800)] == [True, True, False]
    assert not pays(2048, 256, 900, CHOLESKY)


@pytest.mark.parametrize("rho", [1e-6, 0.1, 100.0])
def test_the_batch_alone_is_inverted_exactly(rho: float) -> None:
    F, X, ridge = columns(0), columns(1, 7), torch.tensor(rho, dtype=torch.double)
    function, ok = inverse(alone(F), ridge)
    wanted = torch.linalg.solve(linalg.add_ridge(F @ F.mT, rho), X)
    assert bool(ok)
    torch.testing.assert_close(function @ X, wanted, rtol=1e-7, atol=1e-9 * float(wanted.abs().max()))
    assert not torch.allclose(inverse(alone(1.1 * F), ridge)[0] @ X, wanted, rtol=1e-3)
    torch.testing.assert_close(alone(F).trace, (F @ F.mT).trace())


@pytest.mark.parametrize(("d_out", "d_in"), [(20, 30), (30, 20)])
def test_a_gradient_of_the_factors_own_rows_is_preconditioned_within_them(d_out: int, d_in: int) -> None:
    D, H, ridge = columns(0)[:d_out].mT, columns(1)[:d_in].mT, torch.tensor(0.1, dtype=torch.double)
    left, right = (inverse(alone(0.5 * rows.mT), ridge)[0] for rows in (D, H))
    B, A = (linalg.add_ridge(0.25 * rows.mT @ rows, ridge) for rows in (D, H))
    wanted = torch.linalg.solve(B, D.mT @ H) @ torch.linalg.inv(A)
    torch.testing.assert_close(own_update(left, Thin(D, H, 3.0), right).product, 3 * wanted)
    other, _ = inverse(alone(columns(2)[:d_in]), ridge)
    assert not torch.allclose(own_update(left, Thin(D, H), other).product, wanted, rtol=1e-2)
    nothing, _ = inverse(alone(0.0 * D.mT), ridge)
    assert not own_update(nothing, Thin(D, H), right).product.any()


@pytest.mark.parametrize(("keep", "weight"), [(1.0, -0.1), (0.9, 2.0), (0.0, 1.0)])
def test_a_thin_product_is_added_as_if_it_were_multiplied_out(keep: float, weight: float) -> None:
    matrix = columns(2, 20)
    thin, before = Thin(columns(0).mT, columns(1)[:20].mT, 3.0), matrix.clone()
    torch.testing.assert_close(thin.product, 3 * thin.D.mT @ thin.H)
    thin.add_to(matrix, keep, weight)
    torch.testing.assert_close(matrix, keep * before + weight * thin.product)
    assert not torch.allclose(matrix, keep * before + weight * thin._replace(factor=1.0).product)


@pytest.mark.parametrize("spoilt", [0.0, torch.nan, torch.inf])
def test_a_batch_without_a_usable_factor_takes_no_step(spoilt: float) -> None:
    function, ok = inverse(alone(spoilt * columns(0)), torch.tensor(0.1, dtype=torch.double))
    assert not bool(ok)
    assert not function.inner.any()
    assert not function.rest.any()


def test_the_batch_alone_pays_where_it_is_smaller_than_the_layer() -> None:
    assert alone_pays(512, 256)
    assert not alone_pays(512, 512)
    assert alone_pays(256, 16)
    assert not alone_pays(128, 16)  # too small to be worth a call
