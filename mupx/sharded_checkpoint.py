"""What a run with sharded parameters writes down: each rank its part, and any number of ranks can go on.

Tensors are ``model/NAME`` and ``optimizer/INDEX/KEY``, INDEX counting parameters as in torch's own
``state_dict``. A parameter's elementwise state (Adam's moments) is cut as it is; of what is divided among
ranks (:mod:`mupx.optim.divided`) its owner writes all, and whoever owns it later reads it. Numbers, and which
tensors there are, go into the plain checkpoint beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mupx.distributed.communicator import Communicator
from mupx.distributed.sharding import shaped_like, sharded
from mupx.distributed.storage import read_parts, sizes, write_parts
from mupx.optim.adapter import Trainable
from mupx.optim.base import Base
from mupx.optim.divided import Divided

PART = {"part": True}  # stands for a tensor that is in the folder


def write(directory: Path, model: nn.Module, optimizer: Base, ranks: Communicator) -> dict[str, Any]:
    """Write this rank's part of weights and state; return the rest of the optimizer's state, of all ranks."""
    state = torch.optim.Optimizer.state_dict(optimizer)
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    numbers: dict[int, dict[str, Any]] = {}
    for index, (parameter, own) in enumerate(_ordered(optimizer)):
        if index in state["state"] and (not own or _mine(optimizer, parameter)):
            entries = state["state"][index]
            tensors |= {f"optimizer/{index}/{k}": v for k, v in entries.items() if isinstance(v, Tensor)}
            numbers[index] = {k: PART if isinstance(v, Tensor) else v for k, v in entries.items()}
    write_parts(directory, tensors, ranks.size == 1)
    merged = {index: entries for theirs in ranks.gathered(numbers) for index, entries in theirs.items()}
    return {"state": dict(sorted(merged.items())), "param_groups": state["param_groups"]}


def read(
    directory: Path, rest: Mapping[str, Any], model: nn.Module, optimizer: Base, ranks: Communicator
) -> None:
    """Load weights and state, each in the form that this run has them."""
    there = sizes(directory)
    weights = model.state_dict()
    tensors: dict[str, Tensor] = {f"model/{name}": tensor for name, tensor in weights.items()}
    state: dict[int, dict[str, Any]] = {}
    for index, (parameter, own) in enumerate(_ordered(optimizer)):
        entries = state[index] = dict(rest["state"].get(index, {}))
        elsewhere = own and sharded(parameter) and not _mine(optimizer, parameter)
        for key in [key for key, value in entries.items() if value == PART]:
            name = f"optimizer/{index}/{key}"
            if elsewhere:
                del entries[key]
                continue
            size, dtype = there[name]
            tensors[name] = torch.empty(size, dtype=dtype, device=parameter.device)
            if sharded(parameter) and not own:
                tensors[name] = torch.zeros_like(parameter)
            entries[key] = tensors[name]
    read_parts(directory, tensors, ranks.size == 1)
    model.load_state_dict(weights)
    optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})


def cut_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole weights in the form that a model has them."""
    return {name: shaped_like(weights[name].to(now.device), now) for name, now in model.state_dict().items()}


def cut_state(optimizer: Trainable, state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's whole state in the form of its parameters; what owners keep stays whole."""
    if not isinstance(optimizer, Base):
        return state
    result = dict(state["state"])
    for index, (parameter, own) in enumerate(_ordered(optimizer)):
        if index in result and sharded(parameter) and not own:
            result[index] = {
                key: shaped_like(each.to(parameter.device), parameter) if isinstance(each, Tensor) else each
                for key, each in result[index].items()
            }
    return {**state, "state": result}


def _ordered(optimizer: Base) -> list[tuple[Tensor, bool]]:
    """Return the parameters in torch's order, and whether the optimizer divides their work among ranks."""
    divided = isinstance(optimizer, Divided)
    groups = ((g, divided and g["algorithm"] == optimizer.algorithm) for g in optimizer.param_groups)
    return [(parameter, own) for group, own in groups for parameter in group["params"]]


def _mine(optimizer: Base, parameter: Tensor) -> bool:
    return not isinstance(optimizer, Divided) or optimizer.mine(parameter)
