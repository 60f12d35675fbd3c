"""Damped inverses and inverse roots of symmetric factors: pure functions over leading dimensions.

Shapes: a factor is ``[..., d, d]``, a ridge broadcasts against ``[...]``. Every function returns its
result together with ``ok [...]``, which is False where the factor is zero or not finite; the result
there is zero, so the layer takes no step. Non-finite values never reach LAPACK: MKL prints errors and
stalls on them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

Scalar = Tensor | float

DECOMPOSED = 256  # up to this size λmax comes from a full decomposition
BLOCK = 8  # vectors of the subspace iteration: a plateau at λ₂ would have to hold nine eigenvalues


def over(scalar: Scalar, tensor: Tensor) -> Scalar:
    """Shape a hyperparameter ``[...]`` so that it broadcasts over the trailing axes of ``tensor``."""
    if isinstance(scalar, Tensor) and scalar.dim():
        return scalar.reshape(*scalar.shape, *[1] * (tensor.dim() - scalar.dim()))
    return scalar


def trace(factor: Tensor) -> Tensor:
    """Return tr(M), shape ``[...]``, of ``[..., d, d]``."""
    return factor.diagonal(dim1=-2, dim2=-1).sum(-1)


def usable(factor: Tensor) -> Tensor:
    """Return ``[...]`` bool: every entry finite and the trace positive."""
    # Extremes are NaN where an entry is, and cost a tenth of a look at every entry.
    low, high = factor.amin((-2, -1)), factor.amax((-2, -1))
    return low.isfinite() & high.isfinite() & (trace(factor) > 0)


def add_ridge(factor: Tensor, ridge: Tensor | float) -> Tensor:
    """Return M + ρ I for ρ broadcastable against ``[...]``."""
    result = factor.clone()
    rho = torch.as_tensor(ridge, dtype=factor.dtype, device=factor.device)
    result.diagonal(dim1=-2, dim2=-1).add_(rho[..., None])
    return result


def damped_cholesky(factor: Tensor, ridge: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return the lower triangular C with C Cᵀ = M + ρ I, and ok; the identity where ok is False.

    A factor whose rounding errors exceed the ridge is factorised again in float64; where that fails
    too, ok is False. The result then has the precision of the second try.

    Args:
        factor: Symmetric positive semi-definite M, ``[..., d, d]``.
        ridge: ρ, broadcastable against ``[...]``, in the units of M.
    """
    damped = add_ridge(factor, ridge)
    ok = usable(factor) & trace(damped).isfinite()
    safe = _replace_unusable(damped, ok)
    lower, info = torch.linalg.cholesky_ex(safe)
    if bool(info.any()):
        lower, info = torch.linalg.cholesky_ex(safe.double())
        ok = ok & (info == 0)
        lower = _replace_unusable(lower, info == 0)
    return lower, ok


def damped_inverse(factor: Tensor, ridge: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return (M + ρ I)⁻¹ by :func:`damped_cholesky`, and ok.

    Args:
        factor: Symmetric positive semi-definite M, ``[..., d, d]``.
        ridge: ρ, broadcastable against ``[...]``, in the units of M.
    """
    lower, ok = damped_cholesky(factor, ridge)
    return _zero_unless(ok, torch.cholesky_inverse(lower).to(factor.dtype)), ok


def eigh(factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return eigenvalues ``[..., d]`` (clamped at zero), eigenvectors ``[..., d, d]`` and ok ``[...]``.

    LAPACK gives up on some rank-deficient factors in float32; those are decomposed in float64.
    """
    ok = usable(factor)
    safe = _replace_unusable(factor, ok)
    try:
        values, vectors = torch.linalg.eigh(safe)
    except LinAlgError:
        values, vectors = (part.to(factor.dtype) for part in torch.linalg.eigh(safe.double()))
    return values.clamp_min(0), vectors, ok


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
    except LinAlgError:  # see `eigh`
        values = torch.linalg.eigvalsh(factor.double()).to(factor.dtype)
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
    """
    values, vectors, ok = eigh(factor)
    rho = torch.as_tensor(ridge, dtype=factor.dtype, device=factor.device)
    unit = values[..., -1] if relative else torch.ones_like(values[..., -1])
    powered = (values + (rho * unit)[..., None]).pow(-1.0 / root)
    result = (vectors * powered[..., None, :]) @ vectors.mT
    return _zero_unless(ok, result), ok


def _zero_unless(ok: Tensor, result: Tensor) -> Tensor:
    return result if bool(ok.all()) else torch.where(ok[..., None, None], result, 0.0)


def _replace_unusable(factor: Tensor, ok: Tensor) -> Tensor:
    if bool(ok.all()):
        return factor
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.where(ok[..., None, None], factor, identity)
