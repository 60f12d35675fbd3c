"""What the optimizers share that solve with running averages of Kronecker factors.

:attr:`Kronecker.sides` says which factors there are: A and B, or A alone. Each is kept dense or as
columns (:mod:`mupx.lowrank`), whichever costs less, and solved with or inverted likewise.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from mupx.curvature import FactorRows, FactorSums
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
    Groups,
    average_weight,
    finite_or,
    refresh_interval,
    require_choice,
    require_damping_rule,
    running_average,
)
from mupx.optim.captured import Captured
from mupx.preconditioning import Factor, Solver, clear_side, prefers_cholesky
from mupx.refresh import averaged_at, averages, needs_refresh, require_statistics


class Kronecker(Captured):
    """A preconditioner made of running averages of A, or of A and B.

    Args:
        params: As for :class:`mupx.optim.captured.Captured`, as is all that is not listed.
        model: The module they belong to.
        defaults: Group defaults.
        damping_rule: One of the scaling rule's damping rules.
        solver: ``dense``, ``low-rank`` or ``auto``.
        statistics: Interval between updates of the factors alone, in steps; such factors are kept dense.
        **more: The rest.
    """

    sides: ClassVar[str] = "AB"
    kept = (*Captured.kept, "damping_rule", "solver")

    def __init__(
        self,
        params: Groups,
        model: nn.Module,
        defaults: dict[str, Any],
        *,
        damping_rule: str,
        solver: str,
        statistics: int | None = None,
        **more: Any,
    ) -> None:
        self.damping_rule = require_damping_rule(self.algorithm, damping_rule)
        self.solver = require_choice("solver", solver, SOLVERS)
        require_statistics(statistics, solver)
        super().__init__(params, model, defaults, statistics=statistics, **more)

    @abstractmethod
    def build_solver(
        self,
        factors: Mapping[str, Factor],
        weight: Tensor,
        groups: Mapping[int, dict[str, Any]],
        solved: set[str],
    ) -> tuple[Solver, Tensor]:
        """Return what preconditions one layer until the next refresh, and whether every factor is usable.

        Args:
            factors: Side → running average.
            weight: Weight of the layer.
            groups: Parameter id → its group.
            solved: Sides whose Cholesky factor is kept in place of the inverse.
        """

    def _watched(self) -> list[Tensor]:
        return [
            p
            for p in self._weights()
            if self._averages(self.state.get(p, {})) or (self._thin and min(p.flatten(1).shape) >= SMALLEST)
        ]

    @property
    def _columns(self) -> bool:
        return self.solver != "dense"

    @property
    def _thin(self) -> bool:
        # δ of a sampled or exact Fisher is not the gradient's.
        return self._columns and self.fisher == "empirical" and self.sides == "AB"

    def _collector(self, weight: Tensor, due: bool) -> FactorSums:
        return FactorRows(limit=max(weight.flatten(1).shape), summed=due) if self._columns else FactorSums()

    def refresh_layer(self, weight: Tensor, sums: FactorSums, groups: Mapping[int, dict[str, Any]]) -> None:
        """Average new factors in and rebuild the solver, each where its step has come."""
        state, group = self.state[weight], groups[id(weight)]
        step = state.get("step", 0)
        # Outside its columns a factor is its ridge alone: without one it has no inverse there.
        damped = all(group[f"damping_{side}"] > 0 for side in self.sides)
        factors = {side: factor_in(state, side) or state.get(side) for side in self.sides}
        # Left from a run without statistics of their own; the average below is dense.
        columns = self.statistics is not None and any(isinstance(f, Columns) for f in factors.values())
        if self._averages(state):
            factors = {side: self._average(state, sums, side, damped) for side in self.sides}
            state["averages"], state["averaged_at"] = averages(state) + 1, step
        if not (columns or needs_refresh(state, self.refresh, self.staleness)):
            return
        state["refreshed_at"] = step
        solved = self._solved(weight, sums, step)
        for side, factor in factors.items():
            clear_side(state, side, keep_columns=isinstance(factor, Columns))
        solver, ok = self.build_solver(factors, weight, groups, solved)
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
        seen, gap = averages(state), state.get("step", 0) - averaged_at(state)
        old = factor_in(state, side)
        thin = damped and self.statistics is None
        new = sums.columns(side) if thin and isinstance(sums, FactorRows) else None
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
