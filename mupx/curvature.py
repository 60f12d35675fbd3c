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
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from mupx.errors import UsageError
from mupx.linalg import Scalar, gram
from mupx.losses import Loss
from mupx.lowrank import Thin
from mupx.roles.axes import factorable

Layer = nn.Linear | nn.Conv2d
UNFOLDED = 2**25  # bytes of a convolution's patches laid out at a time: what a cache holds, not a batch
SHORT_LINE = 4  # positions in a line of a feature map, below which copying line by line is slower


def factorable_layers(model: nn.Module) -> dict[str, Layer]:
    """Return the layers of ``model`` that K-FAC can factor, by qualified name."""
    layers = ((name, m) for name, m in model.named_modules() if factorable(m))
    return {name: m for name, m in layers if m.weight.numel()}  # nothing is known of a side without units


def input_rows(layer: nn.Module, h: Tensor) -> Tensor:
    """Lay a layer's input out as rows ``[N, T, d_in]``."""
    if isinstance(layer, nn.Conv2d):
        return _patches(layer, h)
    return h.reshape(h.shape[0], -1, h.shape[-1])


def _patches(layer: nn.Conv2d, h: Tensor) -> Tensor:
    """Lay out the patches ``[N, T, d_in]`` with one copy.

    Position by position, as a row has them, what is copied lies scattered. With the positions of a patch's
    entry side by side whole lines are copied, which is four times as fast unless lines are short.
    """
    left, right, top, bottom = _padding(layer)
    windows = F.pad(h, (left, right, top, bottom))
    for axis, (size, gap, stride) in enumerate(
        zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)
    ):
        windows = windows.unfold(2 + axis, (size - 1) * gap + 1, stride)[..., ::gap]
    N, C, rows, columns, high, wide = windows.shape
    d_in, T = C * high * wide, rows * columns
    if columns < SHORT_LINE:
        return windows.permute(0, 2, 3, 1, 4, 5).reshape(N, T, d_in)
    return windows.permute(1, 4, 5, 0, 2, 3).reshape(d_in, N, T).permute(1, 2, 0)


def output_rows(layer: nn.Module, delta: Tensor) -> Tensor:
    """Lay a gradient with respect to a layer's output out as rows ``[N·T, d_out]``."""
    if isinstance(layer, nn.Conv2d):
        return delta.movedim(1, -1).reshape(-1, delta.shape[1])
    return delta.reshape(-1, delta.shape[-1])


def unfolded_bytes(layer: nn.Module, rows: int) -> int:
    """Return the bytes that laying out so many rows takes beyond the input; none but a convolution's."""
    if not isinstance(layer, nn.Conv2d):
        return 0
    return rows * layer.weight[0].numel() * layer.weight.element_size()


def row_mask(mask: Tensor | None, samples: int, positions: int) -> Tensor | None:
    """Return a loss's mask as ``[N, T]`` or ``[N, 1]`` where it speaks of so many rows, else None."""
    if mask is not None and mask.numel() == samples * positions:
        return mask.reshape(samples, positions)
    return mask.unsqueeze(1) if mask is not None and mask.shape == (samples,) else None


def _padding(layer: nn.Conv2d) -> tuple[int, int, int, int]:
    if isinstance(layer.padding, str):
        # torch keeps the resolved "same"/"valid" padding in F.pad order.
        left, right, top, bottom = layer._reversed_padding_repeated_twice
        return left, right, top, bottom
    vertical, horizontal = layer.padding
    return horizontal, horizontal, vertical, vertical


def nothing_captured() -> UsageError:
    """Return the error for a refresh without the passes it needs."""
    return UsageError(
        "no curvature captured: run the forward and the backward pass inside `with opt.curvature():`"
        " (and call `opt.update_curvature(outputs)` for the Monte-Carlo and exact Fisher)"
    )


def joined(passes: list[Tensor]) -> Tensor:
    """Return the rows of several passes as one tensor, of a single pass as they are."""
    return passes[0] if len(passes) == 1 else torch.cat(passes)


