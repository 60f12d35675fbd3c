"""Products with upper triangular matrices, of which torch has none: ``mm`` multiplies by their zeros too.

On a CPU the rows of a large one are taken in strips that end or begin at the diagonal. With eight of them
nine sixteenths of the operations are left where the other matrix is full, two fifths where it is another
triangle.

And solutions with them, which torch has, from the side that is quicker.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from mupx.linalg import has_parts

STRIPS, THINNEST = 8, 64  # most strips, and least rows of one: thinner ones are slow
MANY = 32  # vectors for which substitution from the right is quicker than from the left
WORK = 256**2 * 64  # multiplications by a full matrix from which strips pay, on one thread


def left(U: Tensor, M: Tensor, *, transposed: bool = False) -> Tensor:
    """Return U M, or with ``transposed`` Uᵀ M.

    Args:
        U: Upper triangular, ``[..., d, d]``; its zeros must be there.
        M: ``[..., d, n]``.
        transposed: Of U its transpose.
    """
    if not _worth_strips(U, M):
        return (U.mT if transposed else U) @ M
    result = torch.empty_like(M)
    for start, stop in _strips(len(U)):
        if transposed:
            torch.mm(U[:stop, start:stop].mT, M[:stop], out=result[start:stop])
        else:
            torch.mm(U[start:stop, start:], M[start:], out=result[start:stop])
    return result


def right(M: Tensor, U: Tensor, *, transposed: bool = False) -> Tensor:
    """Return M U, or with ``transposed`` M Uᵀ, of ``[..., n, d]``; as :func:`left`."""
    return left(U, M.mT, transposed=not transposed).mT


def both(T: Tensor, U: Tensor) -> Tensor:
    """Return T U, upper triangular as both ``[..., d, d]`` are."""
    if not _worth_strips(T, U):
        return T @ U
    result = torch.zeros_like(U)
    for start, stop in _strips(len(U)):
        torch.mm(T[start:stop, start:], U[start:, start:], out=result[start:stop, start:])
    return result


def solve_right(M: Tensor, U: Tensor) -> Tensor:
    """Return M U⁻¹, column after column in memory, for an upper triangular U far smaller than M.

    On one thread of a CPU by substitution from the right, which takes half the time of one from the left.
    Substitution is hardly divided among threads: with more of them by a product with the small inverse.

    Args:
        M: ``[n, d]``, best laid out in columns, too.
        U: Upper triangular, ``[d, d]``.
    """
    result: Tensor
    if has_parts(U) and torch.get_num_threads() == 1:
        result = torch.linalg.solve_triangular(U, M, upper=True, left=False)
    else:
        inverse = torch.linalg.solve_triangular(
            U, torch.eye(len(U), dtype=U.dtype, device=U.device), upper=True
        )
        result = (inverse.mT @ M.mT).mT
    return result


def solve_both(lower: Tensor, X: Tensor) -> Tensor:
    """Return (L Lᵀ)⁻¹ X, for which torch substitutes from the left.

    On one thread of a CPU from the right, for as many vectors as make that quicker.

    Args:
        lower: L, lower triangular, ``[..., d, d]``.
        X: ``[..., d, n]``.
    """
    if has_parts(lower) and X.shape[1] >= MANY and torch.get_num_threads() == 1:
        half = torch.linalg.solve_triangular(lower.mT, X.mT, upper=True, left=False)
        solution: Tensor = torch.linalg.solve_triangular(lower, half, upper=False, left=False).mT
        return solution
    return torch.cholesky_solve(X, lower)


def share(d: int, n: int, *, triangle: bool = False) -> float:
    """Return what part of the operations of a product is done, d² n multiplications in all.

    Args:
        d: Side of the triangular matrix.
        n: Columns (:func:`left`) or rows (:func:`right`) of the other.
        triangle: That is upper triangular, too (:func:`both`).
    """
    strips = len(_strips(d)) if _worth(d, n) else 1
    whole = (strips + 1) / (2 * strips)
    return whole * (2 * strips + 1) / (3 * strips) if triangle else whole


def _strips(d: int) -> list[tuple[int, int]]:
    count = min(STRIPS, d // THINNEST)
    return list(pairwise(d * i // count for i in range(count + 1)))


def _worth_strips(U: Tensor, M: Tensor) -> bool:
    return has_parts(U) and has_parts(M) and _worth(*M.shape)


def _worth(d: int, n: int) -> bool:
    # A strip is divided among threads worse than the whole.
    return d >= 4 * THINNEST and d**2 * n >= WORK * torch.get_num_threads() ** 3
