"""Exported recipes: the Python file runs with torch alone and trains as mupx does.

Each exported file is run in a fresh interpreter in which importing mupx fails; what it reports is
compared with the groups, the initial weights and the training of mupx itself.
"""

from __future__ import annotations

import ast
import json
import math
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mupx.config import parse
from mupx.errors import MismatchError
from mupx.export import FORMATS, printable, to_json, to_torch
from mupx.groups import check_groups, make_groups
from mupx.layers import Parameter
from mupx.models.mlp import build as build_mlp
from mupx.parametrization import build_optimizer, initialise, resolved
from mupx.recipe import Recipe, from_dict
from mupx.refresh import Intervals
from mupx.roles import describe
from tests.factories import cnn
from tests.strategies import experiments, parameters

MLP = partial(build_mlp, input_shape=(6,), classes=3)
STEPS, SCHEDULE = 3, (1.0, 0.5, 0.25)
# Reads files, models and batches, runs the exported files without mupx, writes what came of it.
RUNNER = f"""
import importlib.util, sys, torch
class Blocked:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "mupx": raise ImportError("blocked")
sys.meta_path.insert(0, Blocked())
def load(path):
    spec = importlib.util.spec_from_file_location("exported", path)
    module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); return module
results = []
for path, model, steps in torch.load(sys.argv[1], weights_only=False):
    exported, result = load(path), {{}}
    result["groups"] = exported.param_groups(model)
    exported.rescale_init(model)
    result["initial"] = {{n: p.detach().clone() for n, p in model.named_parameters()}}
    if steps:
        optimizer = exported.make_optimizer(model)
        result["optimizer"] = type(optimizer).__name__
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: {SCHEDULE}[min(t, {STEPS} - 1)])
        for x, y in steps:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step(); schedule.step()
        result["trained"] = dict(model.named_parameters())
    results.append(result)
torch.save(results, sys.argv[2])
"""


def recipe(optimizer: str, *, width: int = 32, factory: Any = MLP, **changes: Any) -> Recipe:
    stated = {"optimizer.name": optimizer, "scaling.base_width": 8, "scaling.width": width}
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    experiment = resolved(parse({}).updated({**stated, **dotted}))
    return Recipe(experiment, describe(factory, 8), {"study": "s", "trial": 3})


def drawn(width: int, factory: Any = MLP) -> nn.Module:
    torch.manual_seed(1)
    model: nn.Module = factory(width)
    return model


def batches() -> list[Any]:
    torch.manual_seed(2)
    return [(torch.randn(16, 6), torch.randint(3, (16,))) for _ in range(STEPS)]


