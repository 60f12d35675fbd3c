"""Solves with a Kronecker-factored curvature: pure functions over leading dimensions.

Shapes: A ``[..., d_in, d_in]``, B ``[..., d_out, d_out]``, a weight gradient G ``[..., d_out, d_in]``, a
bias gradient g ``[..., d_out]``; ridges broadcast against ``[...]``. A factor that is zero or not finite
gives a zero update and ok = False.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mupx.linalg import Scalar, damped_inverse, eigh, over, trace

Solver = dict[str, Tensor]


def ridges(A: Tensor, B: Tensor, damping_A: Scalar, damping_B: Scalar, rule: str) -> tuple[Tensor, Tensor]:
    """Return the ridges (ρ_A, ρ_B), each ``[...]``, in the units of A ``[..., d, d]`` and of B."""
    tr_A, tr_B = trace(A), trace(B)
    if rule == "trace":
        return damping_A * tr_A, damping_B * tr_B
    if rule == "pi":
        # Written as products: below a zero head tr B = 0 and π would be infinite.
        mean_A, mean_B = tr_A / A.shape[-1], tr_B / B.shape[-1]
        tiny = torch.finfo(A.dtype).tiny
        root = torch.as_tensor(damping_B, dtype=A.dtype, device=A.device).sqrt()
        pi = (mean_A.clamp_min(tiny) / mean_B.clamp_min(tiny)).sqrt()
        return root * pi, root / pi
    return damping_A + torch.zeros_like(tr_A), damping_B + torch.zeros_like(tr_B)


def build_solver(
    A: Tensor, B: Tensor, damping_A: Scalar | None, damping_B: Scalar, bias_ridge: Scalar | None, rule: str
) -> tuple[Solver, Tensor]:
    """Prepare what :func:`precondition` needs from one layer's factors.

    Args:
        A: ``[..., d_in, d_in]``.
        B: ``[..., d_out, d_out]``.
        damping_A: ρ_A of the weight; unused by ``exact``.
        damping_B: ρ_B of the weight, or the single ρ of ``exact``.
        bias_ridge: ρ_B of the bias where it differs from the weight's (``exact``).
        rule: ``absolute``, ``trace``, ``pi`` or ``exact``.

    Returns:
        The solver and ok ``[...]``: False where a factor is zero or not finite, so U is zero.
    """
    if rule == "exact":
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
    inverse_A, ok_A = damped_inverse(A, rho_A)
    inverse_B, ok_B = damped_inverse(B, rho_B)
    return {"inverse_A": inverse_A, "inverse_B": inverse_B}, ok_A & ok_B


def precondition(gradient: Tensor, solver: Mapping[str, Tensor]) -> Tensor:
    """Return U for a weight gradient ``[..., d_out, d_in]``."""
    if "inner" in solver:
        Q_A, Q_B = solver["vectors_A"], solver["vectors_B"]
        return Q_B @ ((Q_B.mT @ gradient @ Q_A) * solver["inner"]) @ Q_A.mT
    return solver["inverse_B"] @ gradient @ solver["inverse_A"]


def precondition_bias(gradient: Tensor, solver: Mapping[str, Tensor]) -> Tensor:
    """Return (B + ρ_B I)⁻¹ g for a bias gradient ``[..., d_out]``."""
    column = gradient.unsqueeze(-1)
    if "inner_bias" in solver:
        Q_B = solver["vectors_B"]
        return (Q_B @ ((Q_B.mT @ column) * solver["inner_bias"].unsqueeze(-1))).squeeze(-1)
    return (solver["inverse_B"] @ column).squeeze(-1)
