"""Build a model at a width, without memory where its constructor allows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from mupx.layers import Shape

Factory = Callable[[int], nn.Module]


def shapes_at(build: Factory, width: int) -> dict[str, Shape]:
    """Return name → shape of ``build(width)``, built on the meta device where that works."""
    try:
        with torch.device("meta"):
            model = build(width)
    except (RuntimeError, NotImplementedError):
        # Some constructors read values (.item()); build those for real.
        model = build(width)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}
