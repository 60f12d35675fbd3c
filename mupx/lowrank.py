"""Kronecker factors kept as columns: M = C Cᵀ with far fewer columns than rows.

The factor of one batch of N rows has rank N at most, and the spectrum of a running average falls off
quickly: where the width exceeds both, decomposing the Gram matrix of the columns, ``[r, r]``, replaces
every decomposition of the factor itself, ``[d, d]``, and no such matrix is ever formed. Damping makes
that safe: an eigenvalue far below the ridge ρ changes f(M + ρ I) by next to nothing.

What is dropped is accounted for. With ε = ‖M − C Cᵀ‖₂ / ρ,

    ‖(M + ρ)⁻¹ − (C Cᵀ + ρ)⁻¹‖₂ ≤ ε / ρ    and    ‖(M + ρ)^(-1/p) − (C Cᵀ + ρ)^(-1/p)‖₂ ≤ ε ρ^(-1/p) / p,

relative to the largest value either function can take; :func:`truncated` keeps ε below its budget over
the whole running average. The inverse is Woodbury's identity in the eigenbasis of the columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mupx.linalg import damped_inverse, eigh, finite, gram, trace

SOLVERS = ("auto", "dense", "low-rank")
SMALLEST = 256  # below, a dense inverse costs less than the calls to do anything else
CHOLESKY, EIGH = 2.5, 10.0  # cost over d³ at the speed of a matrix product; EIGH with the root it gives
TOLERANCE = 0.02  # ε: how far a truncated factor may be from the exact one, in units of the ridge


class Columns(NamedTuple):
    """A factor M ≈ C Cᵀ.

    Attributes:
        columns: C, ``[d, r]``, mutually orthogonal.
        values: Eigenvalues of M that are kept, ``[r]``, ascending; the squared norms of C.
        dropped: Bound on ‖M − C Cᵀ‖₂, a scalar.
        trace: tr(M), what was dropped included, a scalar.
    """

    columns: Tensor
    values: Tensor
    dropped: Tensor
    trace: Tensor


class Spanned(NamedTuple):
    """A factor M ≈ C Cᵀ whose columns are not orthogonal: an inverse needs no more, and no decomposition.

    Attributes:
        columns: C, ``[d, r]``.
        gram: Cᵀ C, ``[r, r]``.
        dropped: Bound on ‖M − C Cᵀ‖₂, a scalar.
        trace: tr(M), what was dropped included, a scalar.
    """

    columns: Tensor
    gram: Tensor
    dropped: Tensor
    trace: Tensor

    @property
    def orthogonal(self) -> Columns:
        """The same factor in its eigenbasis."""
        values, vectors, _ = eigh(self.gram)
        values = torch.where(trace(self.gram) > 0, values, 0.0)
        return Columns(self.columns @ vectors, values, self.dropped, self.trace)


class LowRank(NamedTuple):
    """A function of a damped factor: f(M + ρ I) X = rest · X + C inner Cᵀ X.

    Attributes:
        columns: C, ``[d, r]``.
        inner: ``[r, r]``, or its diagonal ``[r]`` where the columns are orthogonal.
        rest: f(ρ), a scalar.
    """

    columns: Tensor
    inner: Tensor
    rest: Tensor

    def __matmul__(self, X: Tensor) -> Tensor:
        """Return f(M + ρ I) X for ``[d, n]``."""
        C, inside = self.columns, self.columns.mT @ X
        inside = self.inner @ inside if self.inner.ndim == 2 else self.inner[:, None] * inside
        # In place: the rows of a batch come transposed, and copying them into a new layout takes as long as
        # a third of the product.
        return (self.rest * X).addmm_(C, inside)

    @property
    def flops(self) -> int:
        """Operations per vector it is applied to."""
        return 4 * self.columns.numel()


class Thin(NamedTuple):
    """A gradient, or an update made of it, of n rows: G = c Dᵀ H ``[d_out, d_in]``, not multiplied out.

    Attributes:
        D: ``[n, d_out]``.
        H: ``[n, d_in]``.
        factor: c.
    """

    D: Tensor
    H: Tensor
    factor: float = 1.0

    @property
    def rows(self) -> int:
        """How many rows D and H have."""
        return len(self.D)

    @property
    def product(self) -> Tensor:
        """G, multiplied out."""
        return torch.addmm(self.D.new_zeros(()), self.D.mT, self.H, beta=0, alpha=self.factor)

    def add_to(self, matrix: Tensor, keep: float, weight: float) -> None:
        """Do M ← keep · M + weight · G in one pass over M, and with no other matrix of its size."""
        matrix.addmm_(self.D.mT, self.H, beta=keep, alpha=weight * self.factor)


def averaged(old: Columns | None, new: Tensor, keep: float, weight: float) -> Columns:
    """Return keep · C Cᵀ + weight · F Fᵀ for new columns F, in its eigenbasis and not yet truncated.

    Where the result is not finite the old columns come back with ``values`` that are not a number, so
    that every function of it is zero and the next average can go on from what was good.

    Args:
        old: The average so far, None at first.
        new: F, ``[d, n]``.
        keep: Weight of the old average.
        weight: Weight of the new columns.
    """
    if old is None:
        nothing = new[..., :0]
        old = Columns(nothing, nothing[0], new.new_zeros(()), new.new_zeros(()))
    stacked = torch.cat([keep**0.5 * old.columns, weight**0.5 * new], -1)
    inside = gram(stacked)
    if not bool(finite(inside)):
        return old._replace(values=torch.full_like(old.values, torch.nan))
    values, vectors, _ = eigh(inside)
    # Below a zero head every column is zero: so are the eigenvalues, whatever stood in for the matrix.
    values = torch.where(trace(inside) > 0, values, 0.0)
    total = keep * old.trace + weight * new.square().sum()
    return Columns(stacked @ vectors, values, keep * old.dropped, total)


def pays(d: int, n: int, r: int, decomposition: float) -> bool:
    """Whether columns are cheaper than a dense ``[d, d]`` factor.

    With m = r + n, one refresh costs 2 d m² + 2 d m r for the Gram matrix and the rotation and 10 m³ for
    its decomposition, against 2 d² n for the product and the dense decomposition; one application to n
    vectors 4 d r n against 2 d² n. Decompositions run at a fraction of the speed of products, which
    their factors contain.

    Args:
        d: Units of the layer on this side.
        n: New columns per refresh.
        r: Columns kept so far.
        decomposition: Cost of the dense one in units of d³: `CHOLESKY` or `EIGH`.
    """
    m = r + n
    columns = 2 * d * m * (m + r) + 10 * m**3 + 4 * d * r * n
    return d >= SMALLEST and m < d and columns < decomposition * d**3 + 4 * d**2 * n


def alone(new: Tensor) -> Spanned:
    """Return F Fᵀ for the columns F ``[d, n]`` of one batch, whose inverse is solved for in ``[n, n]``."""
    inside = gram(new)
    return Spanned(new, inside, new.new_zeros(()), trace(inside))


def alone_pays(d: int, n: int) -> bool:
    """Whether :func:`alone` is cheaper than a dense ``[d, d]`` factor where every step has its own.

    The Gram matrix 2 d n², its inverse 2.5 n³, and applied to n vectors 4 d n² + 2 n³, against a product
    and a dense inverse as in :func:`pays`. Where an inverse serves several steps an eigenbasis is better:
    it is applied without the 2 n³, and can be truncated.
    """
    return d >= SMALLEST and 6 * d * n**2 + (CHOLESKY + 2) * n**3 < CHOLESKY * d**3 + 4 * d**2 * n


def stands_alone(d: int, n: int, solver: str, ema: float, every_step: bool) -> bool:
    """Whether a factor is the batch of one step, solved for as it is.

    Args:
        d: Size of the factor.
        n: Rows of the batch.
        solver: One that forces low rank, or leaves it to :func:`alone_pays`.
        ema: Decay of the running average; 0 for the batch alone.
        every_step: Whether every step has a factor of its own.
    """
    return ema == 0.0 and every_step and (solver == "low-rank" or alone_pays(d, n))


def on_own_columns(function: LowRank) -> Tensor:
    """Return W ``[r, r]`` with (M + ρ I)⁻¹ C = C W for M = C Cᵀ, from :func:`inverse` of a :class:`Spanned`.

    The push-through identity: (C Cᵀ + ρ I)⁻¹ C = C (Cᵀ C + ρ I)⁻¹. Zero where the inverse is.
    """
    scale = torch.where(function.rest > 0, -1.0 / torch.where(function.rest > 0, function.rest, 1.0), 0.0)
    return scale * function.inner


def truncated(factor: Columns, budget: Tensor) -> Columns:
    """Drop the smallest eigenvalues as long as the accumulated error stays within ``budget``.

    Args:
        factor: As :func:`averaged` returns it.
        budget: Largest ‖M − C Cᵀ‖₂ allowed, in the units of M.
    """
    within = int((factor.values <= budget - factor.dropped).sum())
    # Far above every eigenvalue the ridge is all that matters, but nothing left would mean a zero factor.
    count = min(within, len(factor.values) - 1)
    if count <= 0:
        return factor
    dropped = factor.dropped + factor.values[count - 1]
    return Columns(factor.columns[:, count:].contiguous(), factor.values[count:], dropped, factor.trace)


def inverse(factor: Columns | Spanned, ridge: Tensor) -> tuple[LowRank, Tensor]:
    """Return (M + ρ I)⁻¹, and ok: False (and the result zero) for a zero or non-finite factor.

    Of columns that are not orthogonal, by Woodbury's identity: (X − C (Cᵀ C + ρ I)⁻¹ Cᵀ X) / ρ.

    Args:
        factor: M.
        ridge: ρ > 0, a scalar tensor in the units of M.
    """
    if isinstance(factor, Columns):
        return _function(factor, ridge, 1.0)
    inside, ok = damped_inverse(factor.gram, ridge)
    ok = ok & (ridge > 0)
    rest = torch.where(ok, 1.0 / torch.where(ok, ridge, 1.0), 0.0)
    return LowRank(factor.columns, -rest * inside, rest), ok


def inverse_root(factor: Columns, root: float, ridge: Tensor) -> tuple[LowRank, Tensor]:
    """Return (M + ρ I)^(-1/root), and ok as :func:`inverse`."""
    return _function(factor, ridge, 1.0 / root)


def _function(factor: Columns, rho: Tensor, power: float) -> tuple[LowRank, Tensor]:
    """Return (M + ρ)^-power: ρ^-power outside the columns, and the rest by divided differences inside.

    f(M + ρ) X = f(ρ) X + C g(Λ) Cᵀ X with g(λ) = (f(λ + ρ) − f(ρ)) / λ, as the columns of C have norm √λ.
    """
    values = factor.values
    ok = values.isfinite().all() & (values.sum() > 0) & rho.isfinite() & (rho > 0)
    rho = torch.where(ok, rho, 1.0)
    x = torch.where(ok, values, 0.0) / rho
    # expm1 and log1p keep the digits that (1 + x)^-power − 1 would lose where λ ≪ ρ.
    gap = torch.where(x > 0, torch.expm1(-power * torch.log1p(x)) / x, -power)
    inner, rest = gap * rho ** (-power - 1.0), rho**-power
    zero = torch.zeros_like(rest)
    return LowRank(factor.columns, torch.where(ok, inner, zero), torch.where(ok, rest, zero)), ok


def state_of(side: str, factor: Columns | Spanned, function: LowRank) -> dict[str, Tensor]:
    """Return the tensors of a factor and its function, by the names an optimizer's state gives them.

    A factor that is not finite keeps what the state had: only its function, zero, is returned.
    """
    state = {f"columns_{side}": factor.columns, f"gain_{side}": function.inner, f"rest_{side}": function.rest}
    whole = factor.values.isfinite().all() if isinstance(factor, Columns) else finite(factor.gram)
    if bool(whole):
        rest = factor._asdict().items()
        state |= {f"{key}_{side}": value for key, value in rest if key != "columns"}
    return state


def kept_in(state: Mapping[str, Tensor], side: str) -> Columns | Spanned | None:
    """Return the factor that :func:`state_of` put into an optimizer's state, or None."""
    if f"values_{side}" in state:
        return Columns(*(state[f"{key}_{side}"] for key in Columns._fields))
    if f"gram_{side}" in state:
        return Spanned(*(state[f"{key}_{side}"] for key in Spanned._fields))
    return None


def factor_in(state: Mapping[str, Tensor], side: str) -> Columns | None:
    """Return the factor that :func:`kept_in` returns, in its eigenbasis."""
    kept = kept_in(state, side)
    return kept.orthogonal if isinstance(kept, Spanned) else kept


def forget(state: dict[str, Tensor], side: str, but: type[Columns] | type[Spanned] | None = None) -> None:
    """Remove what :func:`state_of` put into an optimizer's state, except the factor of one kind."""
    kept = () if but is None else but._fields
    for key in {*Columns._fields, *Spanned._fields, "gain", "rest"} - {*kept}:
        state.pop(f"{key}_{side}", None)


def function_in(state: Mapping[str, Tensor], side: str) -> LowRank | None:
    """Return the function that :func:`state_of` put into an optimizer's state, or None."""
    if f"gain_{side}" not in state:
        return None
    return LowRank(state[f"columns_{side}"], state[f"gain_{side}"], state[f"rest_{side}"])
