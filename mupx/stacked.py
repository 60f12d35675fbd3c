"""Updates of several models at once: the optimizers' pure functions with a leading axis of members.

Shapes: parameters and gradients ``[P, *shape]``, hyperparameters ``[P]``, factors ``[P, d, d]``, or
``[1, d, d]`` where all members have the same one: that of the inputs of a first layer, if they see the
same batches. Members are at the same step, so there is one clock for all. Factors are kept dense.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mupx.blocks import blocks_of
from mupx.curvature import factorable_layers
from mupx.errors import UsageError
from mupx.linalg import inverse_root, over
from mupx.optim.adam import AdamW
from mupx.optim.adapter import Trainable
from mupx.optim.base import Base, adam_direction, decayed, heavy_ball, running_average
from mupx.optim.kfac import KFAC
from mupx.optim.sgd import SGD
from mupx.optim.shampoo import HalfShampoo, LeftShampoo, RightShampoo, Shampoo
from mupx.preconditioning import Solver, build_solver, precondition, precondition_bias
from mupx.refresh import averaged_at, averages, needs_refresh, needs_statistics

Group = dict[str, Any]
Factors = Mapping[str, Mapping[str, Tensor]]  # layer → side, A or B → factor
NUMBERS = ("lr", "reference_lr", "damping_A", "damping_B", "eps", "weight_decay", "momentum")
SKIPPED_AT_ZERO = ("weight_decay", "momentum")  # as one float 0.0 they cost nothing


class Stacked:
    """P optimizers of one structure; their groups' numbers may differ.

    Args:
        model: The model of the first.
        optimizers: One per member, not used yet. The structure is that of the first.
        values: Name → ``[P, *shape]``, updated in place.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Base], values: dict[str, Tensor]) -> None:
        self.values, self.shell = values, optimizers[0]
        self.groups = _stack_groups(optimizers, values)
        self.state: dict[str, dict[str, Tensor]] = {name: {} for name in values}
        self.clock = {"step": 0}

    @property
    def captured(self) -> list[str]:
        """Names of the layers whose factors the coming step asks for."""
        return []

    @torch.no_grad()
    def advance(self, gradients: Mapping[str, Tensor], factors: Factors, schedule: float) -> None:
        """Do one step, as :meth:`mupx.optim.base.Base.step`.

        Args:
            gradients: Name → ``[P, *shape]``, all of them finite.
            factors: What :attr:`captured` asks for.
            schedule: Factor on every learning rate.
        """
        self.refresh(factors)
        for name, gradient in gradients.items():
            value, group = self.values[name], self.groups[name]
            lr, decay = group["lr"] * schedule, group["weight_decay"]
            mode, reference = group["weight_decay_mode"], group["reference_lr"]
            kept, gradient = decayed(value, gradient, mode, decay, lr, reference)
            own = group["algorithm"] == self.shell.algorithm
            update = (self.direction if own else self.adam)(name, gradient, group)
            if isinstance(kept, Tensor):
                value.mul_(kept)
            value.sub_(over(lr, update) * update)
        self.clock["step"] += 1

    def keep(self, members: Tensor) -> None:
        """Go on with some of the members only.

        Args:
            members: Their positions.
        """
        for kept in (self.groups, self.state):
            for name, entries in kept.items():
                kept[name] = pick(entries, members)

    def refresh(self, factors: Factors) -> None:
        """Renew what the directions of this step need."""

    def direction(self, name: str, gradient: Tensor, group: Group) -> Tensor:
        """Return the update of one parameter."""
        raise NotImplementedError

    def adam(self, name: str, gradient: Tensor, group: Group) -> Tensor:
        """Return Adam's direction."""
        state, zeros = self.state[name], torch.zeros_like(gradient)
        mean, square = state.get("exp_avg", zeros), state.get("exp_avg_sq", zeros)
        update, state["exp_avg"], state["exp_avg_sq"] = adam_direction(
            gradient, mean, square, self.clock["step"] + 1, group["betas"], group["eps"]
        )
        return update

    def momentum(self, name: str, update: Tensor, group: Group) -> Tensor:
        """Return the heavy-ball buffer after adding ``update``; the update where no member has momentum."""
        if isinstance(group["momentum"], float):
            return update
        state = self.state[name]
        state["momentum_buffer"] = heavy_ball(update, state.get("momentum_buffer"), group["momentum"])
        return state["momentum_buffer"]


