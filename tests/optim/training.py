"""Hand-written training steps that several optimizer tests share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mupx.optim import OPTIMIZERS
from mupx.optim.base import Base
from mupx.optim.captured import Captured

CAPTURED = [name for name in OPTIMIZERS if issubclass(OPTIMIZERS.load(name), Captured)]


def build(name: str, params: Any, model: nn.Module, **options: Any) -> Base:
    """Build an optimizer; those that capture curvature also want the model."""
    extra = (model,) if name in CAPTURED else ()
    optimizer: Base = OPTIMIZERS.load(name)(params, *extra, **options)
    return optimizer


def make(name: str, model: nn.Module, **options: Any) -> Base:
    """Build an optimizer from named parameters."""
    return build(name, model.named_parameters(), model, **options)


def backward(model: nn.Module, optimizer: Base, x: Tensor, y: Tensor, labels: Tensor | None = None) -> float:
    """One forward and backward pass with curvature captured; no step."""
    optimizer.zero_grad()
    with optimizer.curvature(y):
        outputs = model(x)
        optimizer.update_curvature(outputs, labels)
        loss = F.cross_entropy(outputs.flatten(0, -2), y.flatten())
        loss.backward()
    return loss.item()


def train(model: nn.Module, optimizer: Base, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    losses = []
    for x, y in batches:
        losses.append(backward(model, optimizer, x, y))
        optimizer.step()
    return losses


def batches(count: int, dtype: torch.dtype = torch.float32, seed: int = 0, size: int = 12) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 6, generator=generator, dtype=dtype),
            torch.randint(0, 4, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def one_update(model: nn.Module, optimizer: Base) -> dict[str, Tensor]:
    """Weights before minus weights after a step, by name: lr times the update."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}
