"""What every optimizer asks of the gradients before a step: that they are dense, real and finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mupx.errors import UsageError


def all_finite(gradients: Sequence[Tensor]) -> bool:
    """Whether every entry of every gradient is finite, by one fused norm and one synchronisation.

    The sum of squares is far quicker than a look at every entry, but overflows for finite gradients
    beyond 1e19 in float32: only where it does, the largest entry is looked at.

    Args:
        gradients: Dense tensors of any shape, dtype and device. Under FSDP all ranks agree.
    """
    present = [gradient for gradient in gradients if gradient.numel()]
    # While a CUDA graph is captured nobody can look, and a replay would not ask.
    if not present or (present[0].is_cuda and torch.cuda.is_current_stream_capturing()):
        return True
    return _finite_norm(present, 2.0) or _finite_norm(present, math.inf)


def _finite_norm(tensors: Sequence[Tensor], order: float) -> bool:
    kinds = {(type(tensor), tensor.device, tensor.dtype) for tensor in tensors}
    if len(kinds) == 1 and not hasattr(tensors[0], "full_tensor"):
        # get_total_norm sorts and sums besides, which takes longer than the norms of a narrow network.
        return math.isfinite(torch.stack(torch._foreach_norm(list(tensors), order)).amax().item())
    total = torch.nn.utils.get_total_norm(tensors, order)
    if hasattr(total, "full_tensor"):  # each rank holds the norm of its own part
        total = total.full_tensor()
    return math.isfinite(total.item())


def require_dense(groups: Iterable[dict[str, Any]]) -> None:
    """Refuse sparse gradients.

    Raises:
        UsageError: A gradient is sparse; the parameter and what to do are named.
    """
    for group in groups:
        for index, parameter in enumerate(group["params"]):
            if parameter.grad is not None and parameter.grad.layout is not torch.strided:
                raise UsageError(
                    f"the gradient of {name_in(group, index)} is sparse, which no optimizer of mupx updates "
                    "by; make its layer with sparse=False (torch.nn.Embedding and EmbeddingBag), or leave "
                    "the parameter to torch.optim.SparseAdam"
                )


def require_real(group: Mapping[str, Any]) -> None:
    """Refuse complex parameters.

    Raises:
        UsageError: A parameter is complex; it and what to do are named.
    """
    for index, parameter in enumerate(group["params"]):
        if parameter.is_complex():
            raise UsageError(
                f"{name_in(group, index)} is complex ({parameter.dtype}), and no update of mupx is defined "
                "for complex numbers; keep real and imaginary part as one real parameter "
                "(torch.view_as_real) and combine them in forward (torch.view_as_complex)"
            )


def name_in(group: Mapping[str, Any], index: int) -> str:
    """Return the name of a group's parameter, or its shape where it came without one."""
    names = group.get("param_names")
    return str(names[index]) if names else f"the parameter of shape {list(group['params'][index].shape)}"
