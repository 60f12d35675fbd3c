"""Decompositions inside a border: torch's own, exactly where they should be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mupx import padded
from mupx.linalg import damped_cholesky, damped_inverse, eigh


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def factor(*shape: int, rank: int | None = None, dtype: torch.dtype = torch.double) -> Tensor:
    d, generator = shape[-1], torch.Generator().manual_seed(0)
    rows = torch.randn(*shape[:-1], rank or 2 * d, generator=generator, dtype=torch.double)
    return (rows @ rows.mT / d).to(dtype)


def sizes_of(monkeypatch: pytest.MonkeyPatch, name: str, call: Callable[[], object]) -> list[int]:
    """Return the rows of what a function of torch.linalg is given while a call runs."""
    found, own = [], getattr(torch.linalg, name)

    def watched(matrix: Tensor) -> object:
        found.append(matrix.shape[-2])
        return own(matrix)

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, name, watched)
        call()
    return found


@pytest.mark.parametrize("shape", [(128, 128), (512, 512), (3, 128, 128), (2, 512, 512)])
def test_a_cholesky_factor_and_an_inverse_are_those_of_the_matrix_inside(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    M, d = factor(*shape), shape[-1]
    assert sizes_of(monkeypatch, "cholesky_ex", lambda: damped_cholesky(M, 0.1)) == [d + padded.BORDER]
    damped = M + 0.1 * torch.eye(d, dtype=M.dtype)
    lower, ok = damped_cholesky(M, 0.1)
    assert bool(ok.all())
    assert lower.shape == M.shape
    torch.testing.assert_close(lower, torch.linalg.cholesky(damped))
    inverse, _ = damped_inverse(M, 0.1)
    torch.testing.assert_close(inverse, torch.linalg.inv(damped))
    for found in (lower, inverse):  # nothing of the border is kept
        assert found.untyped_storage().nbytes() == M.untyped_storage().nbytes()


@pytest.mark.parametrize(("shape", "scale"), [((512, 512), 1.0), ((2, 512, 512), 1.0), ((512, 512), 1e-30)])
def test_eigenvectors_are_those_of_the_matrix_inside(
    shape: tuple[int, ...], scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    M, d = scale * factor(*shape, rank=300), shape[-1]  # a null space, where a border of zeros would mix in
    assert sizes_of(monkeypatch, "eigh", lambda: padded.eigh(M)) == [d + padded.BORDER]
    values, vectors = padded.eigh(M)
    own, _ = torch.linalg.eigh(M)
    torch.testing.assert_close(values / scale, own / scale, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close((vectors * values[..., None, :]) @ vectors.mT / scale, M / scale)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(d, dtype=M.dtype).expand(M.shape))
    assert vectors.untyped_storage().nbytes() == M.untyped_storage().nbytes()

    def mixed(matrix: Tensor, corner: Tensor | float) -> Tensor:
        return bordered(matrix, 0.0)

    bordered = padded._bordered
    with monkeypatch.context() as patch:
        patch.setattr(padded, "_bordered", mixed)
        vectors = padded.eigh(M)[1]
        assert not torch.allclose(vectors.mT @ vectors, torch.eye(d, dtype=M.dtype).expand(M.shape))


def test_entries_near_the_largest_number_and_zeros_are_decomposed() -> None:
    M = factor(512, 512, dtype=torch.float32)
    large = M / M.abs().max() * 1e35
    values, vectors, ok = eigh(large)
    assert bool(ok)
    assert values.isfinite().all()
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(512), rtol=0, atol=1e-4)
    values, vectors = padded.eigh(torch.zeros(512, 512))
    assert not values.any()
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(512))


@pytest.mark.parametrize("shape", [(256, 256), (2, 256, 256), (512, 40)])
@pytest.mark.parametrize("rank", [None, 20])
def test_a_qr_decomposition_is_that_of_the_columns(
    shape: tuple[int, ...], rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = shape[-1]
    columns = factor(*shape[:-2], shape[-2], shape[-2], rank=rank)[..., :n]
    assert sizes_of(monkeypatch, "qr", lambda: padded.qr(columns)) == [shape[-2] + padded.BORDER]
    Q = padded.qr(columns)
    own = torch.linalg.qr(columns)[0]
    assert Q.shape == columns.shape
    torch.testing.assert_close(Q.mT @ Q, torch.eye(n, dtype=Q.dtype).expand((*Q.mT.shape[:-1], n)))
    torch.testing.assert_close(Q @ (Q.mT @ columns), columns)
    if rank is None:
        torch.testing.assert_close(Q, own)
        assert not torch.allclose(Q, -own)


def test_elsewhere_there_is_no_border(monkeypatch: pytest.MonkeyPatch) -> None:
    def sizes(d: int) -> list[int]:
        M = factor(d, d)
        calls: dict[str, Callable[[], object]] = {
            "cholesky_ex": lambda: damped_inverse(M, 0.1),
            "eigh": lambda: padded.eigh(M),
            "qr": lambda: padded.qr(M),
        }
        return [size - d for name, call in calls.items() for size in sizes_of(monkeypatch, name, call)]

    border = padded.BORDER
    assert [sizes(d) for d in (64, 130, 384)] == [[0, 0, 0]] * 3
    assert [sizes(d) for d in (128, 256, 512)] == [[border, 0, 0], [0, 0, border], [border] * 3]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert [sizes(d) for d in (128, 256, 512)] == [[0, 0, 0], [0, 0, 0], [0, 0, border]]
    assert padded.qr(torch.zeros(0, 0)).shape == (0, 0)


def test_a_factor_that_is_not_finite_spares_the_others_beside_it() -> None:
    M = factor(3, 128, 128)
    alone, _ = damped_inverse(M[2], 0.1)
    M[1, 5, 7] = float("nan")
    inverse, ok = damped_inverse(M, torch.full((3,), 0.1, dtype=M.dtype))
    assert ok.tolist() == [True, False, True]
    assert not inverse[1].any()
    torch.testing.assert_close(inverse[2], alone)


def test_a_factor_that_needs_more_precision_is_repaired_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    M = factor(128, 128, rank=3, dtype=torch.float32)
    rho = 1e-9 * float(M.diagonal().sum())
    assert bool(torch.linalg.cholesky_ex(M + rho * torch.eye(128)).info)  # float32 alone fails
    inverse, ok = damped_inverse(M, rho)
    assert bool(ok)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # without a border
    assert torch.equal(inverse, damped_inverse(M, rho)[0])