def pick(entries: Mapping[str, Any], members: Tensor) -> dict[str, Any]:
    """Return the entries of some members; what all share, and what is no tensor, stays."""
    return {
        key: value[members] if isinstance(value, Tensor) and len(value) > 1 else value
        for key, value in entries.items()
    }


def _stack_groups(optimizers: Iterable[Base], values: Mapping[str, Tensor]) -> dict[str, Group]:
    named = [{name: g for g in o.param_groups for name in g["param_names"]} for o in optimizers]
    groups = {}
    for name, value in values.items():
        own = [groups_of[name] for groups_of in named]
        numbers: Group = {
            key: torch.tensor([float(group[key]) for group in own], dtype=torch.double).to(value)
            for key in NUMBERS
            if key in own[0]
        }
        numbers |= {key: 0.0 for key in SKIPPED_AT_ZERO if not numbers[key].any()}
        groups[name] = {**{k: v for k, v in own[0].items() if k != "params"}, **numbers}
    return groups


class StackedSGD(Stacked):
    """SGD with momentum."""

    def direction(self, name: str, gradient: Tensor, group: Group) -> Tensor:
        """Return the momentum buffer."""
        return self.momentum(name, gradient, group)


class StackedAdamW(Stacked):
    """AdamW."""

    def direction(self, name: str, gradient: Tensor, group: Group) -> Tensor:
        """Return m̂ / (√v̂ + eps)."""
        return self.adam(name, gradient, group)


class StackedKFAC(Stacked):
    """K-FAC with the empirical Fisher."""

    shell: KFAC

    def __init__(self, model: nn.Module, optimizers: Sequence[Base], values: dict[str, Tensor]) -> None:
        super().__init__(model, optimizers, values)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.weights: dict[str, str] = {}  # layer → its weight, and so on
        self.biases: dict[str, str] = {}
        self.layer_of: dict[str, str] = {}
        for layer, module in factorable_layers(model).items():
            weight, bias = names[id(module.weight)], names.get(id(module.bias), "")
            if self.groups[weight]["algorithm"] == self.shell.algorithm:
                self.weights[layer], self.biases[layer] = weight, bias
                self.layer_of |= dict.fromkeys((weight, bias), layer)
        self.averages: dict[str, dict[str, Tensor]] = {layer: {} for layer in self.weights}
        self.solvers: dict[str, Solver] = {}

    @property
    def captured(self) -> list[str]:
        """The layers it treats, where new factors are averaged in."""
        shell = self.shell
        due = needs_statistics(self.clock, shell.refresh, shell.staleness, shell.statistics)
        return list(self.weights) if due else []

    def keep(self, members: Tensor) -> None:
        """Go on with some of the members only."""
        super().keep(members)
        for kept in (self.averages, self.solvers):
            for layer, entries in kept.items():
                kept[layer] = pick(entries, members)

    def refresh(self, factors: Factors) -> None:
        """Average new factors in and rebuild the solvers, each where its step has come."""
        shell, clock, step = self.shell, self.clock, self.clock["step"]
        if factors:
            seen, gap = averages(clock), step - averaged_at(clock)
            for layer, pair in factors.items():
                kept = self.averages[layer]
                for side, new in pair.items():
                    kept[side] = running_average(kept.get(side), new, shell.ema, seen, gap)
            clock |= {"averages": seen + 1, "averaged_at": step}
        if needs_refresh(clock, shell.refresh, shell.staleness):
            clock["refreshed_at"] = step
            self.solvers = {layer: self._solver(layer) for layer in self.weights}

    def _solver(self, layer: str) -> Solver:
        group, bias = self.groups[self.weights[layer]], self.groups.get(self.biases[layer])
        A, B = self.averages[layer]["A"], self.averages[layer]["B"]
        rule = self.shell.damping_rule
        if rule != "exact":  # its eigenvectors serve every ridge; the inverses of the others differ
            A = A.expand(len(B), -1, -1)
        bias_ridge = None if bias is None else bias["damping_B"]
        return build_solver(A, B, group["damping_A"], group["damping_B"], bias_ridge, rule)[0]

    def direction(self, name: str, gradient: Tensor, group: Group) -> Tensor:
        """Return the momentum of the preconditioned gradient."""
        layer = self.layer_of[name]
        solver = self.solvers[layer]
        if name == self.biases[layer]:
            return self.momentum(name, precondition_bias(gradient, solver), group)
        return self.momentum(name, precondition(gradient.flatten(2), solver).view_as(gradient), group)


