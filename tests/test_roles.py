"""Roles, fan-in and fan-out read from the model; initial laws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from mupx.errors import MismatchError, UsageError
from mupx.models import MODELS
from mupx.roles import describe, initial_std
from tests.factories import Everything, cnn, mlp3, mlp_uneven

TOKENS = torch.randint(0, 7, (2, 5))
POSITION = {"position": "vector"}


def roles_of(build, base=8, **options) -> dict[str, str]:
    return {p.name: p.role for p in describe(build, base, **options)}


def test_mlp() -> None:
    assert roles_of(mlp3) == {
        "fc1.weight": "input",
        "fc1.bias": "vector",
        "fc2.weight": "hidden",
        "fc2.bias": "vector",
        "out.weight": "output",
        "out.bias": "vector",
    }


def test_myrtle5() -> None:
    def build(width: int) -> nn.Module:
        model: nn.Module = MODELS.load("myrtle5")(width, input_shape=(3, 8, 8), classes=10)
        return model

    described = {p.name: p for p in describe(build, 8, example=torch.zeros(2, 3, 8, 8))}
    weights = [described[f"conv{i}.weight"].role for i in (1, 2, 3, 4)]
    assert weights == ["input", "hidden", "hidden", "hidden"]
    assert described["output.weight"].role == "output"
    assert described["conv1.weight"].kind == "conv2d"
    # Channels grow, kernel positions do not.
    assert described["conv2.weight"].ratios((32, 32, 3, 3)) == (4.0, 4.0)


def test_unequal_widths_give_unequal_ratios() -> None:
    described = {p.name: p for p in describe(mlp_uneven, 16)}
    shapes = {name: tuple(p.shape) for name, p in mlp_uneven(64).named_parameters()}
    assert described["fc2.weight"].ratios(shapes["fc2.weight"]) == (4.0, 16.0)
    assert described["fc3.weight"].ratios(shapes["fc3.weight"]) == (16.0, 4.0)
    assert described["fc3.weight"].role == "hidden"


def test_convolutions_and_batch_norm() -> None:
    described = {p.name: p for p in describe(cnn, 8)}
    assert described["bn2.weight"].role == "vector"
    assert described["bn2.weight"].kind == "norm"
    assert described["bn2.weight"].std == 0.0
    assert described["c2.weight"].ratios((64, 32, 3, 3)) == (4.0, 4.0)


def test_transposed_convolution_has_fan_in_first() -> None:
    def build(width: int) -> nn.Module:
        return nn.Sequential(nn.ConvTranspose2d(width, 3, 4), nn.Conv2d(3, 2 * width, 1), nn.Linear(9, width))

    first = describe(build, 4)[0]
    assert (first.name, first.kind) == ("0.weight", "conv")
    assert first.ratios((16, 3, 4, 4)) == (4.0, 1.0)
    assert first.role == "output"  # growing fan-in, fixed fan-out, and the only such


def test_grouped_convolution_is_not_factorable() -> None:
    def build(width: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, width, 1), nn.Conv2d(width, width, 3, groups=4))

    assert [p.kind for p in describe(build, 8) if p.name.endswith("weight")] == ["conv2d", "conv"]


def test_traced_forward_finds_the_read_out_whatever_the_registration_order() -> None:
    traced = roles_of(Everything, example=TOKENS, overrides=POSITION)
    assert traced["head.weight"] == "output"
    # A finite fan-out that is not the read-out is hidden with r_out = 1.
    assert traced["k.weight"] == traced["adapter.weight"] == "hidden"
    assert traced["expand.weight"] == "input"
    assert traced["embed.weight"] == "input"
    registered = roles_of(Everything, overrides=POSITION)
    assert registered["head.weight"] == "hidden"  # what goes wrong without an example
    k = next(p for p in describe(Everything, 8, example=TOKENS, overrides=POSITION) if p.name == "k.weight")
    assert k.ratios((4, 64)) == (8.0, 1.0)


def test_embedding_has_fan_out_last() -> None:
    embed = next(p for p in describe(Everything, 8, overrides=POSITION) if p.name == "embed.weight")
    assert embed.ratios((7, 32)) == (1.0, 4.0)
    assert embed.std == 1.0


def test_bare_matrix_needs_a_line_in_the_config_and_takes_it() -> None:
    with pytest.raises(MismatchError, match=r'\[roles\] "position" = ') as caught:
        describe(Everything, 8)
    assert "fan-in" in str(caught.value)
    for role, expected in (("vector", (1.0, 4.0)), ("input", (1.0, 4.0)), ("output", (4.0, 1.0))):
        described = describe(Everything, 8, overrides={"pos*": role})
        position = next(p for p in described if p.name == "position")
        assert position.role == role
        r_in, r_out = position.ratios((5, 32))
        assert r_out == expected[1]
        assert role == "vector" or r_in == expected[0]


@pytest.mark.parametrize("growing", [0, 1, 2])
def test_bare_tensor_with_three_axes(growing: int) -> None:
    class Bare(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.head = nn.Linear(width, 2)
            self.w = nn.Parameter(torch.zeros(*(width if i == growing else 3 for i in range(3))))

    shape = tuple(16 if i == growing else 3 for i in range(3))
    described = describe(Bare, 4, overrides={"w": "input"})
    assert described[0].ratios(shape) == (1.0, 4.0)
    if growing == 2:
        assert roles_of(Bare, 4)["w"] == "vector"
    else:
        with pytest.raises(MismatchError, match="fan-in, fan-out or neither"):
            describe(Bare, 4)


def test_override_patterns() -> None:
    assert roles_of(mlp3, overrides={"fc?.weight": "hidden"})["fc1.weight"] == "hidden"
    with pytest.raises(UsageError, match=r"'fc9.\*' matches no parameter"):
        describe(mlp3, 8, overrides={"fc9.*": "hidden"})


def test_tied_weights_are_refused() -> None:
    with pytest.raises(MismatchError, match=r"embed\.weight shares its tensor with head\.weight"):
        describe(lambda width: Everything(width, tied=True), 8, overrides=POSITION)


def test_nothing_grows_is_refused() -> None:
    with pytest.raises(MismatchError, match="nothing grows between width 8 and 16"):
        describe(lambda width: nn.Linear(4, 4), 8)


def test_parameters_that_come_and_go_are_refused() -> None:
    with pytest.raises(MismatchError, match="width changes which parameters exist"):
        describe(lambda width: nn.Sequential(*(nn.Linear(width, width) for _ in range(width))), 2)


def test_constructors_that_read_values_are_built_for_real() -> None:
    class Reading(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.fc = nn.Linear(3, width)
            self.first = self.fc.weight[0, 0].item()

    assert roles_of(Reading) == {"fc.weight": "input", "fc.bias": "vector"}


def test_describe_leaves_the_random_state_alone() -> None:
    def build(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(3, width), nn.Dropout(), nn.Linear(width, 2))

    before = torch.get_rng_state()
    describe(build, 8, example=torch.ones(4, 3))
    assert torch.equal(before, torch.get_rng_state())


def test_description_depends_on_nothing_random() -> None:
    torch.manual_seed(1)
    first = describe(Everything, 8, overrides=POSITION)
    torch.manual_seed(2)
    assert first == describe(Everything, 8, overrides=POSITION)


@pytest.mark.parametrize(
    ("layer", "fan_in"),
    [
        (nn.Linear(30, 40), 30),
        (nn.Conv2d(4, 60, 3), 36),
        (nn.Conv2d(8, 60, 3, groups=2), 36),
        (nn.ConvTranspose2d(60, 4, 3), 36),
        (nn.Conv1d(10, 50, 3), 30),
    ],
)
def test_torch_default_law_is_known_exactly(layer: nn.Module, fan_in: int) -> None:
    assert initial_std(layer, "weight") == pytest.approx(1 / math.sqrt(3 * fan_in), rel=1e-15)
    assert initial_std(layer, "bias") == pytest.approx(1 / math.sqrt(3 * fan_in), rel=1e-15)
    measured = float(layer.get_parameter("weight").detach().square().mean().sqrt())
    assert measured == pytest.approx(initial_std(layer, "weight"), rel=0.1)
    assert measured != initial_std(layer, "weight")


def test_other_laws_are_measured() -> None:
    layer = nn.Linear(50, 50)
    nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    assert initial_std(layer, "weight") == pytest.approx(0.02, rel=0.1)
    assert initial_std(layer, "bias") == 0.0
    nn.init.uniform_(layer.weight, -1 / math.sqrt(50) * 1.2, 1 / math.sqrt(50) * 1.2)
    assert initial_std(layer, "weight") > 1.1 / math.sqrt(150)


def test_the_bias_of_one_output_is_no_constant() -> None:
    layer = nn.Linear(12, 1)
    assert initial_std(layer, "bias") == pytest.approx(1 / 6)
    nn.init.zeros_(layer.bias)
    assert initial_std(layer, "bias") == 0.0


def test_float_examples_follow_the_model_and_tokens_stay_whole() -> None:
    def double(width: int) -> nn.Module:
        return mlp3(width).double()

    assert roles_of(double, example=torch.ones(2, 32))["out.weight"] == "output"
    assert roles_of(Everything, example=TOKENS, overrides=POSITION)["head.weight"] == "output"


def test_two_layers_with_the_same_module_names_of_call() -> None:
    class Twice(nn.Module):
        """The read-out candidate that is called last wins, even if it was also called before."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, width), nn.Linear(width, 2), nn.Linear(width, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            result: Tensor = self.b(h) + self.c(h) + self.b(h)
            return result

    assert roles_of(Twice, example=torch.ones(1, 3))["b.weight"] == "output"
