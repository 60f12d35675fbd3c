"""K-FAC: precondition each layer's gradient by its Kronecker factors.

Update: U = (B + ρ_B I)⁻¹ G (A + ρ_A I)⁻¹ for weights ``[d_out, d_in]`` and (B + ρ_B I)⁻¹ g for biases
(Martens & Grosse 2015, arXiv:1503.05671; convolutions: arXiv:1602.01407). Biases are preconditioned
by B alone: folding them into h as a homogeneous coordinate makes their updates vanish with width.

Damping rules, with ρ_A and ρ_B the group's ``damping_A`` and ``damping_B``:

* ``absolute``: the ridges are ρ_A and ρ_B (arXiv:2312.12226, Prop. 4.1);
* ``trace``: ρ_A·tr(A) and ρ_B·tr(B), dimensionless (arXiv:2312.12226, §4.2);
* ``pi``: π√ρ and √ρ/π, π² = (tr A/d_in)/(tr B/d_out) — not width-invariant, for comparison;
* ``exact``: (A⊗B + ρ I)⁻¹ through both eigendecompositions, ρ = ``damping_B``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from mupx import sketch
from mupx.factor_sums import FactorRows
from mupx.linalg import Scalar
from mupx.losses import Loss
from mupx.lowrank import CHOLESKY, LowRank, Thin, factor_in, pays, stands_alone
from mupx.optim.base import Groups, Refresh, Scale, Update, split_ridge
from mupx.optim.kronecker import Kronecker
from mupx.preconditioning import (
    Factor,
    Forecast,
    Solver,
    build_solver,
    least_of,
    own_update,
    precondition,
    precondition_bias,
    ridges,
    side_of,
    size_of,
    thin_pays,
    thin_update,
    trace_of,
    undo,
    undo_bias,
)


class KFAC(Kronecker):
    """K-FAC for Linear and ungrouped Conv2d layers; everything else goes to AdamW.

    On a refresh step the forward and backward pass must run inside :meth:`curvature`::

        with optimizer.curvature(targets):
            outputs = model(inputs)
            optimizer.update_curvature(outputs)  # Monte-Carlo and exact Fisher only
            loss(outputs, targets).backward()
        optimizer.step()

    With ``curvature(targets, gradients=False)`` the backward pass leaves out the gradients of weights whose
    update is made without them; see :meth:`curvature`.

    Width rule (arXiv:2312.12226): lr × 1, ρ_A × r_in, ρ_B × 1/r_out; ``trace`` needs no multiplier.

    Args:
        params: Parameters or groups; plain parameters are sorted into K-FAC and fallback by layer.
        model: The module they belong to.
        lr: Learning rate.
        damping: ρ, split as ρ_A = ρ·√ratio, ρ_B = ρ/√ratio where a group does not set its own.
        damping_ratio: ρ_A/ρ_B; π and exact damping have a single ρ and ignore it.
        damping_rule: ``trace``, ``absolute``, ``pi`` or ``exact``.
        fisher: ``empirical``, ``mc`` (one sampled label) or ``exact`` (all classes).
        loss: ``cross_entropy``, ``squared_error`` or a :class:`mupx.losses.Loss`.
        refresh: Longest interval between updates of the factors and their inverses, in steps, or a
            function step -> interval, such as a schedule of :mod:`mupx.refresh`.
        staleness: Largest age of the curvature as a fraction of the steps done; what decides early on
            where ``refresh`` is a number.
        statistics: Interval between updates of the factors alone, in steps; None: only where their
            inverses are updated too. Such factors are kept dense.
        ema: Decay per step of the running average of A and B (0: the current batch only).
        solver: ``dense`` factors, ``low-rank`` ones (columns, see :mod:`mupx.lowrank`), a ``sketch`` of
            wide ones (:mod:`mupx.sketch`), or ``auto``: per layer and side whichever costs less.
        momentum: Heavy-ball momentum on the preconditioned update.
        graft: Whose update's norm this one takes: ``none``, ``sgd``, ``adam`` or ``rms``; before momentum
            (see :mod:`mupx.update_norm`).
        normalise: ``spectral`` divides the update by its largest singular value; or ``none``.
        fallback_lr: AdamW's learning rate for what K-FAC cannot factor.
        betas: AdamW's betas for the same.
        eps: AdamW's eps for the same.
        weight_decay: λ under ``weight_decay_mode``.
        weight_decay_mode: ``independent``, ``adamw`` or ``l2``.
        generator: Source of the Monte-Carlo labels.

    Under DistributedDataParallel and FSDP A and B are those of all ranks' samples: every rank must refresh
    at the same steps, with its part of the batch inside :meth:`curvature`. Where ranks hold unequal parts,
    the weight that makes the ranks' mean loss the batch's belongs into ``loss_scale``.
    """

    algorithm = "kfac"

    def __init__(
        self,
        params: Groups,
        model: nn.Module,
        lr: Scalar = 0.1,
        *,
        damping: float = 0.01,
        damping_ratio: float = 1.0,
        damping_rule: str = "trace",
        fisher: str = "empirical",
        loss: str | Loss = "cross_entropy",
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
        generator: torch.Generator | None = None,
    ) -> None:
        split = damping_rule in ("absolute", "trace")
        ridge_A, ridge_B = split_ridge(damping, damping_ratio if split else 1.0)
        defaults = {
            "lr": lr,
            "damping_A": ridge_A,
            "damping_B": ridge_B,
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
            fisher=fisher,
            loss=loss,
            refresh=refresh,
            staleness=staleness,
            statistics=statistics,
            ema=ema,
            generator=generator,
            fallback_lr=fallback_lr,
        )

    @property
    def _columns(self) -> bool:
        # Exact damping needs both eigenbases, whole.
        return super()._columns and self.damping_rule != "exact"

    def build_solver(
        self,
        factors: Mapping[str, Factor],
        weight: Tensor,
        groups: Mapping[int, dict[str, Any]],
        solved: set[str],
    ) -> tuple[Solver, Tensor]:
        """Return both damped inverses, or both eigenbases, and whether both factors are usable."""
        group, bias = groups[id(weight)], self._layers[id(weight)].bias
        bias_group = None if bias is None else groups.get(id(bias))
        bias_ridge = None if bias_group is None else bias_group["damping_B"]
        ridge_A, ridge_B = group["damping_A"], group["damping_B"]
        A, B = factors["A"], factors["B"]
        return build_solver(A, B, ridge_A, ridge_B, bias_ridge, self.damping_rule, solved)

    def precondition_weight(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> Update:
        """Return (B + ρ_B)⁻¹ G (A + ρ_A)⁻¹, by thin products where they pay."""
        state, rows = self.state[weight], self._rows.pop(self._name(weight), None)
        if self._thin and isinstance(rows, FactorRows):
            own = rows.alone == {"A", "B"}
            if own or self._thin_pays(weight, sum(map(len, rows.h)), made=True):
                thin = rows.gradient(gradient)
                if thin is not None:
                    return _thin_update(state, thin, own)
        return precondition(gradient, state)

    def precondition_thin(self, weight: Tensor, gradient: Thin, group: dict[str, Any]) -> Update:
        """Return the same of a gradient that was left out, multiplied out if thin products ceased to pay."""
        state, rows = self.state[weight], self._rows.pop(self._name(weight), None)
        own = isinstance(rows, FactorRows) and rows.alone == {"A", "B"}
        if own and self._left[id(weight)].is_captured(rows):
            return _thin_update(state, gradient, True)
        if self._thin_pays(weight, gradient.rows, made=False):
            return _thin_update(state, gradient, False)
        return precondition(gradient.product, state)

    def leaves_out(self, weight: Tensor, rows: int) -> bool:
        """Whether the update is made of thin products; before there is a solver, whether it will be."""
        if not self._thin or self.communicator.size > 1:
            return False
        if "refreshed_at" in self.state.get(weight, {}):
            return self._thin_pays(weight, rows, made=False)
        d_out, d_in = weight.shape
        left, right = (Forecast.of(d, self._first_columns(d, rows)) for d in (d_out, d_in))
        return thin_pays(left, right, (d_out, d_in), rows, made=False)

    def _first_columns(self, d: int, n: int) -> int | None:
        """Return how many columns a factor is kept as after the first n rows; None where it is dense."""
        if self.statistics is not None:
            return None
        if sketch.pays(d, n, 0, self.solver, self.ema):
            return sketch.RANK
        kept = self.solver == "low-rank" or pays(d, n, 0, CHOLESKY)
        return n if kept or stands_alone(d, n, self.solver, self.ema, self.refresh == 1) else None

    def _thin_pays(self, weight: Tensor, rows: int, made: bool) -> bool:
        state, (d_out, d_in) = self.state[weight], weight.flatten(1).shape
        return thin_pays(side_of(state, "B"), side_of(state, "A"), (d_out, d_in), rows, made)

    def precondition_bias(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Return (B + ρ_B)⁻¹ g."""
        return precondition_bias(gradient, self.state[weight])

    def scales(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Scale]:
        """Return λmax of A and B with their ridges; a bias has B alone.

        Exact damping adds its one ridge to ``AB``, the eigenvalues of A⊗B.
        """
        weight = self._owned(parameter)
        state = self.state.get(weight, {})
        A, B = (factor_in(state, side) or state.get(side) for side in "AB")
        if group["algorithm"] != self.algorithm or A is None or B is None:
            return super().scales(parameter, group)
        sizes = {"A": size_of(A).item(), "B": size_of(B).item()}
        traces = {"A": trace_of(A).item(), "B": trace_of(B).item()}
        if self.damping_rule == "exact":
            ridge = float(group["damping_B"])
            if weight is not parameter:
                return {"B": Scale(sizes["B"], ridge, traces["B"])}
            product = {"AB": Scale(sizes["A"] * sizes["B"], ridge, traces["A"] * traces["B"])}
            return {**{key: Scale(size, None, traces[key]) for key, size in sizes.items()}, **product}
        # A bias is preconditioned by its layer's solver, whose ridges are those of the weight's group.
        own = next(g for g in self.param_groups if any(p is weight for p in g["params"]))
        rho_A, rho_B = ridges(A, B, own["damping_A"], own["damping_B"], self.damping_rule)
        pairs = {
            "A": Scale(sizes["A"], rho_A.item(), traces["A"]),
            "B": Scale(sizes["B"], rho_B.item(), traces["B"]),
        }
        return pairs if weight is parameter else {"B": pairs["B"]}

    def least(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, float]:
        """Return λmin of A and B, and under exact damping of A⊗B."""
        found = self.scales(parameter, group)
        state = self.state.get(self._owned(parameter), {})
        least = {
            side: least_of(factor_in(state, side) or state[side]).item() for side in "AB" if side in found
        }
        return least | ({"AB": least["A"] * least["B"]} if "AB" in found else {})

    def precondition(
        self, parameter: Tensor, vector: Tensor, group: dict[str, Any], *, inverse: bool = False
    ) -> Tensor | None:
        """Return P v or P⁻¹ v with the last solver; a bias's P is its layer's B side."""
        if group["algorithm"] != self.algorithm:
            return super().precondition(parameter, vector, group, inverse=inverse)
        weight = self._owned(parameter)
        state = self.state.get(weight, {})
        if "refreshed_at" not in state:
            return None
        if weight is not parameter:
            return undo_bias(vector, state) if inverse else precondition_bias(vector, state)
        flat = vector.flatten(1)
        return (undo(flat, state) if inverse else precondition(flat, state)).view_as(vector)


def _thin_update(solver: Mapping[str, Tensor], thin: Thin, own: bool) -> Thin:
    """Return the update of a thin gradient; ``own`` where the solver is made of its rows and no others."""
    left, right = side_of(solver, "B"), side_of(solver, "A")
    if own:
        return own_update(cast(LowRank, left), thin, cast(LowRank, right))
    return thin_update(left, thin, right)
