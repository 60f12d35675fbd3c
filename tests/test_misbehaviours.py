"""What goes wrong, silently or not, with microsoft/mup 1.0.0 must not go wrong here: one test a case.

Each test is named after a case observed by running that package; its docstring says what happened there.
"""

from __future__ import annotations

import copy
import math
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mupx
from mupx import recipe as recipes
from mupx.errors import MismatchError
from mupx.layers import derive
from mupx.optim import SGD, AdamW
from mupx.parametrization import experiment_from, make_groups, param_groups, parametrize
from mupx.roles import describe
from tests.factories import Everything, mlp3
from tests.zoo import Net

SETTING: dict[str, Any] = {"width": 256, "base_width": 64, "optimizer": "adamw"}
X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
RATIO = 256 / 64


def learning_rates(groups: list[dict[str, Any]]) -> dict[str, float]:
    return {group["params"][0][0]: float(group["lr"]) for group in groups}


def trained(width: int = 256) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model, groups = parametrize(mlp3, **{**SETTING, "width": width}, lr=0.01)
    optimizer = AdamW(groups)
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return model, optimizer


def test_an_optimizer_before_the_base_shapes() -> None:
    """mup: an assertion that prints a shape. Here there is no such order, and errors name parameters."""
    layers = derive(describe(mlp3, 64), experiment_from(**SETTING))
    with pytest.raises(MismatchError, match=r"fc1\.weight has shape \(128, 32\) in the model"):
        make_groups(mlp3(128), layers, experiment_from(**SETTING))
    AdamW(mlp3(64).parameters())  # a plain optimizer stays one


def test_plain_linear_readout() -> None:
    """mup: an assertion that asks for MuReadout. Here the read-out is found."""
    roles = {p.name: p.role for p in describe(mlp3, 64, example=X)}
    assert [name for name, role in roles.items() if role == "output"] == ["out.weight"]


def test_grouped_query_projection() -> None:
    """mup: rejected as a mistyped read-out. Here a legal projection, hidden with r_out = 1."""
    tokens = torch.randint(0, 7, (2, 5))
    _, groups = parametrize(
        Everything,
        width=32,
        base_width=8,
        optimizer="sgd",
        lr=1.0,
        example=tokens,
        roles={"position": "vector"},
    )
    k = next(g for g in groups if g["params"][0][0] == "k.weight")
    assert (k["role"], k["r_in"], k["r_out"], k["lr"]) == ("hidden", 4.0, 1.0, 0.25)


def deep(depth: Callable[[int], int]) -> Callable[[int], nn.Module]:
    def build(w: int) -> nn.Module:
        blocks = nn.Sequential(*(nn.Linear(w, w) for _ in range(depth(w))))
        return nn.Sequential(OrderedDict(fc=nn.Linear(3, w), blocks=blocks, out=nn.Linear(w, 2)))

    return build


