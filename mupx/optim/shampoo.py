"""Shampoo: precondition a matrix gradient by inverse roots of its row and column second moments.

Update: U = (L + ridge)^-e G (R + ridge)^-e, L = average of G Gᵀ ``[d_out, d_out]``, R = average of Gᵀ G
``[d_in, d_in]``, e = ¼ (Gupta et al. 2018, arXiv:1802.09568), or ½ on both sides (the optimal Kronecker
approximation squared, arXiv:2406.17748) or on one alone (one-sided Shampoo, arXiv:2503.10537). The ridge
is ρ·λmax of the factor (``relative``) or ρ itself (``absolute``); it is never added into the running
statistics. Convolution weights are flattened to ``[out, in·k·k]``. Large matrices may be cut into blocks,
each with its own factors. What is not a matrix (biases, gains) goes to AdamW.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mupx.blocks import BOTH
from mupx.curvature import EagerCapture
from mupx.errors import UsageError
from mupx.factor_sums import FactorRows
from mupx.layer_rows import Layer, factorable_layers
from mupx.left_out import leaving_out
from mupx.linalg import Scalar, eigh, gram, inverse_root
from mupx.lowrank import (
    EIGH,
    SMALLEST,
    SOLVERS,
    TOLERANCE,
    Columns,
    Thin,
    averaged,
    factor_in,
    forget,
    function_in,
    pays,
    state_of,
    truncated,
)
from mupx.lowrank import inverse_root as low_rank_root
from mupx.optim.base import (
    DEFAULTS,
    Gradient,
    Groups,
    Refresh,
    Scale,
    Update,
    average_weight,
    finite_or,
    multiplied,
    require_choice,
    require_damping_rule,
    require_refresh,
    running_average,
    sort_groups,
    split_ridge,
)
from mupx.optim.blockwise import Blockwise
from mupx.optim.by_rows import ByRows
from mupx.optim.divided import interval_of
from mupx.preconditioning import (
    Forecast,
    Identity,
    Operator,
    least_of,
    size_of,
    thin_pays,
    thin_update,
    times,
    trace_of,
    undo_side,
)
from mupx.refresh import averaged_at, averages, needs_refresh, needs_statistics, require_statistics
from mupx.tiles import Tiles, in_parts

EXPONENT = 0.25


def moments(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return (G Gᵀ, Gᵀ G) of ``[..., d_out, d_in]``."""
    return gram(gradient.mT), gram(gradient)


def thin_moment(gradient: Thin, side: str) -> Tensor:
    """Return columns F ``[d, n]`` of one moment, F Fᵀ, of a gradient G = c Dᵀ H ``[d_out, d_in]``.

    With c in D, that of ``"L"`` is G Gᵀ = Dᵀ (H Hᵀ) D and that of ``"R"`` Gᵀ G = Hᵀ (D Dᵀ) H: only a root of
    ``[n, n]`` is taken.
    """
    D, H = gradient.factor * gradient.D, gradient.H
    return _weighted(D, H) if side == "L" else _weighted(H, D)


def _weighted(rows: Tensor, others: Tensor) -> Tensor:
    values, vectors, ok = eigh(gram(others.mT))
    return rows.mT @ (vectors * torch.where(ok, values, 0.0).sqrt())


def roots(L: Tensor, R: Tensor, damping_L: Scalar, damping_R: Scalar, rule: str) -> tuple[Tensor, Tensor]:
    """Return the damped inverse fourth roots of L and R; zero where a factor is zero or not finite."""
    relative = rule == "relative"
    root_L, _ = inverse_root(L, 1 / EXPONENT, damping_L, relative)
    root_R, _ = inverse_root(R, 1 / EXPONENT, damping_R, relative)
    return root_L, root_R


