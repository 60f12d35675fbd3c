"""WikiText-2: articles of Wikipedia as words.

*Source*: S. Merity et al., "Pointer Sentinel Mixture Models", ICLR 2017, arXiv:1609.07843. CC BY-SA.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from mupx.datasets.base import Dataset
from mupx.datasets.download import fetch
from mupx.datasets.files import cache_folder, find_text, locate
from mupx.datasets.text import UNKNOWN, assemble_text, most_frequent, read_text
from mupx.models.arguments import require_integer

BASE_URL = "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/"
FILES = {
    "train.txt": "2d84b35af79e411d73ea7cae83c73964c6ac83b4",
    "valid.txt": "eec944eb2d9e46061cd34a6913528797db6842fc",
    "test.txt": "6f3fc88e4cd88456ea892971f9f12243e8428624",
}
END = "<eos>"  # of a line
HELD_OUT = 1 / 10  # of valid.txt, in the small variant


def load(
    directory: Path | None = None,
    *,
    task: str = "next-token",
    context: int = 64,
    window: int = 5,
    vocabulary: int | None = 2000,
) -> Dataset:
    """Load the official split into training, validation and test words.

    Losses are comparable at equal ``vocabulary`` only. The default is small because K-FAC's B of a
    read-out over V words is ``[V, V]``; None takes every word of the training split.

    Args:
        directory: Folder with ``train.txt``, ``valid.txt`` and ``test.txt``, plain, ``.xz`` or ``.gz``.
        task: ``next-token`` (ids ``[N, T]``, targets ``[N, T]``) or ``cbow`` (neighbours ``[N, 2 w]``,
            the word between them ``[N]``).
        context: T, tokens of an example of ``next-token``.
        window: w, words on either side, of ``cbow``.
        vocabulary: Number of words told apart, the most frequent of the training split and ``<unk>``.

    Raises:
        UsageError: An argument is out of range.
        NotFoundError: A file is missing and cannot be downloaded.
        MismatchError: A file has another checksum than the official one.
    """
    return _load("wikitext-2", directory, tuple(FILES), task, context, window, vocabulary)


def load_small(
    directory: Path | None = None,
    *,
    task: str = "next-token",
    context: int = 64,
    window: int = 5,
    vocabulary: int | None = 2000,
) -> Dataset:
    """Load a tenth of WikiText-2: train on 9/10 of ``valid.txt``, validate on its last tenth.

    The test split is ``test.txt``; ``train.txt`` is not needed. Numbers from here say "WikiText-2 small".

    Args: as `load`.
    """
    return _load("wikitext-2-small", directory, ("valid.txt", "test.txt"), task, context, window, vocabulary)


def _load(
    name: str,
    directory: Path | None,
    files: tuple[str, ...],
    task: str,
    context: int,
    window: int,
    vocabulary: int | None,
) -> Dataset:
    if vocabulary is not None:
        require_integer("vocabulary", vocabulary, least=2)
    folder = locate("wikitext-2", directory, lambda place: [f for f in files if not find_text(place, [f])])
    if folder is None:
        folder = cache_folder("wikitext-2")
        fetch({file: FILES[file] for file in files}, BASE_URL, folder)
    texts = [_words(read_text(folder, [file], FILES[file])) for file in files]
    if len(texts) == 2:
        cut = len(texts[0]) - round(HELD_OUT * len(texts[0]))
        texts = [texts[0][:cut], texts[0][cut:], texts[1]]
    numbers = most_frequent(texts[0], vocabulary)
    ids = [_ids(words, numbers) for words in texts]
    return assemble_text(name, ids, len(numbers), task=task, context=context, window=window)


def _words(text: str) -> list[str]:
    return [word for line in text.removesuffix("\n").split("\n") for word in (*line.split(), END)]


def _ids(words: Iterable[str], numbers: dict[str, int]) -> Tensor:
    return torch.tensor([numbers.get(word, numbers[UNKNOWN]) for word in words])
