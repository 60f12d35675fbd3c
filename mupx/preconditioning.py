"""Solves with a Kronecker-factored curvature: pure functions over leading dimensions.

Shapes: A ``[..., d_in, d_in]``, B ``[..., d_out, d_out]``, a weight gradient G ``[..., d_out, d_in]``, a
bias gradient g ``[..., d_out]``; ridges broadcast against ``[...]``. A factor that is zero or not finite
gives a zero update and ok = False.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mupx import lowrank
from mupx.linalg import Scalar, damped_cholesky, damped_inverse, eigh, largest_eigenvalue, over, trace
from mupx.lowrank import SMALLEST, TOLERANCE, Columns, LowRank, Spanned, Thin
from mupx.triangular import solve_both

Factor = Tensor | Columns | Spanned
Solver = dict[str, Tensor]


class Cholesky(NamedTuple):
    """(M + ρ I)⁻¹ X by two triangular solves; half the cost of an inverse that is seldom applied.

    Attributes:
        lower: C with C Cᵀ = M + ρ I, ``[..., d, d]``.
        gain: 1, or 0 for a factor that is zero or not finite, ``[...]``.
    """

    lower: Tensor
    gain: Tensor

    def __matmul__(self, X: Tensor) -> Tensor:
        """Return (M + ρ I)⁻¹ X for ``[..., d, n]``."""
        return self.gain[..., None, None] * solve_both(self.lower, X)

    @property
    def flops(self) -> int:
        """Operations per vector it is applied to."""
        return 2 * self.lower.shape[-1] ** 2


class Identity:
    """What stands for the operator of a side that is not preconditioned."""

    flops = 0

    def __matmul__(self, X: Tensor) -> Tensor:
        """Return X."""
        return X


class Forecast(NamedTuple):
    """What stands for an operator that is not there yet, to ask whether it will pay.

    Attributes:
        flops: Operations per vector.
    """

    flops: int

    @classmethod
    def of(cls, d: int, columns: int | None) -> Forecast:
        """Return that of a factor ``[d, d]`` kept as so many columns, or whole."""
        return cls(2 * d**2 if columns is None else 4 * d * columns)


Operator = Tensor | LowRank | Cholesky | Identity


def ridges(A: Factor, B: Factor, damping_A: Scalar, damping_B: Scalar, rule: str) -> tuple[Tensor, Tensor]:
    """Return the ridges (ρ_A, ρ_B), each ``[...]``, in the units of A ``[..., d, d]`` and of B."""
    if rule == "pi":
        tr_A, tr_B = trace_of(A), trace_of(B)
        # Written as products: below a zero head tr B = 0 and π would be infinite.
        mean_A, mean_B = tr_A / _dimension(A), tr_B / _dimension(B)
        tiny = torch.finfo(tr_A.dtype).tiny
        root = torch.as_tensor(damping_B, dtype=tr_A.dtype, device=tr_A.device).sqrt()
        pi = (mean_A.clamp_min(tiny) / mean_B.clamp_min(tiny)).sqrt()
        return root * pi, root / pi
    return ridge_of(A, damping_A, rule), ridge_of(B, damping_B, rule)


def ridge_of(factor: Factor, damping: Scalar, rule: str) -> Tensor:
    """Return one factor's ridge ``[...]`` in its units: ρ·tr(M) under ``trace``, else ρ itself."""
    tr = trace_of(factor)
    return damping * tr if rule == "trace" else damping + torch.zeros_like(tr)


def trace_of(factor: Factor) -> Tensor:
    """Return tr(M) ``[...]`` of a factor in any form."""
    return trace(factor) if isinstance(factor, Tensor) else factor.trace


def size_of(factor: Factor) -> Tensor:
    """Return λmax(M) ``[...]`` of a factor in any form; zero where it is zero or not finite."""
    if isinstance(factor, Spanned):
        return largest_eigenvalue(factor.gram)
    if isinstance(factor, Columns):
        return factor.values.amax() if len(factor.values) else factor.trace
    return largest_eigenvalue(factor)


def _dimension(factor: Factor) -> int:
    return factor.shape[-1] if isinstance(factor, Tensor) else factor.columns.shape[-2]


