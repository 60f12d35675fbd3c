import pytest
import torch

from mupx import checkpoint
from mupx.checkpoint import Checkpoint
from mupx.errors import MismatchError


def sample(step=3):
    return Checkpoint(
        step, {"a": torch.randn(2, 3, dtype=torch.float64), "b": torch.arange(4)}, {"x": [1, 0.1]}
    )


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    saved = sample()
    checkpoint.write(tmp_path, saved)
    loaded = checkpoint.latest(tmp_path)
    assert loaded.step == 3
    assert loaded.values == {"x": [1, 0.1]}
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in saved.tensors.items())


def test_the_layout_in_memory_comes_back_too(tmp_path):
    """A product rounds differently when its operand is laid out differently."""
    rows = torch.randn(5, 5)
    tensors = {
        "rows": rows,
        "columns": rows.mT.contiguous().mT,
        "mixed": torch.randn(2, 3, 4).permute(1, 2, 0),
        "strided": torch.randn(4, 4)[:, ::2],  # not dense: its values alone come back
        "scalar": torch.tensor(1.0),
    }
    checkpoint.write(tmp_path, Checkpoint(1, tensors, {}))
    loaded = checkpoint.latest(tmp_path).tensors
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    for name in ("rows", "columns", "mixed"):
        assert loaded[name].stride() == tensors[name].stride()
    assert loaded["columns"].stride() != loaded["rows"].stride()


def test_tensors_that_share_memory_are_kept_under_both_names(tmp_path):
    shared = torch.randn(3)
    checkpoint.write(tmp_path, Checkpoint(1, {"a": shared, "b": shared}, {}))
    loaded = checkpoint.latest(tmp_path).tensors
    assert torch.equal(loaded["a"], shared)
    assert torch.equal(loaded["b"], shared)


def test_only_the_newest_are_kept_and_the_latest_is_found(tmp_path):
    for step in (5, 10, 100):
        checkpoint.write(tmp_path, sample(step), keep=2)
    assert checkpoint.latest(tmp_path).step == 100
    assert len(list(tmp_path.iterdir())) == 2
    assert checkpoint.latest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("keep", [0, 10, 200])
def test_a_damaged_file_is_named_and_left_in_place(tmp_path, keep):
    path = checkpoint.write(tmp_path, sample())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(MismatchError, match=path.name):
        checkpoint.latest(tmp_path)
    assert path.exists()


def test_a_file_of_another_schema_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SCHEMA", "mupx/99")
    path = checkpoint.write(tmp_path, sample())
    monkeypatch.undo()
    with pytest.raises(MismatchError, match="mupx/99"):
        checkpoint.read(path)


def test_optimizer_state_survives_the_split_into_tensors_and_json():
    import json

    state = {
        "state": {0: {"step": 3, "m": torch.ones(2)}},
        "param_groups": [{"lr": torch.tensor(0.1), "betas": (0.9, 0.99)}],
    }
    tensors, document = checkpoint.flatten_optimizer(state)
    back = checkpoint.unflatten_optimizer(tensors, json.loads(json.dumps(document)))
    assert back["state"][0]["step"] == 3
    assert torch.equal(back["state"][0]["m"], torch.ones(2))
    assert back["param_groups"][0]["lr"] == torch.tensor(0.1)
    assert back["param_groups"][0]["betas"] == [0.9, 0.99]


def damage(path, where):
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("where", [-1, -20, 9, 60])
def test_one_flipped_bit_is_found_wherever_it_is(tmp_path, where):
    path = checkpoint.write(tmp_path, sample())
    damage(path, where)
    with pytest.raises(MismatchError, match=r"damaged|schema"):
        checkpoint.read(path)


def test_a_damaged_file_is_set_aside_for_the_one_before_it_and_that_is_said(tmp_path, caplog):
    for step in (5, 10, 15):
        checkpoint.write(tmp_path, sample(step), keep=3)
    damage(tmp_path / "step-000000015.safetensors", -1)
    (tmp_path / "step-000000010.safetensors").write_bytes(b"")
    with caplog.at_level("WARNING", "mupx"):
        assert checkpoint.latest(tmp_path).step == 5
    assert caplog.text.count("continuing from the one before it, step 5") == 2
    assert "step-000000015.safetensors" in caplog.text
    checkpoint.write(tmp_path, sample(6), keep=1)  # the damaged ones do not count as the newest
    assert checkpoint.latest(tmp_path).step == 6
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".damaged", ".damaged", ".safetensors"]


def test_a_checkpoint_of_a_newer_mupx_is_refused_and_not_skipped(tmp_path, monkeypatch):
    checkpoint.write(tmp_path, sample(5))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "SCHEMA", "mupx/99")
        checkpoint.write(tmp_path, sample(10))
    with pytest.raises(MismatchError, match="mupx/99"):
        checkpoint.latest(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.complex64, torch.int8])
def test_the_checksum_takes_every_type_and_shape(tmp_path, dtype):
    tensors = {"a": torch.ones(3, 2).to(dtype), "empty": torch.ones(0, 4).to(dtype), "": torch.tensor(1.0)}
    path = checkpoint.write(tmp_path, Checkpoint(1, tensors, {}))
    assert torch.equal(checkpoint.read(path).tensors["a"], tensors["a"])
