"""Products with triangular matrices: the same numbers as whole ones, from fewer operations."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mupx import triangular
from mupx.triangular import both, left, right, share, solve_both, solve_right


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # more need larger products


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


PRODUCTS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "U M": (left, lambda U, M: U @ M),
    "Uᵀ M": (lambda U, M: left(U, M, transposed=True), lambda U, M: U.mT @ M),
    "M U": (lambda U, M: right(M.mT, U), lambda U, M: M.mT @ U),
    "M Uᵀ": (lambda U, M: right(M.mT, U, transposed=True), lambda U, M: M.mT @ U.mT),
    "T U": (lambda U, M: both(U, (M @ M.mT).triu()), lambda U, M: U @ (M @ M.mT).triu()),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("d", "n"), [(1, 1), (5, 3), (255, 300), (256, 64), (301, 80), (600, 70)])
@pytest.mark.parametrize("product", PRODUCTS)
def test_they_are_the_whole_products(product: str, d: int, n: int, transposed: bool) -> None:
    ours, whole = PRODUCTS[product]
    U, M = draw(d, d, seed=1).triu(), draw(d, n, seed=2)
    M = M.mT.contiguous().mT if transposed else M
    torch.testing.assert_close(ours(U, M), whole(U, M))
    # Where its zeros are not there the numbers may be others: it is strips that are tested here.
    full = U + U.mT.tril(-1)
    if triangular.has_parts(U) and share(d, n) < 1:
        assert not torch.allclose(ours(full, M), whole(full, M))


@pytest.mark.parametrize("product", PRODUCTS)
def test_leading_dimensions_and_gradients_are_those_of_torch(product: str) -> None:
    ours, whole = PRODUCTS[product]
    U, M = draw(2, 256, 256, seed=1).triu(), draw(2, 256, 64, seed=2)
    torch.testing.assert_close(ours(U, M), whole(U, M))
    watched = U[0].clone().requires_grad_()
    ours(watched, M[0]).sum().backward()
    assert watched.grad is not None
    found, watched.grad = watched.grad, None
    whole(watched, M[0]).sum().backward()
    torch.testing.assert_close(found, watched.grad)


@pytest.mark.parametrize(("d", "n"), [(200, 400), (256, 64), (301, 80), (512, 512), (2048, 64)])
def test_the_share_of_the_operations_that_is_left(d: int, n: int) -> None:
    U, M = torch.zeros(d, d), torch.zeros(d, n)
    products = [
        (lambda: left(U, M), n, False),
        (lambda: right(M.mT, U), n, False),
        (lambda: both(U, U), d, True),
    ]
    for product, columns, triangle in products:
        with FlopCounterMode(display=False) as counter:
            product()
        found = counter.get_total_flops() / (2 * d**2 * columns)
        assert found == pytest.approx(share(d, columns, triangle=triangle), rel=0.02)
    if d >= 512:
        assert share(d, n) == 9 / 16
        assert share(d, d, triangle=True) == pytest.approx(0.4, abs=0.01)
    with patch("torch.get_num_threads", lambda: 64):
        assert share(d, n) == share(d, n, triangle=True) == 1.0


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_a_solution_from_the_right_is_that_of_torch(threads: int, layout: str) -> None:
    U, M = draw(20, 20, seed=1).triu() + 9 * torch.eye(20), draw(70, 20, seed=2)
    M = M.mT.contiguous().mT if layout == "columns" else M
    with patch("torch.get_num_threads", lambda: threads):
        found = solve_right(M, U)
        wrong = solve_right(M, U.mT)
    torch.testing.assert_close(found, torch.linalg.solve(U, M, left=False))
    assert not torch.allclose(wrong @ U, M)
    assert found.mT.is_contiguous()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("vectors", [1, 31, 32, 90])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_a_solution_of_both_triangles_is_that_of_torch(threads: int, vectors: int, layout: str) -> None:
    L, X = draw(40, 40, seed=1).tril() + 9 * torch.eye(40), draw(40, vectors, seed=2)
    X = X.mT.contiguous().mT if layout == "columns" else X
    with patch("torch.get_num_threads", lambda: threads):
        found, wrong = solve_both(L, X), solve_both(L.mT.contiguous(), X)
    torch.testing.assert_close(found, torch.linalg.solve(L @ L.mT, X))
    assert not torch.allclose(wrong, found)


def test_solutions_of_both_triangles_have_leading_dimensions() -> None:
    L, X = draw(3, 20, 20, seed=1).tril() + 9 * torch.eye(20), draw(3, 20, 50, seed=2)
    torch.testing.assert_close(solve_both(L, X), torch.linalg.solve(L @ L.mT, X))