class StackedShampoo(Stacked):
    """Shampoo and its variants, block by block."""

    shell: Shampoo

    def __init__(self, model: nn.Module, optimizers: Sequence[Base], values: dict[str, Tensor]) -> None:
        super().__init__(model, optimizers, values)
        self.seen = self.gap = 0
        self.new = self.stale = False

    def refresh(self, factors: Factors) -> None:
        """Decide whether this step's directions average new statistics in and take new roots."""
        clock, shell, step = self.clock, self.shell, self.clock["step"]
        self.seen, self.gap = averages(clock), step - averaged_at(clock)
        self.new = needs_statistics(clock, shell.refresh, shell.staleness, shell.statistics)
        if self.new:
            clock |= {"averages": self.seen + 1, "averaged_at": step}
        self.stale = needs_refresh(clock, shell.refresh, shell.staleness)
        if self.stale:
            clock["refreshed_at"] = step

    def direction(self, name: str, gradient: Tensor, group: Group) -> Tensor:
        """Return the momentum of L^-e G R^-e."""
        matrix, shell = gradient.flatten(2), self.shell
        update = torch.empty_like(matrix)
        cuts = blocks_of(matrix.shape[1:], shell.blocks, shell.sides)
        for index, (rows, columns) in enumerate(cuts):
            block = product = matrix[:, rows, columns]
            if "L" in shell.sides:
                product = self._root(name, f"L{index}", block, group["damping_B"]) @ product
            if "R" in shell.sides:
                product = product @ self._root(name, f"R{index}", block.mT, group["damping_A"])
            update[:, rows, columns] = product
        return self.momentum(name, update.view_as(gradient), group)

    def _root(self, name: str, side: str, block: Tensor, damping: Tensor) -> Tensor:
        state, shell = self.state[name], self.shell
        if self.new:
            old, new = state.get(side), block @ block.mT
            if old is not None and shell.accumulate == "sum":
                state[side] = old + new
            else:
                state[side] = running_average(old, new, shell.ema, self.seen, self.gap)
        if self.stale:
            relative = shell.damping_rule == "relative"
            state[f"root_{side}"], _ = inverse_root(state[side], 1 / shell.exponent, damping, relative)
        return state[f"root_{side}"]


UPDATES: Mapping[type[Base], type[Stacked]] = {
    SGD: StackedSGD,
    AdamW: StackedAdamW,
    KFAC: StackedKFAC,
    Shampoo: StackedShampoo,
    HalfShampoo: StackedShampoo,
    LeftShampoo: StackedShampoo,
    RightShampoo: StackedShampoo,
}


def stack(model: nn.Module, optimizers: Sequence[Trainable], values: dict[str, Tensor]) -> Stacked:
    """Return the update of all members at once; arguments as for :class:`Stacked`.

    Raises:
        UsageError: Some optimizer is not one of :data:`UPDATES`, or not of the first one's kind.
    """
    kind = next((kind for kind in UPDATES if all(type(each) is kind for each in optimizers)), None)
    if kind is None:
        raise UsageError(
            f"several models at once are updated by one of {', '.join(k.algorithm for k in UPDATES)}"
        )
    return UPDATES[kind](model, [each for each in optimizers if isinstance(each, Base)], values)
