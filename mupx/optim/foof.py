"""FOOF: precondition each layer's gradient by the covariance of its inputs alone.

Update: U = G (A + ρ_A I)⁻¹ for weights ``[d_out, d_in]``, A = E[h hᵀ] ``[d_in, d_in]`` over samples and
positions, and the plain gradient g for biases (Benzing 2022, arXiv:2201.12250, "fast first-order
optimizer"): gradient descent on the outputs of neurons in place of their weights. It is K-FAC with B = I,
so nothing of the backward pass is captured and there is no Fisher to choose.

Damping rules: ``trace``, ρ_A·tr(A), dimensionless; ``absolute``, ρ_A itself. A bias has no input
covariance and so no damping.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mupx.linalg import Scalar
from mupx.lowrank import factor_in
from mupx.optim.base import Groups, Refresh, Scale, split_ridge
from mupx.optim.kronecker import Kronecker
from mupx.preconditioning import (
    Factor,
    Solver,
    damped_side,
    least_of,
    ridge_of,
    side_of,
    size_of,
    times,
    trace_of,
    undo_side,
)


class FOOF(Kronecker):
    """FOOF for Linear and ungrouped Conv2d layers; everything else goes to AdamW.

    On a refresh step the forward and backward pass must run inside :meth:`curvature`.

    Width rule (derived from arXiv:2312.12226, Prop. 4.1, with e_A = 1 and e_B = 0): lr × r_out, for
    weights and biases alike; ρ_A × r_in; ``trace`` needs no multiplier.

    Args:
        params: Parameters or groups; plain parameters are sorted into FOOF and fallback by layer.
        model: The module they belong to.
        lr: Learning rate.
        damping: ρ_A.
        damping_rule: ``trace`` or ``absolute``.
        loss: ``cross_entropy``, ``squared_error`` or a :class:`mupx.losses.Loss`; tells which terms of a
            batch are ignored.
        refresh: Longest interval between updates of A and its inverse, in steps, or a function
            step -> interval.
        staleness: Largest age of A as a fraction of the steps done; what decides early on.
        statistics: Interval between updates of the factors alone, in steps; None: only where their
            inverses are updated too. Such factors are kept dense.
        ema: Decay per step of the running average of A (0: the current batch only).
        solver: ``dense``, ``low-rank``, ``sketch`` or ``auto``, as for K-FAC.
        momentum: Heavy-ball momentum on the preconditioned update.
        graft: Whose update's norm this one takes: ``none``, ``sgd``, ``adam`` or ``rms``; before momentum
            (see :mod:`mupx.update_norm`).
        normalise: ``spectral`` divides the update by its largest singular value; or ``none``.
        fallback_lr: AdamW's learning rate for what FOOF cannot factor.
        betas: AdamW's betas for the same.
        eps: AdamW's eps for the same.
        weight_decay: λ under ``weight_decay_mode``.
        weight_decay_mode: ``independent``, ``adamw`` or ``l2``.
    """

    algorithm = "foof"
    sides = "A"
    bias_needs_weight = False

    def __init__(
        self,
        params: Groups,
        model: nn.Module,
        lr: Scalar = 0.1,
        *,
        damping: float = 0.01,
        damping_rule: str = "trace",
        loss: str | Any = "cross_entropy",
        refresh: Refresh = 10,
        staleness: float = 0.05,
        statistics: int | None = None,
        ema: float = 0.95,
        solver: str = "auto",
        momentum: float = 0.0,
        graft: str = "none",
        normalise: str = "none",
        fallback_lr: Scalar = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        weight_decay_mode: str = "independent",
    ) -> None:
        defaults = {
            "lr": lr,
            "damping_A": split_ridge(damping, 1.0)[0],
            "momentum": momentum,
            "graft": graft,
            "normalise": normalise,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "weight_decay_mode": weight_decay_mode,
        }
        super().__init__(
            params,
            model,
            defaults,
            damping_rule=damping_rule,
            solver=solver,
            fisher=None,
            loss=loss,
            refresh=refresh,
            staleness=staleness,
            statistics=statistics,
            ema=ema,
            generator=None,
            fallback_lr=fallback_lr,
        )

    def build_solver(
        self,
        factors: Mapping[str, Factor],
        weight: Tensor,
        groups: Mapping[int, dict[str, Any]],
        solved: set[str],
    ) -> tuple[Solver, Tensor]:
        """Return the damped inverse of A, and whether A is usable."""
        A, damping = factors["A"], groups[id(weight)]["damping_A"]
        return damped_side("A", A, ridge_of(A, damping, self.damping_rule), "A" in solved)

    def precondition_weight(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Return G (A + ρ_A)⁻¹."""
        return times(gradient, side_of(self.state[weight], "A"))

    def precondition_bias(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Return g: the input of a bias is the constant 1."""
        return gradient

    def scales(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Scale]:
        """Return λmax and trace of A with its ridge; nothing for a bias."""
        state = self.state.get(parameter, {})
        A = factor_in(state, "A") or state.get("A")
        if A is None:
            return super().scales(parameter, group)
        ridge = ridge_of(A, group["damping_A"], self.damping_rule).item()
        return {"A": Scale(size_of(A).item(), ridge, trace_of(A).item())}

    def least(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, float]:
        """Return λmin of A; nothing for a bias."""
        state = self.state.get(parameter, {})
        present = self.scales(parameter, group).keys() & set(self.sides)
        return {side: least_of(factor_in(state, side) or state[side]).item() for side in present}

    def precondition(
        self, parameter: Tensor, vector: Tensor, group: dict[str, Any], *, inverse: bool = False
    ) -> Tensor | None:
        """Return P v or P⁻¹ v with the last solver; a bias's P is the identity."""
        if group["algorithm"] != self.algorithm:
            return super().precondition(parameter, vector, group, inverse=inverse)
        if id(parameter) not in self._layers:
            return vector.clone()
        state = self.state.get(parameter, {})
        if "refreshed_at" not in state:
            return None
        flat, side = vector.flatten(1), side_of(state, "A")
        return (undo_side(side, flat.mT).mT if inverse else times(flat, side)).view_as(vector)
