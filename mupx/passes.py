"""What the backward pass that is running is asked for."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

# Whether the backward pass that is running goes on to a node of the graph; not known of older versions.
_runs: Callable[[Any], bool] | None = getattr(torch._C, "_will_engine_execute_node", None)


class Asked(Enum):
    """What becomes of a gradient: nothing, added to ``grad``, or perhaps returned by ``autograd.grad``."""

    NOT = 0
    ADDED = 1
    RETURNED = 2


def asked(node: Any) -> Asked:
    """Return what the running pass makes of the gradient that a node of its graph would take.

    Args:
        node: Such a node, or None where it is not known.
    """
    if _runs is None or node is None:
        return Asked.RETURNED
    try:
        return Asked.ADDED if _runs(node) else Asked.NOT
    except RuntimeError:  # so torch answers of leaves that ``autograd.grad`` is asked for
        return Asked.RETURNED


def node_of(tensor: Tensor) -> Any:
    """Return the node that takes a tensor's gradient, or None where it has none."""
    return get_gradient_edge(tensor).node if tensor.requires_grad and torch.is_grad_enabled() else None
