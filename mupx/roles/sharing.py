"""Tensors with several names: layers that share a weight, and heads tied to an embedding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from mupx.errors import MismatchError, UsageError
from mupx.roles.axes import EMBEDDINGS, Layout
from mupx.roles.tracing import Trace

Shared = Mapping[str, tuple[str, ...]]
# Operations by which a weight maps an activation; transposing it comes before one.
CONTRACTIONS = {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "einsum", "t", "__get__"}
CONTRACTIONS |= {"transpose", "permute", "tensordot", "addmm", "baddbmm"}


def shared_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return name → all names of the same tensor in different modules, itself first."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    owners: set[tuple[int, str]] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path, _, leaf = name.rpartition(".")
        key = (id(model.get_submodule(path)), leaf)
        if key not in owners:  # a module registered twice is still one module
            owners.add(key)
            names.setdefault(first.setdefault(id(parameter), name), []).append(name)
    return {name: tuple(aliases) for name, aliases in names.items()}


def shared_layout(name: str, spelt: Mapping[str, Layout]) -> Layout:
    """Return the one layout of a tensor by all its names.

    Raises:
        MismatchError: Its modules disagree on what is fan-in: a tied head.
    """
    layout = spelt[name]
    for alias, other in spelt.items():
        if (other.in_axes, other.out_axes) != (layout.in_axes, layout.out_axes):
            head = name if other.kind == "embedding" else alias
            raise MismatchError(
                f"{alias} shares its tensor with {name}: one tensor, two roles. Untie them, or add a line to "
                f'the config: [roles] "{head}" = "tied" (the tensor is then an input, and the head '
                "multiplies its logits by 1/r_in)"
            )
    return replace(layout, unknown=next((o.unknown for o in spelt.values() if o.unknown), ""))


def tied_module(model: nn.Module, names: tuple[str, ...]) -> str:
    """Return the path of the Linear head that shares an embedding's weight.

    Raises:
        UsageError: The tensor is not that of one embedding and one plain Linear head.
    """
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    heads = [name for name, owner in owners.items() if not isinstance(owner, EMBEDDINGS)]
    if len(heads) != 1 or len(names) < 2 or type(owners[heads[0]]) is not nn.Linear:
        raise UsageError(
            f'[roles] says "tied" of {" = ".join(names)}, but tied are one nn.Linear head and the embeddings '
            "whose weight it shares"
        )
    return heads[0].rpartition(".")[0]


def functional_head(model: nn.Module, name: str, trace: Trace | None) -> bool:
    """Whether an embedding's weight also serves as a matrix in the forward pass, without a module."""
    parameter = model.get_parameter(name)
    if trace is None or not isinstance(model.get_submodule(name.rpartition(".")[0]), EMBEDDINGS):
        return False
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if p is parameter]
    return len(names) == 1 and bool(CONTRACTIONS & trace.operations.get(name, set()))
