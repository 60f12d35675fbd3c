"""Words, characters, windows: WikiText-2, tiny Shakespeare and what they share."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mupx.datasets import tiny_shakespeare, wikitext_2
from mupx.datasets.base import Dataset
from mupx.datasets.files import digest
from mupx.datasets.text import UNKNOWN, centre_word, most_frequent, next_token
from mupx.errors import MismatchError, NotFoundError, UsageError

from .toys import REAL_DATA, FileServer

WORDS = [
    "the",
    "of",
    "and",
    "a",
    "in",
    "to",
    "was",
    "his",
    "her",
    "king",
    "sea",
    "ship",
    "old",
    "bright",
    "never",
]
REAL_WIKITEXT, REAL_SHAKESPEARE = REAL_DATA / "text" / "wikitext-2", REAL_DATA / "text"


def toy_words(seed: int, lines: int) -> bytes:
    random = np.random.default_rng(seed)
    picked = [" ".join(random.choice(WORDS, 12)) for _ in range(lines)]
    return "".join(f" {line} \n" for line in picked).encode()


def write_wikitext(folder: Path) -> dict[str, str]:
    """Write three toy files and return their checksums."""
    checksums = {}
    for seed, (name, lines) in enumerate({"train.txt": 120, "valid.txt": 90, "test.txt": 40}.items()):
        content = toy_words(seed, lines)
        (folder / name).write_bytes(content)
        checksums[name] = digest(content, "0" * 40)[1]
    return checksums


def write_shakespeare(folder: Path) -> str:
    """Write a toy text and return its sha256."""
    content = toy_words(7, 60)
    (folder / "input.txt").write_bytes(content)
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(wikitext_2, "FILES", write_wikitext(tmp_path))
    monkeypatch.setattr(tiny_shakespeare, "SHA256", write_shakespeare(tmp_path))
    return tmp_path


@given(st.integers(2, 40), st.integers(1, 10))
def test_windows_lie_side_by_side_and_each_target_follows(length: int, context: int) -> None:
    ids = torch.arange(length)
    split = next_token(ids, context)
    assert split.inputs.shape == split.targets.shape == ((length - 1) // context, context)
    assert torch.equal(split.targets, split.inputs + 1)
    assert torch.equal(split.inputs.flatten(), ids[: split.inputs.numel()])


@given(st.integers(3, 30), st.integers(1, 3))
def test_the_word_in_the_middle_of_its_neighbours(length: int, window: int) -> None:
    ids = torch.arange(length)
    if length < 2 * window + 1:
        return
    split = centre_word(ids, window)
    assert split.inputs.shape == (length - 2 * window, 2 * window)
    offsets = torch.tensor([i for i in range(-window, window + 1) if i])
    assert torch.equal(split.inputs, split.targets[:, None] + offsets)


def test_the_most_frequent_words_do_not_depend_on_their_order() -> None:
    words = f"b a c c b d {UNKNOWN}".split()
    assert most_frequent(words, None) == {UNKNOWN: 0, "b": 1, "c": 2, "a": 3, "d": 4}
    assert most_frequent(words[::-1], 4) == {UNKNOWN: 0, "b": 1, "c": 2, "a": 3}


def test_vocabulary_comes_from_the_training_split_alone(folder: Path) -> None:
    data = wikitext_2.load(folder, context=5, vocabulary=8)
    assert data.classes == 8
    unknown = data.train.targets.eq(0).float().mean()
    assert 0.3 < unknown < 0.6  # eight or nine of fifteen words
    assert wikitext_2.load(folder, context=5, vocabulary=None).classes == len(WORDS) + 2
    (folder / "test.txt").write_bytes(b" " + b"unheard " * 50 + b"\n")
    wikitext_2.FILES["test.txt"] = digest((folder / "test.txt").read_bytes(), "0" * 40)[1]
    renewed = wikitext_2.load(folder, context=5, vocabulary=8)
    assert torch.equal(renewed.train.inputs, data.train.inputs)
    assert renewed.test.inputs.eq(0).float().mean() > 0.9


def test_lines_end_in_a_word_of_their_own(folder: Path) -> None:
    data = wikitext_2.load(folder, task="cbow", window=1)
    assert len(data.train) == 120 * 13 - 2  # twelve words and the end of each line


def test_the_small_variant_does_without_train_txt(folder: Path) -> None:
    (folder / "train.txt").unlink()
    data = wikitext_2.load_small(folder, context=9)
    words = 90 * 13
    assert [len(s) for s in (data.train, data.validation, data.test)] == [
        (round(0.9 * words) - 1) // 9, (round(0.1 * words) - 1) // 9, (40 * 13 - 1) // 9,
    ]  # fmt: skip
    with pytest.raises(NotFoundError, match=r"lacks train\.txt"):
        wikitext_2.load(folder)


@pytest.mark.parametrize(("suffix", "pack"), [(".xz", lzma.compress), (".gz", gzip.compress)])
def test_packed_files_are_read_as_they_are(folder: Path, suffix: str, pack: Any) -> None:
    plain = wikitext_2.load(folder).checksum, tiny_shakespeare.load(folder).checksum
    for name in [*wikitext_2.FILES, "input.txt"]:
        (folder / f"{name}{suffix}").write_bytes(pack((folder / name).read_bytes()))
        (folder / name).unlink()
    assert (wikitext_2.load(folder).checksum, tiny_shakespeare.load(folder).checksum) == plain
    packed = folder / f"valid.txt{suffix}"
    content = packed.read_bytes()
    for damaged, message in ((content[:-9], "truncated|damaged"), (b"x" + content[1:], "damaged")):
        packed.write_bytes(damaged)
        with pytest.raises(MismatchError, match=rf"valid\.txt\{suffix} is ({message})"):
            wikitext_2.load(folder)


@pytest.mark.parametrize(
    ("load", "name"), [(wikitext_2.load, "test.txt"), (tiny_shakespeare.load, "input.txt")]
)
def test_another_checksum_names_the_file_and_deletes_nothing(folder: Path, load: Any, name: str) -> None:
    with (folder / name).open("ab") as file:
        file.write(b"more\n")
    with pytest.raises(MismatchError, match=rf"{name} has (git sha1|sha256) \w+, expected \w+; replace it"):
        load(folder)
    assert (folder / name).exists()


def test_text_that_is_not_utf_8(folder: Path) -> None:
    (folder / "test.txt").write_bytes(b"\xff\xfe\n")
    wikitext_2.FILES["test.txt"] = digest(b"\xff\xfe\n", "0" * 40)[1]
    with pytest.raises(MismatchError, match=r"test\.txt is not UTF-8"):
        wikitext_2.load(folder)


def test_downloads_and_verifies(
    folder: Path, server: FileServer, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [*wikitext_2.FILES, "input.txt"]
    server.content = {name: (folder / name).read_bytes() for name in names}
    for module in (wikitext_2, tiny_shakespeare):
        monkeypatch.setattr(module, "BASE_URL", server.base_url)
    assert wikitext_2.load().checksum == wikitext_2.load(folder).checksum
    assert tiny_shakespeare.load().checksum == tiny_shakespeare.load(folder).checksum
    assert wikitext_2.load_small().checksum == wikitext_2.load_small(folder).checksum
    assert sorted(server.requests) == sorted(names)
    (places["cache"] / "wikitext-2" / "test.txt").unlink()
    server.content["test.txt"] += b"altered"
    with pytest.raises(MismatchError, match=r"test\.txt from .* has git sha1 .*; it was not kept"):
        wikitext_2.load()


def test_shakespeare_is_cut_at_90_and_95_percent(folder: Path) -> None:
    text = (folder / "input.txt").read_text()
    data = tiny_shakespeare.load(folder, context=1)
    symbols = sorted(set(text))
    assert data.classes == len(symbols)
    cuts = [0, round(0.9 * len(text)), round(0.95 * len(text)), len(text)]
    for split, start, end in zip((data.train, data.validation, data.test), cuts, cuts[1:], strict=False):
        read = [*split.inputs.flatten().tolist(), int(split.targets[-1, -1])]
        assert "".join(symbols[i] for i in read) == text[start:end]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"task": "cbwo"}, "unknown task 'cbwo'; did you mean 'cbow'"),
        ({"context": 0}, "context is 0"),
        ({"task": "cbow", "window": 0}, "window is 0"),
        ({"vocabulary": 1}, "vocabulary is 1, but must be a whole number of at least 2"),
    ],
)
def test_bad_arguments(folder: Path, args: dict[str, Any], message: str) -> None:
    for load in (wikitext_2.load, wikitext_2.load_small):
        with pytest.raises(UsageError, match=message):
            load(folder, **args)


def test_a_text_shorter_than_one_example(folder: Path) -> None:
    with pytest.raises(
        MismatchError, match="has 117 tokens, but an example needs 118; use a shorter context"
    ):
        wikitext_2.load_small(folder, context=117)
    assert len(wikitext_2.load_small(folder, context=116).validation) == 1


def unigram_loss(data: Dataset) -> float:
    """Test loss of the training frequencies, a symbol never seen counting one half."""
    counts = torch.bincount(data.train.targets.flatten(), minlength=data.classes).double().clamp_min(0.5)
    return float(-(counts / counts.sum()).log()[data.test.targets.flatten()].mean())


@pytest.mark.skipif(not REAL_WIKITEXT.is_dir(), reason=f"no WikiText-2 at {REAL_WIKITEXT}; set MUPX_DATA_DIR")
def test_real_wikitext() -> None:
    data = wikitext_2.load_small(REAL_WIKITEXT, task="cbow", window=2)
    # The published numbers of tokens, 217,646 and 245,569, less the ends that have no neighbours.
    assert len(data.train) + len(data.validation) == 217_646 - 2 * 4
    assert len(data.test) == 245_569 - 4
    assert 4 < unigram_loss(data) < math.log(data.classes)


@pytest.mark.skipif(
    not (REAL_SHAKESPEARE / "tinyshakespeare.txt.xz").is_file(),
    reason=f"no tiny Shakespeare at {REAL_SHAKESPEARE}; set MUPX_DATA_DIR",
)
def test_real_shakespeare() -> None:
    data = tiny_shakespeare.load(REAL_SHAKESPEARE, context=32)
    assert data.classes == 65
    assert data.input_shape == (32,)
    assert 3 < unigram_loss(data) < 3.6