def trained_by_mupx(source: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return initial and final weights of mupx's own road with the same draw, batches and schedule."""
    model = drawn(source.experiment.scaling.width)
    initialise(model, source.layers)
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, source.layers, source.experiment)
    for factor, (x, y) in zip(SCHEDULE, batches(), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return initial, dict(model.named_parameters())


DECAYING = {"hyperparameters__lr": 0.05, "hyperparameters__eps": 1e-3, "hyperparameters__weight_decay": 0.1}
CASES = {
    "momentum": ("sgd", {"hyperparameters__lr": 0.05, "hyperparameters__momentum": 0.9}, "SGD"),
    "sgd": ("sgd", {**DECAYING, "hyperparameters__momentum": 0.9}, "SGD"),
    "sgd-adamw": ("sgd", {**DECAYING, "optimizer__weight_decay_mode": "adamw"}, "SGD"),
    "sgd-l2": ("sgd", {**DECAYING, "optimizer__weight_decay_mode": "l2"}, "SGD"),
    "adamw": ("adamw", {**DECAYING, "optimizer__betas": (0.8, 0.9)}, "AdamW"),
    "adamw-adamw": ("adamw", {**DECAYING, "optimizer__weight_decay_mode": "adamw"}, "AdamW"),
    "adamw-l2": ("adamw", {**DECAYING, "optimizer__weight_decay_mode": "l2"}, "Adam"),
    "kfac": ("kfac", {**DECAYING, "hyperparameters__momentum": 0.5}, None),
    "shampoo": ("shampoo", {**DECAYING, "hyperparameters__momentum": 0.5}, None),
    "muon": ("muon", DECAYING, None),
}
TORCH = [name for name, case in CASES.items() if case[2]]


@pytest.fixture(scope="module")
def without_mupx(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What every case's exported file did, in one interpreter that cannot import mupx."""
    folder, given = tmp_path_factory.mktemp("exported"), []
    for name, (optimizer, changes, kind) in CASES.items():
        path = folder / f"{name}.py"
        path.write_text(to_torch(recipe(optimizer, **changes)), encoding="utf-8")
        given.append((str(path), drawn(32), batches() if kind else []))
    torch.save(given, folder / "given.pt")
    paths = [str(folder / name) for name in ("given.pt", "results.pt")]
    ended = subprocess.run(
        [sys.executable, "-c", RUNNER, *paths], capture_output=True, text=True, cwd=folder, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return dict(zip(CASES, torch.load(folder / "results.pt", weights_only=False), strict=True))


@pytest.mark.parametrize("case", TORCH)
def test_the_file_trains_with_torch_alone_as_mupx_does(case: str, without_mupx: dict[str, Any]) -> None:
    optimizer, changes, kind = CASES[case]
    source, result = recipe(optimizer, **changes), without_mupx[case]
    initial, trained = trained_by_mupx(source)
    assert result["optimizer"] == kind
    assert [group["lr"] for group in result["groups"]] == [layer.lr for layer in source.layers]
    if optimizer == "adamw":
        assert [group["eps"] for group in result["groups"]] == [layer.eps for layer in source.layers]
    for name, weights in trained.items():
        torch.testing.assert_close(result["initial"][name], initial[name], rtol=0, atol=0)
        torch.testing.assert_close(result["trained"][name], weights, rtol=1e-5, atol=1e-7)
        assert not torch.equal(result["trained"][name], initial[name])


@pytest.mark.parametrize(
    ("case", "other"), [("sgd", "momentum"), ("adamw", "adamw-adamw"), ("adamw", "adamw-l2")]
)
def test_another_weight_decay_or_momentum_would_be_seen(case: str, other: str, without_mupx: Any) -> None:
    optimizer, changes, _ = CASES[case]
    _, trained = trained_by_mupx(recipe(optimizer, **changes))
    name = "hidden1.weight"
    assert not torch.allclose(without_mupx[other]["trained"][name], trained[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if not case[2]])
def test_the_groups_of_a_second_order_recipe_are_those_of_mupx(case: str, without_mupx: Any) -> None:
    source = recipe(case, **CASES[case][1])
    wanted = make_groups(drawn(32), source.layers, source.experiment)
    for ours, theirs in zip(wanted, without_mupx[case]["groups"], strict=True):
        assert [name for name, _ in ours.pop("params")] == [name for name, _ in theirs.pop("params")]
        assert ours == theirs


@pytest.mark.parametrize(
    ("optimizer", "args"), [("kfac", {}), ("shampoo", {}), ("muon", {"nesterov": False, "ns_steps": 3})]
)
def test_where_mupx_is_installed_the_file_makes_its_optimizer(optimizer: str, args: dict[str, Any]) -> None:
    source = recipe(optimizer, optimizer__ema=0.8, optimizer__refresh=3, optimizer__args=args)
    space: dict[str, Any] = {}
    exec(to_torch(source), space)
    made = space["make_optimizer"](drawn(32))
    ours = build_optimizer(drawn(32), source.layers, source.experiment)
    check_groups(made, source.layers)
    assert type(made) is type(ours)
    for setting in ("ema", "refresh", "damping_rule", "fisher", "nesterov", "ns_steps"):
        assert getattr(made, setting, None) == getattr(ours, setting, None)


def test_phases_of_refresh_ask_for_the_number_of_steps() -> None:
    source, space = recipe("kfac", optimizer__refresh="10:1%,100"), dict[str, Any]()
    exec(to_torch(source), space)
    assert space["make_optimizer"](drawn(32), 50_000).refresh == Intervals((500,), (10, 100))
    assert space["make_optimizer"](drawn(32), 500, epoch=20).refresh == Intervals((20,), (10, 100))
    assert "make_optimizer(model, steps)" in to_torch(source)


@pytest.mark.parametrize("width", [8, 24])
def test_initial_weights_are_those_of_mupx_for_convolutions_norms_and_other_laws(width: int) -> None:
    def build(width: int) -> nn.Module:
        model = cnn(width)
        nn.init.normal_(model.c2.weight, std=0.02)
        nn.init.zeros_(model.out.bias)
        return model

    source = recipe("sgd", width=width, factory=build, hyperparameters__init_mult_hidden=2.0)
    ours, theirs = drawn(width, build), drawn(width, build)
    initialise(ours, source.layers)
    space: dict[str, Any] = {}
    exec(to_torch(source), space)
    space["rescale_init"](theirs)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0, msg=name)
    assert not torch.equal(ours.c2.weight, drawn(width, build).c2.weight)  # type: ignore[union-attr]


def test_wrapped_models_are_recognised_and_others_refused() -> None:
    source = recipe("sgd")
    space: dict[str, Any] = {}
    exec(to_torch(source), space)
    wrapped = nn.ModuleDict({"module": nn.ModuleDict({"_orig_mod": drawn(32)})})
    space["rescale_init"](wrapped)
    assert len(space["param_groups"](wrapped)) == 6
    for other in (drawn(16), nn.Linear(3, 3), drawn(32, partial(MLP, depth=4))):
        with pytest.raises(ValueError, match="in the table"):
            space["param_groups"](other)


NASTY = st.text(
    st.sampled_from("\"'\\\n\r\t#${}%\x00\x0c\u2028\udcffé中") | st.characters(blacklist_characters="."),
    min_size=1,
)


def statements(name: str, text: str, optimizer: str, width: int) -> tuple[list[type], list[str]]:
    """Return the kinds of statements of an exported file and the names in its table."""
    row = Parameter(name, "linear", "hidden", (8, 8), (16, 16), (1,), (0,), 0.1)
    changes = {"model.name": text, "data.name": text, "optimizer.name": optimizer}
    experiment = parse({}).updated({**changes, "scaling.base_width": 8, "scaling.width": width})
    tree = ast.parse(to_torch(Recipe(experiment, (row,), {"study": text, text: name})).encode())
    table = next(node for node in tree.body if isinstance(node, ast.Assign))
    return [type(node) for node in tree.body], list(ast.literal_eval(table.value))


@given(NASTY, NASTY, st.sampled_from(["sgd", "adamw", "kfac"]), st.sampled_from([8, 16]))
def test_no_name_escapes_from_its_string_or_comment(name: str, text: str, optimizer: str, width: int) -> None:
    found, names = statements(name, f"coding: utf-7 {text}", optimizer, width)
    assert names == [name]
    assert found == statements("x", "x", optimizer, width)[0]


def test_a_name_that_is_not_escaped_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printable("a\nb\u2028 größe ρ") == "a\\nb\\u2028 größe ρ"
    monkeypatch.setattr("mupx.export.printable", str)
    assert statements("x", "a\nimport os #", "sgd", 8)[0] != statements("x", "x", "sgd", 8)[0]


@given(experiments(), parameters())
def test_the_json_document_carries_the_table_and_the_conventions(experiment: Any, rows: Any) -> None:
    source = Recipe(experiment, rows, {"value": math.pi})
    document = json.loads(json.dumps(to_json(source)))
    assert document["layers"] == json.loads(json.dumps([layer.as_dict() for layer in source.layers]))
    assert document["optimizer"]["weight_decay_mode"] == experiment.optimizer.weight_decay_mode
    assert document["provenance"] == {"value": math.pi}
    assert "search" not in document


def test_a_recipe_whose_table_was_altered_is_not_exported() -> None:
    document = recipe("sgd").to_dict()
    document["layers"][0]["lr"] *= 2
    with pytest.raises(MismatchError, match="was edited by hand"):
        from_dict(document, origin="r.toml")


def test_output_scale_is_stated_where_it_is_not_one() -> None:
    assert "OUTPUT_SCALE = 4.0" in to_torch(recipe("sgd", hyperparameters__output_scale=4.0))
    assert "OUTPUT_SCALE" not in to_torch(recipe("sgd"))


def test_every_format_gives_text_or_a_document() -> None:
    assert {type(write(recipe("sgd"))) for write in FORMATS.values()} == {str, dict}
