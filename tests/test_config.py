"""Configuration: strictness, helpers for precedence, identity."""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mupx.config import Experiment, load, parse, parse_range
from mupx.dotted import (
    assignments,
    differences,
    environment_changes,
    merge,
    parse_value,
    read_toml,
    refuse_difference,
)
from mupx.errors import MismatchError, NotFoundError, UsageError
from mupx.sections import Range
from tests.strategies import experiments


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            {"hyperparameter": {}},
            "unknown key 'hyperparameter' in the experiment; did you mean 'hyperparameters'",
        ),
        ({"hyperparameters": {"learning_rate": 1}}, "unknown key 'learning_rate' in hyperparameters"),
        ({"hyperparameters": {"dampning": 1}}, "did you mean 'damping'"),
        ({"train": {"batchsize": 1}}, "did you mean 'batch_size'"),
        ({"optimizer": {"damping_rul": "pi"}}, "did you mean 'damping_rule'"),
        ({"search": {"space": {"lr": {"lo": 1, "high": 2}}}}, "did you mean 'low'"),
        ({"search": {"space": {"lrr": {"low": 1, "high": 2}}}}, "'lrr' in search.space; did you mean 'lr'"),
    ],
)
def test_an_unknown_key_is_an_error_with_the_nearest_name(document: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(document)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "key", "bad"),
    [
        *(
            ("hyperparameters", key, bad)
            for key in ("lr", "damping", "eps")
            for bad in (0.0, -1.0, math.nan, math.inf)
        ),
        ("hyperparameters", "lr", "fast"),
        ("hyperparameters", "momentum", 1.0),
        ("hyperparameters", "weight_decay", -0.1),
        ("optimizer", "ema", 1.0),
        ("optimizer", "refresh", 0),
        ("optimizer", "staleness", 0.0),
        ("optimizer", "fisher", "true"),
        ("optimizer", "betas", [0.9, 1.0]),
        ("optimizer", "betas", [0.9]),
        ("optimizer", "weight_decay_mode", "coupled"),
        ("train", "batch_size", 2.5),
        ("train", "batch_size", 64.0),
        ("train", "epochs", 0),
        ("train", "schedule", "step"),
        ("train", "warmup", 1.0),
        ("train", "seed", -1),
        ("scaling", "width", 0),
        ("scaling", "base_width", True),
        ("search", "trials", 0),
        ("search", "sampler", "grid"),
    ],
)
def test_values_out_of_range_are_refused_and_named(section: str, key: str, bad: Any) -> None:
    with pytest.raises(UsageError, match=rf"{section}\.{key}") as caught:
        parse({section: {key: bad}})
    assert "\n" not in str(caught.value)


def test_every_problem_is_reported() -> None:
    with pytest.raises(UsageError, match=r"hyperparameters\.lr.*; .*train\.seed"):
        parse({"hyperparameters": {"lr": -1}, "train": {"seed": -1}})


@pytest.mark.parametrize(
    ("low", "high", "log", "message"),
    [
        (1.0, 0.5, True, "must be below"),
        (1.0, 1.0, False, "must be below"),
        (0.0, 1.0, True, "positive low end"),
        (-math.inf, 1.0, False, "two finite numbers"),
    ],
)
def test_ranges(low: float, high: float, log: bool, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse({"search": {"space": {"damping": {"low": low, "high": high, "log": log}}}})


def test_the_ends_of_a_range_must_be_legal_values() -> None:
    with pytest.raises(UsageError, match=r"search\.space\.momentum: 1\.5 is not a legal momentum"):
        parse({"search": {"space": {"momentum": {"low": 0.1, "high": 1.5}}}})


@pytest.mark.parametrize(
    ("text", "expected"), [("0.03", 0.03), ("1e-3:1", Range(low=1e-3, high=1.0)), ("2", 2.0)]
)
def test_shorthand(text: str, expected: object) -> None:
    assert parse_range("lr", text) == expected


@pytest.mark.parametrize("text", ["fast", "1:2:3", "1:", "", "2:1", "0:1", "nan:1"])
def test_bad_shorthand(text: str) -> None:
    with pytest.raises(UsageError, match=r"^lr"):
        parse_range("lr", text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("0.5", 0.5), ("true", True), ("mnist", "mnist"), ('"3"', "3"), ("[1, 2]", [1, 2]), ("", "")],
)
def test_values_are_toml_or_plain_strings(text: str, value: object) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_assignments() -> None:
    assert assignments(["a.b=1", "c=x=y"]) == {"a.b": 1, "c": "x=y"}
    for bad in ("a.b", "=3"):
        with pytest.raises(UsageError, match="--set takes key=value"):
            assignments([bad])


def test_environment() -> None:
    environment = {
        "MUPX_TRAIN__SEED": "3",
        "MUPX_DATA__NAME": "mnist",
        "MUPX_DATA_DIR": "elsewhere",  # a setting of its own, not a key
        "OTHER__SEED": "4",
    }
    assert environment_changes(environment) == {"train.seed": 3, "data.name": "mnist"}


