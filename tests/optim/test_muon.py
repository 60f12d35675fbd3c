"""Muon: torch's own to the last bit, a twin by singular values, packed weights, scales that do not grow."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mupx
from mupx.checks.curvature_orders import ORDERS
from mupx.errors import UsageError
from mupx.optim.muon import COEFFICIENTS, SCALES, Muon, averaged, newton_schulz
from mupx.parametrization import build_optimizer, experiment_from, make_groups
from mupx.scaling import RULES
from tests import oracles
from tests.optim.slopes import WRONG, flat, slopes
from tests.optim.training import batches, train

SHAPES = [(8, 8), (16, 5), (5, 16), (1, 7), (7, 1), (100, 64), (10, 64)]
TORCH: list[dict[str, Any]] = [
    {},
    {"nesterov": False},
    {"momentum": 0.0},
    {"adjust_lr_fn": "match_rms_adamw"},
    {"ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5), "eps": 1e-3},
]


def moved(kind: Any, gradients: list[Tensor], **options: Any) -> Tensor:
    """Return the weights after one step per gradient."""
    weight = nn.Parameter(torch.ones_like(gradients[0]))
    optimizer = kind([weight], **options)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def draws(*shape: int, dtype: torch.dtype = torch.float32, steps: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [10.0**-t * torch.randn(shape, generator=generator, dtype=dtype) for t in range(steps)]


@pytest.mark.parametrize("options", TORCH, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_to_the_last_bit(shape: tuple[int, int], options: dict[str, Any]) -> None:
    settings = {"lr": 0.03, "weight_decay": 0.1, **options}
    theirs = moved(torch.optim.Muon, draws(*shape), **settings)
    assert torch.equal(moved(Muon, draws(*shape), weight_decay_mode="adamw", **settings), theirs)


def test_the_comparison_with_torch_can_fail() -> None:
    theirs = moved(torch.optim.Muon, draws(16, 5), lr=0.03, weight_decay=0.0)
    for change in ({"dtype": "parameter"}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}):
        assert not torch.equal(moved(Muon, draws(16, 5), lr=0.03, **change), theirs)


def test_torch_has_the_same_defaults() -> None:
    theirs, ours = (kind([nn.Parameter(torch.ones(2, 2))]) for kind in (torch.optim.Muon, Muon))
    group = {**ours.param_groups[0], **{key: getattr(ours, key) for key in ours.kept}}
    for key, value in theirs.defaults.items():
        if key not in ("weight_decay", "adjust_lr_fn"):  # None means original there
            assert group[key] == value
    assert ours.adjust_lr_fn == "original"


@pytest.mark.parametrize("shape", SHAPES)
def test_twin_by_singular_values(shape: tuple[int, int]) -> None:
    for gradient in draws(*shape, dtype=torch.float64):
        found = newton_schulz(gradient)
        twin = oracles.orthogonalised(gradient.numpy(), 5, COEFFICIENTS)
        np.testing.assert_allclose(found.numpy(), twin, rtol=0, atol=1e-12)
        fewer = oracles.orthogonalised(gradient.numpy(), 4, COEFFICIENTS)
        assert np.abs(found.numpy() - fewer).max() > 1e-3


@pytest.mark.parametrize("nesterov", [True, False])
def test_a_float64_run_is_its_twin(nesterov: bool) -> None:
    gradients = draws(6, 4, dtype=torch.float64)
    found = moved(Muon, gradients, lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.2)
    weight, mean = np.ones((6, 4)), np.zeros((6, 4))
    for gradient in gradients:
        g = gradient.numpy()
        mean = 0.9 * mean + 0.1 * g
        U = oracles.orthogonalised(0.9 * mean + 0.1 * g if nesterov else mean, 5, COEFFICIENTS)
        weight = 0.8 * weight - 0.1 * math.sqrt(6 / 4) * U
    np.testing.assert_allclose(found.numpy(), weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "parameter"])
def test_singular_values_end_near_one(dtype: str) -> None:
    for gradient in draws(40, 24):
        update = -moved(Muon, [gradient], lr=1.0, dtype=dtype, adjust_lr_fn="fan_ratio") + 1
        sigma = torch.linalg.svdvals(update / math.sqrt(40 / 24))
        assert 0.6 < sigma.min() <= sigma.max() < 1.3


def test_precisions_agree_as_far_as_they_reach() -> None:
    gradients = draws(12, 20)
    half, single = (moved(Muon, gradients, lr=0.1, dtype=d) for d in ("bfloat16", "parameter"))
    exact = moved(Muon, [g.double() for g in gradients], lr=0.1)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(half.double(), exact, rtol=0, atol=1e-2)
    assert not torch.allclose(half.double(), exact, rtol=0, atol=1e-5)


def test_convolutions_are_matrices_of_filters() -> None:
    gradients = draws(6, 3, 2, 2)
    whole = moved(Muon, gradients)
    assert torch.equal(whole.flatten(1), moved(Muon, [g.flatten(1) for g in gradients]))
    for shape in ((6, 5, 3), (6, 2, 2, 2, 2)):
        assert moved(Muon, draws(*shape)).isfinite().all()


def test_vectors_go_to_adamw() -> None:
    layer = nn.Linear(3, 2)
    optimizer = Muon(layer.named_parameters(), fallback_lr=0.25)
    assert [g["algorithm"] for g in optimizer.param_groups] == ["muon", "adamw"]
    before = layer.bias.detach().clone()
    layer.bias.grad = torch.tensor([1.0, -2.0])
    optimizer.step()
    torch.testing.assert_close(before - layer.bias.detach(), torch.tensor([0.25, -0.25]))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.lstm = nn.LSTM(8, 6, proj_size=3)
        self.gru = nn.GRUCell(4, 5)
        self.qkv = nn.Linear(4, 12)
        self.head = nn.Linear(4, 6)


def test_packed_weights_are_found_or_named() -> None:
    model = Packed()
    optimizer = Muon(model.named_parameters(), parts={"qkv.*": 3}, model=model)
    found = {
        name: group["parts"]
        for group in optimizer.param_groups
        for name in group["param_names"]
        if group["algorithm"] == "muon"
    }
    assert found == {
        "attention.in_proj_weight": 3,
        "attention.out_proj.weight": 1,
        "lstm.weight_ih_l0": 4,
        "lstm.weight_hh_l0": 4,
        "lstm.weight_hr_l0": 1,
        "gru.weight_ih": 3,
        "gru.weight_hh": 3,
        "qkv.weight": 3,
        "head.weight": 1,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_parts_of_a_packed_weight_are_weights_of_their_own(dtype: torch.dtype) -> None:
    gradients = draws(12, 5, dtype=dtype)
    weight = nn.Parameter(torch.ones(12, 5, dtype=dtype))
    optimizer = Muon([("qkv", weight)], parts={"q*": 3}, lr=0.1)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    apart = [moved(Muon, [g.chunk(3)[i].clone() for g in gradients], lr=0.1) for i in range(3)]
    assert torch.equal(weight.detach(), torch.cat(apart))
    assert not torch.allclose(weight.detach(), moved(Muon, gradients, lr=0.1))
    resumed = Muon([("qkv", weight)])
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0]["parts"] == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"parts": {"w": 5}}, "w has 12 rows, which cannot be cut into 5 equal parts"),
        ({"parts": {"w": 0}}, "cut into 0 equal"),
        ({"parts": {"w": 2.0}}, r"cut into 2\.0 equal"),
        ({"parts": {"v*": 2}}, r"matches 'v\*'"),
        ({"adjust_lr_fn": "spectral"}, "adjust_lr_fn must be one of original, match_rms_adamw, fan_ratio"),
        ({"dtype": "float16"}, "dtype must be one of bfloat16, parameter"),
        ({"ns_steps": 0}, "ns_steps must be 1 to 99"),
        ({"ns_coefficients": (1.0, 2.0)}, "three numbers"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Muon([("w", nn.Parameter(torch.ones(12, 2)))], **options)


def test_leading_dimensions_are_members_of_a_population() -> None:
    gradient, mean = torch.randn(2, 3, 2, 6, 4, dtype=torch.float64)
    momentum = torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64)
    means = mean.clone()
    updates = averaged(gradient, means, momentum)
    eps = torch.tensor([1e-7, 1e-3, 100.0], dtype=torch.float64)
    whole = newton_schulz(updates, eps=eps[:, None])
    for member in range(3):
        update = averaged(gradient[member], mean[member], float(momentum[member]))
        torch.testing.assert_close(means[member], mean[member], rtol=1e-14, atol=1e-14)
        for part in range(2):
            alone = newton_schulz(update[part], eps=float(eps[member]))
            torch.testing.assert_close(whole[member, part], alone, rtol=1e-12, atol=1e-12)


# --- width ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
def test_the_first_step_moves_every_layer_alike_at_every_width(scale: str) -> None:
    assert flat(slopes("muon", 0.05, adjust_lr_fn=scale))


def test_a_wrong_exponent_shows() -> None:
    assert not any(flat(slopes("muon", 0.05, wrong=wrong)) for wrong in WRONG)


@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_at_the_grown_shape_would_count_growth_twice(scale: str) -> None:
    found = slopes("muon", 0.05, without="reference_shape", adjust_lr_fn=scale)
    assert found[0] == pytest.approx(0.5, abs=0.1)  # the input layer: √r_out beside the rule's


@pytest.mark.parametrize("multiplied", [True, False])
def test_an_eps_above_every_gradient_needs_its_multiplier(multiplied: bool) -> None:
    # The update is then proportional to the gradient over eps: without the multiplier, lr is not SGD's.
    key = "" if multiplied else "eps"
    found = slopes("muon", 0.05, without=key, values={"eps": 1e3}, eps=1e3)
    assert flat(found) == multiplied


def test_lr_at_base_width_is_torchs_and_wider_layers_follow_the_rule_alone() -> None:
    def build(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, 10))

    for scale, s in SCALES.items():
        _, groups = mupx.parametrize(build, width=32, base_width=8, optimizer="muon", lr=0.1)
        optimizer = Muon(groups, adjust_lr_fn=scale)
        sizes = {
            name: optimizer.step_size(parameter, group)
            for group in optimizer.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        }
        assert sizes["0.weight"] == pytest.approx(0.1 * 2 * s(8, 3))
        assert sizes["1.weight"] == pytest.approx(0.1 * s(8, 8))
        assert sizes["2.weight"] == pytest.approx(0.1 / 2 * s(10, 8))


def test_standard_parametrization_is_torchs_muon_at_its_own_shape() -> None:
    def build(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(6, width, bias=False), nn.Linear(width, 4, bias=False))

    torch.manual_seed(0)
    model, groups = mupx.parametrize(
        build, width=32, base_width=8, optimizer="muon", lr=0.1, parametrization="sp"
    )
    twin = copy.deepcopy(model)
    data = batches(3)
    train(model, Muon(groups), data)
    theirs = torch.optim.Muon(twin.parameters(), lr=0.1, weight_decay=0.0)
    for x, y in data:
        theirs.zero_grad()
        nn.functional.cross_entropy(twin(x), y).backward()
        theirs.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_embeddings_and_vectors_follow_adamw_in_the_table() -> None:
    def build(width: int) -> nn.Module:
        return nn.Sequential(nn.Embedding(7, width), nn.LayerNorm(width), nn.Linear(width, 5))

    experiment = experiment_from(width=32, base_width=8, optimizer="muon")
    layers = mupx.transfer(build, 32, base_width=8, optimizer="muon", data=_tokens()).layers
    assert [layer.optimizer for layer in layers] == ["adamw", "adamw", "adamw", "muon", "adamw"]
    optimizer = build_optimizer(build(32), layers, experiment)
    assert optimizer.param_groups[0]["algorithm"] == "adamw"
    assert make_groups(build(32), layers, experiment)[0]["lr"] == pytest.approx(1e-3)


def _tokens() -> Any:
    tokens, labels = torch.randint(0, 7, (40,)), torch.randint(0, 5, (40,))
    return (tokens, labels), (tokens, labels)


def test_its_eps_follows_the_norm_it_is_compared_with() -> None:
    rule = RULES["muon"].eps
    assert rule is not None
    assert (rule.r_in, rule.r_out) == (ORDERS["G"].r_in, ORDERS["G"].r_out)
    weight = nn.Parameter(torch.zeros(4, 3))
    optimizer = Muon([weight], momentum=0.0)
    group = optimizer.param_groups[0]
    assert optimizer.scales(weight, group) == {}
    weight.grad = torch.full((4, 3), 2.0)
    optimizer.step()
    scale = optimizer.scales(weight, group)["G"]
    assert scale.size == pytest.approx(2 * math.sqrt(12))
    assert scale.ridge == 1e-7
