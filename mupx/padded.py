"""Decompositions on a CPU of matrices of an unlucky size, inside somewhat larger ones.

Widths are powers of two, and there LAPACK is slow: in its column-major matrices the entries of a row lie
whole KiB apart, so that many of them share few places in the caches. On one thread a border of eight more
rows takes a fifth to a third off the time of a Cholesky factor or a QR decomposition of 512 or 1024, an
eighth or a quarter with the inverse, and about a sixth off that of eigenvectors (benchmarks/padded.py). Of
128 it takes a quarter off a Cholesky factor: up to that size MKL goes another way.

The border of a square matrix is c I, that of columns is zero. LAPACK's reflections and eliminations leave
such entries exactly as they are, and what is decomposed is the matrix alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

BORDER = 8
# Sizes at whose multiples the gain exceeds the cost of the copies, on one thread and on several.
SQUARES, QRS = (512, 1024), (256, 512)
UNBLOCKED = 128  # size of one more Cholesky factor that gains, on one thread


def for_cholesky(matrix: Tensor) -> Tensor:
    """Return a copy of ``[..., d, d]``, inside a larger matrix where that is factorised quicker."""
    small = matrix.shape[-1] == UNBLOCKED and torch.get_num_threads() == 1 and matrix.device.type == "cpu"
    return _bordered(matrix, 1.0) if small or _gains(matrix, SQUARES) else matrix.clone()


def inner(matrix: Tensor, d: int) -> Tensor:
    """Return the ``[..., d, d]`` inside the border of a column-major matrix, in a memory of its own."""
    return matrix if matrix.shape[-1] == d else matrix.mT[..., :d, :d].contiguous().mT


def cholesky_inverse(lower: Tensor, d: int) -> Tensor:
    """Return (C Cᵀ)⁻¹ ``[..., d, d]``.

    Args:
        lower: C, of :func:`for_cholesky`'s matrix or of the one inside.
        d: Size of the one inside.
    """
    if d == UNBLOCKED:
        lower = lower[..., :d, :d]
    return inner(torch.cholesky_inverse(lower), d)


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return what torch.linalg.eigh does of ``[..., d, d]``.

    Raises:
        LinAlgError: It did not converge.
    """
    d = matrix.shape[-1]
    if not _gains(matrix, SQUARES):
        return tuple(torch.linalg.eigh(matrix))
    # Above all eigenvalues, which are at most d times the largest entry, so that the border's come last.
    most = 2.0 * d * matrix.abs().amax((-2, -1))
    above = most.clamp(torch.finfo(matrix.dtype).tiny, torch.finfo(matrix.dtype).max)
    values, vectors = torch.linalg.eigh(_bordered(matrix, above[..., None]))
    return values[..., :d].contiguous(), inner(vectors, d)


def qr(columns: Tensor) -> Tensor:
    """Return the orthogonal factor of ``[..., m, n]``, m ≥ n, column-major.

    Of column-major columns it is quickest: they need not be transposed.
    """
    m = columns.shape[-2]
    if not _gains(columns, QRS):
        whole: Tensor = torch.linalg.qr(columns)[0]
        return whole
    Q: Tensor = torch.linalg.qr(torch.nn.functional.pad(columns, (0, 0, 0, BORDER)))[0]
    return Q.mT[..., :m].contiguous().mT


def _gains(matrix: Tensor, multiples: tuple[int, int]) -> bool:
    rows, multiple = matrix.shape[-2], multiples[torch.get_num_threads() > 1]
    return rows > 0 and rows % multiple == 0 and matrix.device.type == "cpu"


def _bordered(matrix: Tensor, corner: Tensor | float) -> Tensor:
    d = matrix.shape[-1]
    result = matrix.new_zeros(*matrix.shape[:-2], d + BORDER, d + BORDER)
    result[..., :d, :d] = matrix
    result.diagonal(dim1=-2, dim2=-1)[..., d:] = corner
    return result
