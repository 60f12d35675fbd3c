"""`mupx transfer --base-shapes`: the base width is read from a file of microsoft/mup."""

from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[1] / "golden"
FILE = GOLDEN / "mup_mlp_48.bsh"
VALUES = ["--optimizer", "adamw", "--lr", "0.01", "--width", "96"]


@pytest.mark.parametrize("file", ["mup_mlp_48.bsh", "mup_mlp_48_data_parallel.bsh"])
def test_the_file_stands_for_the_base_width(run, file):
    named = run("transfer", *VALUES, "--base-shapes", GOLDEN / file, "-o", "a.toml", "--json").json
    stated = run("transfer", *VALUES, "--base-width", 48, "-o", "b.toml", "--json").json
    assert named["base_width"] == 48
    assert named["layers"] == stated["layers"]
    assert named["layers"] != run("transfer", *VALUES, "--base-width", 24, "-o", "c.toml", "--json").json


def test_the_recipe_says_where_its_base_comes_from_and_can_be_trained(run, tmp_path):
    assert run("transfer", *VALUES, "--base-shapes", FILE, "--steps", 3, "-o", "w.toml").code == 0
    assert 'base_shapes = "mup_mlp_48.bsh"' in (tmp_path / "w.toml").read_text()
    assert run("train", "w.toml", "--threads", 1).code == 0


def test_a_width_that_is_not_the_commonest_size_is_found_as_well(run, tmp_path):
    # Two hidden layers of twice the width: the commonest size is 2 × 12, the width is 12.
    ratios = ["--set", "model.args.ratios=[1, 2, 2]", "--set", "model.args.depth=4"]
    sizes = {"input": (12, None), "hidden1": (24, 12), "hidden2": (24, 24), "output": (None, 24)}
    lines = [f"{name}.weight: {[a, b]}" for name, (a, b) in sizes.items()]
    lines += [f"{name}.bias: [{a}]" for name, (a, _) in sizes.items()]
    (tmp_path / "b.bsh").write_text("\n".join(lines).replace("None", "null"))
    ended = run("transfer", *VALUES, *ratios, "--base-shapes", "b.bsh", "--json")
    assert ended.json["base_width"] == 12


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([*VALUES, "--base-shapes", FILE, "--base-width", "48"], 2, "leave --base-width out"),
        ([*VALUES, "--base-shapes", "nowhere.bsh"], 3, "cannot read base shapes nowhere.bsh"),
        ([*VALUES, "--base-shapes", Path(__file__)], 2, "is not a base-shape file"),
        ([*VALUES, "--base-shapes", FILE, "--set", "model.args.depth=4"], 4, "the file lacks hidden2.weight"),
        (["--width", "96", "--lr", "0.1", "--base-shapes", FILE], 2, "--damping"),
        (["nowhere", "--width", "96", "--base-shapes", FILE], 2, "--base-shapes: the source says that"),
    ],
)
def test_a_wrong_file_or_flag_is_refused_in_one_sentence(run, tmp_path, arguments, code, message):
    ended = run("transfer", *arguments)
    assert ended.code == code, ended.err
    assert message in ended.message
    assert not list(tmp_path.iterdir())
