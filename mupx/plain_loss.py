"""Losses of the user's own: any callable (outputs, targets) → scalar mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mupx.blame import calling
from mupx.errors import UsageError
from mupx.losses import LOSSES, Loss
from mupx.usercode import is_reference, load_callable

LIKELIHOOD = ("mask", "normaliser", "sampled_gradients", "exact_gradients")


class PlainLoss:
    """A callable that returns a mean; no likelihood is known, so only the empirical Fisher is defined.

    Args:
        name: Its reference, for error messages.
        function: (outputs, targets) → scalar: the mean over integer targets, or over samples.
    """

    def __init__(self, name: str, function: Callable[[Tensor, Tensor], Any]) -> None:
        self.name, self.function = name, function

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss.

        Raises:
            UsageError: What the function returns is no scalar.
        """
        with calling(self.name, lambda: f"called with {_shape(outputs)} and {_shape(targets)}"):
            value = self.function(outputs, targets)
        if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
            given = _shape(value) if isinstance(value, Tensor) else type(value).__name__
            raise UsageError(f"train.loss = {self.name} returned {given}; return the mean, a scalar tensor")
        return value

    def mask(self, targets: Tensor) -> Tensor | None:
        """Return None: every term counts."""
        return None

    def normaliser(self, targets: Tensor) -> Tensor | int:
        """Return the number of terms: of targets where they are classes, else of samples."""
        return len(targets) if targets.is_floating_point() else targets.numel()

    def sampled_gradients(
        self, outputs: Tensor, generator: torch.Generator | None, labels: Tensor | None = None
    ) -> Tensor:
        """Refuse: there is no likelihood to draw targets from."""
        raise no_likelihood(self.name)

    def exact_gradients(self, outputs: Tensor) -> Tensor:
        """Refuse: there is no likelihood whose Fisher could be exact."""
        raise no_likelihood(self.name)


class LikelihoodLoss(PlainLoss):
    """An object with the whole of :class:`mupx.losses.Loss`.

    Args:
        name: Its reference.
        loss: The object.
    """

    def __init__(self, name: str, loss: Loss) -> None:
        super().__init__(name, loss)
        self.loss = loss

    def mask(self, targets: Tensor) -> Tensor | None:
        """Return the object's mask."""
        return self.loss.mask(targets)

    def normaliser(self, targets: Tensor) -> Tensor | int:
        """Return the object's number of terms."""
        return self.loss.normaliser(targets)

    def sampled_gradients(
        self, outputs: Tensor, generator: torch.Generator | None, labels: Tensor | None = None
    ) -> Tensor:
        """Return the object's gradients for targets drawn from the model."""
        return self.loss.sampled_gradients(outputs, generator, labels)

    def exact_gradients(self, outputs: Tensor) -> Tensor:
        """Return the object's gradients whose outer products sum to the Fisher."""
        return self.loss.exact_gradients(outputs)


def find_loss(name: str) -> Loss:
    """Return the loss of a name: a known one, or the user's own.

    A class is instantiated without arguments: ``torch.nn:MSELoss`` works.
    """
    if not is_reference(name):
        return LOSSES[name]
    target: Any = load_callable(name, "train.loss", "a function of (outputs, targets)")
    if isinstance(target, type):
        with calling(name, "when it was made without arguments"):
            target = target()
    complete = all(hasattr(target, method) for method in LIKELIHOOD)
    return LikelihoodLoss(name, target) if complete else PlainLoss(name, target)


def no_likelihood(name: str) -> UsageError:
    """Return the error for a Fisher that a plain callable does not define."""
    return UsageError(
        f"train.loss = {name} is a plain function: it names no likelihood, so only optimizer.fisher = "
        "empirical is defined; give an object with the methods of mupx.losses.Loss for mc and exact"
    )


def _shape(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")
