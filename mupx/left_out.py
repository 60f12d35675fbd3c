"""Weight gradients that a backward pass leaves out, kept as the rows they are made of.

Of the products of a Linear layer's passes one gives the gradient of its weight, G = gᵀ h. An update that is
made of the rows g and h themselves (:func:`mupx.preconditioning.thin_update`) never looks at it. Inside
:func:`leaving_out` a layer's backward pass keeps the rows in place of their product. Whatever else the weight
is used for is differentiated as ever and arrives in ``weight.grad``: the gradient is the sum of both, so
nothing has to be known about the model. Passes that do not ask for the weight's gradient, such as the
gradient with respect to an input, keep nothing; those that return it or are differentiated again make it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor, nn

from mupx.factor_sums import FactorRows, FactorSums, joined
from mupx.lowrank import Thin
from mupx.passes import Asked, asked


class Call:
    """One call of a layer whose weight's gradient is left out.

    Attributes:
        captured: Whether a capture took the rows of this call as they are, none of them ignored.
    """

    def __init__(self, left: LeftOut) -> None:
        self.left = left
        self.captured = False


class _Linear(torch.autograd.Function):
    """``F.linear``; its backward pass gives the rows to a :class:`Call`, and no gradient of the weight."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.call = call
        return F.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        inputs, weight = ctx.saved_tensors
        rows = g.reshape(-1, g.shape[-1])
        back = (rows @ weight).view(inputs.shape) if ctx.needs_input_grad[0] else None
        sums = rows.sum(0) if ctx.needs_input_grad[2] else None
        wanted = asked(ctx.next_functions[1][0])
        if wanted is Asked.RETURNED or torch.is_grad_enabled():
            return back, rows.mT @ inputs.reshape(-1, inputs.shape[-1]), sums, None
        if wanted is Asked.ADDED:
            # What needs no gradient is data, whose buffer may have the next batch before the step.
            h = inputs.detach() if inputs.requires_grad else inputs.clone()
            ctx.call.left.add(ctx.call, h.reshape(-1, h.shape[-1]), rows)
        return back, None, sums, None


class LeftOut:
    """What the passes leave out of one weight's gradient.

    Args:
        layer: The layer.
        pays: Whether to leave the gradient out of a call with so many rows.
    """

    def __init__(self, layer: nn.Linear, pays: Callable[[int], bool]) -> None:
        self.layer, self.weight = layer, layer.weight
        self._pays = pays
        self._parts: list[tuple[Call, Tensor, Tensor]] = []  # with h [n, d_in] and g [n, d_out]
        self._thin: Thin | None = None  # what they are together
        self._latest: tuple[Tensor, Call] | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the layer's outputs ``[…, d_out]`` for ``[…, d_in]``."""
        weight, bias = self.layer.weight, self.layer.bias
        if not (self._is_plain(weight, inputs) and self._pays(inputs.numel() // inputs.shape[-1])):
            return F.linear(inputs, weight, bias)
        call, device = Call(self), inputs.device.type
        tensors: tuple[Tensor | None, ...] = (inputs, weight, bias)
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            tensors = tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)
        with torch.autocast(device, enabled=False):
            output: Tensor = _Linear.apply(*tensors, call)  # type: ignore[no-untyped-call]
        self._latest = output, call
        return output

    def _is_plain(self, weight: Tensor, inputs: Tensor) -> bool:
        # Somebody's hook may edit the gradient or look at it. Under torch.func a tensor is not what it seems.
        if weight._backward_hooks or weight._post_accumulate_grad_hooks:
            return False
        if torch._C._are_functorch_transforms_active() or fwAD.unpack_dual(inputs).tangent is not None:
            return False
        return weight is self.weight and weight.requires_grad and torch.is_grad_enabled()

    @torch.no_grad()
    def add(self, call: Call, h: Tensor, g: Tensor) -> None:
        """Add the rows of a call, ``[n, d_in]`` and ``[n, d_out]``, in whatever precision."""
        self._parts.append((call, h.to(self.weight.dtype), g.detach().to(self.weight.dtype)))
        self._thin = None
        # More rows than the weight has would take more memory than the gradient.
        if sum(len(part) for _, _, part in self._parts) > max(self.weight.shape):
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
        self._thin = Thin(joined([g for _, _, g in self._parts]), joined([h for _, h, _ in self._parts]))
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
