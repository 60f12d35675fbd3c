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

from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mupx.curvature import EagerCapture, FactorRows, FactorSums, Layer, factorable_layers
from mupx.errors import UsageError
from mupx.linalg import Scalar
from mupx.losses import LOSSES, Loss
from mupx.lowrank import (
    CHOLESKY,
    SMALLEST,
    SOLVERS,
    Columns,
    averaged,
    factor_in,
    pays,
)
from mupx.optim.base import (
    DEFAULTS,
    Base,
    Groups,
    Scale,
    average_weight,
    finite_or,
    refresh_interval,
    require_choice,
    require_damping_rule,
    require_refresh,
    require_whole,
    running_average,
    sort_groups,
    split_ridge,
)
from mupx.preconditioning import (
    Factor,
    build_solver,
    clear_side,
    precondition,
    precondition_bias,
    prefers_cholesky,
    ridges,
    side_of,
    size_of,
    thin_pays,
    thin_update,
    trace_of,
)


class KFAC(Base):
    """K-FAC for Linear and ungrouped Conv2d layers; everything else goes to AdamW.

    On a refresh step the forward and backward pass must run inside :meth:`curvature`::

        with optimizer.curvature(targets):
            outputs = model(inputs)
            optimizer.update_curvature(outputs)  # Monte-Carlo and exact Fisher only
            loss(outputs, targets).backward()
        optimizer.step()

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
        refresh: Longest interval between updates of the factors and their inverses, in steps.
        staleness: Largest age of the curvature as a fraction of the steps done; what decides early on.
        ema: Decay per step of the running average of A and B (0: the current batch only).
        solver: ``dense`` factors, ``low-rank`` ones (columns, see :mod:`mupx.lowrank`), or ``auto``: per
            layer and side whichever costs less.
        momentum: Heavy-ball momentum on the preconditioned update.
        fallback_lr: AdamW's learning rate for what K-FAC cannot factor.
        betas: AdamW's betas for the same.
        eps: AdamW's eps for the same.
        weight_decay: λ under ``weight_decay_mode``.
        weight_decay_mode: ``independent``, ``adamw`` or ``l2``.
        generator: Source of the Monte-Carlo labels.

    Several processes (DistributedDataParallel, FSDP) are refused: A and B are those of one process's
    samples.
    """

    algorithm = "kfac"
    kept = (
        "damping_rule",
        "fisher",
        "loss",
        "solver",
        "refresh",
        "staleness",
        "ema",
        "generator",
        "_model",
    )

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
        refresh: int = 10,
        staleness: float = 0.05,
        ema: float = 0.95,
        solver: str = "auto",
        momentum: float = 0.0,
        fallback_lr: Scalar = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        weight_decay_mode: str = "independent",
        generator: torch.Generator | None = None,
    ) -> None:
        self.damping_rule = require_damping_rule("kfac", damping_rule)
        self.fisher = require_choice("fisher", fisher, ("empirical", "mc", "exact"))
        self.loss: Loss = LOSSES[require_choice("loss", loss, LOSSES)] if isinstance(loss, str) else loss
        self.solver = require_choice("solver", solver, SOLVERS)
        require_refresh(refresh, staleness, ema)
        self.refresh, self.staleness = refresh, staleness
        self.ema, self.generator = ema, generator
        split = damping_rule in ("absolute", "trace")
        ridge_A, ridge_B = split_ridge(damping, damping_ratio if split else 1.0)
        self._model = model
        self._read_model()
        defaults = {
            **DEFAULTS,
            "lr": lr,
            "damping_A": ridge_A,
            "damping_B": ridge_B,
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "weight_decay_mode": weight_decay_mode,
        }
        super().__init__(sort_groups(params, fallback_lr, self._can_factor), defaults)

    def _read_model(self) -> None:
        self._names = {id(p): name for name, p in self._model.named_parameters()}
        self._layers = _layers_by_weight(self._model)
        self._bias_owner = {id(m.bias): m for m in self._layers.values() if m.bias is not None}
        self._sums: dict[str, FactorSums] = {}
        self._rows: dict[str, FactorSums] = {}
        self._capture: EagerCapture | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state; a copy finds its own model's layers."""
        super().__setstate__(state)
        if "_model" in state:
            self._read_model()

    @property
    def skipped(self) -> Counter[str]:
        """Layer name → refreshes at which a factor was zero or not finite (its update is zero)."""
        weights = [layer.weight for layer in self._layers.values()]
        counts = {self._name(weight): self.state.get(weight, {}).get("skipped") for weight in weights}
        return Counter({name: count for name, count in counts.items() if count is not None})

    @property
    def fallback(self) -> list[str]:
        """Names of the parameters that AdamW updates, in order."""
        groups = [g for g in self.param_groups if g["algorithm"] != self.algorithm]
        return [self._names.get(id(p), "?") for g in groups for p in g["params"]]

    def _can_factor(self, parameter: Tensor) -> bool:
        owner = self._bias_owner.get(id(parameter))
        # Without a gradient for its weight a layer's curvature is not kept: such a bias goes to AdamW.
        return id(parameter) in self._layers or (owner is not None and owner.weight.requires_grad)

    def _name(self, weight: Tensor) -> str:
        return self._names[id(weight)].removesuffix(".weight")

    @property
    def refresh_due(self) -> bool:
        """Whether the coming step updates the factors and so needs :meth:`curvature`."""
        return bool(self._due())

    def _weights(self) -> list[Tensor]:
        mine = (p for g in self.param_groups if g["algorithm"] == "kfac" for p in g["params"])
        return [p for p in mine if id(p) in self._layers and p.requires_grad]

    def _due(self) -> list[Tensor]:
        return [p for p in self._weights() if self._stale(self.state.get(p, {}))]

    def _watched(self) -> list[Tensor]:
        """Return the weights whose layers are captured in the coming passes."""
        return [
            p
            for p in self._weights()
            if self._stale(self.state.get(p, {})) or (self._thin and min(p.flatten(1).shape) >= SMALLEST)
        ]

    @property
    def _columns(self) -> bool:
        # Exact damping needs both eigenbases, whole.
        return self.solver != "dense" and self.damping_rule != "exact"

    @property
    def _thin(self) -> bool:
        # δ of a sampled or exact Fisher is not the gradient's.
        return self._columns and self.fisher == "empirical"

    def _collector(self, weight: Tensor, due: bool) -> FactorSums:
        return FactorRows(limit=max(weight.flatten(1).shape), summed=due) if self._columns else FactorSums()

    def _stale(self, state: Mapping[str, Any]) -> bool:
        step = state.get("step", 0)
        if "refreshed_at" not in state:
            return True
        age: int = step - state["refreshed_at"]
        return age >= refresh_interval(step, self.refresh, self.staleness)

    @contextmanager
    def curvature(self, targets: Tensor | None = None, *, loss_scale: float = 1.0) -> Generator[None]:
        """Capture A and B from the passes inside when a refresh is due, and thin gradients where they pay.

        Args:
            targets: Targets of the batch, for the loss's normaliser and ignored terms; None means that
                the loss is a plain mean over the batch dimension.
            loss_scale: Factor on the back-propagated loss: 1/k when accumulating k micro-batches, the
                scale of a GradScaler.
        """
        watched = self._watched()
        layers: dict[str, Layer] = {self._name(w): self._layers[id(w)] for w in watched}
        if not layers:
            yield
            return
        due = {id(weight) for weight in self._due()}
        for weight in watched:
            self._sums.setdefault(self._name(weight), self._collector(weight, id(weight) in due))
        empirical = self.fisher == "empirical"
        try:
            with EagerCapture(layers, self._sums, self.loss, targets, loss_scale, empirical) as self._capture:
                yield
        except BaseException:
            self._sums = {}  # what a broken pass left must not enter the next factors
            raise
        finally:
            self._capture = None

    def update_curvature(self, outputs: Tensor, labels: Tensor | None = None) -> None:
        """Back-propagate the Monte-Carlo or exact Fisher; call between forward and backward.

        Args:
            outputs: Model outputs ``[N, …, C]``, attached to the graph.
            labels: Labels to use instead of sampling them (Monte-Carlo only).
        """
        if self._capture is not None and self.fisher != "empirical":
            self._capture.add_fisher(outputs, self.fisher == "exact", self.generator, labels)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients and what was captured with them, as after a step that a GradScaler skipped."""
        super().zero_grad(set_to_none)
        self._sums = {}

    def before_step(self) -> None:
        """On a refresh step, average the new factors in and rebuild the solvers."""
        require_whole(self.algorithm, self._weights())
        self._rows, self._sums = self._sums, {}
        # Looked up anew: load_state_dict replaces the groups.
        groups = {id(p): g for g in self.param_groups for p in g["params"]}
        for weight in self._due():
            if weight.grad is not None:
                self._refresh_layer(weight, self._rows.get(self._name(weight), FactorSums()), groups)

    def _refresh_layer(self, weight: Tensor, sums: FactorSums, groups: Mapping[int, dict[str, Any]]) -> None:
        state, group = self.state[weight], groups[id(weight)]
        step = state.get("step", 0)
        # Outside its columns a factor is its ridge alone: without one it has no inverse there.
        damped = all(group[key] > 0 for key in ("damping_A", "damping_B"))
        A, B = (self._average(state, sums, key, damped) for key in "AB")
        state["refreshes"], state["refreshed_at"] = state.get("refreshes", 0) + 1, step
        bias = self._layers[id(weight)].bias
        bias_group = None if bias is None else groups.get(id(bias))
        bias_ridge = None if bias_group is None else bias_group["damping_B"]
        solved = self._solved(weight, sums, step)
        for side, factor in (("A", A), ("B", B)):
            clear_side(state, side, keep_columns=isinstance(factor, Columns))
        ridge_A, ridge_B = group["damping_A"], group["damping_B"]
        solver, ok = build_solver(A, B, ridge_A, ridge_B, bias_ridge, self.damping_rule, solved)
        state.update(solver, skipped=state.get("skipped", 0) + int(not bool(ok)))

    def _solved(self, weight: Tensor, sums: FactorSums, step: int) -> set[str]:
        """Return the sides that are cheaper to solve with than to invert until the next refresh."""
        if self.solver == "dense":
            return set()
        d_out, d_in = weight.flatten(1).shape
        kept = sum(map(len, sums.h)) if isinstance(sums, FactorRows) else 0
        rows = kept if kept and self._thin and min(d_out, d_in) >= SMALLEST else max(d_out, d_in)
        interval = refresh_interval(step, self.refresh, self.staleness)
        sizes = {"A": (d_in, min(d_out, rows)), "B": (d_out, min(d_in, rows))}
        return {side for side, (d, vectors) in sizes.items() if prefers_cholesky(d, vectors, interval)}

    def _average(self, state: dict[str, Any], sums: FactorSums, side: str, damped: bool) -> Factor:
        """Average one side's new factor in; columns stay columns until they no longer pay."""
        seen, step = state.get("refreshes", 0), state.get("step", 0)
        gap = step - state.get("refreshed_at", step)
        old = factor_in(state, side)
        new = sums.columns(side) if damped and isinstance(sums, FactorRows) else None
        if new is not None and side not in state and self._keeps_columns(new, old):
            weight = average_weight(self.ema, seen, gap) if old is not None else 1.0
            return averaged(old, new, 1.0 - weight, weight)
        dense = state.get(side) if old is None else old.columns @ old.columns.mT
        factor = running_average(dense, sums.factor(side), self.ema, seen, gap)
        state[side] = finite_or(factor, dense)
        return factor

    def _keeps_columns(self, new: Tensor, old: Columns | None) -> bool:
        d, n = new.shape
        return self.solver == "low-rank" or pays(d, n, 0 if old is None else old.columns.shape[-1], CHOLESKY)

    def direction(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the momentum of the preconditioned gradient."""
        state = self.state[parameter]
        state["step"] = state.get("step", 0) + 1
        if id(parameter) in self._layers:
            flat = self._preconditioned(parameter, gradient.flatten(1))
            return self.momentum(parameter, flat.view_as(gradient), group)
        weight = self._bias_owner[id(parameter)].weight
        if weight.grad is None:
            raise UsageError(
                f"{self._names[id(parameter)]} trains but {self._names[id(weight)]} does not: a bias uses "
                "the factor B that is kept with its layer's weight; freeze both, or build the optimizer "
                "after freezing, from named_parameters(), which gives such a bias to AdamW"
            )
        return self.momentum(parameter, precondition_bias(gradient, self.state[weight]), group)

    def _preconditioned(self, weight: Tensor, gradient: Tensor) -> Tensor:
        state, rows = self.state[weight], self._rows.pop(self._name(weight), None)
        if self._thin and isinstance(rows, FactorRows):
            left, right = side_of(state, "B"), side_of(state, "A")
            d_out, d_in = gradient.shape
            if thin_pays(left, right, (d_out, d_in), sum(map(len, rows.h))):
                thin = rows.gradient(gradient)
                if thin is not None:
                    return thin_update(left, *thin, right)
        return precondition(gradient, state)

    def scales(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Scale]:
        """Return λmax of A and B with their ridges; a bias has B alone.

        Exact damping adds its one ridge to ``AB``, the eigenvalues of A⊗B.
        """
        weight = self._bias_owner[id(parameter)].weight if id(parameter) in self._bias_owner else parameter
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


def _layers_by_weight(model: nn.Module) -> dict[int, Layer]:
    return {id(layer.weight): layer for layer in factorable_layers(model).values()}