def test_depth_that_differs_between_base_and_target() -> None:
    """mup: an assertion with two sets of names. Here an explanation."""
    build = deep(lambda w: 4 if w > 32 else 2)
    with pytest.raises(MismatchError, match=r"model has blocks\.2\.weight, .*same number of layers \(depth"):
        parametrize(build, width=64, base_width=16, optimizer="sgd")
    shallow = deep(lambda w: 1)(64)
    with pytest.raises(MismatchError, match=r"lacks blocks\.1\.weight, blocks\.1\.bias"):
        param_groups(shallow, build=deep(lambda w: 2), width=64, base_width=16, optimizer="sgd")
    with pytest.raises(MismatchError, match=r"an argument of its own \(a depth\)"):
        describe(deep(lambda w: w // 8), 16)


def test_base_equals_target() -> None:
    """mup: no dimension grows, silently. Here a warning; the dimensions are known all the same."""
    with pytest.warns(UserWarning, match="width 64 is the base width: every multiplier is 1"):
        _, groups = parametrize(mlp3, width=64, base_width=64, optimizer="adamw", lr=0.1)
    assert set(learning_rates(groups).values()) == {0.1}
    assert [p.name for p in describe(mlp3, 64) if p.shape == p.doubled] == ["out.bias"]


def test_a_second_width_that_changes_nothing() -> None:
    """mup: delta equal to base falls back silently. Here an error."""
    with pytest.raises(MismatchError, match="nothing grows between width 64 and 128"):
        parametrize(lambda width: mlp3(64), **SETTING)


def test_setting_twice() -> None:
    """mup: an error, or wrong biases. Here twice is once: groups are derived, weights are not touched."""
    model, groups = parametrize(mlp3, **SETTING, lr=0.1)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        again = param_groups(model, build=mlp3, **SETTING, lr=0.1)
        assert learning_rates(again) == learning_rates(groups)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Somewhere:
    """An os.PathLike that is no pathlib.Path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


@pytest.mark.parametrize("kind", [str, Path, Somewhere])
def test_a_path_object_for_the_recipe(tmp_path: Path, kind: Callable[[Path], Any]) -> None:
    """mup: pathlib.Path is unhandled. Here str and every os.PathLike."""
    place = kind(tmp_path / "r.toml")
    written = recipes.Recipe(experiment_from(**SETTING), describe(mlp3, 64))
    written.write(place)
    assert recipes.read(place) == written
    assert recipes.transfer(place, 512) == written.transfer(512)
    assert os.fspath(place)


def test_named_parameters_into_an_optimizer() -> None:
    """mup: a tuple has no shape. Here pairs are what groups hold."""
    model = mlp3(64)
    optimizer = SGD(model.named_parameters(), lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    for kind in (SGD, AdamW, torch.optim.AdamW):
        model, groups = parametrize(mlp3, **SETTING)
        names = [name for group in kind(groups).param_groups for name in group["param_names"]]
        assert names == [name for name, _ in model.named_parameters()]


def test_a_tensor_as_learning_rate() -> None:
    """mup: all groups share one tensor, so the ratios are lost. Here one tensor per group."""
    lr = torch.tensor(0.01)
    for kind in (AdamW, torch.optim.AdamW):
        _, groups = parametrize(mlp3, **SETTING, lr=lr)
        assert learning_rates(groups)["fc2.weight"] == pytest.approx(0.01 / RATIO)
        rates = [group["lr"] for group in kind(groups).param_groups]
        assert all(isinstance(rate, Tensor) for rate in rates)
        assert len({rate.data_ptr() for rate in rates} | {lr.data_ptr()}) == len(rates) + 1
    rates[0].mul_(0)
    assert float(rates[1]) == float(lr) == pytest.approx(0.01)
    assert (
        len(
            {
                g["lr"].data_ptr()
                for g in SGD([{"params": [p]} for p in mlp3(8).parameters()], lr=lr).param_groups
            }
        )
        == 6
    )


def test_no_learning_rate_given() -> None:
    """mup: KeyError. Here the optimizer class's own default."""
    for name, default in (("adamw", 1e-3), ("kfac", 0.1), ("shampoo", 0.05)):
        _, groups = parametrize(mlp3, **{**SETTING, "optimizer": name})
        own = next(g for g in groups if g["params"][0][0] == "fc1.weight")
        multiplier = 2.0 if name == "shampoo" else 1.0
        assert own["lr"] == pytest.approx(default * multiplier)


def test_groups_are_named() -> None:
    """mup: groups without names. Here role and width ratios, one name each."""
    _, groups = parametrize(mlp3, **SETTING)
    names = [group["name"] for group in AdamW(groups).param_groups]
    assert names[2] == "fc2.weight (hidden, r_in 4, r_out 4)"
    assert len(set(names)) == len(names)


def test_einsum_weight_with_three_growing_axes() -> None:
    """mup: more than two infinite dimensions are not implemented. Here the axes are declared."""

    def build(w: int) -> nn.Module:
        parts = {"fc": nn.Linear(3, w), "w": nn.Parameter(torch.randn(w, w, w) / w), "out": nn.Linear(w, 2)}
        return Net(
            lambda net, x: net.out(torch.einsum("oij,ni,nj->no", net.w, net.fc(x), net.fc(x))), **parts
        )

    with pytest.raises(MismatchError, match=r"role of w \[8, 8, 8\].*\{fan_in = \[1, 2\], fan_out = \[0\]\}"):
        describe(build, 8)
    declared = {"w": {"fan_in": [1, 2], "fan_out": [0]}}
    _, groups = parametrize(build, width=16, base_width=8, optimizer="sgd", lr=1.0, roles=declared)
    assert learning_rates(groups)["w"] == 2 / 4


def test_export_of_a_trained_model() -> None:
    """mup: its read-out refuses without base shapes. Here the model is a plain one."""
    model, _ = trained()
    exported = torch.export.export(model, (X,))
    torch.testing.assert_close(exported.module()(X), model(X))


def test_functional_call() -> None:
    """mup: the same refusal. Here per-sample gradients work."""
    model, _ = trained()
    values = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(model, values, (x,)).square().mean()
        return result

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, X)
    assert per_sample["out.weight"].shape == (4, 10, 256)


def test_deepcopy_for_an_average_of_weights() -> None:
    """mup: copies lose their shapes. Here a copy computes the same."""
    model, _ = trained()
    assert torch.equal(copy.deepcopy(model)(X), model(X))
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    assert torch.equal(average(X), model(X))


def test_loading_a_checkpoint_rescales_nothing() -> None:
    """mup: set_base_shapes after loading rescales trained weights silently. Here nothing is rescaled."""
    model, optimizer = trained()
    again = mlp3(256)
    again.load_state_dict(model.state_dict())
    groups = param_groups(again, build=mlp3, **SETTING, lr=0.01)
    assert torch.equal(again(X), model(X))
    # The optimizer's state carries the parametrization, and continuing is continuing.
    restored = AdamW(groups)
    restored.load_state_dict(optimizer.state_dict())
    kept = [(group["name"], group["lr"]) for group in restored.param_groups]
    assert kept == [(group["name"], group["lr"]) for group in optimizer.param_groups]


def test_one_cycle_with_a_single_rate() -> None:
    """mup: every group gets the same rate, silently. Here that is found, and a list keeps the ratios."""
    _, groups = parametrize(mlp3, **SETTING, lr=0.01)
    schedulers = torch.optim.lr_scheduler
    collapsed = SGD(groups, momentum=0.5)
    schedulers.OneCycleLR(collapsed, max_lr=0.01, total_steps=10, cycle_momentum=False)
    with pytest.warns(UserWarning, match=r"out\.weight .* has 0\.16 times its own, .*wrote one rate"):
        mupx.lr_factor(collapsed)
    _, groups = parametrize(mlp3, **SETTING, lr=0.01)
    kept = SGD(groups, momentum=0.5)
    rates = [group["lr"] for group in kept.param_groups]
    schedulers.OneCycleLR(kept, max_lr=rates, total_steps=10, cycle_momentum=False)
    assert mupx.lr_factor(kept) == pytest.approx(1 / 25)
    _, groups = parametrize(mlp3, **SETTING, lr=torch.tensor(0.01))
    relative = AdamW(groups)
    schedulers.LambdaLR(relative, lambda step: 0.5)
    assert mupx.lr_factor(relative) == pytest.approx(0.5)


def test_one_declaration_of_fan_in_for_every_optimizer() -> None:
    """mup: SGD and Adam read its override differently. Here (fan_in, fan_out) = (×2, ×16) for all."""

    def build(width: int) -> nn.Module:
        w_in, w_out = 4 * width, 4 * width**2  # ×2 and ×4 when width doubles
        parts = {
            "a": nn.Linear(3, w_in),
            "w": nn.Parameter(torch.randn(w_in, w_out)),
            "b": nn.Linear(w_out, 2),
        }
        return Net(lambda net, x: net.b(net.a(x) @ net.w), **parts)

    lr = {}
    for name in ("sgd", "adamw", "shampoo"):
        roles = {"w": {"fan_in": [0], "fan_out": [1]}}
        _, groups = parametrize(build, width=4, base_width=2, optimizer=name, lr=1.0, roles=roles)
        group = next(g for g in groups if g["params"][0][0] == "w")
        assert (group["r_in"], group["r_out"]) == (2.0, 4.0)
        lr[name] = group["lr"]
    assert lr == pytest.approx({"sgd": 4 / 2, "adamw": 1 / 2, "shampoo": math.sqrt(4 / 2)})


class Distributed(nn.Module):
    """What DistributedDataParallel does to names, without a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_names_under_wrappers() -> None:
    """mup: strips characters instead of a prefix. Here prefixes, in any order, also inside."""
    model = mlp3(256)
    plain = param_groups(model, build=mlp3, **SETTING, lr=0.1)
    compiled = torch.compile(model, backend="eager")
    inner = mlp3(256)
    inner.fc2 = torch.compile(inner.fc2, backend="eager")
    for wrapped in (Distributed(model), compiled, Distributed(compiled), inner):
        groups = param_groups(wrapped, build=mlp3, **SETTING, lr=0.1)
        assert learning_rates(groups) == learning_rates(plain)

    def embedded(w: int) -> nn.Module:
        return nn.Sequential(
            OrderedDict(encoder=nn.Linear(3, w), module=nn.Linear(w, w), bed=nn.Linear(w, 2))
        )

    # A part that is really called "module" keeps its name; "m", "o", "d"… are no prefix.
    groups = param_groups(Distributed(embedded(16)), build=embedded, width=16, base_width=8, optimizer="sgd")
    names = [name for name in learning_rates(groups) if name.endswith("weight")]
    assert names == ["encoder.weight", "module.weight", "bed.weight"]


def test_fan_in_of_a_transposed_convolution() -> None:
    """mup: takes axis 1 for fan-in, 16 instead of 2. Here the layer type says which axis it is."""

    def build(w: int) -> nn.Module:
        wide = w * w // 8  # fan-out grows as w²
        layer = nn.ConvTranspose2d(w, wide, 3)
        return nn.Sequential(nn.Conv2d(3, w, 1), layer, nn.Conv2d(wide, 2, 1))

    _, groups = parametrize(build, width=16, base_width=8, optimizer="adamw", lr=1.0)
    group = next(g for g in groups if g["params"][0][0] == "1.weight")
    assert (group["r_in"], group["r_out"], group["lr"]) == (2.0, 4.0, 0.5)
