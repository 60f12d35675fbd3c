"""What the optimizers share whose updates cost enough to be divided among ranks.

Under a communicator that shares (:class:`mupx.distributed.communicator.Ranks`) every parameter of the
optimizer's own, a bias with its weight, has one *owner*, found by greedy bin packing over the cubes of its
sides. The owner alone keeps its statistics and decomposes them. What it sends is whichever takes fewer bytes
per step: at each refresh the *solver*, what gradients are preconditioned with, so that every rank makes the
update itself; or at each step the update. A sharded parameter (FSDP) always gets updates: its gradient is
put together at the owner, the update cut up again. All ranks end every step with the same weights.

Without sharing (a loop of the user's own under DistributedDataParallel) every rank does everything, and
``state_dict`` needs nobody else.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mupx.distributed.assignment import assigned, cubes
from mupx.distributed.communicator import Communicator, found, packed, unpacked
from mupx.distributed.sharding import from_local, local, rows_of, shaped_like, sharded, whole
from mupx.errors import MismatchError
from mupx.optim.base import Base, Moving, multiplied
from mupx.refresh import Intervals, Refresh

NOTHING = re.compile(r"(?!)")


class Divided(Base):
    """An optimizer that can divide its updates among ranks.

    Attributes:
        solver_keys: What of a parameter's state preconditions its gradient, if that can be sent alone.
        statistics_keys: What of the state only the next refresh needs.
        dispatches: Whether its update is right on sharded tensors as they are.
    """

    solver_keys: ClassVar[re.Pattern[str]] = NOTHING
    statistics_keys: ClassVar[re.Pattern[str]] = NOTHING
    dispatches: ClassVar[bool] = False
    _communicator: Communicator | None = None
    _loaded = False  # a state from elsewhere, with the parts of others in it

    @property
    def communicator(self) -> Communicator:
        """What it talks to other processes with; unless one is set, torch's process group if there is one."""
        return found() if self._communicator is None else self._communicator

    @communicator.setter
    def communicator(self, communicator: Communicator) -> None:
        self._communicator = communicator

    @abstractmethod
    def cost(self, parameter: Tensor) -> float:
        """Return what an update of this tensor costs, in any unit that is the same for all."""

    def unit(self, parameter: Tensor) -> Tensor:
        """Return the tensor whose owner does this one's update too."""
        return parameter

    def solver_size(self, parameter: Tensor) -> int | None:
        """Return how many numbers a solver has; None where only updates can be sent."""
        return None

    @property
    def interval(self) -> int:
        """Steps that a solver serves in the long run."""
        return 1

    def owner(self, parameter: Tensor) -> int | None:
        """Return the rank that does a parameter's work; None where every rank does it."""
        ranks = self.communicator
        if not ranks.shares:
            return None
        owners = self.__dict__.setdefault("_owners", {})
        if id(self.unit(parameter)) not in owners:
            mine = (p for g in self.param_groups if g["algorithm"] == self.algorithm for p in g["params"])
            units = list(dict.fromkeys(self.unit(p) for p in mine))
            new = [p for p in units if id(p) not in owners]
            shapes = [tuple(p.shape) for p in new]
            if len(set(map(str, ranks.gathered(shapes)))) > 1:
                raise MismatchError(
                    f"the ranks give {self.algorithm} different parameters, so they cannot divide the work; "
                    "set optimizer.communicator = mupx.distributed.communicator.Communicator() where "
                    "each trains a model of its own"
                )
            ranked = assigned([self.cost(p) for p in new], ranks.size)
            owners |= dict(zip(map(id, new), ranked, strict=True))
        result: int = owners[id(self.unit(parameter))]
        return result

    def mine(self, parameter: Tensor) -> bool:
        """Whether this rank does a parameter's work."""
        return self.owner(parameter) in (None, self.communicator.rank)

    def sends_updates(self, parameter: Tensor) -> bool:
        """Whether a parameter's owner sends updates, not solvers: whichever is fewer bytes per step."""
        if not self.communicator.shares:
            return False
        numbers = self.solver_size(self.unit(parameter))
        return (
            sharded(parameter) or numbers is None or numbers >= self.interval * self.unit(parameter).numel()
        )

    def before_step(self) -> None:
        """Put sharded gradients together where they are needed whole."""
        self._whole = {}
        if self._loaded and self.communicator.shares:
            self._release()
        groups = ((p, g) for g in self.param_groups if g["algorithm"] == self.algorithm for p in g["params"])
        split = [(p, g) for p, g in groups if p.grad is not None and p.numel() and self._joined(p)]
        self._join([(p, multiplied(self._decayed(p, group)[1], p)) for p, group in split])

    def _join(self, split: Sequence[tuple[Tensor, Tensor]]) -> None:
        ranks, by_rows = self.communicator, []
        for parameter, gradient in split:
            rows = rows_of(gradient, ranks.size) if ranks.shares else []
            if rows:
                by_rows.append((parameter, local(gradient), rows))
                continue
            joined = whole(gradient)  # by everybody, as somebody else has cut it up
            if self.mine(parameter):
                self._whole[id(parameter)] = joined
        owners, parts = [self.owner(p) for p, _, _ in by_rows], [part for _, part, _ in by_rows]
        found = ranks.collected(parts, [rows for _, _, rows in by_rows], owners, "updates")
        for (parameter, _, _), pieces in zip(by_rows, found, strict=True):
            if pieces:
                self._whole[id(parameter)] = torch.cat(pieces)

    _whole: dict[int, Tensor] = {}  # noqa: RUF012 - replaced, never changed

    def _joined(self, parameter: Tensor) -> bool:
        return sharded(parameter) and (self.communicator.shares or not self.dispatches)

    def refresh_all(self, due: Sequence[Tensor], refresh: Callable[[Tensor], None]) -> None:
        """Refresh the curvature of parameters, each by its owner, who sends the others what they need."""
        for parameter in due:
            if self.mine(parameter):
                with self.repairing(parameter):
                    refresh(parameter)
        if due and self.communicator.shares:
            self._hand_out(due)

    def _hand_out(self, due: Sequence[Tensor]) -> None:
        ranks, owners = self.communicator, [self.owner(p) for p in due]
        sent = [packed(self._to_send(p)) if self.mine(p) else ({}, []) for p in due]
        told = ranks.gathered([described for described, _ in sent])
        tensors, receivers = [], []
        for i, (parameter, owner) in enumerate(zip(due, owners, strict=True)):
            assert owner is not None
            parts = sent[i][1]
            if owner != ranks.rank:
                entries, parts = unpacked(told[owner][i], parameter.device)
                self._take(parameter, entries)
            tensors += parts
            receivers += [owner] * len(parts)
        ranks.broadcast(tensors, receivers, "solvers")

    def _to_send(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        solver = self._is_fresh(state) and not self.sends_updates(parameter)
        return {
            key: value
            for key, value in state.items()
            if not isinstance(value, Tensor) or (solver and self.solver_keys.fullmatch(key))
        }

    def _take(self, parameter: Tensor, entries: dict[str, Any]) -> None:
        state = self.state[parameter]
        if self._is_fresh(entries):
            for key in [key for key in state if self.solver_keys.fullmatch(key)]:
                del state[key]
        state.update(entries)

    @staticmethod
    def _is_fresh(state: Mapping[str, Any]) -> bool:
        return "refreshed_at" in state and state["refreshed_at"] == state.get("step", 0)

    def update_all(self, moving: Moving) -> None:
        """Move the parameters that have a gradient; what others own moves by the update they send."""
        divided = [(p, g) for p, g in moving if g["algorithm"] == self.algorithm and self.sends_updates(p)]
        if divided:
            self._move_divided(divided)
        done = {id(p) for p, _ in divided}
        for parameter, group in self.moved_at_once([(p, g) for p, g in moving if id(p) not in done]):
            factor, gradient = self._decayed(parameter, group)
            gradient = self._whole.get(id(parameter), gradient)
            factor, update = self.update_of(parameter, group, (factor, gradient))
            if id(parameter) in self._whole:
                update = shaped_like(multiplied(update, parameter), parameter)
            self.move(parameter, group, factor, update)
        self._whole = {}

    def _move_divided(self, divided: Moving) -> None:
        updates = [self._divided_update(parameter, group) for parameter, group in divided]
        for (parameter, group), update in zip(divided, self._exchanged(divided, updates), strict=True):
            self.move(parameter, group, self._decayed(parameter, group)[0], update)

    def _divided_update(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        if not self.mine(parameter):
            self.followed(parameter)
            by_rows = sharded(parameter) and rows_of(parameter, self.communicator.size)
            shape = (0, *parameter.shape[1:]) if by_rows else parameter.shape
            return torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
        factor, gradient = self._decayed(parameter, group)
        gradient = self._whole.get(id(parameter), gradient)
        return multiplied(self.update_of(parameter, group, (factor, gradient))[1], parameter)

    def _exchanged(self, divided: Moving, updates: list[Tensor]) -> list[Tensor]:
        """Return the owners' updates in the form of the parameters."""
        ranks, owners = self.communicator, [int(self.owner(p) or 0) for p, _ in divided]
        rows = [rows_of(p, ranks.size) if sharded(p) else [] for p, _ in divided]
        cut = [i for i, each in enumerate(rows) if each]
        rest = [i for i, each in enumerate(rows) if not each]
        ranks.broadcast([updates[i] for i in rest], [owners[i] for i in rest], "updates")
        chosen = ([updates[i] for i in cut], [rows[i] for i in cut], [owners[i] for i in cut])
        parts = zip(cut, ranks.dealt(*chosen, "updates"), strict=True)
        result = {i: from_local(part, divided[i][0]) for i, part in parts}
        result |= {i: shaped_like(updates[i], divided[i][0]) for i in rest}
        return [result[i] for i in range(len(divided))]

    def followed(self, parameter: Tensor) -> None:
        """Count a step of this parameter that its owner does."""

    def _gradient(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        joined = self._whole.get(id(parameter))
        return super()._gradient(parameter, group) if joined is None else joined

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state; of one from elsewhere, what other ranks own is dropped at the next step."""
        super().__setstate__(state)
        self._loaded = True

    def _release(self) -> None:
        """Drop what only the owner of a parameter needs; a whole state was loaded by every rank."""
        self._loaded = False
        for group in self.param_groups:
            for parameter in group["params"] if group["algorithm"] == self.algorithm else ():
                if self.mine(parameter) or parameter not in self.state:
                    continue
                keys = self.statistics_keys.fullmatch if not self.sends_updates(parameter) else bool
                state = self.state[parameter]
                for key in [key for key in state if isinstance(state[key], Tensor) and keys(key)]:
                    del state[key]

    def state_dict(self) -> dict[str, Any]:
        """Return the state; where ranks share the work all must call this, and rank 0 gets the whole."""
        result = super().state_dict()
        ranks = self.communicator
        if not ranks.shares:
            return result
        order = [p for g in self.param_groups for p in g["params"]]
        own = [g["algorithm"] == self.algorithm for g in self.param_groups for _ in g["params"]]
        places = [i for i, treated in enumerate(own) if treated and order[i].numel()]
        parts = {i: result["state"][i] for i in places if i in result["state"] and self.mine(order[i])}
        for found_at in ranks.to_first(parts):
            result["state"] |= found_at
        result["state"] = dict(sorted(result["state"].items()))
        return result


def interval_of(refresh: Refresh) -> int:
    """Return the interval of a refresh schedule in the long run; 1 where only a function knows it."""
    if isinstance(refresh, Intervals):
        return refresh.intervals[-1]
    return refresh if isinstance(refresh, int) else 1


def cubes_of(parameter: Tensor, sides: str) -> float:
    """Return Σ d³ over the decomposed sides of a parameter as a matrix."""
    d_out, *rest = parameter.shape
    return cubes((d_out, torch.Size(rest).numel()), sides)