class Shampoo(ByRows, Blockwise):
    """Shampoo with exponent ¼ on each side; the variants below it differ in exponent or sides alone.

    Width rule (arXiv:2312.12226; 2512.05620): lr × (r_out/r_in)^½ · n_blocks^-½; an absolute ridge ×
    r_in/(r_out · n_blocks); a relative ridge × 1.

    Args:
        params: Parameters or groups; tensors with fewer than two axes go to AdamW.
        lr: Learning rate.
        damping: ρ of the ridge.
        damping_ratio: ρ_R/ρ_L, split as for K-FAC's ρ_A/ρ_B.
        damping_rule: ``relative`` (in units of λmax) or ``absolute``.
        refresh: Longest interval between updates of the statistics and their roots, in steps, or a
            function step -> interval, such as a schedule of :mod:`mupx.refresh`.
        staleness: Largest age of the roots as a fraction of the steps done; what decides early on where
            ``refresh`` is a number.
        statistics: Interval between updates of the statistics alone, in steps; None: only where their
            roots are updated too. Such factors are kept dense.
        accumulate: ``average`` (running average with ``ema``) or ``sum``, as in the original.
        ema: Decay of the running average, per step.
        blocks: Longest block edge (see :mod:`mupx.blocks`); 0 means one block.
        model: The module the parameters belong to. With it, and with the forward and backward pass
            inside :meth:`curvature`, gradients of wide layers are kept as the thin products they are.
        solver: ``dense`` factors, ``low-rank`` ones (columns, see :mod:`mupx.lowrank`), or ``auto``: per
            layer and side whichever costs less.
        momentum: Heavy-ball momentum on the preconditioned update.
        graft: Whose update's norm this one takes: ``none``, ``sgd``, ``adam`` or ``rms``; before momentum
            (see :mod:`mupx.update_norm`).
        normalise: ``spectral`` divides the update by its largest singular value; or ``none``.
        fallback_lr: AdamW's learning rate for biases and gains.
        betas: AdamW's betas for the same.
        eps: AdamW's eps for the same.
        weight_decay: λ under ``weight_decay_mode``.
        weight_decay_mode: ``independent``, ``adamw`` or ``l2``.
    """

    algorithm = "shampoo"
    exponent: ClassVar[float] = EXPONENT
    of_blocks = ("L", "R", "root_L", "root_R")
    solver_keys = re.compile(r"(root|columns|gain|rest)_[LR]\d+")
    statistics_keys = re.compile(r"[LR]\d+|(values|dropped|trace)_[LR]\d+")
    kept = (
        "damping_rule",
        "accumulate",
        "solver",
        "refresh",
        "staleness",
        "statistics",
        "ema",
        "blocks",
        "_model",
    )

    def __init__(
        self,
        params: Groups,
        lr: Scalar = 0.05,
        *,
        damping: float = 1e-3,
        damping_ratio: float = 1.0,
        damping_rule: str = "relative",
        refresh: Refresh = 10,
        staleness: float = 0.05,
        statistics: int | None = None,
        accumulate: str = "average",
        ema: float = 0.95,
        blocks: int = 0,
        model: nn.Module | None = None,
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
        self.damping_rule = require_damping_rule(self.algorithm, damping_rule)
        self.accumulate = require_choice("accumulate", accumulate, ("average", "sum"))
        require_refresh(refresh, staleness, ema)
        if blocks < 0:
            raise UsageError(f"blocks must be ≥ 0 (0: one block), got {blocks}")
        self.solver = require_choice("solver", solver, SOLVERS)
        require_statistics(statistics, solver)
        self.refresh, self.staleness, self.statistics = refresh, staleness, statistics
        self._model = model
        self._read_model()
        self.ema, self.blocks = ema, blocks
        ridge_R, ridge_L = split_ridge(damping, damping_ratio)
        defaults = {
            **DEFAULTS,
            "lr": lr,
            "damping_A": ridge_R,
            "damping_B": ridge_L,
            "momentum": momentum,
            "graft": graft,
            "normalise": normalise,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "weight_decay_mode": weight_decay_mode,
        }
        super().__init__(sort_groups(params, fallback_lr, lambda p: p.dim() >= 2), defaults)

    def _read_model(self) -> None:
        self._layers = {} if self._model is None else factorable_layers(self._model)
        self._names = {id(layer.weight): name for name, layer in self._layers.items()}
        self._captured: dict[str, FactorRows] = {}
        self._rows: dict[str, FactorRows] = {}
        self._thin: dict[int, Thin | None] = {}  # by parameter, of this step

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state; a copy finds its own model's layers."""
        super().__setstate__(state)
        if "_model" in state:
            self._read_model()

    @contextmanager
    def curvature(
        self, targets: Tensor | None = None, *, loss_scale: float = 1.0, gradients: bool = True
    ) -> Generator[None]:
        """Capture thin gradients from the passes inside, where they pay; nothing depends on it but cost.

        Args:
            targets: Not needed: Shampoo knows no loss.
            loss_scale: Not needed: a factor on the gradient is found by comparison.
            gradients: Have every weight's ``grad``; see :meth:`mupx.optim.captured.Captured.curvature`.
        """
        layers = self._watched()
        if not layers:
            yield
            return
        for name, layer in layers.items():
            limit = max(layer.weight.flatten(1).shape)
            self._captured.setdefault(name, FactorRows(limit=limit, summed=False))
        try:
            left = {} if gradients else self.left_out(layers)
            # Signals as they are: those of unequal micro-batches add up to the gradient only so.
            with leaving_out(left.values()), EagerCapture(layers, self._captured, left=left, terms=1):
                yield
        except BaseException:
            self.forget()  # what a broken pass left must not be taken for a gradient
            raise

    def _watched(self) -> dict[str, Layer]:
        if self.solver == "dense" or self.communicator.size > 1:
            return {}  # one process has rows for its own samples, but the gradient is of all
        mine = {id(p) for g in self.param_groups if g["algorithm"] == self.algorithm for p in g["params"]}
        return {
            name: layer
            for name, layer in self._layers.items()
            if id(layer.weight) in mine
            and layer.weight.requires_grad
            and (self.solver == "low-rank" or max(layer.weight.flatten(1).shape) >= SMALLEST)
        }

    def forget(self) -> None:
        """Drop what the passes captured for a step that will not be done."""
        super().forget()
        self._captured = {}

    def leaves_out(self, weight: Tensor, rows: int) -> bool:
        """Whether the update is made of thin products; before there are roots, whether it will be."""
        if not self._is_one_block(weight):
            return False
        state, (d_out, d_in) = self.state.get(weight, {}), weight.shape
        if "refreshed_at" in state:
            return thin_pays(_root_in(state, "L0"), _root_in(state, "R0"), (d_out, d_in), rows, made=False)
        left, right = self._forecast("L", d_out, rows), self._forecast("R", d_in, rows)
        return thin_pays(left, right, (d_out, d_in), rows, made=False)

    def _forecast(self, side: str, d: int, n: int) -> Identity | Forecast:
        if side not in self.sides:
            return Identity()
        kept = self.statistics is None and (self.solver == "low-rank" or pays(d, n, 0, EIGH))
        return Forecast.of(d, n if kept else None)

    def _is_one_block(self, parameter: Tensor) -> bool:
        return not self.blocks or max(parameter.flatten(1).shape) <= self.blocks

    def before_step(self) -> None:
        """Update statistics and roots where their step has come."""
        super().before_step()
        self._rows, self._captured = self._captured, {}
        due = {
            parameter: group
            for group in self.param_groups
            if group["algorithm"] == self.algorithm
            for parameter in group["params"]
            if self.gradient_of(parameter) is not None and parameter.numel() and self._renews(parameter)
        }
        self.refresh_all(list(due), lambda parameter: self._renew(parameter, due[parameter]))

    def _renews(self, parameter: Tensor) -> bool:
        state = self.state.get(parameter, {})
        new = needs_statistics(state, self.refresh, self.staleness, self.statistics)
        return new or needs_refresh(state, self.refresh, self.staleness)

    def _renew(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], self._decayed(parameter, group)[1]
        step = state.get("step", 0)
        gap = step - averaged_at(state)
        new = needs_statistics(state, self.refresh, self.staleness, self.statistics)
        if new:
            state["averaged_at"] = step
        stale = needs_refresh(state, self.refresh, self.staleness)
        thin = self._thin_gradient(parameter, gradient)

        @cache
        def matrix() -> Tensor:  # where only factors of columns are renewed nobody asks for it
            return self._gradient(parameter, group).flatten(1)

        for index, tile in enumerate(self.tiles(parameter)):
            cut = partial(_cut, tile, matrix)
            self._refresh(state, index, cut, thin, group, gap if new else None, stale)
        if new:
            state["averages"] = averages(state) + 1
        if stale:
            state["refreshed_at"] = step

    def direction(self, parameter: Tensor, gradient: Gradient, group: dict[str, Any]) -> Update:
        """Return the momentum of L^-¼ G R^-¼, for all blocks of one shape at once."""
        state, thin = self.state[parameter], self._thin_gradient(parameter, gradient)
        self._rows.pop(self._names.get(id(parameter), ""), None)
        self._thin.pop(id(parameter), None)
        tiles, (d_out, d_in) = self.tiles(parameter), parameter.flatten(1).shape
        roots = [(_root_in(state, f"L{index}"), _root_in(state, f"R{index}")) for index in range(len(tiles))]
        made = not isinstance(gradient, Thin)
        if thin is not None and thin_pays(*roots[0], (d_out, d_in), thin.rows, made):
            update: Update = thin_update(roots[0][0], thin, roots[0][1])
        else:
            matrix = multiplied(gradient, parameter).flatten(1)
            flat = matrix.new_empty(matrix.shape)
            for tile, (left, right) in zip(tiles, roots, strict=True):
                tile.paste(times(left @ tile.cut(matrix), right), flat)
            update = flat.view_as(parameter)
        state["step"] = state.get("step", 0) + 1
        return self.momentum(parameter, update, group)

    def solver_size(self, parameter: Tensor) -> int:
        """Return the entries of the roots of all blocks."""
        return sum(
            len(tile.blocks) * d**2
            for tile in self.tiles(parameter)
            for side, d in zip(BOTH, tile.shape, strict=True)
            if side in self.sides
        )

    @property
    def interval(self) -> int:
        """Steps between refreshes in the long run."""
        return interval_of(self.refresh)

    def followed(self, parameter: Tensor) -> None:
        """Count a step that the owner does: on it depends when the next refresh is due."""
        state = self.state[parameter]
        state["step"] = state.get("step", 0) + 1

    def _thin_gradient(self, parameter: Tensor, gradient: Gradient) -> Thin | None:
        if isinstance(gradient, Thin):
            return gradient
        rows = self._rows.get(self._names.get(id(parameter), ""))
        if rows is None or not self._is_one_block(parameter):
            return None
        if id(parameter) not in self._thin:
            self._thin[id(parameter)] = rows.gradient(gradient.flatten(1))
        return self._thin[id(parameter)]

    def scales(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Scale]:
        """Return λmax and trace of L and R, the largest over blocks, with their ridges."""
        state = self.state.get(parameter, {})
        result = dict(super().scales(parameter, group))
        for side, key in (("L", "damping_B"), ("R", "damping_A")):
            names = [f"{side}{index}" for index in range(len(state))]
            present = [name for name in names if name in state or f"values_{name}" in state]
            factors = [factor_in(state, name) or state[name] for name in present]
            if factors and all(factor is not None for factor in factors):
                size = max(size_of(factor).max().item() for factor in factors)
                unit = size if self.damping_rule == "relative" else 1.0
                largest = max(trace_of(factor).max().item() for factor in factors)
                result[side] = Scale(size, float(group[key]) * unit, largest)
        return result

    def least(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, float]:
        """Return λmin of L and R, the smallest over blocks."""
        state, found = self.state.get(parameter, {}), {}
        for side in self.scales(parameter, group).keys() & {"L", "R"}:
            names = [f"{side}{index}" for index in range(len(state))]
            factors = [factor_in(state, name) or state.get(name) for name in names]
            found[side] = min(least_of(factor).min().item() for factor in factors if factor is not None)
        return found

    def precondition(
        self, parameter: Tensor, vector: Tensor, group: dict[str, Any], *, inverse: bool = False
    ) -> Tensor | None:
        """Return P v or P⁻¹ v with the last roots."""
        if group["algorithm"] != self.algorithm:
            return super().precondition(parameter, vector, group, inverse=inverse)
        state, matrix = self.state.get(parameter, {}), vector.flatten(1)
        if "refreshed_at" not in state:
            return None
        result = torch.empty_like(matrix)
        for index, tile in enumerate(self.tiles(parameter)):
            left, right = _root_in(state, f"L{index}"), _root_in(state, f"R{index}")
            blocks = tile.cut(matrix)
            if inverse:
                tile.paste(undo_side(right, undo_side(left, blocks).mT).mT, result)
            else:
                tile.paste(times(left @ blocks, right), result)
        return result.view_as(vector)

    def _refresh(
        self,
        state: dict[str, Any],
        index: int,
        block: Callable[[], Tensor],
        thin: Thin | None,
        group: dict[str, Any],
        gap: int | None,
        stale: bool,
    ) -> None:
        # An average of columns is a decomposition: with statistics of their own, factors are dense.
        columns = thin if self.statistics is None else None
        for side, key in zip("LR", ("damping_B", "damping_A"), strict=True):
            if side not in self.sides:
                continue
            name = f"{side}{index}"
            old = factor_in(state, name)
            # Outside its columns a factor is its ridge alone: without one it has no inverse root there.
            free = group[key] > 0 and name not in state
            if columns is not None and gap is not None and free and self._keeps_columns(columns, side, old):
                self._refresh_columns(state, name, old, thin_moment(columns, side), group[key], gap)
            else:
                matrix = block() if side == "L" else block().mT
                self._refresh_dense(state, name, old, matrix, group[key], gap, stale)

    def _keeps_columns(self, new: Thin, side: str, old: Columns | None) -> bool:
        n, d = (new.D if side == "L" else new.H).shape
        return self.solver == "low-rank" or pays(d, n, 0 if old is None else old.columns.shape[-1], EIGH)

    def _refresh_columns(
        self, state: dict[str, Any], name: str, old: Columns | None, new: Tensor, damping: Scalar, gap: int
    ) -> None:
        keep, weight = 1.0, 1.0
        if self.accumulate == "average":
            weight = 1.0 if old is None else average_weight(self.ema, averages(state), gap)
            keep = 1.0 - weight
        factor = averaged(old, new, keep, weight)
        ridge = damping * (
            size_of(factor) if self.damping_rule == "relative" else torch.ones_like(factor.trace)
        )
        factor = truncated(factor, TOLERANCE * ridge)
        function, _ = low_rank_root(factor, 1 / self.exponent, ridge)
        state.update(state_of(name, factor, function))

    def _refresh_dense(
        self,
        state: dict[str, Any],
        name: str,
        columns: Columns | None,
        block: Tensor,
        damping: Scalar,
        gap: int | None,
        stale: bool,
    ) -> None:
        old = state.get(name) if columns is None else columns.columns @ columns.columns.mT
        forget(state, name)
        factor = old if gap is None else self._average(old, block, averages(state), gap)
        if factor is None:  # nothing finite has been seen so far
            return
        state[name] = finite_or(factor, old)
        if stale or columns is not None:
            state[f"root_{name}"] = self.root(factor, damping)

    def root(self, factor: Tensor, damping: Scalar) -> Tensor:
        """Return the damped inverse root of factors ``[..., d, d]``, a part of them in one call.

        Args:
            factor: Symmetric positive semi-definite.
            damping: ρ, one for all or broadcastable against ``[...]``.
        """
        power, relative = 1 / self.exponent, self.damping_rule == "relative"
        if factor.dim() == 2:
            return inverse_root(factor, power, damping, relative)[0]
        rho = torch.as_tensor(damping, dtype=factor.dtype, device=factor.device).expand(factor.shape[:-2])
        every, rho = factor.flatten(0, -3), rho.flatten()
        result = torch.empty_like(every)
        for part in in_parts(every):
            result[part], _ = inverse_root(every[part], power, rho[part], relative)
        return result.view_as(factor)

    def _average(self, old: Tensor | None, block: Tensor, seen: int, gap: int) -> Tensor:
        new = gram(block.mT)
        if self.accumulate == "sum":
            return new if old is None else old + new
        return running_average(old, new, self.ema, seen, gap)


class HalfShampoo(Shampoo):
    """Shampoo with exponent ½ on each side; lr × n_blocks^-1, ridges as for Shampoo."""

    algorithm = "shampoo-half"
    exponent = 0.5


class LeftShampoo(Shampoo):
    """Shampoo with exponent ½ on the output side alone, which alone is cut into blocks; lr as Shampoo's."""

    algorithm = "shampoo-left"
    exponent, sides = 0.5, "L"


class RightShampoo(Shampoo):
    """Shampoo with exponent ½ on the input side alone, which alone is cut into blocks; lr as Shampoo's."""

    algorithm = "shampoo-right"
    exponent, sides = 0.5, "R"


def _cut(tile: Tiles, matrix: Callable[[], Tensor]) -> Tensor:
    return tile.cut(matrix())


def _root_in(state: dict[str, Any], name: str) -> Operator:
    function = function_in(state, name)
    root: Operator = state.get(f"root_{name}", Identity()) if function is None else function
    return root