def test_precedence(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[train]\nseed = 1\nbatch_size = 10\nepochs = 3.0\n[hyperparameters]\nlr = 0.5\n")
    document = read_toml(path)
    for changes in (
        environment_changes(
            {"MUPX_TRAIN__SEED": "2", "MUPX_TRAIN__BATCH_SIZE": "20", "MUPX_TRAIN__EPOCHS": "4"}
        ),
        assignments(["train.batch_size=30", "train.epochs=5"]),
        {"train.epochs": 6.0},
    ):
        document = merge(document, changes)
    train = parse(document).train
    assert (train.seed, train.batch_size, train.epochs) == (2, 30, 6.0)
    assert load(path).train.seed == 1
    assert load(path).hyperparameters.lr == 0.5


def test_merge_leaves_its_arguments_alone() -> None:
    original = {"a": {"b": [1]}, "day": datetime.date(2024, 1, 1)}
    result = merge(original, {"a.c": 2, "x.y.z": 3})
    assert result == {"a": {"b": [1], "c": 2}, "x": {"y": {"z": 3}}, "day": datetime.date(2024, 1, 1)}
    result["a"]["b"].append(2)
    assert original == {"a": {"b": [1]}, "day": datetime.date(2024, 1, 1)}
    with pytest.raises(UsageError, match="'b' is a value, not a table"):
        merge(original, {"a.b.c": 1})


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="cannot read"):
        load(tmp_path / "none.toml")
    with pytest.raises(NotFoundError):
        load(tmp_path)
    (tmp_path / "bad.toml").write_text("[train\nseed = 1")
    with pytest.raises(UsageError, match=r"not valid TOML.*line 1"):
        load(tmp_path / "bad.toml")


# --- identity -------------------------------------------------------------------------------------


@given(experiments())
def test_what_does_not_change_the_numbers_does_not_change_the_fingerprint(experiment: Experiment) -> None:
    neutral = {
        "data.dir": "/elsewhere",
        "train.device": "cpu",
        "train.threads": 3,
        "train.checkpoint_every": 7,
        "search.trials": 99,
        "search.storage": "sqlite:///x.db",
    }
    for search in (True, False):
        assert experiment.updated(neutral).fingerprint(search=search) == experiment.fingerprint(search=search)


@pytest.mark.parametrize(
    "change",
    [
        {"hyperparameters.lr": 0.123},
        {"train.seed": 5},
        {"train.steps": 7},
        {"model.args": {"depth": 5}},
        {"optimizer.refresh": 3},
        {"optimizer.refresh": "1:5%,10"},
        {"optimizer.statistics": 1},
        {"train.curvature_every": 10},
        {"scaling.width": 128},
        {"roles": {"x": "input"}},
        {"data.name": "mnist"},
    ],
)
def test_what_changes_the_numbers_changes_the_fingerprint(change: dict[str, Any]) -> None:
    base = Experiment()
    for search in (True, False):
        assert base.updated(change).fingerprint(search=search) != base.fingerprint(search=search)


def test_a_key_that_came_later_leaves_older_runs_what_they_were() -> None:
    identity = Experiment().identity(search=False)
    assert "statistics" not in identity["optimizer"]
    assert "curvature_every" not in identity["train"]


def test_the_search_enters_the_fingerprint_of_a_study_alone() -> None:
    base = Experiment()
    for change in (
        {"search.space": {"lr": {"low": 0.1, "high": 1.0}}},
        {"search.seed": 3},
        {"search.sampler": "random"},
    ):
        other = base.updated(change)
        assert other.fingerprint(search=True) != base.fingerprint(search=True)
        assert other.fingerprint(search=False) == base.fingerprint(search=False)


def test_the_fingerprint_is_stable_across_processes() -> None:
    assert Experiment().fingerprint(search=True) == Experiment.model_validate({}).fingerprint(search=True)
    assert len(Experiment().fingerprint(search=False)) == 16


def test_differences_name_the_key_and_both_values() -> None:
    old, new = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}
    assert differences(old, new) == ["a.c: 2 → 4", "d: 3 → None", "e: None → 5"]
    with pytest.raises(MismatchError, match=r"the run was made with another configuration \(a\.c: 2 → 4"):
        refuse_difference("the run", old, new, "use --fresh")
    refuse_difference("the run", old, dict(old), "use --fresh")


@given(st.sampled_from(["input", "hidden", "output", "vector"]), st.floats(0.01, 10))
def test_role_multipliers(role: Any, value: float) -> None:
    hyper = Experiment().updated({f"hyperparameters.lr_mult_{role}": value}).hyperparameters
    assert hyper.lr_mult(role) == value
    assert hyper.init_mult("vector") == 1.0


@given(experiments())
def test_a_dumped_experiment_parses_to_itself(experiment: Experiment) -> None:
    assert parse(experiment.model_dump()) == experiment
    assert parse(experiment.model_dump(mode="json")) == experiment
    assert experiment.updated({}) == experiment


def test_experiments_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Experiment().train.seed = 3


def test_the_centre_of_a_range_lies_on_its_own_scale():
    assert Range(low=0.01, high=1.0).centre == pytest.approx(0.1)
    assert Range(low=0.0, high=0.5, log=False).centre == 0.25
