"""Models that several ranks train: replicated (DistributedDataParallel) or sharded (FSDP2)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import nn

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def replicated(model: nn.Module, unused: bool) -> nn.Module:
    """Return the model whose backward pass averages gradients over ranks, overlapped with itself.

    Args:
        model: On its device.
        unused: Whether some parameter gets no gradient: then every pass looks which.
    """
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)


def fully_sharded(model: nn.Module, device: torch.device) -> nn.Module:
    """Split the parameters of a model over ranks, in place: of each the rows, block by block.

    What a list of modules holds is a block (a residual block, a layer of a Sequential); its parameters are
    put together for its forward and backward pass only. The rest is one more block.

    Args:
        model: Whole, the same on every rank.
        device: Where the parts go.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    shared = _shared(model)
    blocks = [child for m in model.modules() if isinstance(m, CONTAINERS) for child in m.children()]
    for block in reversed(blocks):  # inner ones first
        parameters = list(block.parameters())
        if parameters and not any(id(p) in shared for p in parameters):
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def synchronising(model: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Return a context for a pass whose gradients are exchanged only if it is the last of its step."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return nullcontext() if last else model.no_sync()
    cast(Any, model).set_requires_gradient_sync(last)
    return nullcontext()


def batch_norms(model: nn.Module) -> list[str]:
    """Return the names of layers that normalise by statistics of their batch."""
    kinds = nn.modules.batchnorm._BatchNorm
    return [
        n for n, m in model.named_modules() if isinstance(m, kinds) and not isinstance(m, nn.SyncBatchNorm)
    ]


def _shared(model: nn.Module) -> set[int]:
    """Return the parameters that several modules hold: a block of its own must not take one of them away."""
    holders = [id(p) for m in model.modules() for p in m.parameters(recurse=False)]
    return {each for each in holders if holders.count(each) > 1}
