"""Read each parameter's role, fan-in and fan-out from the model itself.

The factory is built at the base width and at twice the base width. A dimension that differs grows with
width; the layer type says which axes are fan-in. Role is a property of the architecture, whatever the
target: *input* (only fan-out grows), *hidden* (both grow, or a finite fan-out that is not the read-out),
*output* (the last module with growing fan-in and fixed fan-out in a traced forward pass), *vector*.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from mupx.errors import MismatchError, UsageError
from mupx.layers import Parameter, Shape, require_growth
from mupx.roles.axes import BARE, Layout, bare_layout, growing_axes, layout_of
from mupx.roles.building import Factory, shapes_at
from mupx.roles.initial import initial_std
from mupx.roles.tracing import call_order
from mupx.scaling import Role

BUILD_SEED = 0


def describe(
    build: Factory,
    base_width: int,
    *,
    overrides: Mapping[str, Role] | None = None,
    example: Tensor | None = None,
) -> tuple[Parameter, ...]:
    """Describe every parameter of ``build(width)`` at the base width and at twice that.

    Args:
        build: Factory of the model, ``build(width)``.
        base_width: The width at which multipliers are 1.
        overrides: Name pattern (``*`` and ``?``) → role, for what the shapes cannot tell.
        example: A batch of inputs; with it the read-out is the last one in a traced forward pass,
            without it the last one in order of registration.

    Raises:
        MismatchError: Nothing grows with width, or a parameter's role cannot be told.
        UsageError: An override matches no parameter.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(BUILD_SEED)
        base = build(base_width)
        doubled = shapes_at(build, 2 * base_width)
        order = call_order(base, example)
    shapes = {name: tuple(p.shape) for name, p in base.named_parameters()}
    if shapes.keys() != doubled.keys():
        different = sorted(shapes.keys() ^ doubled.keys())
        raise MismatchError(
            f"width changes which parameters exist ({', '.join(different[:3])}); "
            "the factory must build the same layers at every width"
        )
    _refuse_tied(base)
    chosen = _overridden(shapes, overrides or {})
    layouts = {name: layout_of(owner, leaf) for name, owner, leaf in _owned(base)}
    layouts |= {
        name: bare_layout(layouts[name], role, growing_axes(shapes[name], doubled[name]), len(shapes[name]))
        for name, role in chosen.items()
        if layouts[name].kind in BARE
    }
    inferred = {name: layout for name, layout in layouts.items() if name not in chosen}
    roles = _roles(shapes, doubled, inferred, order) | chosen
    parameters = tuple(
        Parameter(
            name=name,
            kind=layouts[name].kind,
            role=roles[name],
            shape=shapes[name],
            doubled=doubled[name],
            in_axes=layouts[name].in_axes,
            out_axes=layouts[name].out_axes,
            std=initial_std(base, name),
        )
        for name in shapes
    )
    require_growth(parameters, base_width)
    return parameters


def _owned(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    result = []
    for name, _ in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        result.append((name, model.get_submodule(path), leaf))
    return result


def _roles(
    shapes: Mapping[str, Shape], doubled: Mapping[str, Shape], layouts: Mapping[str, Layout], order: list[str]
) -> dict[str, Role]:
    roles: dict[str, Role] = {}
    readouts: list[str] = []
    for name, layout in layouts.items():
        grows = growing_axes(shapes[name], doubled[name])
        grows_in, grows_out = bool(grows & {*layout.in_axes}), bool(grows & {*layout.out_axes})
        if grows - {*layout.in_axes, *layout.out_axes}:
            raise _unknown_role(name, shapes[name], "an axis that is neither fan-in nor fan-out grows")
        if not layout.in_axes:
            roles[name] = "vector"
        elif layout.kind == "matrix" and grows:
            raise _unknown_role(name, shapes[name], "a bare parameter does not say which axis is fan-in")
        else:
            roles[name] = "hidden" if grows_in else "input"
            if grows_in and not grows_out:
                readouts.append(name)
    if readouts:
        position = {module: i for i, module in enumerate(order)}
        roles[max(readouts, key=lambda n: position.get(n.rpartition(".")[0], -1))] = "output"
    return roles


def _overridden(shapes: Mapping[str, Shape], overrides: Mapping[str, Role]) -> dict[str, Role]:
    result: dict[str, Role] = {}
    for pattern, role in overrides.items():
        matched = [name for name in shapes if fnmatchcase(name, pattern)]
        if not matched:
            raise UsageError(
                f"[roles] pattern {pattern!r} matches no parameter (parameters: {', '.join(shapes)})"
            )
        result |= dict.fromkeys(matched, role)
    return result


def _refuse_tied(model: nn.Module) -> None:
    seen: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = seen.setdefault(id(parameter), name)
        if first != name:
            raise MismatchError(
                f"{name} shares its tensor with {first}: one tensor, two roles, and the head would need "
                "a 1/r_in multiplier; untie them, or build the model with separate tensors"
            )


def _unknown_role(name: str, shape: Shape, reason: str) -> MismatchError:
    return MismatchError(
        f"cannot tell the role of {name} {list(shape)}: {reason}; "
        f'add a line to the config: [roles] "{name}" = "input" | "hidden" | "output" | "vector"'
    )
