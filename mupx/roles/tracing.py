"""The order in which a model's modules are called."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def call_order(model: nn.Module, example: Tensor | None) -> list[str]:
    """Return module names in order of their (last) call, or of registration without an example."""
    names = {module: name for name, module in model.named_modules()}
    if example is None:
        return list(names.values())
    calls: list[str] = []
    handles = [m.register_forward_hook(lambda m, *_: calls.append(names[m])) for m in names]
    try:
        with torch.no_grad():
            floating = example.is_floating_point()
            model(example.to(next(model.parameters()).dtype) if floating else example)
    finally:
        for handle in handles:
            handle.remove()
    return calls
