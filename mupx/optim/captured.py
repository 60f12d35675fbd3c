"""What the optimizers share whose curvature is captured from the passes: layers, refreshes, the capture.

A layer's curvature lives in the state of its weight, where its bias finds it. An optimizer supplies
:meth:`Captured.refresh_layer`, which turns what was captured into state, and the two directions
:meth:`Captured.precondition_weight` and :meth:`Captured.precondition_bias`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mupx.curvature import EagerCapture
from mupx.errors import UsageError
from mupx.factor_sums import FactorSums
from mupx.layer_rows import Layer, factorable_layers
from mupx.left_out import leaving_out
from mupx.linalg import Scalar
from mupx.losses import LOSSES, Loss
from mupx.lowrank import Thin
from mupx.optim.base import (
    DEFAULTS,
    Gradient,
    Groups,
    Refresh,
    Update,
    multiplied,
    require_choice,
    require_refresh,
    sort_groups,
)
from mupx.optim.by_rows import ByRows
from mupx.optim.divided import cubes_of, interval_of
from mupx.pooling import pool
from mupx.refresh import needs_refresh, needs_statistics

FISHERS = ("empirical", "mc", "exact")


class Captured(ByRows):
    """An optimizer for Linear and ungrouped Conv2d layers; everything else goes to AdamW.

    Args:
        params: Parameters or groups; plain parameters are sorted into its own and fallback by layer.
        model: The module they belong to.
        defaults: Group defaults beside :data:`mupx.optim.base.DEFAULTS`.
        fisher: ``empirical``, ``mc`` (one sampled label), ``exact`` (all classes), or None where nothing of
            the backward pass is needed.
        loss: ``cross_entropy``, ``squared_error`` or a :class:`mupx.losses.Loss`.
        refresh: Longest interval between updates of the curvature, in steps, or a function step -> interval.
        staleness: Largest age of the curvature as a fraction of the steps done.
        statistics: Interval between updates of the factors alone, in steps; None: at refreshes only.
        ema: Decay per step of the running averages.
        generator: Source of the Monte-Carlo labels.
        fallback_lr: AdamW's learning rate for what has no layer.
    """

    kept: ClassVar[tuple[str, ...]] = (
        "fisher",
        "loss",
        "refresh",
        "staleness",
        "statistics",
        "ema",
        "generator",
        "_model",
    )
    bias_needs_weight: ClassVar[bool] = True  # a bias is preconditioned by what lives with its weight
    sides: ClassVar[str] = "AB"

    def __init__(
        self,
        params: Groups,
        model: nn.Module,
        defaults: dict[str, Any],
        *,
        fisher: str | None,
        loss: str | Loss,
        refresh: Refresh,
        staleness: float,
        ema: float,
        generator: torch.Generator | None,
        fallback_lr: Scalar,
        statistics: int | None = None,
    ) -> None:
        self.fisher = None if fisher is None else require_choice("fisher", fisher, FISHERS)
        self.loss: Loss = LOSSES[require_choice("loss", loss, LOSSES)] if isinstance(loss, str) else loss
        require_refresh(refresh, staleness, ema)
        self.refresh, self.staleness, self.statistics = refresh, staleness, statistics
        self.ema, self.generator = ema, generator
        self._model = model
        self._read_model()
        super().__init__(sort_groups(params, fallback_lr, self._treats), {**DEFAULTS, **defaults})

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

    def _treats(self, parameter: Tensor) -> bool:
        owner = self._bias_owner.get(id(parameter))
        if owner is None or not self.bias_needs_weight:
            return id(parameter) in self._layers or owner is not None
        # Without a gradient for its weight a layer's curvature is not kept: such a bias goes to AdamW.
        return owner.weight.requires_grad

    def _name(self, weight: Tensor) -> str:
        return self._names[id(weight)].removesuffix(".weight")

    def _owned(self, parameter: Tensor) -> Tensor:
        """Return the weight whose factors a parameter uses: its own, or for a bias its layer's."""
        return self._bias_owner[id(parameter)].weight if id(parameter) in self._bias_owner else parameter

    @property
    def refresh_due(self) -> bool:
        """Whether the coming step updates the curvature and so needs :meth:`curvature`."""
        return bool(self._due())

    def _weights(self) -> list[Tensor]:
        mine = (p for g in self.param_groups if g["algorithm"] == self.algorithm for p in g["params"])
        return [p for p in mine if id(p) in self._layers and p.requires_grad]

    def _due(self) -> list[Tensor]:
        return [p for p in self._weights() if self._averages(self.state.get(p, {}))]

    def _watched(self) -> list[Tensor]:
        """Return the weights whose layers are captured in the coming passes."""
        return self._due()

    def _collector(self, weight: Tensor, due: bool) -> FactorSums:
        """Return what collects one layer's rows; ``due`` tells whether its curvature is."""
        return FactorSums()

    def _averages(self, state: Mapping[str, Any]) -> bool:
        return needs_statistics(state, self.refresh, self.staleness, self.statistics)

    @contextmanager
    def curvature(
        self, targets: Tensor | None = None, *, loss_scale: float = 1.0, gradients: bool = True
    ) -> Generator[None]:
        """Capture curvature from the passes inside when a refresh is due, and thin gradients where they pay.

        Args:
            targets: Targets of the batch, for the loss's normaliser and ignored terms; None means that
                the loss is a plain mean over the batch dimension.
            loss_scale: Factor on the back-propagated loss: 1/k when accumulating k micro-batches, the
                scale of a GradScaler.
            gradients: Have every weight's ``grad``. False leaves out of the backward pass what the step does
                without: such a weight's ``grad`` is None, or what the weight gets by another use than its
                layer's. Nothing between the backward pass and the step can then edit all gradients: no
                clipping of their norm, no GradScaler.
        """
        watched = self._watched()
        layers: dict[str, Layer] = {self._name(w): self._layers[id(w)] for w in watched}
        if not layers:
            yield
            return
        due = {self._name(weight) for weight in self._due()}
        left = {} if gradients else self.left_out(layers)
        # Where nothing is due, what is left out comes as rows already.
        captured = {name: layer for name, layer in layers.items() if name in due or name not in left}
        for name, layer in captured.items():
            self._sums.setdefault(name, self._collector(layer.weight, name in due))
        empirical = self.fisher == "empirical"
        capture = EagerCapture(captured, self._sums, self.loss, targets, loss_scale, empirical, left)
        try:
            with leaving_out(left.values()), capture as self._capture:
                yield
        except BaseException:
            self.forget()  # what a broken pass left must not enter the next factors
            raise
        finally:
            self._capture = None

    def update_curvature(self, outputs: Tensor, labels: Tensor | None = None) -> None:
        """Back-propagate the Monte-Carlo or exact Fisher; call between forward and backward.

        Args:
            outputs: Model outputs ``[N, …, C]``, attached to the graph.
            labels: Labels to use instead of sampling them (Monte-Carlo only).
        """
        if self._capture is not None and self.fisher in ("mc", "exact"):
            self._capture.add_fisher(outputs, self.fisher == "exact", self.generator, labels)

    def forget(self) -> None:
        """Drop what the passes captured for a step that will not be done."""
        super().forget()
        self._sums = {}

    def before_step(self) -> None:
        """Turn what was captured, by all ranks, into state, where its step has come."""
        super().before_step()
        self._rows, self._sums = self._sums, {}
        # Looked up anew: load_state_dict replaces the groups.
        groups = {id(p): g for g in self.param_groups for p in g["params"]}
        due = [w for w in self._weights() if self.gradient_of(w) is not None and self._renews(w)]
        self._pool([weight for weight in due if self._averages(self.state.get(weight, {}))])

        def refresh(weight: Tensor) -> None:
            self.refresh_layer(weight, self._rows.get(self._name(weight), FactorSums()), groups)

        self.refresh_all(due, refresh)
        if self.communicator.shares:
            # What the others make their update with is the solver: rows must not make this one's.
            updates = {self._name(weight) for weight in due if self.sends_updates(weight)}
            self._rows = {name: rows for name, rows in self._rows.items() if name in updates}

    def _renews(self, weight: Tensor) -> bool:
        state = self.state.get(weight, {})
        return self._averages(state) or needs_refresh(state, self.refresh, self.staleness)

    def _pool(self, weights: list[Tensor]) -> None:
        ranks = self.communicator
        if ranks.size == 1 or not weights:
            return
        sums = [self._rows.setdefault(self._name(w), self._collector(w, True)) for w in weights]
        pool(ranks, sums, weights, [self.owner(w) for w in weights], [self._keeps_rows(w) for w in weights])

    def _keeps_rows(self, weight: Tensor) -> bool:
        """Whether rows are of use beyond the sums that they add up to."""
        return False

    def unit(self, parameter: Tensor) -> Tensor:
        """Return the weight whose factors a parameter uses."""
        return self._owned(parameter)

    def cost(self, parameter: Tensor) -> float:
        """Return Σ d³ over the factors of a weight."""
        return cubes_of(parameter, self.sides.translate(str.maketrans("AB", "RL")))

    @property
    def interval(self) -> int:
        """Steps between refreshes in the long run."""
        return interval_of(self.refresh)

    def followed(self, parameter: Tensor) -> None:
        """Count a step that the owner does: on it depends when the next refresh is due."""
        if id(parameter) in self._layers:
            state = self.state[parameter]
            state["step"] = state.get("step", 0) + 1

    @abstractmethod
    def refresh_layer(self, weight: Tensor, sums: FactorSums, groups: Mapping[int, dict[str, Any]]) -> None:
        """Update the curvature in the state of ``weight``.

        Args:
            weight: Weight of the layer.
            sums: What the passes of this step captured.
            groups: Parameter id → its group.
        """

    def direction(self, parameter: Tensor, gradient: Gradient, group: dict[str, Any]) -> Update:
        """Return the momentum of the preconditioned gradient."""
        state = self.state[parameter]
        state["step"] = state.get("step", 0) + 1
        if id(parameter) in self._layers:
            if isinstance(gradient, Thin):
                update = self.precondition_thin(parameter, gradient, group)
            else:
                update = self.precondition_weight(parameter, gradient.flatten(1), group)
            shaped = update.view_as(parameter) if isinstance(update, Tensor) else update
            return self.momentum(parameter, shaped, group)
        gradient = multiplied(gradient, parameter)
        weight = self._bias_owner[id(parameter)].weight
        if self.gradient_of(weight) is None and self.bias_needs_weight:
            raise UsageError(
                f"{self._names[id(parameter)]} trains but {self._names[id(weight)]} does not: a bias uses "
                "the factor B that is kept with its layer's weight; freeze both, or build the optimizer "
                "after freezing, from named_parameters(), which gives such a bias to AdamW"
            )
        return self.momentum(parameter, self.precondition_bias(weight, gradient, group), group)

    @abstractmethod
    def precondition_weight(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> Update:
        """Return the update of a weight gradient flattened to ``[d_out, d_in]``."""

    def precondition_thin(self, weight: Tensor, gradient: Thin, group: dict[str, Any]) -> Update:
        """Return the update of a gradient that was left out of the backward pass."""
        return self.precondition_weight(weight, gradient.product, group)

    @abstractmethod
    def precondition_bias(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the update of a bias gradient ``[d_out]``; ``weight`` is its layer's."""


def _layers_by_weight(model: nn.Module) -> dict[int, Layer]:
    # A weight that is computed from others, by torch's parametrizations, is a new tensor at every look.
    layers = (layer for layer in factorable_layers(model).values() if "weight" in layer._parameters)
    return {id(layer.weight): layer for layer in layers}
