"""Tiny Shakespeare: one megabyte of plays, character by character.

*Source*: A. Karpathy, "The Unreasonable Effectiveness of Recurrent Neural Networks", 2015.
"""

from __future__ import annotations

from pathlib import Path

import torch

from mupx.datasets.base import Dataset
from mupx.datasets.download import fetch
from mupx.datasets.files import cache_folder, find_text, locate
from mupx.datasets.text import assemble_text, read_text

BASE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
FILE, SHA256 = "input.txt", "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
NAMES = (FILE, "tinyshakespeare.txt", "tiny-shakespeare.txt")
CUTS = (0.90, 0.95)  # where validation and test begin


def load(directory: Path | None = None, *, context: int = 64) -> Dataset:
    """Load the first 90 % of the text for training, then 5 % for validation and 5 % for test.

    An example is ``context`` characters; the target of each is the one after it. The vocabulary is the
    65 characters of the whole text.

    Args:
        directory: Folder with ``input.txt`` (or ``tinyshakespeare.txt``), as it is, ``.xz`` or ``.gz``.
        context: T, characters of an example.

    Raises:
        UsageError: ``context`` is out of range.
        NotFoundError: The file is missing and cannot be downloaded.
        MismatchError: It has another checksum than the official one.
    """
    folder = locate("tiny-shakespeare", directory, lambda place: [] if find_text(place, NAMES) else [FILE])
    if folder is None:
        folder = cache_folder("tiny-shakespeare")
        fetch({FILE: SHA256}, BASE_URL, folder)
    text = read_text(folder, NAMES, SHA256)
    numbers = {character: i for i, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([numbers[character] for character in text])
    first, second = (round(cut * len(ids)) for cut in CUTS)
    texts = [ids[:first], ids[first:second], ids[second:]]
    return assemble_text(
        "tiny-shakespeare", texts, len(numbers), task="next-token", context=context, window=1
    )
