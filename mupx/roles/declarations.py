"""What the user declares about parameters, and what is asked for when that is missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from mupx.config import declare
from mupx.errors import MismatchError, UsageError
from mupx.layers import Shape
from mupx.roles.axes import Layout, kind_of_axes
from mupx.scaling import Role
from mupx.sections import Declaration


def declared(names: Mapping[str, tuple[str, ...]], overrides: Mapping[str, Any]) -> dict[str, Declaration]:
    """Return the declaration of every parameter that a pattern matches; the last pattern wins.

    Args:
        names: Parameter → all names of its tensor.
        overrides: Pattern → role or declaration.

    Raises:
        UsageError: A pattern matches nothing, or a declaration is malformed.
    """
    result: dict[str, Declaration] = {}
    for pattern, value in overrides.items():
        declaration = declare(value, pattern)
        matched = [
            name for name, all_names in names.items() if any(fnmatchcase(n, pattern) for n in all_names)
        ]
        if not matched:
            raise UsageError(
                f"[roles] pattern {pattern!r} matches no parameter (parameters: {', '.join(names)})"
            )
        result |= dict.fromkeys(matched, declaration)
    return result


def apply_axes(name: str, shape: Shape, layout: Layout, fan_in: Shape, fan_out: Shape) -> Layout:
    """Return the layout with the user's axes.

    Raises:
        UsageError: The tensor has no such axis.
    """
    missing = [axis for axis in (*fan_in, *fan_out) if axis >= len(shape)]
    if missing:
        raise UsageError(
            f"[roles] names axis {missing[0]} of {name}, whose shape is {list(shape)}: axes are "
            f"0 … {len(shape) - 1}"
        )
    fan_in, fan_out = tuple(sorted(fan_in)), tuple(sorted(fan_out))
    if (fan_in, fan_out) == (layout.in_axes, layout.out_axes) and not layout.unknown:
        return layout
    return replace(
        layout, kind=kind_of_axes(fan_in, fan_out, len(shape)), in_axes=fan_in, out_axes=fan_out, unknown=""
    )


def bare_layout(name: str, shape: Shape, layout: Layout, role: Role, growing: set[int]) -> Layout:
    """Tell fan-in from fan-out of a parameter by the role the user gave it.

    Raises:
        MismatchError: A hidden tensor of which several axes grow; its axes must be declared.
    """
    if layout.in_axes:  # a known layer whose axes are known, but not its treatment
        return replace(layout, unknown="")
    fixed = tuple(sorted({*range(len(shape))} - growing))
    grown = tuple(sorted(growing))
    if role == "hidden" and len(shape) > 2 and len(growing) > 1:
        raise undeclared(
            name, shape, replace(layout, unknown="several of its axes grow, some fan-in, some not")
        )
    if role == "hidden" and len(growing) > 1:
        fan_in, fan_out = (1,), (0,)
    else:
        fan_in, fan_out = {
            "vector": ((), grown),
            "input": (fixed, grown),
            "hidden": (grown, fixed),
            "output": (grown, fixed),
        }[role]
    kind = "vector" if role == "vector" else kind_of_axes(fan_in, fan_out, len(shape))
    return replace(layout, kind=kind, in_axes=fan_in, out_axes=fan_out, unknown="")


def undeclared(name: str, shape: Shape, layout: Layout) -> MismatchError:
    """Return the error for a parameter whose role cannot be told, with the line to add."""
    problem = f"cannot tell the role of {name} {list(shape)}: {layout.unknown}"
    if layout.advice and layout.in_axes:  # its axes are known, but no rule is right for it
        return MismatchError(f"{problem}; {layout.advice}")
    table = "{fan_in = [1, 2], fan_out = [0]}" if len(shape) > 2 else "{fan_in = [1], fan_out = [0]}"
    return MismatchError(
        f"{problem}; {f'{layout.advice}, or ' if layout.advice else ''}"
        f'add a line to the config: [roles] "{name}" = "input" | "hidden" | "output" | "vector" | {table} '
        "(axes counted from 0)"
    )
