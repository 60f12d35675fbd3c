"""An optimizer that knows nothing of mupx, in the place of one that does."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mupx.gradients import all_finite
from mupx.optim.base import Base, Gradient, Scale


class Adapter:
    """Any ``torch.optim.Optimizer``, with AdamW beside it for what its rule does not treat.

    Args:
        own: The user's optimizer.
        rest: What treats the other parameters; None where there are none.
    """

    def __init__(self, own: torch.optim.Optimizer, rest: Base | None) -> None:
        self.own, self.rest = own, rest
        self.skipped_steps = self.skipped_in_a_row = 0
        for group in own.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self._curvature = getattr(own, "curvature", _no_curvature)
        self._update_curvature = getattr(own, "update_curvature", _no_update)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of both."""
        return [group for part in self._parts for group in part.param_groups]

    @property
    def _parts(self) -> list[torch.optim.Optimizer]:
        return [self.own, *([] if self.rest is None else [self.rest])]

    @property
    def repairs(self) -> Mapping[str, int]:
        """Repaired factors, of which nothing is known here."""
        return {}

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self._parts:
            part.zero_grad()

    def step(self) -> None:
        """Do one step of both, or none where a gradient is not finite (see :meth:`Base.step`)."""
        gradients = (p.grad for group in self.param_groups for p in group["params"])
        # What is sparse is its own optimizer's affair.
        if not all_finite([g for g in gradients if g is not None and g.layout is torch.strided]):
            self.skipped_steps, self.skipped_in_a_row = self.skipped_steps + 1, self.skipped_in_a_row + 1
            return
        self.skipped_in_a_row = 0
        for part in self._parts:
            part.step()

    def gradient_of(self, parameter: Tensor) -> Gradient | None:
        """Return the gradient that the coming step is made from, or None where there is none."""
        return parameter.grad

    def curvature(
        self, targets: Tensor | None = None, *, loss_scale: float = 1.0, gradients: bool = True
    ) -> AbstractContextManager[None]:
        """Wrap the forward and backward pass, where the optimizer wants that; it gets all gradients."""
        context: AbstractContextManager[None] = self._curvature(targets, loss_scale=loss_scale)
        return context

    def update_curvature(self, outputs: Tensor, labels: Tensor | None = None) -> None:
        """Offer the model's outputs between forward and backward pass."""
        self._update_curvature(outputs, labels)

    def scales(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Scale]:
        """Return the sizes behind the last update, known only of the parameters beside."""
        return self.rest.scales(parameter, group) if self.rest is not None else {}

    def least(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, float]:
        """Return nothing: the statistics of a foreign optimizer are not known."""
        return {}

    def precondition(
        self, parameter: Tensor, vector: Tensor, group: dict[str, Any], *, inverse: bool = False
    ) -> Tensor | None:
        """Return P v or P⁻¹ v, known only of the parameters beside."""
        return (
            None if self.rest is None else self.rest.precondition(parameter, vector, group, inverse=inverse)
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both."""
        rest = {} if self.rest is None else {"rest": self.rest.state_dict()}
        skips = {"skipped_steps": self.skipped_steps, "skipped_in_a_row": self.skipped_in_a_row}
        return {"own": self.own.state_dict(), **rest, **skips}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.own.load_state_dict(state["own"])
        if self.rest is not None:
            self.rest.load_state_dict(state["rest"])
        self.skipped_steps = state.get("skipped_steps", 0)
        self.skipped_in_a_row = state.get("skipped_in_a_row", 0)


Trainable = Base | Adapter


def _no_curvature(targets: Tensor | None = None, *, loss_scale: float = 1.0) -> AbstractContextManager[None]:
    return nullcontext()


def _no_update(outputs: Tensor, labels: Tensor | None = None) -> None:
    return None
