"""What the optimizers share that can do a step without some weights' gradients, from the rows of a pass."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

from mupx.layer_rows import Layer
from mupx.left_out import LeftOut, can_leave_out
from mupx.optim.base import Gradient, Moving
from mupx.optim.divided import Divided


class ByRows(Divided):
    """An optimizer that makes thin updates where they pay, see :mod:`mupx.left_out`.

    What a backward pass leaves out is forgotten with the step, or by :meth:`forget`.
    """

    _left: dict[int, LeftOut] = {}  # noqa: RUF012 - by weight; replaced, and changed only once it is an instance's

    def left_out(self, layers: Mapping[str, Layer]) -> dict[str, LeftOut]:
        """Return what the coming passes may leave out, by name, of the weights of these layers."""
        found = {}
        for name, layer in layers.items():
            if not isinstance(layer, nn.Linear) or not can_leave_out(layer):
                continue
            left = self._left.get(id(layer.weight)) or LeftOut(layer, partial(self.leaves_out, layer.weight))
            if left.layer is layer:  # and no other one that shares the weight
                found[name] = left
                self._left = {**self._left, id(layer.weight): left}
        return found

    def leaves_out(self, weight: Tensor, rows: int) -> bool:
        """Whether the coming step is cheaper without the gradient of a weight than with it.

        Args:
            weight: Of a Linear layer.
            rows: How many rows the layer's inputs and outputs have.
        """
        return False

    def forget(self) -> None:
        """Drop what the passes captured for a step that will not be done."""
        self._left = {}

    def before_gradients(self) -> None:
        """Multiply out what was left out of a gradient that came in part."""
        for left in self._left.values():
            if left.weight.grad is not None:
                left.multiply_out()

    def gradient_of(self, parameter: Tensor) -> Gradient | None:
        """Return a gradient, thin where it was left out of the backward pass."""
        left = self._left.get(id(parameter))
        return parameter.grad if left is None or left.thin is None else left.thin

    def update_all(self, moving: Moving) -> None:
        """Move the parameters that have a gradient, left out of the backward pass or not."""
        super().update_all(moving)
        self._left = {}  # not waiting for zero_grad: the model's knows nothing of them