def build_solver(
    A: Factor,
    B: Factor,
    damping_A: Scalar | None,
    damping_B: Scalar,
    bias_ridge: Scalar | None,
    rule: str,
    solved: Collection[str] = (),
) -> tuple[Solver, Tensor]:
    """Prepare what :func:`precondition` needs from one layer's factors.

    Args:
        A: ``[..., d_in, d_in]``, or its columns.
        B: ``[..., d_out, d_out]``, or its columns.
        damping_A: ρ_A of the weight; unused by ``exact``.
        damping_B: ρ_B of the weight, or the single ρ of ``exact``.
        bias_ridge: ρ_B of the bias where it differs from the weight's (``exact``).
        rule: ``absolute``, ``trace``, ``pi`` or ``exact``.
        solved: The sides, of ``"A"`` and ``"B"``, whose Cholesky factor is kept in place of the inverse.

    Returns:
        The solver and ok ``[...]``: False where a factor is zero or not finite, so U is zero.
    """
    if rule == "exact":
        assert isinstance(A, Tensor)
        assert isinstance(B, Tensor)
        values_A, vectors_A, ok_A = eigh(A)
        values_B, vectors_B, ok_B = eigh(B)
        ok = ok_A & ok_B
        spectrum = values_B[..., :, None] * values_A[..., None, :]
        inner = ok[..., None, None] / (spectrum + over(damping_B, spectrum))
        solver = {"vectors_A": vectors_A, "vectors_B": vectors_B, "inner": inner}
        if bias_ridge is not None:
            solver["inner_bias"] = ok[..., None] / (values_B + over(bias_ridge, values_B))
        return solver, ok
    assert damping_A is not None
    rho_A, rho_B = ridges(A, B, damping_A, damping_B, rule)
    inverse_A, ok_A = damped_side("A", A, rho_A, "A" in solved)
    inverse_B, ok_B = damped_side("B", B, rho_B, "B" in solved)
    return {**inverse_A, **inverse_B}, ok_A & ok_B


def damped_side(side: str, factor: Factor, rho: Tensor, solve: bool) -> tuple[Solver, Tensor]:
    """Prepare (M + ρ I)⁻¹ of one side for :func:`side_of`, and say whether the factor is usable.

    Args:
        side: ``"A"`` or ``"B"``.
        factor: ``[..., d, d]``, or its columns.
        rho: The ridge in the factor's units, ``[...]``.
        solve: Keep the Cholesky factor in place of the inverse.
    """
    if not isinstance(factor, Tensor):
        if isinstance(factor, Columns):
            factor = lowrank.truncated(factor, TOLERANCE * rho)
        function, ok = lowrank.inverse(factor, rho)
        return lowrank.state_of(side, factor, function), ok
    if solve:
        lower, ok = damped_cholesky(factor, rho)
        # In the factor's precision even after a second try in float64: torch's load_state_dict casts to it.
        return {f"cholesky_{side}": lower.to(factor.dtype), f"usable_{side}": ok.to(factor.dtype)}, ok
    inverse, ok = damped_inverse(factor, rho)
    return {f"inverse_{side}": inverse}, ok


def prefers_cholesky(d: int, vectors: int, interval: int) -> bool:
    """Whether two triangular solves per step beat forming the inverse, which costs another d³.

    Args:
        d: Size of the factor.
        vectors: Columns the inverse is applied to in one step.
        interval: Steps until the next refresh.
    """
    return d >= SMALLEST and vectors * interval < d


def side_of(solver: Mapping[str, Tensor], side: str) -> Operator:
    """Return what multiplies a gradient on one side: ``operator @ X`` works for every form."""
    if f"cholesky_{side}" in solver:
        return Cholesky(solver[f"cholesky_{side}"], solver[f"usable_{side}"])
    function = lowrank.function_in(solver, side)
    return solver[f"inverse_{side}"] if function is None else function


def clear_side(state: dict[str, Tensor], side: str, factor: Factor) -> None:
    """Remove one side's solver from an optimizer's state, whatever its form, to make room for the next.

    Args:
        state: The weight's state.
        side: ``"A"`` or ``"B"``.
        factor: What the next is built from; one that is kept as columns goes on being averaged.
    """
    lowrank.forget(state, side, None if isinstance(factor, Tensor) else type(factor))
    for key in ("inverse", "cholesky", "usable"):
        state.pop(f"{key}_{side}", None)


def times(matrix: Tensor, operator: Operator) -> Tensor:
    """Return X P for ``[..., n, d]`` and a symmetric operator P."""
    return matrix @ operator if isinstance(operator, Tensor) else (operator @ matrix.mT).mT


def thin_update(left: Operator, gradient: Thin, right: Operator) -> Thin:
    """Return P G Q for a thin G, without a product of two large matrices.

    Args:
        left: P, ``[d_out, d_out]``.
        gradient: G.
        right: Q, ``[d_in, d_in]``.
    """
    return Thin((left @ gradient.D.mT).mT, times(gradient.H, right), gradient.factor)


def own_update(left: LowRank, gradient: Thin, right: LowRank) -> Thin:
    """Return P G Q for G = c Dᵀ H, where D and H are the very rows that P and Q are the inverses of.

    (B + ρ_B)⁻¹ Dᵀ = Dᵀ W_B and H (A + ρ_A)⁻¹ = W_A H with W ``[n, n]``, so that of the two products with
    each side's rows that :func:`thin_update` takes only one of all four remains.

    Args:
        left: P, ``[d_out, d_out]``.
        gradient: G.
        right: Q, ``[d_in, d_in]``.
    """
    D, H, factor = gradient
    W = lowrank.on_own_columns(left) @ lowrank.on_own_columns(right)
    return Thin(W.mT @ D, H, factor) if D.shape[1] < H.shape[1] else Thin(D, W @ H, factor)


