"""Read what other μP tools write: the base-shape files (``.bsh``) of microsoft/mup.

Such a file is YAML: parameter name → list with one entry per axis, the size of that axis in the base
model, or ``null`` where it does not grow with width. It says which model the values were tuned on, but
no values. mupx knows a base model by its width, so :func:`base_width_of` finds the one width at which a
model has the shapes of the file, and refuses a file that belongs to another model.

Source: microsoft/mup 1.0.0 (MIT), ``make_base_shapes`` and ``set_base_shapes``; arXiv:2203.03466.
"""

from __future__ import annotations

import os
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mupx.errors import MismatchError, NotFoundError, UsageError
from mupx.files import MOST_TEXT, read_bounded
from mupx.layers import Parameter

BaseShape = tuple[int | None, ...]
WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before every name
EXAMPLE = "`hidden.weight: [64, 64]` or `input.weight: [64, null]`"
SHOWN = 3  # names an error lists


def read_base_shapes(path: os.PathLike[str]) -> dict[str, BaseShape]:
    """Read a base-shape file of microsoft/mup.

    Args:
        path: The ``.bsh`` file.

    Returns:
        Parameter name → base size of each axis, None where the axis does not grow. Prefixes that a
        wrapper put before every name are removed.

    Raises:
        NotFoundError: There is no such file, or it cannot be read.
        UsageError: It is not a base-shape file.
        MismatchError: No axis in it grows: it was saved without a wider model to compare with.
    """
    import yaml

    path = Path(path)
    try:
        document = yaml.safe_load(read_bounded(path, MOST_TEXT).decode())
    except OSError as error:
        raise NotFoundError(f"cannot read base shapes {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{path} is not a base-shape file: {reason}") from None
    if not isinstance(document, dict) or not document:
        raise UsageError(f"{path} is not a base-shape file: it has no lines such as {EXAMPLE}")
    shapes = plain_names({name: _shape(path, name, axes) for name, axes in document.items()})
    if not _growing(shapes):
        raise MismatchError(
            f"no axis in {path} grows with width: every entry is null, as when base and delta model are the "
            "same; save it again with a delta model of another width"
        )
    return shapes


def plain_names(named: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the prefixes that wrappers put before *every* name; a module of that name keeps its own.

    >>> plain_names({"module.embed.weight": 1, "module.decoder.bias": 2})
    {'embed.weight': 1, 'decoder.bias': 2}
    """
    names = list(named)
    while prefix := next((w for w in WRAPPERS if names and all(n.startswith(w) for n in names)), None):
        names = [name.removeprefix(prefix) for name in names]
    return dict(zip(names, named.values(), strict=True))


def likely_width(shapes: Mapping[str, BaseShape]) -> int:
    """Return the commonest size of a growing axis: most often the base width itself."""
    return Counter(_growing(shapes)).most_common(1)[0][0]


def base_width_of(shapes: Mapping[str, BaseShape], parameters: Iterable[Parameter], described_at: int) -> int:
    """Return the width at which a model has the given base shapes.

    An axis that has n₁ entries at width w and n₂ at 2w has n at width w + w (n − n₁) / (n₂ − n₁).

    Args:
        shapes: What :func:`read_base_shapes` returned.
        parameters: The model's description at some width, as :func:`mupx.roles.describe` gives it.
        described_at: That width.

    Raises:
        MismatchError: Other parameters, other numbers of axes, other growing axes, or sizes that no one
            width gives.
    """
    known: dict[str, Parameter] = plain_names({p.name: p for p in parameters})
    _refuse_other_names(shapes, known)
    for name, shape in shapes.items():
        _refuse_other_axes(shape, known[name])
    first = next(name for name, shape in shapes.items() if _growing({name: shape}))
    width = _solve(shapes[first], known[first], described_at)
    for name, shape in shapes.items():
        actual = known[name].shape_at(described_at, width)
        if any(size not in (None, there) for size, there in zip(shape, actual, strict=True)):
            raise MismatchError(
                f"no one width gives the base shapes: {first} {_text(shapes[first])} is of width {width}, "
                f"where {name} is {list(actual)}, but the file says {_text(shape)}; mupx needs a base model "
                "that its factory can build"
            )
    return width


def _shape(path: Path, name: Any, axes: Any) -> BaseShape:
    sizes = isinstance(axes, list) and all(n is None or (type(n) is int and n > 0) for n in axes)
    if not (isinstance(name, str) and sizes):
        # reprlib: a few lines of YAML with aliases can stand for more text than memory holds.
        raise UsageError(
            f"{path} is not a base-shape file: {reprlib.repr(name)}: {reprlib.repr(axes)}; each name needs a "
            f"list of positive whole numbers and nulls, such as {EXAMPLE}"
        )
    return tuple(axes)


def _growing(shapes: Mapping[str, BaseShape]) -> list[int]:
    return [size for shape in shapes.values() for size in shape if size is not None]


def _refuse_other_names(shapes: Mapping[str, BaseShape], known: Mapping[str, Parameter]) -> None:
    for what, missing in (
        ("the file lacks", [name for name in known if name not in shapes]),
        ("the model lacks", [name for name in shapes if name not in known]),
    ):
        if missing:
            more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
            raise MismatchError(
                f"the base shapes are those of another model: {what} {', '.join(missing[:SHOWN])}{more}; "
                "give the model, and its depth, that the file was saved from"
            )


def _refuse_other_axes(shape: BaseShape, parameter: Parameter) -> None:
    if len(shape) != len(parameter.shape):
        raise MismatchError(
            f"{parameter.name} has {len(shape)} axes in the base shapes but {len(parameter.shape)} in the "
            f"model, {list(parameter.shape)}: the file was saved from another model"
        )
    for axis, (size, a, b) in enumerate(zip(shape, parameter.shape, parameter.doubled, strict=True)):
        if (size is None) != (a == b):
            told = "does not grow (null)" if size is None else f"grows from {size}"
            actual = f"stays at {a}" if a == b else f"grows ({a}, then {b} at twice the width)"
            raise MismatchError(
                f"axis {axis} of {parameter.name} {told} in the base shapes, but {actual} in the model: the "
                "file was saved from another model, or its delta model did not vary every width"
            )


def _solve(shape: BaseShape, parameter: Parameter, described_at: int) -> int:
    size, a, b = next(
        (size, a, b)
        for size, a, b in zip(shape, parameter.shape, parameter.doubled, strict=True)
        if size is not None
    )
    more, remainder = divmod((size - a) * described_at, b - a)
    if remainder or described_at + more < 1:
        raise MismatchError(
            f"no width gives {parameter.name} the base shape {_text(shape)}: it is {list(parameter.shape)} "
            f"at width {described_at} and {list(parameter.doubled)} at {2 * described_at}"
        )
    return described_at + more


def _text(shape: BaseShape) -> str:
    return f"[{', '.join('null' if size is None else str(size) for size in shape)}]"
