"""What the coordinate check reads off models that are more than a chain of matrices."""

from __future__ import annotations

import pytest
import torch

from mupx import config, training
from mupx.checks import coordinate
from mupx.datasets.base import Dataset, Split
from mupx.training import Run


def gpt_run() -> Run:
    tokens = torch.randint(0, 11, (64, 9), generator=torch.Generator().manual_seed(0))
    split = Split(tokens[:, :-1], tokens[:, 1:])
    chosen = config.parse(
        {
            "model": {"name": "gpt", "args": {"layers": 1}},
            "optimizer": {"name": "sgd"},
            "hyperparameters": {"lr": 0.3},
            "train": {"steps": 4, "batch_size": 16, "threads": 1},
            "scaling": {"base_width": 32, "width": 32},
        }
    )
    data = Dataset("words", split, split, split, 11, "words")
    run = Run(chosen, data, training.describe(chosen, data))
    torch.nn.init.zeros_(run.model.get_parameter("blocks.0.attention.key.bias"))  # where rounding shows
    return run


def test_a_bias_that_softmax_ignores_contributes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    own = coordinate.read(gpt_run(), (4,)).moved[4].own
    assert own["blocks.0.attention.key.bias"] == 0
    assert own["blocks.0.attention.query.bias"] > 0
    monkeypatch.setattr(coordinate, "ROUNDING", 0.0)
    noise = coordinate.read(gpt_run(), (4,)).moved[4].own["blocks.0.attention.key.bias"]
    assert 0 < noise < 1e-5 * own["blocks.0.attention.key.weight"]
