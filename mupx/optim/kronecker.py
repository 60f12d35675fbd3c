"""What the optimizers share that solve with running averages of Kronecker factors.

:attr:`Kronecker.sides` says which factors there are: A and B, or A alone. Each is kept dense, as
columns (:mod:`mupx.lowrank`) or as a sketch (:mod:`mupx.sketch`), whichever costs less, and solved with or
inverted likewise.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mupx import sketch
from mupx.factor_sums import FactorRows, FactorSums
from mupx.lowrank import (
    CHOLESKY,
    SMALLEST,
    SOLVERS,
    Columns,
    Spanned,
    alone,
    averaged,
    kept_in,
    pays,
    stands_alone,
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
        solver: ``dense``, ``low-rank``, ``sketch`` or ``auto``.
        statistics: Interval between updates of the factors alone, in steps; such factors are kept dense.
        **more: The rest.
    """

    solver_keys = re.compile(r"(inverse|cholesky|usable|columns|gain|rest|vectors|inner)(_\w+)?")
    statistics_keys = re.compile(r"[AB]|(values|dropped|trace|image|test|core|exact)_[AB]")
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
        self.solver = require_choice("solver", solver, (*SOLVERS, "sketch"))
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

    def solver_size(self, parameter: Tensor) -> int:
        """Return the entries of the damped inverses."""
        d_out, d_in = parameter.flatten(1).shape
        return ("A" in self.sides) * d_in**2 + ("B" in self.sides) * d_out**2

    def _keeps_rows(self, weight: Tensor) -> bool:
        # As columns, or where one process multiplies thin products.
        forced = self.solver in ("low-rank", "sketch")
        return forced or (self._columns and max(weight.flatten(1).shape) >= SMALLEST)

    def _watched(self) -> list[Tensor]:
        if self.communicator.size > 1:
            return self._due()  # one rank's rows give one rank's gradient, which no update is made of
        return [p for p in self._weights() if self._averages(self.state.get(p, {})) or self._may_be_thin(p)]

    def _may_be_thin(self, weight: Tensor) -> bool:
        # Between refreshes hooks are for nothing where the last one saw more rows than are kept, and a
        # compiled model would run without its compiled code.
        shape = weight.flatten(1).shape
        few = self.state.get(weight, {}).get("rows", 0) <= max(shape)
        return self._thin and few and min(shape) >= SMALLEST

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
        if self._columns:
            state["rows"] = int(sums.input_count)  # of all ranks
        factors = {side: kept_in(state, side) or state.get(side) for side in self.sides}
        # Left from a run without statistics of their own; the average below is dense.
        thin = any(isinstance(factor, Columns | Spanned) for factor in factors.values())
        columns = self.statistics is not None and thin
        average = partial(
            self._average, state, sums, self._damped(group), averages(state), step - averaged_at(state)
        )
        if self._averages(state):
            factors = {side: average(side) for side in self.sides}
            state["averages"], state["averaged_at"] = averages(state) + 1, step
        if not (columns or needs_refresh(state, self.refresh, self.staleness)):
            return
        state["refreshed_at"] = step
        solved = self._solved(weight, sums, step)
        solver, ok = self._rebuild(state, factors, weight, groups, solved)
        doubted = [side for side in factors if sketch.too_thin(state, solver, side)]
        if doubted:
            for side in doubted:
                sketch.give_up(state, side)
                factors[side] = average(side)
            solver, ok = self._rebuild(state, factors, weight, groups, solved)
        state.update(solver, skipped=state.get("skipped", 0) + int(not bool(ok)))

    def _damped(self, group: Mapping[str, Any]) -> bool:
        # Outside its columns a factor is its ridge alone: without one it has no inverse there.
        return all(group[f"damping_{side}"] > 0 for side in self.sides)

    def _rebuild(
        self,
        state: dict[str, Any],
        factors: Mapping[str, Factor],
        weight: Tensor,
        groups: Mapping[int, dict[str, Any]],
        solved: set[str],
    ) -> tuple[Solver, Tensor]:
        for side, factor in factors.items():
            clear_side(state, side, factor)
        return self.build_solver(factors, weight, groups, solved)

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

    def _average(
        self, state: dict[str, Any], sums: FactorSums, damped: bool, seen: int, gap: int, side: str
    ) -> Factor:
        """Average one side's new factor in; columns stay columns until they no longer pay."""
        old = kept_in(state, side)
        thin = damped and self.statistics is None
        found = sums.unscaled(side) if thin and isinstance(sums, FactorRows) else None
        if isinstance(sums, FactorRows) and found is not None and side not in state:
            rows, count = found
            weight = average_weight(self.ema, seen, gap) if old is not None else 1.0
            if self._sketches(state, side, rows, old):
                return self._sketched(state, side, old, rows, count, weight)
            new = rows / count.sqrt()
            if stands_alone(new.shape[0], new.shape[1], self.solver, self.ema, self.refresh == 1):
                sums.alone.add(side)
                return alone(new)
            if isinstance(old, Spanned):
                old = old.orthogonal  # of a sketch that was given up
            if self._keeps_columns(new, old):
                # Of a batch alone nothing old stays, not even as columns of zeros.
                return averaged(old if weight < 1.0 else None, new, 1.0 - weight, weight)
        dense = state.get(side) if old is None else old.columns @ old.columns.mT
        factor = running_average(dense, sums.factor(side), self.ema, seen, gap)
        state[side] = finite_or(factor, dense)
        return factor

    def _sketched(
        self,
        state: dict[str, Any],
        side: str,
        old: Columns | Spanned | None,
        new: Tensor,
        count: Tensor,
        weight: float,
    ) -> Spanned:
        """Average new columns into a sketch; what is not finite leaves it as it was, for one step of zero."""
        before = sketch.sketch_in(state, side) or sketch.begun(old, new)
        after = sketch.averaged(before, new, 1.0 - weight, weight / count)
        state.update(sketch.state_of(side, after or before))
        factor = sketch.recovered(after or before)
        return factor if after else factor._replace(gram=torch.full_like(factor.gram, torch.nan))

    def _sketches(
        self, state: Mapping[str, Any], side: str, new: Tensor, old: Columns | Spanned | None
    ) -> bool:
        """Whether a factor is averaged as a sketch; one that is stays so until it is given up."""
        if sketch.was_given_up(state, side):
            return False
        if sketch.sketch_in(state, side) is not None:
            return True
        d, n = new.shape
        return sketch.pays(d, n, 0 if old is None else old.columns.shape[-1], self.solver, self.ema)

    def _keeps_columns(self, new: Tensor, old: Columns | None) -> bool:
        d, n = new.shape
        return self.solver == "low-rank" or pays(d, n, 0 if old is None else old.columns.shape[-1], CHOLESKY)
