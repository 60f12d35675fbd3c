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


def rows_of(tensor: Tensor, ranks: int) -> list[int]:
    """Return how many rows of a tensor each rank holds, where it is split by rows as FSDP does.

    Args:
        tensor: Sharded.
        ranks: Number of ranks.

    Returns:
        Rows by rank; nothing where it is split otherwise (several meshes, another axis).
    """
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(tensor, DTensor)
    if tensor.placements != (Shard(0),) or tensor.device_mesh.size() != ranks:
        return []
    each = -(-tensor.shape[0] // ranks)
    return [max(0, min(each, tensor.shape[0] - rank * each)) for rank in range(ranks)]


def local(tensor: Tensor) -> Tensor:
    """Return the rows of a sharded tensor that this rank holds."""
    result: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return result


def from_local(rows: Tensor, like: Tensor) -> Tensor:
    """Return the sharded tensor of which this rank holds these rows, split like another one."""
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    return DTensor.from_local(
        rows, like.device_mesh, like.placements, shape=like.shape, stride=like.stride(), run_check=False
    )
