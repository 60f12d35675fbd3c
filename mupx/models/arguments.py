"""Checks of the arguments that every model family takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from torch import Tensor, nn

from mupx.errors import UsageError, unknown_name

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = MappingProxyType(
    {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}
)


def activation_of(name: str) -> Callable[[], nn.Module]:
    """Return the factory of a named activation.

    Raises:
        UsageError: The name is not in `ACTIVATIONS`.
    """
    require_choice("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]


def require_choice(name: str, given: object, allowed: Iterable[str]) -> None:
    """Raise a UsageError unless ``given`` is one of the allowed words."""
    if given not in (known := list(allowed)):
        raise unknown_name(name, str(given), known)


def require_integer(name: str, given: object, least: int = 1) -> None:
    """Raise a UsageError unless ``given`` is a whole number of at least ``least``."""
    # True is an int to Python, but no width.
    if isinstance(given, bool) or not isinstance(given, int) or given < least:
        raise UsageError(
            f"{name} is {given!r}, but must be a whole number of at least {least}; set it to {least} or more"
        )


def require_positive(name: str, given: object) -> None:
    """Raise a UsageError unless ``given`` is a finite number above 0."""
    number = isinstance(given, int | float) and not isinstance(given, bool)
    if not (number and math.isfinite(given) and given > 0):  # type: ignore[arg-type, operator]
        raise UsageError(
            f"{name} is {given!r}, but must be a finite number above 0; 1 leaves things as they are"
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


def require_image(model: str, input_shape: tuple[int, ...], least: int) -> None:
    """Raise a UsageError unless the input is an image ``[C, H, W]`` of at least ``least`` pixels a side."""
    if len(input_shape) != 3 or min(input_shape[1:]) < least:
        raise UsageError(
            f"input_shape is {tuple(input_shape)}, but {model} takes images [C, H, W] of at least "
            f"{least}×{least} pixels; use such a data set, or the model mlp"
        )


def require_sequence(model: str, input_shape: tuple[int, ...]) -> None:
    """Raise a UsageError unless one input is a sequence of token ids ``[T]``."""
    if len(input_shape) != 1:
        raise UsageError(
            f"input_shape is {tuple(input_shape)}, but {model} takes sequences of token ids [T]; "
            "use a text data set such as tiny-shakespeare"
        )


def require_token_ids(model: str, inputs: Tensor) -> None:
    """Raise a UsageError unless a batch holds whole numbers."""
    if inputs.is_floating_point():
        raise UsageError(
            f"{model} takes token ids (whole numbers), but its inputs are {inputs.dtype}; "
            "use a text data set such as tiny-shakespeare"
        )