def thin_pays(
    left: Operator | Forecast, right: Operator | Forecast, shape: tuple[int, int], n: int, made: bool = True
) -> bool:
    """Whether :func:`thin_update` costs less than multiplying the whole gradient from both sides.

    Args:
        left: Acts on ``d_out`` entries.
        right: Acts on ``d_in`` entries.
        shape: (d_out, d_in).
        n: Rows of D and H.
        made: Whether the gradient is there in any case. Where it is left out it is one more product, as many
            operations as it takes to multiply a thin update out.
    """
    d_out, d_in = shape
    if min(d_out, d_in) < SMALLEST:
        return False
    column, row = _flops(left), _flops(right)
    return n * (column + row) + 2 * n * d_out * d_in * made < d_in * column + d_out * row


def _flops(operator: Operator | Forecast) -> int:
    return 2 * operator.numel() if isinstance(operator, Tensor) else operator.flops


def precondition(gradient: Tensor, solver: Mapping[str, Tensor]) -> Tensor:
    """Return U for a weight gradient ``[..., d_out, d_in]``."""
    if "inner" in solver:
        Q_A, Q_B = solver["vectors_A"], solver["vectors_B"]
        return Q_B @ ((Q_B.mT @ gradient @ Q_A) * solver["inner"]) @ Q_A.mT
    return times(side_of(solver, "B") @ gradient, side_of(solver, "A"))


def precondition_bias(gradient: Tensor, solver: Mapping[str, Tensor]) -> Tensor:
    """Return (B + ρ_B I)⁻¹ g for a bias gradient ``[..., d_out]``."""
    column = gradient.unsqueeze(-1)
    if "inner_bias" in solver:
        Q_B = solver["vectors_B"]
        return (Q_B @ ((Q_B.mT @ column) * solver["inner_bias"].unsqueeze(-1))).squeeze(-1)
    return (side_of(solver, "B") @ column).squeeze(-1)


def undo(update: Tensor, solver: Mapping[str, Tensor]) -> Tensor:
    """Return G ``[d_out, d_in]`` with U = :func:`precondition` (G); not a number where U is always zero."""
    if "inner" in solver:
        Q_A, Q_B = solver["vectors_A"], solver["vectors_B"]
        return Q_B @ ((Q_B.mT @ update @ Q_A) / solver["inner"]) @ Q_A.mT
    return undo_side(side_of(solver, "A"), undo_side(side_of(solver, "B"), update).mT).mT


def undo_bias(update: Tensor, solver: Mapping[str, Tensor]) -> Tensor:
    """Return g ``[d_out]`` with u = :func:`precondition_bias` (g)."""
    column = update.unsqueeze(-1)
    if "inner_bias" in solver:
        Q_B = solver["vectors_B"]
        return (Q_B @ ((Q_B.mT @ column) / solver["inner_bias"].unsqueeze(-1))).squeeze(-1)
    return undo_side(side_of(solver, "B"), column).squeeze(-1)


def undo_side(operator: Operator, X: Tensor) -> Tensor:
    """Return P⁻¹ X for a symmetric operator P; not finite where P is zero."""
    if isinstance(operator, Identity):
        return X
    if isinstance(operator, Cholesky):
        return operator.lower @ (operator.lower.mT @ X) / operator.gain[..., None, None]
    if isinstance(operator, lowrank.LowRank):
        C, inner, rest = operator
        if inner.ndim == 2:  # an inverse, and what it is the inverse of is known: C Cᵀ + ρ I
            return torch.addmm(X / rest, C, C.mT @ X)
        # On a column of squared norm v, P is φ = rest + inner·v, and (1/φ − 1/rest)/v = −inner/(φ rest).
        eigenvalues = rest + inner * C.square().sum(-2)
        return X / rest - C @ ((inner / (eigenvalues * rest))[:, None] * (C.mT @ X))
    solution: Tensor = torch.linalg.solve_ex(operator, X)[0]
    return solution


def least_of(factor: Factor) -> Tensor:
    """Return λmin(M) ``[...]`` of a factor in any form, by a decomposition where it is dense."""
    if isinstance(factor, Spanned):
        factor = factor.orthogonal
    if isinstance(factor, Columns):
        d, r = factor.columns.shape
        return factor.values.amin() if r == d else torch.zeros_like(factor.trace)
    values, _, ok = eigh(factor)
    return torch.where(ok, values[..., 0], 0.0)
