"""The coordinate check: how far each layer's output moves in a few steps, and what moved it.

For one model at one width and seed, on one probe batch (that of the first step):

* ``init``: mean |m(h; p) − m(h; 0)| per parameter p of module m before training, for a linear layer
  mean |W h|: the order of the initial signal a tensor produces by itself;
* ``layers`` after t steps: mean |Δh_l| = mean |h_l(t) − h_l(0)| per module output;
* ``own`` after t steps: mean |m(h(0); p(t)) − m(h(0); p(0))|: what the update of this one tensor does
  with every other tensor and the module's input frozen at their initial values; for a vector that a
  module with layers of its own adds somewhere (class token, positions) mean |p(t) − p(0)|.

Under a right parametrization all of them are Θ(1) in width, except the read-out's initial signal,
which shrinks as r_in^-½ (arXiv:2312.12226, Fig. 1; 2203.03466, App. D.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mupx.checks import curvature_orders
from mupx.layers import Layer
from mupx.run import Run

# Below this many machine precisions of its layer's movement a contribution is rounding: the bias of an
# attention's keys, or one before a normalisation, has a zero gradient in exact arithmetic.
ROUNDING = 100.0


@dataclass
class Moved:
    """Readings after some steps; sizes by name.

    Attributes:
        layers: Module → mean |Δh|.
        own: Parameter → mean |own contribution|; 0 where it is rounding.
        curvature: Parameter → symbol → (size, ridge, trace).
    """

    layers: dict[str, float] = field(default_factory=dict)
    own: dict[str, float] = field(default_factory=dict)
    curvature: curvature_orders.Sizes = field(default_factory=dict)


@dataclass
class Readings:
    """What one run showed.

    Attributes:
        init: Parameter → mean |signal it produces by itself| at initialisation.
        moved: Steps done → what had moved by then; ends at the first step that was not finite.
        broke_at: That step, or None.
        silent: Modules that own parameters and never ran.
    """

    init: dict[str, float] = field(default_factory=dict)
    moved: dict[int, Moved] = field(default_factory=dict)
    broke_at: int | None = None
    silent: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the readings as JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Readings:
        """Read what :meth:`as_dict` wrote (through JSON, which turns step numbers into text)."""
        moved = {int(step): Moved(**values) for step, values in document["moved"].items()}
        return cls(document["init"], moved, document["broke_at"], document["silent"])


class Call:
    """The first call of a module in a forward pass, kept so that it can be repeated.

    Attributes:
        module: The module.
        args: Its positional inputs, detached.
        kwargs: Its keyword inputs.
        output: What it returned, or the first tensor of that.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.module, self.output = module, first_tensor(output).detach().clone()
        self.args = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)
        self.kwargs = {k: a.detach().clone() if isinstance(a, Tensor) else a for k, a in kwargs.items()}

    def repeat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the module's output for the same inputs and other parameters (names local to it)."""
        with frozen_randomness():
            return first_tensor(functional_call(self.module, dict(tensors), self.args, self.kwargs))


@contextmanager
def frozen_randomness() -> Iterator[None]:
    """Draw the same dropout masks on every entry, and leave the global generators as they were."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        yield


def first_tensor(output: Any) -> Tensor:
    """Return a tensor, or the first tensor of a tuple, list or mapping of outputs."""
    if isinstance(output, Tensor):
        return output
    items: Iterable[Any] = output.values() if isinstance(output, Mapping) else output
    return first_tensor(next(iter(items)))


@torch.no_grad()
def read(run: Run, steps: Sequence[int]) -> Readings:
    """Train ``run`` from its first step and read what moved after each of ``steps``."""
    inputs, _ = run.batch()
    names = [layer.name for layer in run.layers]
    modules = {name: name.rpartition(".")[0] for name in names}
    before, calls = _tensors(run.model), _calls(run, inputs, set(modules.values()))
    readings = Readings(silent=sorted(set(modules.values()) - set(calls)))
    readings.init = _init(calls, before, modules, run.layers)
    for step in range(1, max(steps) + 1):
        with torch.enable_grad():
            loss = run.advance()
        if not math.isfinite(loss) or not all(p.isfinite().all() for p in run.model.parameters()):
            readings.broke_at = step
            break
        if step in steps:
            readings.moved[step] = _moved(run, inputs, calls, before, modules)
    return readings


def _moved(
    run: Run, inputs: Tensor, calls: Mapping[str, Call], before: Mapping[str, Tensor], modules: dict[str, str]
) -> Moved:
    after, now = _tensors(run.model), _calls(run, inputs, set(calls))
    vectors = {layer.name for layer in run.layers if layer.role == "vector"}
    layers = {m: float((now[m].output - call.output).abs().mean()) for m, call in calls.items() if m in now}
    floor = ROUNDING * torch.finfo(run.dtype).eps
    own = {}
    for name, module in modules.items():
        if module in calls and not _contains_layers(calls[module].module):
            moved = _distance(calls[module], before, name, before[name], after[name])
            own[name] = moved if moved > floor * layers.get(module, 0.0) else 0.0
        elif module in calls and name in vectors:
            own[name] = float((after[name] - before[name]).abs().mean())
    return Moved(layers, own, curvature_orders.read(run.optimizer))


def _contains_layers(module: nn.Module) -> bool:
    """Whether a tensor of this module acts through layers below it, such as a class token of a whole model.

    What reaches the module's output then has their order, not the tensor's: through a read-out it shrinks.
    """
    return any(True for child in module.children() for _ in child.parameters())


def _init(
    calls: Mapping[str, Call], before: Mapping[str, Tensor], modules: dict[str, str], layers: Sequence[Layer]
) -> dict[str, float]:
    matrices = [layer.name for layer in layers if layer.role != "vector" and modules[layer.name] in calls]
    return {
        name: _distance(calls[modules[name]], before, name, torch.zeros_like(before[name]), before[name])
        for name in matrices
    }


def _distance(call: Call, tensors: Mapping[str, Tensor], name: str, old: Tensor, new: Tensor) -> float:
    prefix, _, local = name.rpartition(".")
    start = f"{prefix}." if prefix else ""
    frozen = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
    difference = call.repeat({**frozen, local: new}) - call.repeat({**frozen, local: old})
    return float(difference.abs().mean())


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    # Buffers too: repeating a call must not move a running mean, nor see one that has moved.
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def _calls(run: Run, inputs: Tensor, names: set[str]) -> dict[str, Call]:
    """Run the model once, without a trace in it, and return the first call of each named module."""
    found: dict[str, Call] = {}
    handles = []
    for name in names:

        def keep(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            found.setdefault(name, Call(module, args, kwargs, output))

        handles.append(run.model.get_submodule(name).register_forward_hook(keep, with_kwargs=True))
    kept = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
    try:
        run.model.train()
        with frozen_randomness():
            run.forward(inputs)
    finally:
        for handle in handles:
            handle.remove()
        for name, buffer in run.model.named_buffers():
            buffer.copy_(kept[name])
    return found
