"""Headers that lie about sizes, nest without end or state nonsense are one sentence, and cost nothing."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from mupx import checkpoint, recipe
from mupx.checkpoint import Checkpoint
from mupx.datasets.idx import parse_idx
from mupx.errors import MismatchError, MupxError, UsageError

TEN_GB = 10 * 2**30


def tensors_file(header: dict[str, Any] | bytes, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


NAME = "step-000000001.safetensors"
LIES = {
    "a header of ten gigabytes": struct.pack("<Q", TEN_GB) + b"{}",
    "a header of 2^64 bytes": b"\xff" * 8 + b"{}",
    "a tensor of ten gigabytes": tensors_file(
        {"a": {"dtype": "F32", "shape": [TEN_GB // 4], "data_offsets": [0, TEN_GB]}}
    ),
    "a shape whose size overflows": tensors_file(
        {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}
    ),
    "tensors that overlap": tensors_file(
        {k: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for k in "ab"}, b"1234"
    ),
    "offsets that run backwards": tensors_file(
        {"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 0]}}, b"1234"
    ),
    "nesting without end": save({}, metadata={"mupx": "[" * 100_000}),
    "metadata that are no object": save({}, metadata={"mupx": "[1]"}),
    "no metadata": save({"a": torch.ones(2)}),
    "no step": save({}, metadata={"mupx": json.dumps({"schema": "mupx/1", "values": {}, "orders": {}})}),
    "a step that is none": save(
        {}, metadata={"mupx": json.dumps({"schema": "mupx/1", "step": "x", "values": {}, "orders": {}})}
    ),
    "axes that do not exist": save(
        {"a": torch.ones(2)},
        metadata={"mupx": json.dumps({"schema": "mupx/1", "step": 1, "values": {}, "orders": {"a": [3, 1]}})},
    ),
    "values that are none": save(
        {}, metadata={"mupx": json.dumps({"schema": "mupx/1", "step": 1, "values": 3, "orders": {}})}
    ),
}


@pytest.mark.parametrize("lie", sorted(LIES))
def test_a_checkpoint_that_lies_is_refused_at_no_cost(tmp_path: Path, lie: str) -> None:
    (tmp_path / NAME).write_bytes(LIES[lie])
    tracemalloc.start()
    with pytest.raises(MismatchError, match=NAME):
        checkpoint.latest(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"optimizer": None, "untrained": {}},
        {"optimizer": {"map": [["state", {"tensor": "no such tensor"}]]}, "untrained": {}},
        {"optimizer": {"map": 3}, "untrained": {}},
        {"optimizer": [], "untrained": []},
    ],
)
def test_a_whole_checkpoint_of_something_else_is_refused_by_the_run(
    run: Any, tuned: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    for _ in range(2):
        command = ["train", tuned / "recipe.toml", "--run-dir", "run", "--set", "train.threads=1"]
        ended = run(*command)
        if ended.code == 0:
            (tmp_path / "run" / "result.json").unlink()
            for path in (tmp_path / "run" / "checkpoints").iterdir():
                path.unlink()
            tensors = {"model/a": torch.ones(2), "losses": torch.zeros(1), "rng/torch": torch.zeros(1)}
            checkpoint.write(tmp_path / "run" / "checkpoints", Checkpoint(1, tensors, values))
    assert ended.code == 4
    assert "is not one of this run" in ended.message


@pytest.mark.parametrize("shape", [(TEN_GB,), (60000, 28, 28), (2**32 - 1,) * 4])
def test_an_idx_header_that_claims_gigabytes_is_refused_unread(shape: tuple[int, ...]) -> None:
    clipped = [min(size, 2**32 - 1) for size in shape]
    payload = bytes((0, 0, 8, len(clipped))) + struct.pack(f">{len(clipped)}I", *clipped)
    tracemalloc.start()
    with pytest.raises(MismatchError, match="expected"):
        parse_idx(payload, Path("train-images"))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "text",
    ["a = " + "[" * 100_000, "a = " + "{b=" * 20_000, "[" + "a." * 50_000 + "b]", "\x00", "a = 1e999999"],
)
def test_a_recipe_that_is_nested_without_end_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(MupxError):
        recipe.read(path)


def test_a_recipe_that_never_ends_is_not_read_to_its_end(run: Any) -> None:
    for verb in (["tune", "/dev/zero"], ["train", "/dev/zero"], ["verify", "/dev/zero"]):
        ended = run(*verb)
        assert ended.code in (UsageError.exit_code, 3), ended.err
        assert ended.message
