"""What every entry of MODELS promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mupx.errors import UsageError
from mupx.models import MODELS

SHAPE = (2, 6, 6)


@pytest.fixture(params=sorted(MODELS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def build(name: str, width: int = 8, **args: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = MODELS.load(name)(width, **{"input_shape": SHAPE, "classes": 5, **args})
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_gives_one_logit_per_class(name: str, dtype: torch.dtype) -> None:
    logits = build(name).to(dtype)(torch.randn(4, *SHAPE, dtype=dtype))
    assert logits.shape == (4, 5)
    assert logits.dtype == dtype
    assert logits.std() > 0


def test_same_names_at_every_width_and_something_grows(name: str) -> None:
    narrow, wide = (dict(build(name, width).named_parameters()) for width in (8, 16))
    assert list(narrow) == list(wide)
    assert any(narrow[key].shape != wide[key].shape for key in narrow)


def test_read_out_is_called_output_and_grows_in_its_input_only(name: str) -> None:
    narrow, wide = (build(name, width).get_parameter("output.weight").shape for width in (8, 16))
    assert (tuple(narrow), tuple(wide)) == ((5, narrow[1]), (5, 2 * narrow[1]))


def test_deterministic_under_a_seed(name: str) -> None:
    first, second = (build(name).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_activations_without_bias(name: str, activation: str) -> None:
    model = build(name, activation=activation, bias=False)
    assert not any(key.endswith("bias") for key, _ in model.named_parameters())
    # Without biases, and as all three activations map 0 to 0, so must the network.
    assert model(torch.zeros(1, *SHAPE)).abs().max() == 0
    assert activation in [type(module).__name__.lower() for module in model.modules()]


def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = build(name)
    model(torch.randn(16, *SHAPE)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("width", [0, -1, 1.5, True, "8", None])
def test_width_must_be_a_positive_integer(name: str, width: Any) -> None:
    with pytest.raises(UsageError, match=r"width is .*whole number of at least 1; set it"):
        build(name, width)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"classes": 0}, "classes is 0"),
        ({"input_shape": ()}, "input_shape is empty"),
        ({"input_shape": (1, 0, 4)}, "each size in input_shape is 0"),
        ({"activation": "rellu"}, "unknown activation 'rellu'; did you mean 'relu'"),
        ({"activation": 3}, "unknown activation '3'"),
    ],
)
def test_bad_arguments(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(name, **args)
