"""An optimizer that knows nothing of mupx, in the place of one that does."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mupx.optim.base import Base, Scale


class Adapter:
    """Any ``torch.optim.Optimizer``, with AdamW beside it for what its rule does not treat.

    Args:
        own: The user's optimizer.
        rest: What treats the other parameters; None where there are none.
    """

    def __init__(self, own: torch.optim.Optimizer, rest: Base | None) -> None:
        self.own, self.rest = own, rest
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

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self._parts:
            part.zero_grad()

    def step(self) -> None:
        """Do one step."""
        for part in self._parts:
            part.step()

    def curvature(
        self, targets: Tensor | None = None, *, loss_scale: float = 1.0
    ) -> AbstractContextManager[None]:
        """Wrap the forward and backward pass, where the optimizer wants that."""
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
        return {"own": self.own.state_dict(), **rest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.own.load_state_dict(state["own"])
        if self.rest is not None:
            self.rest.load_state_dict(state["rest"])


Trainable = Base | Adapter


def _no_curvature(targets: Tensor | None = None, *, loss_scale: float = 1.0) -> AbstractContextManager[None]:
    return nullcontext()


def _no_update(outputs: Tensor, labels: Tensor | None = None) -> None:
    return None
