"""Weight gradients that a backward pass leaves out, kept as the rows they are made of.

Of the products of a Linear layer's passes one gives the gradient of its weight, G = gᵀ h. An update that is
made of the rows g and h themselves (:func:`mupx.preconditioning.thin_update`) never looks at it. Inside
:func:`leaving_out` a layer multiplies by its weight as by a constant, and what G is made of is kept. Whatever
else the weight is used for is differentiated as ever and arrives in ``weight.grad``: the gradient is the sum
of both, so nothing has to be known about the model.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mupx.errors import UsageError
from mupx.factor_sums import FactorRows, FactorSums, joined
from mupx.lowrank import Thin


class Call:
    """One call of a layer whose weight's gradient is left out.

    Attributes:
        h: The layer's input ``[…, d_in]`` in the precision of its weight.
        captured: Whether a capture took the rows of this call as they are, none of them ignored.
    """

    def __init__(self, h: Tensor) -> None:
        self.h = h
        self.captured = False


class LeftOut:
    """What the passes leave out of one weight's gradient.

    Args:
        name: The layer's, for messages.
        layer: The layer.
        pays: Whether to leave the gradient out of a call with so many rows.
    """

    def __init__(self, name: str, layer: nn.Linear, pays: Callable[[int], bool]) -> None:
        self.layer, self.weight = layer, layer.weight
        self._name, self._pays = name, pays
        self._parts: list[tuple[Call, Tensor]] = []  # each with its g [n, d_out], once that has come
        self._thin: Thin | None = None  # what they are together
        self._latest: tuple[Tensor, Call] | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the layer's outputs ``[…, d_out]`` for ``[…, d_in]``."""
        weight, bias = self.layer.weight, self.layer.bias
        if not (self._is_trained(weight, inputs, bias) and self._pays(inputs.numel() // inputs.shape[-1])):
            return F.linear(inputs, weight, bias)
        output = F.linear(inputs, weight.detach(), bias)
        h = inputs.detach().to(weight.dtype)
        if not inputs.requires_grad:
            h = h.clone()  # data, whose buffer may have the next batch before the step
        call, version = Call(h), h._version

        def arrived(gradient: Tensor) -> None:
            if h._version != version:
                raise UsageError(
                    f"the input of layer {self._name!r} was changed in place after its forward pass, and its "
                    "weight's gradient needs it; change a copy instead"
                )
            self._add(call, gradient.detach().flatten(0, -2).to(weight.dtype))

        output.register_hook(arrived)
        self._latest = output, call
        return output

    def _is_trained(self, weight: Tensor, inputs: Tensor, bias: Tensor | None) -> bool:
        # Somebody's hook may edit the gradient or look at it. Under torch.func the weight is another tensor.
        watched = weight._backward_hooks or weight._post_accumulate_grad_hooks
        differentiable = inputs.requires_grad or (bias is not None and bias.requires_grad)
        trained = weight is self.weight and weight.requires_grad and torch.is_grad_enabled()
        return trained and differentiable and not watched

    @torch.no_grad()
    def _add(self, call: Call, g: Tensor) -> None:
        self._parts.append((call, g))
        self._thin = None
        # More rows than the weight has would take more memory than the gradient.
        if sum(len(part) for _, part in self._parts) > max(self.weight.shape):
            self.multiply_out()

    def call_of(self, output: Tensor) -> Call | None:
        """Return the call that gave this output, if it was the last one."""
        return self._latest[1] if self._latest is not None and self._latest[0] is output else None

    def forget_output(self) -> None:
        """Let go of the last output, and the graph behind it."""
        self._latest = None

    @property
    def thin(self) -> Thin | None:
        """The sum of what was left out, or None where nothing was."""
        if not self._parts or self._thin is not None:
            return self._thin
        H = joined([call.h.flatten(0, -2) for call, _ in self._parts])
        self._thin = Thin(joined([g for _, g in self._parts]), H)
        return self._thin

    def multiply_out(self) -> None:
        """Add what was left out to the weight's ``grad``."""
        thin = self.thin
        if thin is not None:
            self.weight.grad = thin.product if self.weight.grad is None else self.weight.grad + thin.product
        self._parts, self._thin = [], None

    def is_captured(self, rows: FactorSums | None) -> bool:
        """Whether the rows that a capture kept are these, its δ up to a factor.

        Args:
            rows: What the capture kept.
        """
        kept = isinstance(rows, FactorRows) and len(rows.h) == len(rows.delta) == 1
        return kept and len(self._parts) == 1 and self._parts[0][0].captured


def can_leave_out(layer: nn.Module) -> bool:
    """Whether a layer's forward pass is torch's own and multiplies by a parameter as it is."""
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        return False
    return "weight" in layer._parameters and "forward" not in layer.__dict__


@contextmanager
def leaving_out(gradients: Iterable[LeftOut]) -> Generator[None]:
    """Leave these gradients out of the passes inside."""
    replaced = list(gradients)
    for each in replaced:
        each.layer.__dict__["forward"] = each.forward
    try:
        yield
    finally:
        for each in replaced:
            del each.layer.__dict__["forward"]
            each.forget_output()
