"""Which modules a forward pass calls, and which operation uses each parameter last."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from mupx.errors import UsageError, out_of_memory

MODES = (True, False)  # training first: that is what the optimizer sees
SEED = 0


class ModelFailedError(UsageError):
    """A model that runs on the example in neither mode; the exception it raised is the cause."""


@dataclass
class Trace:
    """What one or two forward passes did.

    Attributes:
        called: Names of the modules whose ``forward`` ran.
        last_use: Parameter name → position of the last operation it went into.
        operations: Parameter name → names of those operations.
    """

    called: set[str] = field(default_factory=set)
    last_use: dict[str, int] = field(default_factory=dict)
    operations: dict[str, set[str]] = field(default_factory=dict)


def trace_forward(model: nn.Module, example: Tensor) -> Trace:
    """Run a model on an example in training and in evaluation mode and record what it uses.

    One of the two may fail. The order is that of the training mode where it runs; what is called in
    either counts as called (layers dropped at random, fused evaluation paths).

    Raises:
        ModelFailedError: The model runs in neither mode.
    """
    trace, first_error = Trace(), None
    for training in MODES:
        uses = _Uses(model)
        try:
            called = _run(model.train(training), example, uses)
        except Exception as error:
            if out_of_memory(error):
                raise
            first_error = first_error or error
            continue
        trace.called |= called
        for name, operations in uses.operations.items():
            trace.operations.setdefault(name, set()).update(operations)
        if not trace.last_use:
            trace.last_use = uses.last_use
    model.train()
    if not trace.called:
        raise ModelFailedError(
            f"the model does not run on an input of shape {tuple(example.shape)}, in training or in "
            f"evaluation mode: {type(first_error).__name__}: {first_error}"
        ) from first_error
    return trace


class _Uses(TorchFunctionMode):
    """Records every torch function that a parameter goes into."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {id(p): name for name, p in model.named_parameters()}
        self.last_use: dict[str, int] = {}
        self.operations: dict[str, set[str]] = {}
        self._count = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._count += 1
        if isinstance(result, (Tensor, tuple)) and not isinstance(result, torch.Size):  # a dtype is no use
            for value in tree_leaves((args, kwargs or {})):
                name = self._names.get(id(value))
                if name is not None:
                    self.last_use[name] = self._count
                    self.operations.setdefault(name, set()).add(getattr(func, "__name__", ""))
        return result


def _run(model: nn.Module, example: Tensor, uses: _Uses) -> set[str]:
    names = {module: name for name, module in model.named_modules()}
    called: set[str] = set()
    handles = [m.register_forward_hook(lambda m, *_: called.add(names[m])) for m in names]
    own = next((p for p in model.parameters() if p.is_floating_point()), example)
    inputs = example.to(own.device, own.dtype if example.is_floating_point() else None)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the training run will show them
            torch.manual_seed(SEED)
            with uses:
                model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return called
