"""`mupx transfer --explain`: why each parameter has its role, and how its values follow from formulas."""

from __future__ import annotations

import re

import pytest
from torch import nn

from mupx.cli._explain import explain
from mupx.parametrization import experiment_from
from mupx.recipe import Recipe
from mupx.roles import describe
from tests.zoo import ZOO, attention, tied

VALUES = (
    "transfer",
    "--model",
    "mlp",
    "--base-width",
    "16",
    "--width",
    "64",
    "--lr",
    "0.5",
    "--damping",
    "0.01",
)
KFAC = (*VALUES, "--optimizer", "kfac", "--damping-rule", "absolute", "-o", "r.toml", "--explain")


def blocks(out: str) -> dict[str, str]:
    """Parameter → its lines, joined."""
    found = re.findall(r"^(\S+)  (\w+ by .*(?:\n    .*)+)", out, re.M)
    return {name: " ".join(text.split()) for name, text in found}


def test_every_parameter_is_explained(run) -> None:
    ended = run(*KFAC)
    assert ended.code == 0
    said = blocks(ended.out)
    assert set(said) == {f"{n}.{leaf}" for n in ("input", "hidden1", "output") for leaf in ("weight", "bias")}
    assert said["hidden1.weight"] == (
        "hidden by kfac, Linear 16 → 64 (fan-out) × 16 → 64 (fan-in), r_in 4, r_out 4; fan-in and fan-out "
        "grow std × r_in^-1/2 = 0.0722 lr × 1 = 0.5 damping_A × r_in = 0.04 damping_B × r_out^-1 = 0.0025"
    )
    assert "it is the last such in the traced forward pass" in said["output.weight"]
    assert "10 (fan-out) × 16 → 64 (fan-in)" in said["output.weight"]
    assert "vector by kfac, Linear" in said["input.bias"]
    assert "damping_A" not in said["input.bias"]
    assert "[does not transfer" in ended.out
    assert not blocks(run(*KFAC[:-1]).out)


def test_declared_roles_are_said_to_be_declared(run) -> None:
    ended = run(*KFAC, "--set", 'roles={"hidden*" = "input"}')
    assert "input by kfac, Linear" in blocks(ended.out)["hidden1.weight"]
    assert "declared in [roles]" in blocks(ended.out)["hidden1.weight"]


@pytest.mark.parametrize(
    ("value", "code", "message"),
    [
        ('{"hidden9" = "input"}', 2, "'hidden9' matches no parameter"),
        ('{"hidden*" = "inptu"}', 2, "should be 'input', 'hidden', 'output' or 'vector'"),
        ('{"hidden*" = {fan_inn = [0]}}', 2, "did you mean 'fan_in'"),
        ('{"hidden1.weight" = {fan_in = [1], fan_out = [7]}}', 2, "axis 7 of hidden1.weight"),
        ('{"hidden1.weight" = {fan_in = [1], fan_out = []}}', 4, "neither fan-in nor fan-out grows"),
        ('{"output.weight" = {growing_head = true}}', 2, "its fan-out does not grow"),
        ('{"output.weight" = "tied"}', 2, "tied are one nn.Linear head"),
    ],
)
def test_bad_roles_leave_with_one_sentence(run, value, code, message) -> None:
    ended = run(*KFAC, "--set", f"roles={value}")
    assert (ended.code, message in ended.message) == (code, True), ended.err


def explained(capsys, build, width=32, **values) -> str:
    experiment = experiment_from(width=width, base_width=8, **values)
    explain(Recipe(experiment, describe(build, 8, overrides=experiment.roles)))
    return str(capsys.readouterr().out)


def test_a_tied_head_and_a_folded_query_are_shown(capsys) -> None:
    out = explained(capsys, tied, optimizer="adamw", roles={"head.weight": "tied"})
    assert "logits of head × 1/r_in = 0.25" in blocks(out)["embed.weight"]
    assert "no read-out" not in out
    growing = attention(heads=2, kdim=6, vdim=6)
    for optimizer, words in (
        ("sgd", "std × α, lr × α^2"),
        ("adamw", "std × α, lr × α, eps × α^-1"),
    ):
        q = blocks(explained(capsys, growing, optimizer=optimizer))["layer.q_proj_weight"]
        assert f"α = r_out^-1/2 = 0.5 folded in: {words}" in q


def test_notes_on_read_outs(capsys) -> None:
    def two_heads(w: int) -> nn.Module:
        return nn.ModuleDict({"body": nn.Linear(3, w), "a": nn.Linear(w, 2), "b": nn.Linear(w, 3)})

    out = explained(capsys, two_heads, optimizer="sgd")
    assert (
        "the last such in order of registration is b.weight: hidden with r_out = 1" in blocks(out)["a.weight"]
    )
    assert "[no read-out: " in explained(capsys, lambda w: nn.LayerNorm(w), optimizer="sgd")


def test_standard_parametrization_is_explained_by_ones(capsys) -> None:
    said = blocks(explained(capsys, ZOO["Linear"].build, optimizer="adamw", parametrization="sp"))
    assert "std × r_in^-1/2" in said["head.weight"]
    assert "lr × 1 = 0.001 eps × 1 = 1e-8" in said["head.weight"]