@dataclass
class FactorSums:
    """Running sums behind one layer's A and B; adding micro-batches gives the factors of the batch."""

    inputs: Tensor | None = None
    input_count: Tensor | float = 0.0
    outputs: Tensor | None = None
    output_count: Tensor | float = 0.0
    at_once: ClassVar[int | None] = UNFOLDED  # bytes of patches laid out at a time; None: all of a pass
    holds: ClassVar[bool] = False  # whether rows are looked at again after the pass

    def takes(self, rows: int) -> bool:
        """Announce the N·T rows of one more pass and return whether they are wanted; asked before unfolding.

        Args:
            rows: N·T.
        """
        return True

    def add_inputs(self, rows: Tensor, mask: Tensor | None) -> None:
        """Add Σ h hᵀ over the rows ``[N, T, d_in]`` that ``mask`` ([N, T] or [N, 1]) keeps."""
        flat = rows.flatten(0, 1)
        kept = flat
        count: Tensor | float = float(flat.shape[0])
        if mask is not None:
            weights = mask.to(rows.dtype).expand(rows.shape[:2]).reshape(-1, 1)
            kept, count = flat * weights, weights.sum()
        self._keep_inputs(kept)
        self.input_count = self.input_count + count

    def add_terms(self, terms: Tensor | float) -> None:
        """Count the loss's terms of one more pass; its inputs follow."""
        self.output_count = self.output_count + terms

    def add_outputs(self, rows: Tensor, scale: Tensor | float) -> None:
        """Add Σ δ δᵀ for δ = scale · rows, rows ``[N·T, d_out]``."""
        self._keep_outputs(rows * scale)

    def _keep_inputs(self, rows: Tensor) -> None:
        product = gram(rows)
        self.inputs = product if self.inputs is None else self.inputs + product

    def _keep_outputs(self, rows: Tensor) -> None:
        product = gram(rows)
        self.outputs = product if self.outputs is None else self.outputs + product

    def factor(self, side: str) -> Tensor:
        """Return A or B.

        Args:
            side: ``"A"`` or ``"B"``.

        Raises:
            UsageError: The layer saw no forward or no backward pass.
        """
        total, count = {"A": (self.inputs, self.input_count), "B": (self.outputs, self.output_count)}[side]
        if total is None:
            raise nothing_captured()
        return total / count

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (A, B), as :meth:`factor` does."""
        return self.factor("A"), self.factor("B")


@dataclass
class FactorRows(FactorSums):
    """The rows h and δ themselves, as long as there are at most ``limit`` of each; then their sums.

    With fewer rows than units both the factors and the gradient are products of thin matrices, and
    everything K-FAC and Shampoo do with them is cheaper before they are multiplied out. Where only the
    gradient is wanted (``summed`` False), too many rows are not taken: the rows of some passes alone are of
    no use, and for a convolution laying them out costs more than the step.
    """

    holds: ClassVar[bool] = True
    limit: int = 0
    summed: bool = True
    announced: int = 0
    h: list[Tensor] = field(default_factory=list)
    delta: list[Tensor] = field(default_factory=list)
    alone: set[str] = field(default_factory=set)  # sides whose solver was made of these rows and no others

    def takes(self, rows: int) -> bool:
        """Count the rows, and drop what there is when only the gradient is wanted and they are too many."""
        self.announced += rows
        if self.summed or self.announced <= self.limit:
            return True
        self.h.clear()
        self.delta.clear()
        return False

    def _keep_inputs(self, rows: Tensor) -> None:
        self._keep(self.h, rows, super()._keep_inputs, self.inputs)

    def _keep_outputs(self, rows: Tensor) -> None:
        self._keep(self.delta, rows, super()._keep_outputs, self.outputs)

    def _keep(
        self, kept: list[Tensor], rows: Tensor, add: Callable[[Tensor], None], total: Tensor | None
    ) -> None:
        kept.append(rows)
        if total is not None or sum(map(len, kept)) > self.limit:
            for each in kept if self.summed else ():
                add(each)
            kept.clear()

    def sum_up(self) -> None:
        """Turn what is kept as rows into sums."""
        for rows, add in ((self.h, super()._keep_inputs), (self.delta, super()._keep_outputs)):
            for each in rows if self.summed else ():
                add(each)
            rows.clear()

    def unscaled(self, side: str) -> tuple[Tensor, Scalar] | None:
        """Return a thin F ``[d, n]`` and c with F Fᵀ / c = the factor, or None where rows were summed up."""
        rows, count = {"A": (self.h, self.input_count), "B": (self.delta, self.output_count)}[side]
        return (joined(rows).mT, count) if rows else None

    def columns(self, side: str) -> Tensor | None:
        """Return a thin F ``[d, n]`` with F Fᵀ = the factor, or None where the rows were summed up."""
        found = self.unscaled(side)
        if found is None:
            return None
        F, count = found
        return F / torch.as_tensor(count, dtype=F.dtype, device=F.device).sqrt()

    def factor(self, side: str) -> Tensor:
        """Return A or B, as :meth:`FactorSums.factor`."""
        F = self.columns(side)
        return super().factor(side) if F is None else gram(F.mT)

    def gradient(self, actual: Tensor) -> Thin | None:
        """Return the weight gradient as a thin product, or None.

        The rows give the gradient of this pass's loss up to one factor. A probe c·DᵀH v = G v finds the
        factor and tells whether it is all: clipping and loss scaling pass, a gradient that was averaged
        over ranks, decayed or otherwise edited does not.

        Args:
            actual: G as the optimizer sees it, ``[d_out, d_in]``.
        """
        if not (self.h and self.delta):
            return None
        H, D = joined(self.h), joined(self.delta)
        if len(H) != len(D):
            return None
        probe = torch.cos(torch.arange(1, H.shape[1] + 1, dtype=H.dtype, device=H.device))
        wanted, found = actual @ probe, D.mT @ (H @ probe)
        factor = (wanted @ found) / (found @ found)
        error = (wanted - factor * found).norm() / wanted.norm()
        scale, missed = torch.stack((factor, error)).tolist()
        return Thin(D, H, scale) if missed < 1000 * torch.finfo(H.dtype).eps else None


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
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        sums: Mapping[str, FactorSums],
        loss: Loss | None = None,
        targets: Tensor | None = None,
        loss_scale: float = 1.0,
        empirical: bool = True,
    ) -> None:
        self._layers, self._sums, self._loss = layers, sums, loss
        self._mask: Tensor | None = None
        self._terms: Tensor | int | None = None
        if loss is not None and targets is not None:
            self._mask, self._terms = loss.mask(targets), loss.normaliser(targets)
            if self._mask is not None and _all_ones(self._mask):
                self._mask = None  # a product with it would copy every row
        self._loss_scale, self._empirical = loss_scale, empirical
        self._edges: list[tuple[str, GradientEdge]] = []
        self._handles: list[RemovableHandle] = []
        self._counted: set[str] = set()
        self._eager: AbstractContextManager[None] = nullcontext()

    def __enter__(self) -> Self:
        # Importing dynamo takes seconds, and without it nothing is compiled.
        if "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():
            # Code that was compiled before there were hooks does not run them.
            self._eager = torch.compiler.set_stance("force_eager")
        self._eager.__enter__()
        self._handles = [
            layer.register_forward_hook(self._hook(name)) for name, layer in self._layers.items()
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._edges.clear()
        self._eager.__exit__(kind, value, trace)

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def record(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            layer = self._layers[name]
            # A layer's rows are as many as its outputs have positions: known without unfolding its input.
            if not output.requires_grad or not self._sums[name].takes(output.numel() // len(layer.weight)):
                return
            # Under autocast h and δ arrive in bf16; second moments are taken in the weight's precision.
            with torch.autocast(output.device.type, enabled=False):
                h = args[0].detach().to(layer.weight.dtype)
                if self._sums[name].holds and not args[0].requires_grad and isinstance(module, nn.Linear):
                    h = h.clone()  # data, whose buffer may have the next batch before the step
                terms = h.shape[0] if self._terms is None else self._terms
                if name not in self._counted:
                    self._counted.add(name)
                    self._sums[name].add_terms(terms)
                self._add_inputs(name, module, h, output.numel() // len(layer.weight))
            if self._empirical:
                if isinstance(terms, Tensor) and layer.weight.dtype == torch.float64:
                    terms = terms.double()  # a whole number over a float would be float32
                output.register_hook(lambda g: self._add_delta(name, g, terms / self._loss_scale))
            else:
                self._edges.append((name, get_gradient_edge(output)))

        return record

    def _add_inputs(self, name: str, module: nn.Module, h: Tensor, rows: int) -> None:
        sums, size = self._sums[name], unfolded_bytes(module, rows)
        parts = 1 if sums.at_once is None else max(1, min(len(h), -(-size // sums.at_once)))
        mask = row_mask(self._mask, len(h), rows // max(len(h), 1))
        masks = [None] * parts if mask is None else mask.tensor_split(parts)
        for part, own in zip(h.tensor_split(parts) if parts > 1 else (h,), masks, strict=True):
            sums.add_inputs(input_rows(module, part), own)

    def _add_delta(self, name: str, gradient: Tensor, scale: Tensor | float) -> None:
        layer = self._layers[name]
        self._sums[name].add_outputs(output_rows(layer, gradient.detach().to(layer.weight.dtype)), scale)

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
        inputs: h by layer name, ``[..., N·T, d_in]``.
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
        h, signal, weights = self.inputs[name], self.signals[name], self.weights[name]
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
) -> Captured:
    """Return gradients, layer inputs and signals as one pure function, for ``torch.func`` and ``vmap``.

    Args:
        model: The module, used for its structure only.
        loss: A mean over terms; outputs ``[N, …, C]``.
        parameters: Name → tensor; under ``vmap`` with a leading population dimension.
        inputs: One batch.
        targets: Its targets.
        probes: Layer name → zeros of the layer's output shape (see :func:`zero_probes`).
    """
    layers = {name: model.get_submodule(name) for name in probes}
    terms = torch.as_tensor(loss.normaliser(targets), device=inputs.device)
    mask = loss.mask(targets)

    def forward(
        values: Mapping[str, Tensor], added: Mapping[str, Tensor]
    ) -> tuple[Tensor, tuple[dict[str, Tensor], dict[str, Tensor], Tensor]]:
        rows: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}

        def probe(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
                h = input_rows(module, args[0])
                kept = row_mask(mask, *h.shape[:2])
                ones = torch.ones(h.shape[:2], dtype=h.dtype, device=h.device)
                rows[name] = h.flatten(0, 1)
                weights[name] = (ones if kept is None else ones * kept).flatten()
                return output + added[name]

            return hook

        handles = [layer.register_forward_hook(probe(name)) for name, layer in layers.items()]
        try:
            outputs = torch.func.functional_call(model, dict(values), (inputs,))
        finally:
            for handle in handles:
                handle.remove()
        return loss(outputs, targets), (rows, weights, outputs)

    (gradients, signals), (value, (rows, weights, outputs)) = torch.func.grad_and_value(
        forward, argnums=(0, 1), has_aux=True
    )(parameters, probes)
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
