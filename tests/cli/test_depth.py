"""`mupx transfer --depth`: the road of a residual model of one's own to another depth."""

from __future__ import annotations

import pytest

CODE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width, blocks, scale):
        super().__init__()
        self.scale = scale
        self.first = nn.Linear(4, width)
        self.body = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.last = nn.Linear(width, 3)

    def forward(self, x):
        x = self.first(x)
        for block in self.body:
            x = x + self.scale * torch.tanh(block(x))
        return self.last(x)


def build(width, blocks=2, scale=1.0):
    return Net(width, blocks, scale)


def load(directory=None):
    if directory is not None:
        print("reading", directory)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)
    return {"train": (x, x[:, :3].argmax(1)), "validation": (x[:32], x[:32, :3].argmax(1))}
"""
VALUES = ("transfer", "--model", "own.py:build", "--data", "own.py:load", "--optimizer", "sgd", "--lr", "0.1")
VALUES += ("--base-width", "8", "--batch-size", "16", "--steps", "3", "-o", "base.toml")
SECTION = ("depth.blocks=body.*", "depth.argument=blocks", "depth.branch_argument=scale")
DECLARED = tuple(word for key in SECTION for word in ("--set", key))
ALLOW = ("--allow-code", "own.py:build", "--allow-code", "own.py:load")
MLP = ("transfer", "--model", "mlp", "--base-width", "8", "--width", "16", "--optimizer", "sgd", "--lr", "1")
CONFIG = """
model.name = "own.py:build"
data.name = "own.py:load"
optimizer.name = "sgd"
train = {steps = 3, batch_size = 16}
depth = {depth = 8, blocks = "body.*", argument = "blocks", branch_argument = "scale"}
"""


@pytest.fixture
def own(run, tmp_path):
    (tmp_path / "own.py").write_text(CODE)
    return run


def test_a_recipe_goes_to_another_depth_and_is_trained_there(own, tmp_path) -> None:
    assert own(*VALUES, *DECLARED, "--width", "8").code == 0
    deep = own("transfer", "base.toml", "--width", "16", "--depth", "8", *ALLOW, "--explain")
    assert deep.code == 0, deep.err
    assert (tmp_path / "base-w16-d8.toml").exists()
    assert "width 16 from 8, depth 8 from 2 (mup)" in " ".join(deep.out.split())
    assert "lr × r_out·r_in^-1·depth = 0.4" in deep.out
    assert "r_in 2, r_out 2, depth 4; fan-in" in deep.out
    assert "[depth 8 from 2: 16 parameters inside residual branches]" in deep.out
    assert "branches × 1/depth: scale × 0.25" in deep.out
    document = own("transfer", "base-w16-d8.toml", "--depth", "4", *ALLOW, "--json").json
    assert (document["width"], document["base_depth"], document["depth"]) == (16, 2, 4)
    assert str(document["recipe"]) == "base-w16-d4.toml"
    rates = {row["name"]: row["lr"] for row in document["layers"]}
    assert rates["body.3.weight"] == pytest.approx(0.2)
    assert rates["last.weight"] == pytest.approx(0.05)
    ended = own("train", "base-w16-d8.toml", *ALLOW, "--json")
    assert ended.code == 0, ended.err
    assert ended.json["run_dir"].endswith("-w16-d8-target")
    again = own("train", "base.toml", "--set", "depth.depth=4", *ALLOW, "--run-dir", "set", "--json")
    assert (again.code, again.json["outcome"]) == (0, "finished")
    written = own("export", "base-w16-d8.toml", "-o", "groups.py")
    assert written.code == 0
    assert "BRANCH_SCALE = 0.25" in (tmp_path / "groups.py").read_text()


def test_code_of_a_recipe_is_built_only_when_allowed(own) -> None:
    own(*VALUES, *DECLARED, "--width", "8")
    refused = own("transfer", "base.toml", "--depth", "8")
    assert (refused.code, "code that would be imported" in refused.message) == (2, True)
    assert own("transfer", "base.toml", "--width", "32").code == 0


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (
            (*MLP, "--depth", "6"),
            4,
            "model mlp declares no residual branches, and without them",
        ),
        (
            (*MLP, "--depth", "6", "--set", "depth.blocks=hidden*"),
            4,
            "takes no argument 'layers', so",
        ),
        ((*MLP, "--depth", "0"), 2, "--depth must be a whole number of at least 1, got 0"),
        ((*MLP, "--set", "depth.depth=1.5"), 2, "depth.depth: should be a valid integer, got 1.5"),
        ((*MLP, "--set", "depth.dept=4"), 2, "did you mean 'depth'"),
        ((*MLP[:5], *MLP[7:]), 2, "give the target's width, its depth, or both"),
        ((*VALUES, "--depth", "4", *DECLARED[2:]), 4, "model own.py:build declares no residual branches"),
        (
            (*VALUES, "--depth", "4", *DECLARED, "--set", "depth.blocks=layer.*"),
            4,
            "'layer.*' matches",
        ),
        ((*VALUES, "--depth", "4", *DECLARED[:2]), 4, "takes no argument 'layers'"),
        ((*VALUES, "--depth", "4", *DECLARED[:4]), 4, "takes no argument 'branch_scale', so its residual"),
    ],
)
def test_what_has_no_depth_leaves_with_one_sentence(own, command, code, message) -> None:
    ended = own(*command)
    assert (ended.code, message in ended.message) == (code, True), ended.err


def test_a_search_runs_at_the_base_depth(own, tmp_path) -> None:
    (tmp_path / "c.toml").write_text(CONFIG)
    ended = own("tune", "c.toml", "--width", "8", "--trials", "2", "--run-dir", "r", "--json")
    assert ended.code == 0, ended.err
    assert "body.1.weight" in (tmp_path / "r" / "recipe.toml").read_text()
    assert "body.2.weight" not in (tmp_path / "r" / "recipe.toml").read_text()
    deep = own("transfer", "r", "--depth", "8", "--width", "16", *ALLOW)
    assert deep.code == 0, deep.err
    assert (tmp_path / "r" / "recipe-w16-d8.toml").exists()


def test_the_data_may_lie_elsewhere_than_where_it_was_tuned(own, tmp_path) -> None:
    assert own(*VALUES, *DECLARED, "--width", "8").code == 0
    deep = own("transfer", "base.toml", "--depth", "8", "--data-dir", "elsewhere", *ALLOW)
    assert (deep.code, "reading elsewhere" in deep.out) == (0, True)
    plain = own("transfer", "base.toml", "--depth", "8", *ALLOW, "-o", "plain.toml")
    assert (plain.code, "reading" in plain.out) == (0, False)
    assert (tmp_path / "base-w8-d8.toml").read_text() == (tmp_path / "plain.toml").read_text()
    refused = own("transfer", "base.toml", "--width", "16", "--data-dir", "elsewhere", *ALLOW)
    assert refused.code == 2
    assert "--data-dir: the source says that already" in refused.err
