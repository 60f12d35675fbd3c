"""From factory to initialised weights and groups: against the mup package, and at the edges."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mupx.config import Experiment, parse
from mupx.errors import MismatchError, UsageError
from mupx.groups import check_groups, make_groups
from mupx.layers import derive
from mupx.optim import OPTIMIZERS
from mupx.parametrization import (
    build_optimizer,
    experiment_from,
    initialise,
    param_groups,
    parametrize,
    resolved,
)
from mupx.recipe import Recipe
from mupx.roles import describe
from mupx.scaling import RULES
from tests.factories import Everything, cnn, mlp3, mlp_uneven, small_cnn, small_mlp, tanh_mlp
from tests.oracles import golden_json

FACTORIES = {"MLP3": mlp3, "MLPUneven": mlp_uneven, "CNN": cnn}
CASES = golden_json("mup_rules")["cases"]
IDS = [f"{c['model']}-{c['base_width']}-{c['target_width']}" for c in CASES]
TRAJECTORIES = golden_json("mup_trajectories")


def meta_shapes(build: Callable[[int], nn.Module], width: int) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in build(width).named_parameters()}


def table(case: dict[str, Any], optimizer: str, **options: Any) -> dict[str, Any]:
    build, width = FACTORIES[case["model"]], case["target_width"]
    values = {"lr": 1.0, "weight_decay": 1.0, **options}
    experiment = experiment_from(width=width, base_width=case["base_width"], optimizer=optimizer, **values)
    parameters = describe(build, case["base_width"])
    return {row.name: row for row in derive(parameters, experiment, meta_shapes(build, width))}


def torch_default_std(name: str, shapes: dict[str, tuple[int, ...]]) -> float:
    weight = shapes[name.rpartition(".")[0] + ".weight"]
    return 1 / math.sqrt(3 * math.prod(weight[1:]))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_lr_and_init_equal_those_of_the_mup_package(case: dict[str, Any]) -> None:
    sgd, adam = table(case, "sgd"), table(case, "adamw")
    shapes = {p["name"]: tuple(p["shape"]) for p in case["params"]}
    assert sgd.keys() == shapes.keys()
    for stated in case["params"]:
        name = stated["name"]
        assert sgd[name].shape == shapes[name]
        assert sgd[name].lr == pytest.approx(stated["lr_mult_a0"]["SGD"], rel=1e-12)
        assert adam[name].lr == pytest.approx(stated["lr_mult_a0"]["Adam"], rel=1e-12)
        if name.startswith("bn"):
            assert sgd[name].init_std == 0.0  # constants stay
            continue
        ratio = sgd[name].init_std / torch_default_std(name, shapes)
        assert ratio == pytest.approx(stated["init_ratio_vs_sp_a0"], rel=1e-6)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_weight_decay_equals_that_of_the_mup_package(case: dict[str, Any]) -> None:
    options = {"parametrization": "mup-1.0.0"}
    sgd = table(case, "sgd", weight_decay_mode="l2", **options)
    adam = table(case, "adamw", weight_decay_mode="adamw", **options)
    for stated in case["params"]:
        name, forward = stated["name"], stated["forward_mult"]
        # The decay per step, lr × weight_decay, is the same in every abc form.
        for row, key in ((sgd[name], "MuSGD"), (adam[name], "MuAdamW")):
            product = stated[key]["lr_mult"] * stated[key]["wd_mult"]
            assert row.lr * row.weight_decay == pytest.approx(product, rel=1e-12)
        assert adam[name].eps == pytest.approx(1e-8 / forward, rel=1e-12)


def test_the_comparison_tells_standard_parametrization_apart() -> None:
    case = CASES[IDS.index("MLP3-64-256")]
    stated = {p["name"]: p for p in case["params"]}["out.weight"]
    row = table(case, "sgd", parametrization="sp")["out.weight"]
    assert row.lr != stated["lr_mult_a0"]["SGD"]
    default = torch_default_std("out.weight", {"out.weight": (10, 256)})
    assert row.init_std / default == pytest.approx(1.0)
    assert stated["init_ratio_vs_sp_a0"] == 0.5


def trajectory(case: dict[str, Any], parametrization: str, mode: str) -> tuple[list[float], nn.Module]:
    name = "sgd" if case["optimizer"] == "MuSGD" else "adamw"
    values = {"momentum": 0.0, **case["kwargs"]}
    experiment = experiment_from(
        width=case["target_width"],
        base_width=case["base_width"],
        optimizer=name,
        parametrization=parametrization,
        weight_decay_mode=mode,
        **values,
    )
    layers = derive(describe(tanh_mlp, case["base_width"]), experiment)
    model = tanh_mlp(case["target_width"])
    model.load_state_dict(
        {k: torch.tensor(v, dtype=torch.double) for k, v in case["torch_default_init"].items()}
    )
    initialise(model, layers)
    optimizer = build_optimizer(model, layers, experiment)
    x, y = (
        torch.tensor(TRAJECTORIES["data"]["x"], dtype=torch.double),
        torch.tensor(TRAJECTORIES["data"]["y"]),
    )
    losses = []
    for step in range(len(case["losses"])):
        loss = F.cross_entropy(model(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if step < len(case["losses"]) - 1:
            optimizer.step()
    return losses, model


def mode_of(case: dict[str, Any]) -> str:
    return "adamw" if case["optimizer"] == "MuAdamW" else "l2"


@pytest.mark.parametrize("case", TRAJECTORIES["cases"])
def test_trajectories_equal_those_of_the_mup_package(case: dict[str, Any]) -> None:
    parametrization = "mup" if case["optimizer"] == "MuSGD" else "mup-1.0.0"
    losses, model = trajectory(case, parametrization, mode_of(case))
    assert losses == pytest.approx(case["losses"], rel=1e-9)
    for name, parameter in model.named_parameters():
        final = torch.tensor(case["final"][name], dtype=torch.double)
        if name == "out.weight":  # their read-out multiplier, 1/width_mult, is part of our weight
            final *= case["base_width"] / case["target_width"]
        torch.testing.assert_close(parameter.detach(), final, rtol=1e-8, atol=1e-9)


def test_ours_differs_on_purpose_in_eps_and_weight_decay() -> None:
    wide = [c for c in TRAJECTORIES["cases"] if c["target_width"] > c["base_width"] and "eps" in c["kwargs"]]
    (case,) = wide
    theirs, _ = trajectory(case, "mup-1.0.0", "adamw")
    ours, _ = trajectory(case, "mup", "adamw")
    assert theirs == pytest.approx(case["losses"], rel=1e-9)
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) > 1e-5
    options = {"width": 16, "base_width": 4, "lr": 0.1, "weight_decay": 0.1, "optimizer": "adamw"}
    parameters = describe(tanh_mlp, 4)
    rows = [derive(parameters, experiment_from(**options, parametrization=p)) for p in ("mup", "mup-1.0.0")]
    pairs = {a.name: (a, b) for a, b in zip(*rows, strict=True)}
    hidden, output = pairs["fc2.weight"], pairs["out.weight"]
    assert (hidden[0].eps, hidden[1].eps) == (pytest.approx(1e-8 / 4), pytest.approx(1e-8))
    assert (output[0].eps, output[1].eps) == (pytest.approx(1e-8), pytest.approx(4e-8))
    assert hidden[0].weight_decay == 0.1
    coupled = derive(parameters, experiment_from(**options, weight_decay_mode="adamw"))
    assert next(r for r in coupled if r.name == "fc2.weight").weight_decay == pytest.approx(0.4)


# --- initialise -----------------------------------------------------------------------------------


def everything(width: int) -> nn.Module:
    model = Everything(width)
    nn.init.normal_(model.q.weight, std=0.05)
    return model


OVERRIDES = {"position": "vector"}
TOKENS = torch.randint(0, 7, (2, 5))


def table_of(build: Callable[[int], nn.Module], base: int, width: int, **values: Any) -> list[Any]:
    experiment = experiment_from(width=width, base_width=base, **{"optimizer": "sgd", **values})
    return derive(describe(build, base, overrides=OVERRIDES, example=TOKENS), experiment)


def test_initialise_is_the_identity_at_base_width() -> None:
    torch.manual_seed(77)  # not the draw the description was measured on
    model = everything(16)
    before = copy.deepcopy(model.state_dict())
    initialise(model, table_of(everything, 16, 16))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_initialise_rescales_and_never_redraws() -> None:
    model = everything(64)
    before = copy.deepcopy(model.state_dict())
    layers = {layer.name: layer for layer in table_of(everything, 16, 64)}
    initialise(model, list(layers.values()))
    for name, parameter in model.named_parameters():
        old, new, layer = before[name], parameter.detach(), layers[name]
        if layer.init_std == 0:
            assert torch.equal(new, old)
            continue
        factor = (new / old).flatten()
        assert torch.allclose(factor, factor[0], rtol=1e-5)
        if old.numel() > 500:
            assert float(new.square().mean().sqrt()) == pytest.approx(layer.init_std, rel=0.05)
    # The read-out by 1/r_in, other matrices by 1/√r_in, the rest like the base.
    assert layers["head.weight"].init_std == pytest.approx(1 / math.sqrt(3 * 16) / 4)
    assert layers["k.weight"].init_std == pytest.approx(1 / math.sqrt(3 * 64))
    assert layers["q.weight"].init_std == pytest.approx(0.05 / 2, rel=0.2)
    assert layers["adapter.bias"].init_std == pytest.approx(1 / math.sqrt(3 * 16))
    assert layers["norm.weight"].init_std == 0.0


def test_initialise_below_base_width() -> None:
    layers = {layer.name: layer for layer in table_of(everything, 64, 16)}
    assert layers["head.weight"].init_std == pytest.approx(1 / math.sqrt(3 * 64) * 4)
    model = everything(16)
    before = model.head.weight.detach().clone()
    initialise(model, list(layers.values()))
    torch.testing.assert_close(model.head.weight.detach(), 2 * before)


def test_init_multipliers_apply_at_base_and_beyond() -> None:
    for width in (16, 64):
        model = everything(width)
        before = copy.deepcopy(model.state_dict())
        plain = table_of(everything, 16, width)
        initialise(model, plain)
        reference = copy.deepcopy(model.state_dict())
        model.load_state_dict(before)
        initialise(model, table_of(everything, 16, width, init_mult_hidden=3.0))
        for layer in plain:
            scale = 3.0 if layer.role == "hidden" else 1.0
            torch.testing.assert_close(model.state_dict()[layer.name], scale * reference[layer.name])


# --- groups ---------------------------------------------------------------------------------------


def steps(model: nn.Module, optimizer: Any, x: torch.Tensor, y: torch.Tensor, count: int = 4) -> list[float]:
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        with optimizer.curvature(y):
            outputs = model(x)
            optimizer.update_curvature(outputs)
            loss = F.cross_entropy(outputs, y)
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("build", [small_mlp, small_cnn])
def test_standard_and_maximal_update_parametrization_agree_bitwise_at_base_width(
    name: str, build: Callable[[int], nn.Module]
) -> None:
    shape = (16, 6) if build is small_mlp else (16, 2, 5, 5)
    x, y = torch.randn(shape), torch.randint(0, 4, (16,))
    results = []
    for parametrization in ("mup", "sp"):
        torch.manual_seed(3)
        experiment = experiment_from(
            width=8, base_width=8, optimizer=name, parametrization=parametrization, weight_decay=0.01
        )
        layers = derive(describe(build, 8), experiment)
        model = build(8)
        initialise(model, layers)
        groups = make_groups(model, layers, experiment)
        plain = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        losses = steps(model, build_optimizer(model, layers, experiment), x, y)
        results.append((plain, losses, model.state_dict()))
    (groups_a, losses_a, state_a), (groups_b, losses_b, state_b) = results
    assert groups_a == groups_b
    assert losses_a == losses_b
    assert all(torch.equal(state_a[key], state_b[key]) for key in state_a)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_the_parametrizations_part_away_from_base_width(name: str) -> None:
    a, b = (
        derive(
            describe(small_mlp, 8),
            experiment_from(width=32, base_width=8, optimizer=name, parametrization=p),
        )
        for p in ("mup", "sp")
    )
    assert a != b


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("width", [4, 8, 32])
def test_groups_are_the_table(name: str, width: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # at the base width nothing is transferred
        model, groups = parametrize(
            small_mlp, width=width, base_width=8, optimizer=name, lr=0.1, damping=0.02
        )
    parameters = dict(model.named_parameters())
    assert [g["params"][0][0] for g in groups] == list(parameters)
    experiment = experiment_from(width=width, base_width=8, optimizer=name, lr=0.1, damping=0.02)
    layers = derive(describe(small_mlp, 8), experiment)
    for group, layer in zip(groups, layers, strict=True):
        assert group["lr"] == layer.lr
        assert group.get("damping_A") == layer.damping_A
        assert group["params"][0][1] is parameters[layer.name]
    optimizer = build_optimizer(model, layers, experiment)
    check_groups(optimizer, layers)
    y = torch.randint(0, 4, (16,))
    assert math.isfinite(steps(model, optimizer, torch.randn(16, 6), y)[-1])


def test_groups_of_an_existing_model_leave_its_weights_alone() -> None:
    model = small_mlp(32)
    before = copy.deepcopy(model.state_dict())
    groups = param_groups(model, build=small_mlp, width=32, base_width=8, optimizer="adamw", lr=0.1)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [g["lr"] for g in groups] == pytest.approx([0.1, 0.1, 0.025, 0.1, 0.025, 0.1])


def test_widths_that_are_not_affine_use_the_shapes_of_the_model() -> None:
    _, groups = parametrize(mlp_uneven, width=64, base_width=16, optimizer="sgd", lr=1.0)
    lr = {g["params"][0][0]: g["lr"] for g in groups}
    assert (lr["fc2.weight"], lr["fc3.weight"]) == (4.0, 0.25)
    experiment = experiment_from(width=64, base_width=16, optimizer="sgd")
    described = describe(mlp_uneven, 16)
    with pytest.raises(MismatchError, match=r"fc1\.weight has shape None in the model"):
        derive(described, experiment, {})


def overwritten(key: str, value: float) -> tuple[Any, list[Any]]:
    experiment = experiment_from(width=32, base_width=8, optimizer="kfac", damping_rule="absolute")
    layers = derive(describe(small_mlp, 8), experiment)
    optimizer = build_optimizer(small_mlp(32), layers, experiment)
    for group in optimizer.param_groups:
        group[key] = value
    return optimizer, layers


@pytest.mark.parametrize("key", ["lr", "damping_A", "damping_B", "weight_decay"])
def test_an_overwritten_value_is_found(key: str) -> None:
    with pytest.raises(MismatchError, match=f"{key} of 0.weight is .* something overwrote it"):
        check_groups(*overwritten(key, 0.3))


def test_the_schedule_factor_is_allowed_for() -> None:
    optimizer, layers = overwritten("momentum", 0.0)
    for group in optimizer.param_groups:
        group["lr"] *= 0.25
    check_groups(optimizer, layers, factor=0.25)
    with pytest.raises(MismatchError):
        check_groups(optimizer, layers, factor=0.5)


@pytest.mark.parametrize(("deviation", "refused"), [(1e-12, False), (1e-7, True)])
def test_rounding_is_no_overwriting(deviation: float, refused: bool) -> None:
    optimizer, layers = overwritten("momentum", 0.0)
    optimizer.param_groups[0]["lr"] *= 1 + deviation
    if refused:
        with pytest.raises(MismatchError, match=r"lr of 0\.weight"):
            check_groups(optimizer, layers)
    else:
        check_groups(optimizer, layers)


def test_a_missing_group_is_found() -> None:
    optimizer, layers = overwritten("momentum", 0.0)
    del optimizer.param_groups[2]
    with pytest.raises(MismatchError, match=r"no parameter group for 2\.weight"):
        check_groups(optimizer, layers)


def test_a_model_of_another_width_is_refused() -> None:
    experiment = experiment_from(width=32, base_width=8, optimizer="sgd")
    layers = derive(describe(small_mlp, 8), experiment)
    for act in (
        lambda: initialise(small_mlp(16), layers),
        lambda: make_groups(small_mlp(16), layers, experiment),
    ):
        with pytest.raises(MismatchError, match=r"0\.weight has shape \(16, 6\) in the model but \(32, 6\)"):
            act()


def test_default_damping_rule_is_filled_in() -> None:
    for name in OPTIMIZERS:
        rule = resolved(Experiment.model_validate({"optimizer": {"name": name}})).optimizer.damping_rule
        assert rule == RULES[name].default_damping
    assert resolved(Experiment()).optimizer.damping_rule == "trace"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": "kfca"}, "did you mean 'kfac'"),
        ({"optimizer": "kfac", "damping_rule": "tracee"}, "did you mean 'trace'"),
        ({"optimizer": "sgd", "damping_rule": "trace"}, "sgd has no damping"),
        ({"optimizer": "sgd", "learning_rate": 0.1}, "unknown argument 'learning_rate'"),
        ({"optimizer": "sgd", "parametrization": "mupp"}, "did you mean 'mup'"),
        ({"optimizer": "sgd", "lr": -1.0}, "lr"),
        ({"optimizer": "sgd", "lr": math.nan}, "lr"),
    ],
)
def test_wrong_arguments_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        experiment_from(width=16, base_width=8, **values)


def test_models_stay_plain() -> None:
    model, groups = parametrize(small_mlp, width=16, base_width=8, optimizer="kfac", lr=0.1)
    optimizer = OPTIMIZERS.load("kfac")(groups, model)
    steps(model, optimizer, torch.randn(8, 6), torch.randint(0, 4, (8,)))
    twin = pickle.loads(pickle.dumps(model))
    for a, b in ((twin, model), (copy.deepcopy(model), model)):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._backward_hooks
    assert all(set(vars(p)) == set() for p in model.parameters())


def test_a_recipe_gives_groups_to_a_model_that_exists():
    experiment = experiment_from(width=16, base_width=8, optimizer="adamw", lr=0.1, eps=1e-6)
    recipe = Recipe(experiment, describe(small_mlp, 8))
    model = small_mlp(16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(recipe.apply(model))
    check_groups(optimizer, recipe.layers)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1, 0.05, 0.1, 0.05, 0.1]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(MismatchError, match="built at another width"):
        recipe.apply(small_mlp(8))


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_configuration_starts_from_what_the_constructor_does(name: str) -> None:
    accepted = inspect.signature(OPTIMIZERS.load(name)).parameters
    chosen = parse({"optimizer": {"name": name}})
    for key, value in (
        ("betas", chosen.optimizer.betas),
        ("momentum", chosen.hyperparameters.momentum),
        ("eps", chosen.hyperparameters.eps),
    ):
        assert key not in accepted or accepted[key].default == value


def test_what_a_configuration_says_wins_over_an_optimizers_own_default() -> None:
    given = {"optimizer": {"name": "muon"}, "hyperparameters": {"momentum": 0.5}}
    assert parse(given).hyperparameters.momentum == 0.5
    assert parse(given).hyperparameters.eps == 1e-7
    assert parse({}).hyperparameters.momentum == 0.0
    updated = parse(given).updated({"hyperparameters.lr": 1.0})
    assert updated.hyperparameters.momentum == 0.5
    assert Experiment().updated({"optimizer.name": "muon"}).hyperparameters.momentum == 0.95
    _, groups = parametrize(small_mlp, width=16, base_width=8, optimizer="lion", lr=0.1)
    assert groups[0]["betas"] == (0.9, 0.99)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"nesterof": True}, "optimizer muon takes no argument 'nesterof' .*nesterov"),
        ({"momentum": 0.5}, "takes no argument 'momentum'"),  # hyperparameters.momentum, in every group
        ({"parts": {"2.weight": 3}}, "cannot be cut into 3 equal parts"),
    ],
)
def test_arguments_of_a_registered_optimizer_reach_it(args: dict[str, Any], said: str) -> None:
    model = small_mlp(16)
    layers = derive(describe(small_mlp, 8), experiment_from(width=16, base_width=8, optimizer="muon"))
    good = experiment_from(width=16, base_width=8, optimizer="muon", args={"nesterov": False})
    assert build_optimizer(model, layers, good).nesterov is False  # type: ignore[union-attr]
    with pytest.raises(UsageError, match=said):
        build_optimizer(model, layers, good.updated({"optimizer.args": args}))
