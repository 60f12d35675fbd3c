"""What a loader returns, and the three steps every image loader shares (text: `mupx.datasets.text`).

An image loader reads ``Raw`` uint8 images, carves a validation split out of the official training set
with `carve`, and hands the three splits to `assemble`, which normalises and fingerprints them.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mupx.errors import MismatchError

Bytes = NDArray[np.uint8]
Labels = NDArray[np.integer[Any]]
Indices = NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Split:
    """Examples and what is to be predicted of them.

    Args:
        inputs: Real-valued features ``[N, …]``, float32 (images ``[N, C, H, W]``, normalised), or int64
            token ids ``[N, T]``.
        targets: int64 classes, ``[N]``, or ``[N, T]`` where every token has one; −100 is ignored.
    """

    inputs: torch.Tensor
    targets: torch.Tensor

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise MismatchError(
                f"a split has {len(self.inputs)} inputs and {len(self.targets)} targets; "
                "give one target for each input"
            )
        if self.inputs.is_contiguous():
            # The stride of an axis of length one says nothing, but with 1 for a single channel PyTorch takes
            # images for channels-last, and then lays out a convolution's weight anew in every pass.
            object.__setattr__(self, "inputs", self.inputs.view(-1).view(self.inputs.shape))

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three disjoint splits; the search reads train and validation, never test.

    Args:
        classes: Number of classes; of text, the size of the vocabulary.
        checksum: sha256 hex over pixels and labels before normalisation, or over token ids and
            targets, in the order train, validation, test, so it names the exact data and cut, not the
            file they came in.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: int
    checksum: str

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, without the batch dimension: ``[C, H, W]``, or ``[T]`` of a token sequence."""
        return tuple(self.train.inputs.shape[1:])


class Raw(NamedTuple):
    """Images ``[N, C, H, W]``, uint8, and labels ``[N]``, whole numbers, as they lie in the file."""

    images: Bytes
    labels: Labels

    def take(self, indices: Indices) -> Raw:
        """Return the examples at ``indices``, in that order."""
        return Raw(self.images[indices], self.labels[indices])


def carve(labels: Labels, per_class: int, seed: int) -> tuple[Indices, Indices]:
    """Choose ``per_class`` examples of every class at random.

    Returns:
        The indices that stay and the indices chosen, both ascending.

    Raises:
        MismatchError: A class has too few examples to leave one behind.
    """
    # RandomState's stream is frozen for good (NEP 19); Generator's may change between releases.
    random = np.random.RandomState(seed)
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) <= per_class:
            raise MismatchError(
                f"class {label} has {len(members)} training examples, but more than {per_class} are needed "
                "to carve out a validation split; use the complete data set"
            )
        chosen[random.permutation(members)[:per_class]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def split_off_validation(official: Raw, fraction: float, classes: int, seed: int = 0) -> tuple[Raw, Raw]:
    """Carve a class-balanced ``fraction`` out of the official training set."""
    kept, chosen = carve(official.labels, round(len(official.labels) * fraction / classes), seed)
    return official.take(kept), official.take(chosen)


def assemble(name: str, train: Raw, validation: Raw, test: Raw, classes: int) -> Dataset:
    """Normalise every split by the training split's mean and std per channel, and fingerprint them."""
    digest = hashlib.sha256()
    for split in (train, validation, test):
        digest.update(np.ascontiguousarray(split.images).data)
        digest.update(np.ascontiguousarray(split.labels).data)
    mean, std = channel_statistics(train.images)
    return Dataset(
        name,
        train=_normalised(train, mean, std),
        validation=_normalised(validation, mean, std),
        test=_normalised(test, mean, std),
        classes=classes,
        checksum=digest.hexdigest(),
    )


def channel_statistics(images: Bytes) -> tuple[list[float], list[float]]:
    """Return mean and std of each channel's pixels, in grey levels.

    Both come from the histogram of the 256 grey levels in whole numbers: the result has the same
    bits on every machine and with every number of threads.
    """
    pairs = [_mean_and_std(images[:, channel]) for channel in range(images.shape[1])]
    return [mean for mean, _ in pairs], [std for _, std in pairs]


def _mean_and_std(pixels: Bytes) -> tuple[float, float]:
    levels = torch.arange(256)
    counts = torch.bincount(torch.tensor(pixels).flatten(), minlength=256)
    n, total, squares = (int((counts * power).sum()) for power in (levels**0, levels, levels**2))
    variance = (n * squares - total**2) / n**2  # Python integers: exact up to this one division
    # A channel of one grey level carries nothing: dividing by 1 maps it to zero instead of NaN.
    return total / n, math.sqrt(variance) or 1.0


def _normalised(split: Raw, mean: list[float], std: list[float]) -> Split:
    inputs = torch.tensor(split.images, dtype=torch.float32)
    inputs.sub_(torch.tensor(mean).view(-1, 1, 1)).div_(torch.tensor(std).view(-1, 1, 1))
    return Split(inputs, torch.tensor(split.labels, dtype=torch.int64))
