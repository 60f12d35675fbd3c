"""Recipes: exact round trip, transfer, and refusal of what does not hang together."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mupx.config import Experiment, parse
from mupx.errors import MismatchError, NotFoundError, StorageError, UsageError
from mupx.layers import Parameter
from mupx.recipe import Recipe, read, transfer
from tests.strategies import experiments, parameters

recipes = st.builds(
    Recipe,
    experiments(),
    parameters(),
    st.dictionaries(
        st.sampled_from(["study", "trial", "value"]), st.integers() | st.floats(0, 1) | st.text()
    ),
)
WEIGHT = Parameter("fc.weight", "linear", "hidden", (8, 8), (16, 16), (1,), (0,), 0.1)
HEAD = Parameter("head.weight", "linear", "output", (3, 8), (3, 16), (1,), (0,), 0.2)


def recipe(width: int = 8) -> Recipe:
    changes = {"scaling.base_width": 8, "scaling.width": width, "optimizer.name": "kfac"}
    return Recipe(parse({}).updated(changes), (WEIGHT, HEAD), {"study": "s", "trial": 3, "nothing": None})


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recipes)
def test_round_trip_is_exact(tmp_path: Path, original: Recipe) -> None:
    path = tmp_path / "recipe.toml"
    original.write(path)
    again = read(path)
    assert again == original
    assert again.layers == original.layers
    first = path.read_bytes()
    again.write(path)
    assert path.read_bytes() == first


@given(recipes, st.integers(1, 8), st.integers(1, 8))
def test_transfer_composes_and_is_the_identity_on_hyperparameters(original: Recipe, a: int, b: int) -> None:
    direct = original.transfer(8 * b)
    assert original.transfer(8 * a).transfer(8 * b).layers == direct.layers
    assert direct.experiment.hyperparameters == original.experiment.hyperparameters
    assert direct.transfer(original.experiment.scaling.width) == original
    assert original.transfer(original.experiment.scaling.width) is original


def test_transfer_takes_a_recipe_or_its_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    recipe().write(path)
    assert transfer(path, 32).layers == transfer(recipe(), 32).layers
    (weight, head) = transfer(recipe(), 32).layers
    assert weight.shape == (32, 32)
    assert head.init_std == pytest.approx(0.05)


def test_transfer_refuses_what_has_no_shape(tmp_path: Path) -> None:
    half = Parameter("h", "linear", "hidden", (4, 4), (8, 8), (1,), (0,), 1.0)
    with pytest.raises(MismatchError, match="no whole shape at width 9"):
        Recipe(recipe().experiment, (half,)).transfer(9)
    with pytest.raises(UsageError, match=r"scaling\.width"):
        recipe().transfer(0)


def edited(path: Path, *keys: str | int, value: Any) -> Path:
    """Write a good recipe and change one thing in the file."""
    recipe(32).write(path)
    document: Any = tomllib.loads(path.read_text())
    place = document
    for key in keys[:-1]:
        place = place[key]
    if value is None:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    path.write_text(tomli_w.dumps(document))
    return path


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("layers", 0, "lr"), 0.2, "lr of fc.weight is 0.2 in the table"),
        (("layers", 1, "init_std"), 0.4, "init_std of head.weight"),
        (("layers", 0, "damping_A"), None, "damping_A of fc.weight is None in the table"),
        (("layers", 0, "eps"), 1e-8, "eps of fc.weight is 1e-08"),
        (("layers", 0, "role"), "output", "role of fc.weight"),
        (("layers", 0, "shape"), [32, 16], "shape of fc.weight"),
        (("layers", 0, "name"), "other", "does not list the recipe's parameters"),
        (("layers",), [], "does not list the recipe's parameters"),
        (("experiment", "hyperparameters", "lr"), 0.7, "lr of fc.weight"),
        (("experiment", "scaling", "width"), 16, "of fc.weight"),
        (("parameters", 0, "role"), "output", "of fc.weight"),
        (("parameters", 1, "std"), 0.3, "init_std of head.weight"),
        (("schema",), "mupx/2", "newer mupx"),
        (("schema",), None, "a file without a schema is no recipe"),
    ],
)
def test_an_altered_file_is_refused(
    tmp_path: Path, keys: tuple[str | int, ...], value: Any, message: str
) -> None:
    with pytest.raises(MismatchError, match=message):
        read(edited(tmp_path / "r.toml", *keys, value=value))


def test_the_last_bit_may_differ(tmp_path: Path) -> None:
    good = recipe(32).layers[0].lr
    assert read(edited(tmp_path / "r.toml", "layers", 0, "lr", value=good * (1 + 1e-13))) == recipe_read(32)
    with pytest.raises(MismatchError):
        read(edited(tmp_path / "r.toml", "layers", 0, "lr", value=good * (1 + 1e-10)))


def recipe_read(width: int) -> Recipe:
    made = recipe(width)
    return Recipe(made.experiment, made.parameters, {"study": "s", "trial": 3})


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("experiment",), None),
        (("parameters",), None),
        (("layers",), None),
        (("layers",), [1, 2]),
        (("parameters", 0, "std"), None),
        (("parameters", 0, "colour"), "red"),
        (("parameters", 0, "shape"), "wide"),
        (("parameters", 0, "shape"), [0, 8]),
        (("parameters", 0, "in_axes"), [7]),
        (("parameters", 0, "role"), "middle"),
        (("parameters", 0, "doubled"), [16]),
        (("provenance",), "me"),
        (("experiment", "hyperparameters", "lr"), -1.0),
        (("experiment", "optimizer", "name"), "kfca"),
        (("experiment",), 3),
    ],
)
def test_a_malformed_file_is_refused_in_one_sentence(
    tmp_path: Path, keys: tuple[str | int, ...], value: Any
) -> None:
    with pytest.raises(UsageError) as caught:
        read(edited(tmp_path / "r.toml", *keys, value=value))
    assert "\n" not in str(caught.value)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no recipe at"):
        read(tmp_path / "none.toml")
    with pytest.raises(NotFoundError):
        read(tmp_path)
    (tmp_path / "r.toml").write_text("lr = = 3")
    with pytest.raises(UsageError, match=r"not valid TOML.*line 1"):
        read(tmp_path / "r.toml")
    (tmp_path / "r.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not valid TOML"):
        read(tmp_path / "r.toml")
    (tmp_path / "r.toml").write_text("")
    with pytest.raises(MismatchError, match="no recipe"):
        read(tmp_path / "r.toml")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        recipe().write(tmp_path / "file" / "recipe.toml")


def test_the_file_is_made_for_readers(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "recipe.toml"
    recipe(32).write(path)
    text = path.read_text()
    assert text.startswith("# A mupx recipe")
    document = tomllib.loads(text)
    assert document["layers"][1]["name"] == "head.weight"
    assert "base_std" not in text
    assert "nothing" not in document["provenance"]
    assert Experiment.model_validate(document["experiment"]) == recipe(32).experiment
    assert [p.name for p in path.parent.iterdir()] == ["recipe.toml"]
