"""From a text to examples: symbols to ids, ids to windows."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mupx.datasets.base import Dataset, Split
from mupx.datasets.files import REPLACE, find_text, read_unpacked, require_checksum
from mupx.errors import MismatchError, NotFoundError
from mupx.models.arguments import require_choice, require_integer

TASKS = ("next-token", "cbow")
UNKNOWN = "<unk>"
MOST_BYTES = 2**28


def read_text(folder: Path, names: Sequence[str], checksum: str) -> str:
    """Read the first of ``names`` that ``folder`` holds, packed or not, and verify what is inside.

    Raises:
        MismatchError: The checksum is wrong, or the text is not UTF-8; nothing is deleted.
    """
    path = find_text(folder, names)
    if path is None:
        raise NotFoundError(f"{folder} lacks {names[0]}; put it there")
    content = read_unpacked(path, MOST_BYTES)
    require_checksum(path, content, checksum, " (unpacked)" if path.suffix in (".xz", ".gz") else "")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise MismatchError(f"{path} is not UTF-8 ({error}); {REPLACE}") from None


def most_frequent(words: Iterable[str], size: int | None) -> dict[str, int]:
    """Number the ``size`` most frequent words, `UNKNOWN` first (None: all of them).

    >>> most_frequent("b a b c c b".split(), 3)
    {'<unk>': 0, 'b': 1, 'c': 2}
    """
    counts = Counter(words)
    counts.pop(UNKNOWN, None)
    # Ties go by the alphabet, so the numbering does not depend on the order of the text.
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return {word: i for i, word in enumerate([UNKNOWN, *ranked[: None if size is None else size - 1]])}


def next_token(ids: Tensor, context: int) -> Split:
    """Cut ``[n]`` ids into windows side by side; every token's target is the one after it.

    Args:
        ids: Token ids of a text.
        context: T, tokens of a window.
    """
    count = (len(ids) - 1) // context
    end = count * context
    return Split(ids[:end].view(count, context), ids[1 : end + 1].view(count, context))


def centre_word(ids: Tensor, window: int) -> Split:
    """Make every word with ``window`` words on either side the target of its neighbours ``[N, 2 w]``."""
    rows = ids.unfold(0, 2 * window + 1, 1)
    neighbours = torch.cat([rows[:, :window], rows[:, window + 1 :]], 1)
    return Split(neighbours, rows[:, window].clone())


def assemble_text(
    name: str, texts: Sequence[Tensor], vocabulary: int, *, task: str, context: int, window: int
) -> Dataset:
    """Turn the ids of train, validation and test into a fingerprinted data set.

    Raises:
        UsageError: An argument is out of range.
        MismatchError: A text is too short for one example.
    """
    require_choice("task", task, TASKS)
    require_integer("context", context)
    require_integer("window", window)
    needed = context + 1 if task == "next-token" else 2 * window + 1
    if (shortest := min(map(len, texts))) < needed:
        raise MismatchError(
            f"a split of {name} has {shortest} tokens, but an example needs {needed}; use a shorter context"
        )
    train, validation, test = (
        next_token(ids, context) if task == "next-token" else centre_word(ids, window) for ids in texts
    )
    digest = hashlib.sha256()
    for split in (train, validation, test):
        digest.update(split.inputs.numpy().tobytes())
        digest.update(split.targets.numpy().tobytes())
    return Dataset(name, train, validation, test, vocabulary, digest.hexdigest())
