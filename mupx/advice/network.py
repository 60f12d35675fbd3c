"""A model at its target width as a list of operations, without its storage.

The model is built on the meta device, where tensors have shapes and no numbers, and does one forward and one
backward pass over a whole batch there; every operation is noted with its sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mupx.advice.costs import Shape
from mupx.advice.rates import Op, Work, elementwise, gemm
from mupx.layer_rows import factorable_layers
from mupx.layers import Parameter
from mupx.patch_moments import moment_operations
from mupx.roles import Factory

PRODUCTS = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1}  # operation → where its two factors begin
CONVOLUTIONS = ("convolution", "convolution_backward", "_convolution")


@dataclass(frozen=True)
class Network:
    """What one step of a model is, before any optimizer.

    Attributes:
        shapes: Its parameters that train.
        passes: Work of a forward and a backward pass over one batch.
        parameters: Bytes of parameters and buffers.
        gradients: Bytes of gradients.
        activations: Bytes kept between forward and backward pass.
    """

    shapes: tuple[Shape, ...]
    passes: Work
    parameters: float
    gradients: float
    activations: float


def outline(build: Factory, width: int) -> nn.Module:
    """Build a model on the meta device; by way of real tensors where its constructor reads their values."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return build(width)
        except (RuntimeError, NotImplementedError):
            return _emptied(build(width))


def _emptied(model: nn.Module) -> nn.Module:
    """Move a model to the meta device; unlike ``model.to``, tied parameters stay tied."""
    moved: dict[int, nn.Parameter] = {}
    kept = list(model.parameters())  # what is freed could lend its id to another
    for module in model.modules():
        for name, own in module._parameters.items():
            if own is not None:
                if id(own) not in moved:
                    moved[id(own)] = nn.Parameter(own.to("meta"), own.requires_grad)
                module._parameters[name] = moved[id(own)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to("meta")
    del kept
    return model


def network_of(
    model: nn.Module,
    parameters: Mapping[str, Parameter],
    example: Tensor,
    batch_size: int,
    loss: str,
    accumulate: int = 1,
) -> Network:
    """Return the operations of one training step's passes.

    Args:
        model: On the meta device; its precision is that of training.
        parameters: By name, for their kinds.
        example: Inputs of a few examples.
        batch_size: Examples per step.
        loss: ``squared_error`` or else; every other loss costs about what cross-entropy does.
        accumulate: Micro-batches that a batch is made of.
    """
    inputs = torch.empty(-(-batch_size // accumulate), *example.shape[1:], dtype=example.dtype, device="meta")
    rows: dict[str, _Rows] = {}
    handles = [
        layer.register_forward_hook(_counter(rows, f"{name}.weight", layer.weight.shape[0]))
        for name, layer in factorable_layers(model).items()
    ]
    try:
        passes, kept = traced(model.train(), inputs, loss)
    finally:
        for handle in handles:
            handle.remove()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = tuple(
        _shape(
            name,
            p,
            parameters[name].kind if name in parameters else "tensor",
            rows.get(name, _Rows()),
            accumulate,
        )
        for name, p in trained.items()
    )
    tensors = [*model.parameters(), *model.buffers()]
    own = {t.untyped_storage()._cdata for t in tensors}
    return Network(
        shapes,
        tuple(op._replace(times=op.times * accumulate) for op in passes),
        parameters=float(
            sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
        ),
        gradients=float(sum(p.numel() * p.element_size() for p in trained.values())),
        activations=float(sum(size for key, size in kept.items() if key not in own)),
    )


class _Rows(NamedTuple):
    """What is known of a layer's inputs; fields as in :class:`mupx.advice.costs.Shape`."""

    n: int = 0
    positions: int = 1
    channels: int = 1
    moment: float = 0.0


def _shape(name: str, parameter: Tensor, kind: str, rows: _Rows, accumulate: int) -> Shape:
    d_out = parameter.shape[0] if parameter.dim() else 1
    seen = rows._replace(n=rows.n * accumulate, moment=rows.moment * accumulate)
    return Shape(name, kind, d_out, math.prod(parameter.shape[1:]), *seen)


def _counter(rows: dict[str, _Rows], name: str, d_out: int) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        n = output.numel() // d_out
        found = _Rows(n, n // len(output))
        if isinstance(module, nn.Conv2d):
            found = found._replace(channels=args[0].shape[-3], moment=moment_operations(module, args[0]))
        rows[name] = found

    return hook


def traced(model: nn.Module, inputs: Tensor, loss: str) -> tuple[Work, dict[int, int]]:
    """Return the operations of a forward and a backward pass, and the bytes kept between, by storage.

    Args:
        model: On any device.
        inputs: One batch.
        loss: As for :func:`network_of`.
    """
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    recorder = _Recorder()
    with recorder, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(inputs)
        if loss == "squared_error":
            value = F.mse_loss(outputs, torch.zeros_like(outputs))
        else:
            flat = outputs.flatten(0, -2)
            value = F.cross_entropy(flat, torch.zeros(len(flat), dtype=torch.long, device=flat.device))
        value.backward()
    return tuple(recorder.work), kept


def calls_of(work: Work) -> float:
    """Return how many operations some work consists of."""
    return sum(op.times for op in work if op.kind not in ("stream", "allocate"))


class _Recorder(TorchDispatchMode):
    """Notes every operation with its sizes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work: list[Op] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.is_view:
            self.work += elementwise(0.0)
            return made
        name = func._overloadpacket.__name__
        produced = 0.0 if func._schema.is_mutable else _bytes(made)
        if name in PRODUCTS:
            left, right = args[PRODUCTS[name] : PRODUCTS[name] + 2]
            *batch, m, k = left.shape
            self.work += [gemm(m, right.shape[-1], k, math.prod(batch)), Op("allocate", (produced,))]
        elif func._overloadpacket in flop_registry:
            operations = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=made)
            channels = args[1].shape[0] if name in CONVOLUTIONS else args[0].shape[-1]
            kind = ("conv", (operations, channels)) if name in CONVOLUTIONS else _cube(operations)
            self.work += [Op(*kind), Op("allocate", (produced,))]
        else:
            self.work += elementwise(_bytes((args, kwargs or {})) + _bytes(made), produced)
        return made


def _cube(operations: float) -> tuple[str, tuple[float, ...]]:
    side = (operations / 2) ** (1 / 3)
    return "gemm", (side, side, side)


def _bytes(values: Any) -> float:
    return float(sum(v.numel() * v.element_size() for v in tree_leaves(values) if isinstance(v, Tensor)))
