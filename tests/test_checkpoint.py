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
