"""Updates of several models at once: the optimizers' functions with a leading axis of members.

Shapes: parameters and gradients ``[P, *shape]``, hyperparameters ``[P]``, factors ``[P, d, d]``, or
``[1, d, d]`` where all members have the same one: that of the inputs of a first layer, if they see the
same batches. Members are at the same step, so there is one clock for all. Factors are kept dense.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mupx.linalg import over
from mupx.optim.base import Base, decayed
from mupx.running_means import adam_direction, heavy_ball, running

Group = dict[str, Any]
Factors = Mapping[str, Mapping[str, Tensor]]  # layer → side, A or B → factor
NUMBERS = ("lr", "reference_lr", "damping_A", "damping_B", "eps", "weight_decay", "momentum")
SKIPPED_AT_ZERO = ("weight_decay", "momentum")  # as one float 0.0 they cost nothing


class Rows(NamedTuple):
    """Gradients of a weight whose layer has the same inputs in all members, not multiplied out: Sᵀ H.

    Attributes:
        signals: S, ∂(mean loss)/∂(layer output), ``[P, n, d_out]``.
        inputs: H, ``[1, n, d_in]``.
        precision: What the factors of the product are rounded to first, as autocast does; None: not at all.
    """

    signals: Tensor
    inputs: Tensor
    precision: torch.dtype | None = None

    @property
    def product(self) -> Tensor:
        """The gradients ``[P, d_out, d_in]``."""
        dtype = self.signals.dtype if self.precision is None else self.precision
        return (self.signals.to(dtype).mT @ self.inputs.to(dtype)).to(self.signals.dtype)


Gradient = Tensor | Rows


class Stacked:
    """P optimizers of one structure; their groups' numbers may differ.

    Args:
        model: The model of the first.
        optimizers: One per member, not used yet. The structure is that of the first.
        values: Name → ``[P, *shape]``, updated in place.

    Attributes:
        rows_suffice: Layers with the same inputs in all members whose rows can be given for a gradient.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Base], values: dict[str, Tensor]) -> None:
        self.values, self.shell = values, optimizers[0]
        self.groups = _stack_groups(optimizers, values)
        self.state: dict[str, dict[str, Tensor]] = {name: {} for name in values}
        self.rows_suffice: Set[str] = set()
        self.clock = {"step": 0}

    @property
    def captured(self) -> list[str]:
        """Names of the layers whose factors the coming step asks for."""
        return []

    @property
    def by_rows(self) -> Mapping[str, str]:
        """Layer, of those whose rows suffice → its weight, whose gradient is to come as :class:`Rows`."""
        return {}

    @torch.no_grad()
    def advance(self, gradients: Mapping[str, Gradient], factors: Factors, schedule: float) -> None:
        """Do one step, as :meth:`mupx.optim.base.Base.step`.

        Args:
            gradients: Name → ``[P, *shape]``, all of them finite; of :attr:`by_rows` as rows.
            factors: What :attr:`captured` asks for.
            schedule: Factor on every learning rate.
        """
        self.refresh(factors)
        for name, gradient in gradients.items():
            value, group = self.values[name], self.groups[name]
            lr, decay = group["lr"] * schedule, group["weight_decay"]
            mode, reference = group["weight_decay_mode"], group["reference_lr"]
            if isinstance(gradient, Rows):
                kept, _ = decayed(value, value, mode, decay, lr, reference)
                update = self.direction_by_rows(name, gradient, group)
            else:
                kept, gradient = decayed(value, gradient, mode, decay, lr, reference)
                own = group["algorithm"] == self.shell.algorithm
                update = (self.direction if own else self.adam)(name, gradient, group)
            if isinstance(kept, Tensor):
                value.mul_(kept)
            value.addcmul_(over(lr, update), update, value=-1.0)
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

    def direction_by_rows(self, name: str, gradient: Rows, group: Group) -> Tensor:
        """Return the update of one parameter of :attr:`by_rows`."""
        raise NotImplementedError

    def adam(self, name: str, gradient: Tensor, group: Group) -> Tensor:
        """Return Adam's direction."""
        mean, square = (running(self.state[name], key, gradient) for key in ("exp_avg", "exp_avg_sq"))
        return adam_direction(gradient, mean, square, self.clock["step"] + 1, group["betas"], group["eps"])

    def momentum(self, name: str, update: Tensor, group: Group) -> Tensor:
        """Return the heavy-ball buffer after adding ``update``; the update where no member has momentum."""
        if isinstance(group["momentum"], float):
            return update
        state = self.state[name]
        state["momentum_buffer"] = heavy_ball(update, state.get("momentum_buffer"), group["momentum"])
        return state["momentum_buffer"]


def pick(entries: Mapping[str, Any], members: Tensor) -> dict[str, Any]:
    """Return the entries of some members; what all share, and what is no tensor, stays."""
    return {key: _picked(value, members) for key, value in entries.items()}


def _picked(value: Any, members: Tensor) -> Any:
    if isinstance(value, Rows):
        return value._replace(signals=value.signals[members])
    return value[members] if isinstance(value, Tensor) and len(value) > 1 else value


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
