"""`mupx export`: where it goes, what it prints, what it refuses."""

import ast
import json

import pytest


@pytest.fixture
def recipe(run):
    values = ["--optimizer", "adamw", "--lr", "0.01", "--base-width", 8]
    assert run("transfer", *values, "--width", 16, "-o", "r.toml").code == 0
    return "r.toml"


def test_the_python_file_is_printed_or_written(run, recipe, tmp_path):
    printed = run("export", recipe)
    ended = run("export", recipe, "-o", "groups.py")
    assert (printed.code, ended.code) == (0, 0)
    assert (tmp_path / "groups.py").read_text() == printed.out
    assert ended.out == "wrote  groups.py\n"
    assert "make_optimizer" in {node.name for node in ast.parse(printed.out).body if hasattr(node, "name")}


def test_the_json_document_is_that_of_the_recipe(run, recipe, tmp_path):
    document = run("export", recipe, "--format", "json").json
    rows = run("transfer", recipe, "--width", 16, "-o", "again.toml", "--json").json["layers"]
    assert document["layers"] == rows
    assert run("export", recipe, "--format", "json", "-o", "r.json").code == 0
    assert json.loads((tmp_path / "r.json").read_text()) == document


@pytest.mark.parametrize("format", ["torch", "json"])
def test_json_wraps_either_format_in_one_document(run, recipe, format):
    document = run("export", recipe, "--format", format, "-o", "out", "--json").json
    assert (document["format"], document["file"]) == (format, "out")
    assert isinstance(document["content"], str if format == "torch" else dict)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["r.toml", "--format", "trch"], 2, "did you mean 'torch'"),
        (["r.toml", "-o", "./r.toml"], 2, "is the recipe itself"),
        (["nowhere.toml"], 3, "no recipe at nowhere.toml"),
        (["config.toml"], 4, "no recipe"),
        (["r.toml", "-o", "config.toml/out.py"], 7, "cannot write config.toml/out.py"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_sentence(run, recipe, tmp_path, arguments, code, message):
    (tmp_path / "config.toml").write_text("[train]\nsteps = 3\n")
    before = (tmp_path / "r.toml").read_bytes()
    ended = run("export", *arguments)
    assert ended.code == code, ended.err
    assert message in ended.message
    assert (tmp_path / "r.toml").read_bytes() == before


def test_an_optimizer_of_ones_own_is_exported_as_json_only(run, tmp_path):
    (tmp_path / "own.py").write_text("from torch.optim import RMSprop\n")
    values = ["--model", "mlp", "--data", "synthetic", "--base-width", 8, "--width", 16, "--lr", 0.01]
    rule = ["--set", "optimizer.rule=adamw", "--set", "optimizer.weight_decay_mode=l2"]
    made = run("transfer", *values, "--optimizer", "own.py:RMSprop", *rule, "-o", "own.toml")
    assert made.code == 0, made.err
    refused = run("export", "own.toml")
    assert refused.code == 2
    assert "use --format json" in refused.message
    assert run("export", "own.toml", "--format", "json").code == 0
