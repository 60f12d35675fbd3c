"""Checks of the arguments that every model family takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import nn

from mupx.errors import UsageError, unknown_name

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = MappingProxyType(
    {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}
)


def activation_of(name: str) -> Callable[[], nn.Module]:
    """Return the factory of a named activation.

    Raises:
        UsageError: The name is not in `ACTIVATIONS`.
    """
    if name not in ACTIVATIONS:
        raise unknown_name("activation", str(name), ACTIVATIONS)
    return ACTIVATIONS[name]


def require_integer(name: str, given: object, least: int = 1) -> None:
    """Raise a UsageError unless ``given`` is a whole number of at least ``least``."""
    # True is an int to Python, but no width.
    if isinstance(given, bool) or not isinstance(given, int) or given < least:
        raise UsageError(
            f"{name} is {given!r}, but must be a whole number of at least {least}; set it to {least} or more"
        )


def require_sizes(width: int, input_shape: tuple[int, ...], classes: int) -> None:
    """Raise a UsageError unless width, every input dimension and the number of classes are positive."""
    require_integer("width", width)
    require_integer("classes", classes)
    if not input_shape:
        raise UsageError(
            "input_shape is empty; give the shape of one input without the batch, such as (1, 14, 14)"
        )
    for size in input_shape:
        require_integer("each size in input_shape", size)
