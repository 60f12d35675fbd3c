"""Damped inverses and inverse roots of symmetric factors: pure functions over leading dimensions.

Shapes: a factor is ``[..., d, d]``, a ridge broadcasts against ``[...]``. Every function returns its
result together with ``ok [...]``, which is False where the factor is zero or not finite; the result
there is zero, so the layer takes no step. Non-finite values never reach LAPACK: MKL prints errors and
stalls on them.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import overload

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from mupx import padded

Scalar = Tensor | float


@dataclass
class Repairs:
    """How many factors were repaired while a block of :func:`counting_repairs` ran."""

    factors: int = 0


_repairs: ContextVar[Repairs | None] = ContextVar("repairs", default=None)

DECOMPOSED = 256  # up to this size λmax comes from a full decomposition
STRIPS = 4  # of a symmetric product: fewer leave out less, more are too thin to be quick
STRIPS_FROM, STRIPS_WORK = 192, 192**2 * 512  # least side, and products of entries, on one thread
TRIES = 3  # times that a factor which cannot be decomposed gets ten times more damping
BLOCK = 8  # vectors of the subspace iteration: a plateau at λ₂ would have to hold nine eigenvalues


@contextmanager
def counting_repairs() -> Generator[Repairs]:
    """Count the factors that the enclosed calls could only treat in float64 or with more damping.

    The results of these functions say whether a factor is usable; that it nearly was not is nothing a
    caller computes with, but something a user should hear of. Calls inside an inner block count there.

    Yields:
        A count that grows while the block runs.
    """
    token = _repairs.set(found := Repairs())
    try:
        yield found
    finally:
        _repairs.reset(token)


def _count(repaired: Tensor) -> None:
    found = _repairs.get()
    if found is not None:
        found.factors += int(repaired.sum())


@overload
def over(scalar: Tensor, tensor: Tensor) -> Tensor: ...
@overload
def over(scalar: float, tensor: Tensor) -> float: ...
def over(scalar: Scalar, tensor: Tensor) -> Scalar:
    """Shape a hyperparameter ``[...]`` so that it broadcasts over the trailing axes of ``tensor``."""
    if isinstance(scalar, Tensor) and scalar.dim():
        return scalar.reshape(*scalar.shape, *[1] * (tensor.dim() - scalar.dim()))
    return scalar


def trace(factor: Tensor) -> Tensor:
    """Return tr(M), shape ``[...]``, of ``[..., d, d]``."""
    return factor.diagonal(dim1=-2, dim2=-1).sum(-1)


def gram(columns: Tensor) -> Tensor:
    """Return Cᵀ C ``[..., r, r]`` of ``[..., d, r]``.

    torch has no product that knows its result is symmetric. On a CPU a large one is made in strips that
    begin at the diagonal: five eighths of the operations.
    """
    if not _worth_strips(columns):
        return columns.mT @ columns
    r = columns.shape[1]
    result = columns.new_empty(r, r)
    edges = [r * i // STRIPS for i in range(STRIPS + 1)]
    for start, stop in pairwise(edges):
        torch.mm(columns[:, start:].mT, columns[:, start:stop], out=result[start:, start:stop])
    for start, stop in pairwise(edges[1:]):
        result[:start, start:stop] = result[start:stop, :start].mT
    return result


def has_parts(matrix: Tensor) -> bool:
    """Whether a product with it is quicker, and can be written, part by part: a single one on a CPU."""
    # Not of what torch watches (autograd, DTensor): it cannot follow a product into a part of a matrix.
    plain = type(matrix) is Tensor and matrix.dim() == 2 and not matrix.requires_grad
    return plain and matrix.device.type == "cpu"


def _worth_strips(columns: Tensor) -> bool:
    if not has_parts(columns):
        return False
    d, r = columns.shape
    # A strip is divided among threads worse than the whole: two need eight times the work to gain by it.
    return min(d, r) >= STRIPS_FROM and d * r**2 >= STRIPS_WORK * torch.get_num_threads() ** 3


def finite(matrix: Tensor) -> Tensor:
    """Return ``[...]`` bool: every entry of ``[..., m, n]`` finite."""
    if matrix.device.type == "cpu":
        # A sum is finite only if every term is, and takes a tenth of the time of a look at every entry.
        # That it may overflow by itself is seen on a CPU without waiting.
        sums = matrix.sum((-2, -1))
        if math.isfinite(sums.sum().item() if sums.dim() else sums.item()):
            return torch.ones_like(sums, dtype=torch.bool)
    low, high = matrix.amin((-2, -1)), matrix.amax((-2, -1))  # not a number where an entry is none
    return low.isfinite() & high.isfinite()


def usable(factor: Tensor) -> Tensor:
    """Return ``[...]`` bool: every entry finite and the trace positive."""
    return finite(factor) & (trace(factor) > 0)


def add_ridge(factor: Tensor, ridge: Tensor | float) -> Tensor:
    """Return M + ρ I for ρ broadcastable against ``[...]``."""
    return _with_ridge(factor.clone(), ridge, factor.shape[-1])


def _with_ridge(matrix: Tensor, ridge: Tensor | float, d: int) -> Tensor:
    """Return a matrix after adding ρ to the first d entries of its diagonal."""
    rho = torch.as_tensor(ridge, dtype=matrix.dtype, device=matrix.device)
    matrix.diagonal(dim1=-2, dim2=-1)[..., :d].add_(rho[..., None])
    return matrix


def damped_cholesky(factor: Tensor, ridge: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return the lower triangular C with C Cᵀ = M + ρ I, and ok; the identity where ok is False.

    A factor whose rounding errors exceed the ridge is factorised again in float64, and where that fails
    with 10, 100 and 1000 times the ridge; then ok is False. What was repaired so is counted by
    :func:`counting_repairs`, and has the precision of the later try.

    Args:
        factor: Symmetric positive semi-definite M, ``[..., d, d]``.
        ridge: ρ, broadcastable against ``[...]``, in the units of M.
    """
    lower, ok = _factorised(factor, ridge)
    return padded.inner(lower, factor.shape[-1]), ok


