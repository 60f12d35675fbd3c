"""Tensors and models of which every rank holds a part (FSDP2), seen from outside."""

from __future__ import annotations

import torch
from torch import Tensor


def sharded(tensor: Tensor) -> bool:
    """Whether other processes hold parts of a tensor, as under FSDP."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor; collective where it is sharded."""
    result: Tensor = tensor.full_tensor() if sharded(tensor) else tensor  # type: ignore[attr-defined]
    return result


def shaped_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor that every rank has as the part that ``like`` holds of its own."""
    if not sharded(like):
        return tensor.view(like.shape)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    # Without a source every rank cuts its part out of its own copy, and nothing is sent.
    return distribute_tensor(tensor.view(like.shape), like.device_mesh, like.placements, src_data_rank=None)
