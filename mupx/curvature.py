"""Capture layer inputs h and back-propagated signals δ, and turn them into Kronecker factors.

Conventions (Grosse & Martens 2016 "expand", arXiv:1602.01407; h and δ as in arXiv:2312.12226):

* a layer's input is laid out as rows ``[N, T, d_in]``: T = 1 for plain Linear, positions otherwise
  (patches in ``F.unfold`` order for convolutions);
* A = 1/(N·T) Σ h hᵀ over samples and positions, ``[d_in, d_in]``;
* B = 1/M Σ δ δᵀ, summed over positions, ``[d_out, d_out]``, where the loss is a mean over M terms and
  δ = ∂(loss of one term)/∂(layer output), that is M times the gradient of the mean loss.

Duplicating the batch, splitting it into accumulation steps, padding it with ignored targets or scaling
the loss therefore leaves A and B unchanged.

Two ways to capture give the same numbers: :class:`EagerCapture` (hooks during a normal backward pass)
and :func:`functional_gradients` (a zero *probe* added to each layer's output, whose gradient is δ),
which works under ``torch.func.grad`` and ``vmap``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from mupx.factor_sums import FactorRows, FactorSums
from mupx.layer_rows import Layer, factorable_layers, input_rows, output_rows, row_mask, unfolded_bytes
from mupx.left_out import LeftOut
from mupx.losses import Loss
from mupx.passes import Asked, asked, node_of
from mupx.patch_moments import patch_moment, pays


class EagerCapture:
    """Collect h and δ of every layer during a normal forward and backward pass.

    A compiled model runs without its compiled code meanwhile.

    Args:
        layers: Modules to watch.
        sums: Accumulators to add to, by layer name.
        loss: The loss, for its normaliser and mask; None for a plain mean over the batch dimension.
        targets: Targets of this batch; None means every sample counts once.
        loss_scale: Factor between the back-propagated quantity and the mean loss (gradient
            accumulation by 1/k, a GradScaler's scale).
        empirical: Take δ from the backward pass itself (otherwise from :meth:`add_fisher`).
        left: What of the weights' gradients these passes leave out, by layer name.
        terms: What δ is multiplied by where no loss tells how many terms it is the mean of; None means
            the number of samples, 1 leaves the signals as they are.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        sums: Mapping[str, FactorSums],
        loss: Loss | None = None,
        targets: Tensor | None = None,
        loss_scale: float = 1.0,
        empirical: bool = True,
        left: Mapping[str, LeftOut] | None = None,
        terms: int | None = None,
    ) -> None:
        self._layers, self._sums, self._loss = layers, sums, loss
        self._left = left or {}
        self._mask: Tensor | None = None
        self._terms: Tensor | int | None = terms
        if loss is not None and targets is not None:
            self._mask, self._terms = loss.mask(targets), loss.normaliser(targets)
            if self._mask is not None and _all_ones(self._mask):
                self._mask = None  # a product with it would copy every row
        self._loss_scale, self._empirical = loss_scale, empirical
        self._edges: list[tuple[str, GradientEdge]] = []
        self._nodes: dict[str, Any] = {}  # of the weights' gradients
        self._handles: list[RemovableHandle] = []
        self._counted: set[str] = set()
        self._eager: AbstractContextManager[None] = nullcontext()

    def __enter__(self) -> Self:
        # Importing dynamo takes seconds, and without it nothing is compiled.
        if "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():
            # Code that was compiled before there were hooks does not run them.
            self._eager = torch.compiler.set_stance("force_eager")
        self._eager.__enter__()
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_hook(self._hook(name)))
            if self._empirical:
                self._handles.append(layer.register_forward_pre_hook(partial(self._note_weight, name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._edges.clear()
        self._nodes.clear()
        self._eager.__exit__(kind, value, trace)

    def _note_weight(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        # Before the pass: after it a sharded layer may have let go of the weight that it used.
        self._nodes[name] = node_of(module.weight)  # type: ignore[arg-type]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def record(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            layer, sums = self._layers[name], self._sums[name]
            call = self._left[name].call_of(output) if name in self._left else None
            if call is not None and isinstance(sums, FactorRows) and not sums.summed:
                return  # the gradient alone is wanted, and is kept already
            # A layer's rows are as many as its outputs have positions: known without unfolding its input.
            if not output.requires_grad or not sums.takes(output.numel() // len(layer.weight)):
                return
            # Under autocast h and δ arrive in bf16; second moments are taken in the weight's precision.
            with torch.autocast(output.device.type, enabled=False):
                h = args[0].detach().to(layer.weight.dtype)
                if call is not None:
                    call.captured = self._mask is None
                if sums.holds and not args[0].requires_grad and isinstance(module, nn.Linear):
                    h = h.clone()  # data, whose buffer may have the next batch before the step
                terms = h.shape[0] if self._terms is None else self._terms
                if name not in self._counted:
                    self._counted.add(name)
                    sums.add_terms(terms)
                self._add_inputs(name, module, h, output.numel() // len(layer.weight))
            if self._empirical:
                if isinstance(terms, Tensor) and layer.weight.dtype == torch.float64:
                    terms = terms.double()  # a whole number over a float would be float32
                node, scale = self._nodes.get(name), terms / self._loss_scale
                # A pass that is not for the weights, such as an input's gradient, is not the loss's.
                output.register_hook(
                    lambda g: None if asked(node) is Asked.NOT else self._add_delta(name, g, scale)
                )
            else:
                self._edges.append((name, get_gradient_edge(output)))

        return record

    def _add_inputs(self, name: str, module: nn.Module, h: Tensor, rows: int) -> None:
        sums, size = self._sums[name], unfolded_bytes(module, rows)
        mask = row_mask(self._mask, len(h), rows // max(len(h), 1))
        if isinstance(module, nn.Conv2d) and mask is None and not sums.keeps_rows and pays(module, h):
            sums.add_input_sum(patch_moment(module, h), rows)
            return
        parts = 1 if sums.at_once is None else max(1, min(len(h), -(-size // sums.at_once)))
        masks = [None] * parts if mask is None else mask.tensor_split(parts)
        for part, own in zip(h.tensor_split(parts) if parts > 1 else (h,), masks, strict=True):
            sums.add_inputs(input_rows(module, part), own)

    def _add_delta(self, name: str, gradient: Tensor, scale: Tensor | float) -> None:
        layer, sums = self._layers[name], self._sums[name]
        sums.arrived = gradient.dtype
        sums.add_outputs(output_rows(layer, gradient.detach().to(layer.weight.dtype)), scale)

    def add_fisher(self, outputs: Tensor, exact: bool, generator: Any = None, labels: Any = None) -> None:
        """Back-propagate the model's own output distribution to every layer.

        Args:
            outputs: The model's outputs ``[N, …, C]``, still attached to the graph.
            exact: All classes (C backward passes) instead of one sampled label.
            generator: Source of the sampled labels.
            labels: Labels to use instead of sampling (Monte-Carlo only).
        """
        assert self._loss is not None
        if exact:
            directions = self._loss.exact_gradients(outputs)
        else:
            directions = self._loss.sampled_gradients(outputs, generator, labels).unsqueeze(0)
        self.backpropagate(outputs, directions)

    def backpropagate(self, outputs: Tensor, directions: Iterable[Tensor]) -> None:
        """Back-propagate given directions ``[N, …, C]``, one after the other, to every layer."""
        edges = [edge for _, edge in self._edges]
        for direction in directions:
            if self._mask is not None:
                direction = direction * self._mask.unsqueeze(-1)
            gradients = torch.autograd.grad(outputs, edges, direction, retain_graph=True)
            for (name, _), gradient in zip(self._edges, gradients, strict=True):
                self._add_delta(name, gradient, 1.0)


class Captured(NamedTuple):
    """What one functional pass yields; a tuple, so that ``vmap`` can return it.

    Attributes:
        gradients: By parameter name.
        inputs: h by layer name, ``[..., N·T, d_in]``, in the precision the layer gets it in.
        signals: ∂(mean loss)/∂(layer output) by layer name, ``[..., N·T, d_out]``: δ over ``terms``.
        weights: By layer name, ``[..., N·T]``: 1 for rows that count, 0 for ignored ones.
        loss: ``[...]``.
        outputs: ``[..., N, …, C]``.
        terms: Number of terms the loss is a mean over, ``[...]``.
    """

    gradients: dict[str, Tensor]
    inputs: dict[str, Tensor]
    signals: dict[str, Tensor]
    weights: dict[str, Tensor]
    loss: Tensor
    outputs: Tensor
    terms: Tensor

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return (A, B) of one layer, with whatever leading dimensions the capture was mapped over."""
        signal, weights = self.signals[name], self.weights[name]
        h = self.inputs[name].to(signal.dtype)
        kept = h if _all_ones(weights) else h * weights.unsqueeze(-1)
        A = h.mT @ kept / weights.sum(-1)[..., None, None]
        return A, signal.mT @ signal * self.terms[..., None, None]


def _all_ones(weights: Tensor) -> bool:
    """Whether no row is ignored, where looking costs less than a pass over the rows: not on a GPU."""
    return weights.device.type == "cpu" and bool(weights.eq(1).all())


def functional_gradients(
    model: nn.Module,
    loss: Loss,
    parameters: Mapping[str, Tensor],
    inputs: Tensor,
    targets: Tensor,
    probes: Mapping[str, Tensor],
    but: Collection[str] = (),
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Captured:
    """Return gradients, layer inputs and signals as one pure function, for ``torch.func`` and ``vmap``.

    Args:
        model: The module, used for its structure only.
        loss: A mean over terms; outputs ``[N, …, C]``.
        parameters: Name → tensor; under ``vmap`` with a leading population dimension.
        inputs: One batch.
        targets: Its targets.
        probes: Layer name → zeros of the layer's output shape (see :func:`zero_probes`).
        but: Parameters whose gradient is left out.
        precision: Returns the context the model runs forward in, such as autocast. Outputs, gradients and
            signals are in the precision of the parameters whatever it is.
    """
    constant = {name: value for name, value in parameters.items() if name in but}
    varied = {name: value for name, value in parameters.items() if name not in but}
    layers = {name: model.get_submodule(name) for name in probes}
    terms = torch.as_tensor(loss.normaliser(targets), device=inputs.device)
    mask, dtype = loss.mask(targets), next(iter(parameters.values())).dtype

    def forward(
        values: Mapping[str, Tensor], added: Mapping[str, Tensor]
    ) -> tuple[Tensor, tuple[dict[str, Tensor], dict[str, Tensor], Tensor]]:
        rows: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}

        def probe(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
                h = input_rows(module, args[0])
                kept = row_mask(mask, *h.shape[:2])
                ones = torch.ones(h.shape[:2], dtype=added[name].dtype, device=h.device)
                rows[name] = h.flatten(0, 1)
                weights[name] = (ones if kept is None else ones * kept).flatten()
                return output + added[name].to(output.dtype)

            return hook

        handles = [layer.register_forward_hook(probe(name)) for name, layer in layers.items()]
        try:
            with precision():
                outputs = torch.func.functional_call(model, {**values, **constant}, (inputs,))
        finally:
            for handle in handles:
                handle.remove()
        outputs = outputs.to(dtype)
        return loss(outputs, targets), (rows, weights, outputs)

    (gradients, signals), (value, (rows, weights, outputs)) = torch.func.grad_and_value(
        forward, argnums=(0, 1), has_aux=True
    )(varied, probes)
    signals = {name: output_rows(layers[name], signal) for name, signal in signals.items()}
    return Captured(gradients, rows, signals, weights, value, outputs, terms)


def zero_probes(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Return zeros of every factorable layer's output shape for this batch."""
    shapes: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            shapes[name] = torch.zeros_like(output)

        return hook

    layers = factorable_layers(model)
    handles = [layer.register_forward_hook(recorder(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return shapes
