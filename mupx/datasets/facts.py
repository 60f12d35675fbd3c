"""How many examples of which shape a data set has, for what must be known before it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Facts(NamedTuple):
    """Sizes of a data set.

    Attributes:
        examples: In the training split.
        input_shape: Of one input.
        classes: Number of classes.
    """

    examples: int
    input_shape: tuple[int, ...]
    classes: int


# Text and folders of images are not here: their vocabulary or number is known only once they are read.
FACTS: Mapping[str, Facts] = {
    "fashion-mnist-14": Facts(8_000, (1, 14, 14), 10),
    "fashion-mnist-14-full": Facts(55_000, (1, 14, 14), 10),
    "fashion-mnist": Facts(55_000, (1, 28, 28), 10),
    "mnist": Facts(55_000, (1, 28, 28), 10),
    "cifar10": Facts(45_000, (3, 32, 32), 10),
    "cifar100": Facts(45_000, (3, 32, 32), 100),
    "synthetic": Facts(12_800, (24,), 10),
}
