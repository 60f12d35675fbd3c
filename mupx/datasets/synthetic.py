"""A synthetic classification task: Gaussian inputs, labels of a small random tanh network.

Made from a fixed seed in a moment, without a file: for width checks and smoke tests, where what counts
is that the data do not change with the model. Its training split is large enough that the few steps of
a coordinate check never see an example twice.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from mupx.datasets.base import Dataset, Split
from mupx.settling import settle

INPUTS, CLASSES, TEACHER_WIDTH = 24, 10, 32
TRAIN, HELD_OUT_PER_CLASS = 12_800, 100
SEED = 0


def load(directory: Path | None = None) -> Dataset:
    """Make 12,800 training, 1,000 validation and 1,000 test examples of shape ``[24]``.

    x ~ N(0, I), standardised by the training split; y = argmax of V tanh(2 U x), with U and V Gaussian.
    The two held-out splits are class-balanced.

    Args:
        directory: Ignored: the data are made, not read.
    """
    settle()  # or a label may differ from one process to the next
    generator = torch.Generator().manual_seed(SEED)
    U = torch.randn(INPUTS, TEACHER_WIDTH, generator=generator) / INPUTS**0.5
    V = torch.randn(TEACHER_WIDTH, CLASSES, generator=generator)
    x = torch.randn(2 * TRAIN, INPUTS, generator=generator)
    y = (torch.tanh(2 * x @ U) @ V).argmax(1)
    members = [torch.nonzero(y[TRAIN:] == label).flatten() + TRAIN for label in range(CLASSES)]
    cuts = [slice(None, HELD_OUT_PER_CLASS), slice(HELD_OUT_PER_CLASS, 2 * HELD_OUT_PER_CLASS)]
    rows = [torch.arange(TRAIN), *(torch.cat([chosen[cut] for chosen in members]) for cut in cuts)]
    std, mean = torch.std_mean(x[:TRAIN], 0)
    train, validation, test = (Split((x[chosen] - mean) / std, y[chosen]) for chosen in rows)
    digest = hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest()
    return Dataset("synthetic", train, validation, test, CLASSES, digest)
