"""What cannot be trained in lock-step is said in a clause."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from mupx import stackable
from mupx.datasets.base import Dataset, Split
from mupx.usercode import hand_over
from tests.small_runs import assert_equal_over, experiment, members, runs, small_data


@pytest.fixture(scope="module")
def data() -> Dataset:
    return small_data()


class Twice(nn.Module):
    """One layer, used twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input, self.output = nn.Linear(24, width), nn.Linear(width, 10)
        self.hidden = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.hidden(self.hidden(self.input(x)).relu()))


class Decides(Twice):
    """Control flow that depends on the data."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.hidden(self.input(x))
        return self.output(y if y.sum() > 0 else -y)


class Drops(Twice):
    """Randomness in the forward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.hidden(nn.functional.dropout(self.input(x), 0.5, self.training)))


class Hides(Twice):
    """A parameter that is read in a way torch.func does not replace."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.hidden_weights = [self.hidden.weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.input(x) @ self.hidden_weights[0] + self.hidden.bias)


class Unused(Twice):
    """A layer that is never called."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.input(x))


class Frozen(Twice):
    """A layer that does not train."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.hidden.requires_grad_(False)


class Precise(Twice):
    """A layer that does not bear autocast."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.hidden(self.input(x))
        if y.dtype == torch.bfloat16:
            raise TypeError("bfloat16 is too coarse")
        return self.output(y)


def normalised(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(24, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 10))


OBSTACLES = [
    (Twice, {}, "hidden runs more than once in one forward pass"),
    (Decides, {}, "torch.func.vmap does not run the model"),
    (Drops, {}, "torch.func.vmap does not run the model .*random"),
    (Hides, {}, "under torch.func.vmap the gradient of .* is another one"),
    (Unused, {}, "hidden.weight gets no gradient"),
    (Frozen, {}, "hidden.weight is not trained"),
    (normalised, {}, r"1 \(BatchNorm1d\) keeps running statistics in training"),
    (None, {"optimizer.name": "muon"}, "muon has no update for several models at once"),
    (None, {"optimizer.fisher": "mc"}, "the mc Fisher needs backward passes of its own"),
    (None, {"optimizer.solver": "low-rank"}, "optimizer.solver = low-rank has no update"),
    (None, {"optimizer.graft": "sgd"}, "optimizer.graft = sgd has no update"),
    (None, {"train.accumulate": 2}, "train.accumulate = 2 has no update"),
    (
        Precise,
        {"train.amp": "bf16", "train.dtype": "float32"},
        "not run the model .bfloat16 is too",
    ),
]


@pytest.mark.parametrize(("model", "changes", "said"), OBSTACLES)
def test_what_cannot_be_stacked_is_said_in_a_clause(
    data: Dataset, model: Any, changes: dict[str, Any], said: str
) -> None:
    own = {} if model is None else {"model.name": hand_over(model)}
    (run,) = runs([experiment(**{"scaling.base_width": 6, **changes, **own})], data)
    found = stackable.obstacle(run)
    assert found is not None
    assert "\n" not in found
    assert re.search(said, found)


@pytest.mark.parametrize(
    ("width", "obstacle"), [(8, None), (9, "is a convolution of 9 channels, and on a CPU")]
)
def test_wide_convolutions_are_not_trained_side_by_side(width: int, obstacle: str | None) -> None:
    generator = torch.Generator().manual_seed(0)
    split = Split(torch.randn(48, 2, 8, 8, generator=generator), torch.arange(48) % 4)
    images = Dataset("small", split, split, split, 4, "0")
    (run,) = runs([experiment(**{"model.name": "myrtle5", "model.args": {}, "scaling.width": width})], images)
    found = stackable.obstacle(run)
    assert found is None if obstacle is None else obstacle in str(found)


def test_autocast_alone_is_no_obstacle(data: Dataset) -> None:
    changes = {"train.dtype": "float32", "model.name": hand_over(Precise), "scaling.base_width": 6}
    (run,) = runs([experiment(**changes)], data)
    assert stackable.obstacle(run) is None
    (run,) = runs([experiment(**{"train.dtype": "float32", "train.amp": "bf16"})], data)
    assert stackable.obstacle(run) is None


def test_a_layer_used_twice_is_no_obstacle_without_curvature(data: Dataset) -> None:
    changes = {"scaling.base_width": 6, "optimizer.name": "adamw", "model.name": hand_over(Twice)}
    chosen = members(2, **changes)
    assert stackable.obstacle(runs(chosen, data)[0]) is None
    assert_equal_over(chosen, data, steps=4)