def _factorised(factor: Tensor, ridge: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return what :func:`damped_cholesky` does, perhaps with a border (:mod:`mupx.padded`)."""
    damped = _with_ridge(padded.for_cholesky(factor), ridge, factor.shape[-1])
    ok = usable(factor) & (trace(damped) < math.inf)
    lower, info = torch.linalg.cholesky_ex(_replace_unusable(damped, ok))
    if bool(info.any()):
        lower, mended = _cholesky_again(factor, ridge, ok)
        _count(ok & (info != 0) & mended)
        ok = ok & mended
    return lower, ok


def _cholesky_again(factor: Tensor, ridge: Tensor | float, ok: Tensor) -> tuple[Tensor, Tensor]:
    """Return C in float64 with as much damping as it takes, and where there is one."""
    wide = factor.double()
    rho = torch.as_tensor(ridge, dtype=wide.dtype, device=wide.device).expand(ok.shape)
    # Ten times no ridge is none: below this one, factors in their own precision have only rounding.
    least = torch.finfo(factor.dtype).eps * trace(wide)
    lower, left = _replace_unusable(wide, torch.zeros_like(ok)), ok
    for _ in range(1 + TRIES):
        candidate, info = torch.linalg.cholesky_ex(_replace_unusable(add_ridge(wide, rho), left))
        done = left & (info == 0)
        lower = torch.where(done[..., None, None], candidate, lower)
        left = left & ~done
        if not bool(left.any()):
            break
        rho = 10 * torch.maximum(rho, least)
    return lower, ~left


def damped_inverse(factor: Tensor, ridge: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return (M + ρ I)⁻¹ by :func:`damped_cholesky`, and ok.

    Args:
        factor: Symmetric positive semi-definite M, ``[..., d, d]``.
        ridge: ρ, broadcastable against ``[...]``, in the units of M.
    """
    lower, ok = _factorised(factor, ridge)
    return _zero_unless(ok, padded.cholesky_inverse(lower, factor.shape[-1]).to(factor.dtype)), ok


def eigh(factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return eigenvalues ``[..., d]`` (clamped at zero), eigenvectors ``[..., d, d]`` and ok ``[...]``.

    LAPACK gives up on some rank-deficient factors in float32; those are decomposed in float64, as are
    those with an eigenvalue below −d·eps·λmax, which rounding cannot explain. Both are counted by
    :func:`counting_repairs`.
    """
    values, vectors, ok = _decomposed(factor)
    return values.clamp_min(0), vectors, ok


def _decomposed(factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return eigenvalues as they are found, eigenvectors and ok."""
    ok = usable(factor)
    safe = _replace_unusable(factor, ok)
    found = _attempt(safe)
    broken = ok if found is None else ok & ~_semi_definite(found[0])
    if bool(broken.any()):
        again = _decomposed_again(safe)
        if again is None:  # not one decomposition converged: no step, rather than a crash
            return torch.zeros_like(safe[..., 0]), torch.zeros_like(safe), torch.zeros_like(ok)
        _count(broken)
        found = again
    assert found is not None
    return *found, ok


def _attempt(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    try:
        return padded.eigh(matrix)
    except LinAlgError:
        return None


def _decomposed_again(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """Decompose in float64; where even that does not converge, with a shift that is subtracted again."""
    wide = matrix.double()
    shift = torch.finfo(matrix.dtype).eps * trace(wide)
    for k in range(1 + TRIES):
        moved = shift * (10.0**k if k else 0.0)
        found = _attempt(add_ridge(wide, moved))
        if found is not None:
            return (found[0] - moved[..., None]).to(matrix.dtype), found[1].to(matrix.dtype)
    return None


def _semi_definite(values: Tensor) -> Tensor:
    """Whether ascending eigenvalues ``[..., d]`` are those of a semi-definite matrix but for rounding."""
    rounding = values.shape[-1] * torch.finfo(values.dtype).eps
    return values[..., 0] >= -rounding * values[..., -1]


def largest_eigenvalue(factor: Tensor, tolerance: float = 1e-5, iterations: int = 200) -> Tensor:
    """Return λmax ``[...]`` of a symmetric positive semi-definite ``[..., d, d]``.

    Small factors are decomposed; larger ones go through subspace iteration on a block of vectors, whose
    Ritz value approaches λmax from below. Zero where the factor is zero or not finite.

    Args:
        factor: M, ``[..., d, d]``.
        tolerance: Stop when the Ritz value changes by less than this fraction.
        iterations: Stop at the latest after so many products.
    """
    ok = usable(factor)
    safe = _replace_unusable(factor, ok)
    # In units of its largest entry, so that squares of a tiny factor's entries do not underflow.
    unit = safe.abs().amax((-2, -1))
    safe = safe / unit[..., None, None]
    if factor.shape[-1] <= DECOMPOSED:
        value = _eigenvalues(safe)[..., -1]
    else:
        value = _subspace_iteration(safe, tolerance, iterations)
    return torch.where(ok, value * unit, torch.zeros_like(value))


def _eigenvalues(factor: Tensor) -> Tensor:
    try:
        values: Tensor = torch.linalg.eigvalsh(factor)
    except LinAlgError:
        values, _, _ = eigh(factor)
    return values


def _subspace_iteration(factor: Tensor, tolerance: float, iterations: int) -> Tensor:
    # A fixed pseudo-random start: vectors of ones would be orthogonal to every δ of a softmax.
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(factor.shape[-1], BLOCK, generator=generator).to(factor)
    block = torch.linalg.qr(block.expand(*factor.shape[:-1], BLOCK))[0]
    value = torch.zeros_like(factor[..., 0, 0])
    for _ in range(iterations):
        image = factor @ block
        new = torch.linalg.eigvalsh(block.mT @ image)[..., -1]
        block = torch.linalg.qr(image)[0]
        settled = (new - value).abs() <= tolerance * new.abs()
        value = new
        if bool(settled.all()):
            break
    return value


def inverse_root(factor: Tensor, root: float, ridge: Tensor | float, relative: bool) -> tuple[Tensor, Tensor]:
    """Return (M + ρ I)^(-1/root), or with ``relative`` (M + ρ λmax I)^(-1/root), and ok.

    Args:
        factor: Symmetric positive semi-definite M, ``[..., d, d]``.
        root: 4 for Shampoo's inverse fourth root.
        ridge: ρ, broadcastable against ``[...]``; dimensionless when ``relative``.
        relative: Measure the ridge in units of λmax.

    Where an eigenvalue is below zero by more than rounding, the ridge is 10, 100 or 1000 times larger.
    """
    values, vectors, ok = _decomposed(factor)
    rho = torch.as_tensor(ridge, dtype=factor.dtype, device=factor.device)
    unit = values[..., -1] if relative else torch.ones_like(values[..., -1])
    rho = _enough(rho * unit, values)
    powered = (values.clamp_min(0) + rho[..., None]).pow(-1.0 / root)
    result = (vectors * powered[..., None, :]) @ vectors.mT
    return _zero_unless(ok, result), ok


def _enough(rho: Tensor, values: Tensor) -> Tensor:
    """Return ρ, or up to 1000 ρ where an eigenvalue below zero is no rounding error."""
    lowest = (-values[..., 0]).clamp_min(torch.finfo(values.dtype).tiny)
    powers = (lowest / rho).log10().ceil().clamp(0, TRIES)
    return torch.where(_semi_definite(values), rho, rho * 10.0**powers)


def _zero_unless(ok: Tensor, result: Tensor) -> Tensor:
    return result if bool(ok.all()) else torch.where(ok[..., None, None], result, 0.0)


def _replace_unusable(factor: Tensor, ok: Tensor) -> Tensor:
    if bool(ok.all()):
        return factor
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.where(ok[..., None, None], factor, identity)
