"""EKFAC: K-FAC's eigenbases with the gradient's own second moments in them.

Update: U = Q_B [(Q_Bᵀ G Q_A) / (S + ρ)] Q_Aᵀ for weights ``[d_out, d_in]``, with Q_A and Q_B the
eigenvectors of A and B (George et al. 2018, arXiv:1806.03884). S ``[d_out, d_in]`` is what the layer's
Fisher block has on its diagonal in that basis,

    S = E[(Q_Bᵀ G_n Q_A)²],  G_n = Σ_t δ_nt h_ntᵀ the gradient of sample n,

where K-FAC has λ(B) λ(A)ᵀ instead: of all curvatures with these eigenvectors S gives the one closest to
the block in Frobenius norm. For a plain Linear, T = 1, S = E[(Q_Bᵀ δ)² (Q_Aᵀ h)²ᵀ]; over positions nothing
is approximated either: they add up before the square, so that their correlations, which A ⊗ B leaves out,
are in. With an output per position the exact Fisher adds its classes up over positions, as K-FAC's does;
``mc`` is unbiased there.

A bias has Q_B and s = E[(Q_Bᵀ Σ_t δ_nt)²]. A and B, and S with them, are running averages; when a refresh
turns the basis, the S so far is turned along (:func:`mupx.samples.turned`).

Damping: ``trace``, ρ·ΣS, which is ρ·tr(F); ``absolute``, ρ itself. A multiple of the *mean* of S would not
be width-invariant: tr(F) goes as r_in/r_out, as λmax(F) does, while the mean has r_in·r_out entries less.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mupx.factor_sums import FactorSums
from mupx.linalg import Scalar, eigh
from mupx.losses import Loss
from mupx.optim.base import Groups, Refresh, Scale, finite_or, running_average, split_ridge
from mupx.optim.kronecker import Kronecker
from mupx.preconditioning import Solver, precondition, precondition_bias, undo, undo_bias
from mupx.samples import SampleRows, bias_gradients, squares, turned


class EKFAC(Kronecker):
    """EKFAC for Linear and ungrouped Conv2d layers; everything else goes to AdamW.

    On a refresh step the forward and backward pass must run inside :meth:`curvature`, as for K-FAC.

    Width rule (derived): lr × 1; ρ × r_in/r_out, the order of λmax(F); ``trace`` needs no multiplier. For
    a bias r_in = 1.

    Args:
        params: Parameters or groups; plain parameters are sorted into EKFAC and fallback by layer.
        model: The module they belong to.
        lr: Learning rate.
        damping: ρ, the one ridge added to S.
        damping_rule: ``trace`` or ``absolute``.
        fisher: ``empirical``, ``mc`` (one sampled label) or ``exact`` (all classes).
        loss: ``cross_entropy``, ``squared_error`` or a :class:`mupx.losses.Loss`.
        refresh: Longest interval between updates of the bases and of S, in steps, or a function
            step -> interval.
        staleness: Largest age of both as a fraction of the steps done; what decides early on.
        ema: Decay per step of the running averages (0: the current batch only).
        momentum: Heavy-ball momentum on the preconditioned update.
        graft: Whose update's norm this one takes: ``none``, ``sgd``, ``adam`` or ``rms``; before momentum
            (see :mod:`mupx.update_norm`).
        normalise: ``spectral`` divides the update by its largest singular value; or ``none``.
        fallback_lr: AdamW's learning rate for what EKFAC cannot factor.
        betas: AdamW's betas for the same.
        eps: AdamW's eps for the same.
        weight_decay: λ under ``weight_decay_mode``.
        weight_decay_mode: ``independent``, ``adamw`` or ``l2``.
        generator: Source of the Monte-Carlo labels.
    """

    algorithm = "ekfac"
    solver_keys = re.compile(r"vectors_[AB]|S|s|usable")
    statistics_keys = re.compile(r"[AB]")

    def __init__(
        self,
        params: Groups,
        model: nn.Module,
        lr: Scalar = 0.1,
        *,
        damping: float = 0.01,
        damping_rule: str = "trace",
        fisher: str = "empirical",
        loss: str | Loss = "cross_entropy",
        refresh: Refresh = 10,
        staleness: float = 0.05,
        ema: float = 0.95,
        momentum: float = 0.0,
        graft: str = "none",
        normalise: str = "none",
        fallback_lr: Scalar = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        weight_decay_mode: str = "independent",
        generator: torch.Generator | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "damping_B": split_ridge(damping, 1.0)[1],
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
            solver="dense",  # the eigenbases are needed whole
            fisher=fisher,
            loss=loss,
            refresh=refresh,
            staleness=staleness,
            ema=ema,
            generator=generator,
            fallback_lr=fallback_lr,
        )

    def solver_size(self, parameter: Tensor) -> int:
        """Return the entries of the eigenbases and of S."""
        return super().solver_size(parameter) + parameter.numel()

    def _collector(self, weight: Tensor, due: bool) -> FactorSums:
        return SampleRows()

    def before_step(self) -> None:
        """On a refresh step, turn what was captured into bases and moments."""
        super().before_step()
        self._rows = {}  # as large as the activations

    def refresh_layer(self, weight: Tensor, sums: FactorSums, groups: Mapping[int, dict[str, Any]]) -> None:
        """Average A, B and S in; a factor that is zero or not finite leaves bases and S as they were."""
        state = self.state[weight]
        seen, step = state.get("refreshes", 0), state.get("step", 0)
        gap = step - state.get("refreshed_at", step)
        A, B = (self._average(state, sums, True, seen, gap, side) for side in "AB")
        assert isinstance(A, Tensor)
        assert isinstance(B, Tensor)
        (_, Q_A, ok_A), (_, Q_B, ok_B) = eigh(A), eigh(B)
        ok = ok_A & ok_B
        state["refreshes"], state["refreshed_at"] = seen + 1, step
        state["usable"] = ok.to(weight.dtype)
        state["skipped"] = state.get("skipped", 0) + int(not bool(ok))
        if bool(ok):
            assert isinstance(sums, SampleRows)
            for key, new in self._moments(sums, Q_A, Q_B).items():
                old = self._turned(state, key, Q_A, Q_B)
                state[key] = finite_or(running_average(old, new, self.ema, seen, gap), old)
            state["vectors_A"], state["vectors_B"] = Q_A, Q_B

    @staticmethod
    def _moments(sums: SampleRows, Q_A: Tensor, Q_B: Tensor) -> dict[str, Tensor]:
        h, delta = sums.rows()
        signals = delta @ Q_B
        totals = {"S": squares(h @ Q_A, signals), "s": bias_gradients(signals).square().sum((0, 1))}
        return {key: total / sums.output_count for key, total in totals.items()}

    @staticmethod
    def _turned(state: Mapping[str, Any], key: str, Q_A: Tensor, Q_B: Tensor) -> Tensor | None:
        """Return an average so far in the new basis."""
        if key not in state:
            return None
        P = state["vectors_B"].mT @ Q_B
        if key == "s":
            return turned(state[key].unsqueeze(-1), P, torch.ones_like(P[:1, :1])).squeeze(-1)
        return turned(state[key], P, state["vectors_A"].mT @ Q_A)

    def _ridge(self, moments: Tensor, damping: Scalar) -> Tensor:
        unit = moments.sum()
        return damping * unit if self.damping_rule == "trace" else damping + torch.zeros_like(unit)

    def _gain(self, weight: Tensor, key: str, group: dict[str, Any]) -> Tensor:
        """Return 1/(S + ρ), or zero where there is no curvature to divide by."""
        state = self.state[weight]
        damped = state[key] + self._ridge(state[key], group["damping_B"])
        return torch.where((state["usable"] > 0) & (damped > 0), 1 / damped, 0.0)

    def _solver(self, weight: Tensor, key: str, group: dict[str, Any]) -> Solver:
        """Return the bases and the gain between them for ``S`` or ``s``."""
        state = self.state[weight]
        bases = {name: state[name] for name in ("vectors_A", "vectors_B")}
        return {**bases, "inner" if key == "S" else "inner_bias": self._gain(weight, key, group)}

    def precondition_weight(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Return Q_B [(Q_Bᵀ G Q_A) / (S + ρ)] Q_Aᵀ."""
        if "S" not in self.state[weight]:
            return torch.zeros_like(gradient)
        return precondition(gradient, self._solver(weight, "S", group))

    def precondition_bias(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Return Q_B [(Q_Bᵀ g) / (s + ρ)]."""
        if "s" not in self.state[weight]:
            return torch.zeros_like(gradient)
        return precondition_bias(gradient, self._solver(weight, "s", group))

    def scales(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Scale]:
        """Return the largest second moment, its ridge and their sum, as ``F``."""
        moments = self._own_moments(parameter, group)
        if moments is None:
            return super().scales(parameter, group)
        ridge = self._ridge(moments, group["damping_B"])
        return {"F": Scale(moments.max().item(), ridge.item(), moments.sum().item())}

    def least(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, float]:
        """Return the smallest second moment."""
        moments = self._own_moments(parameter, group)
        return {} if moments is None else {"F": moments.min().item()}

    def precondition(
        self, parameter: Tensor, vector: Tensor, group: dict[str, Any], *, inverse: bool = False
    ) -> Tensor | None:
        """Return P v or P⁻¹ v in the last eigenbases; a bias's P is its layer's B side with s."""
        if group["algorithm"] != self.algorithm:
            return super().precondition(parameter, vector, group, inverse=inverse)
        if self._own_moments(parameter, group) is None:
            return None
        weight = self._owned(parameter)
        if weight is not parameter:
            solver = self._solver(weight, "s", group)
            return undo_bias(vector, solver) if inverse else precondition_bias(vector, solver)
        solver, flat = self._solver(weight, "S", group), vector.flatten(1)
        return (undo(flat, solver) if inverse else precondition(flat, solver)).view_as(vector)

    def _own_moments(self, parameter: Tensor, group: dict[str, Any]) -> Tensor | None:
        """Return a weight's S or a bias's s, once there is one."""
        weight = self._owned(parameter)
        state = self.state.get(weight, {}) if group["algorithm"] == self.algorithm else {}
        return state.get("S" if weight is parameter else "s")
