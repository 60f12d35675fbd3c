"""``mupx verify`` on the command line: verdict and exit code, files, one sentence per mistake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from .conftest import Ended

Run = Callable[..., Ended]
VERIFY = ["verify", "--data", "synthetic", "--set", "model.args.activation=tanh", "--threads", "1"]
SLOPES = [*VERIFY, "--slopes-only", "--widths", "64,128,256", "--seeds", "0"]
RIGHT = ["--optimizer", "kfac", "--lr", "0.05", "--damping", "0.02"]
WRONG = [*RIGHT, "--damping-rule", "pi"]


def test_a_right_configuration_exits_with_zero(run: Run) -> None:
    ended = run(*SLOPES, *RIGHT)
    assert ended.code == 0, ended.err
    assert "verdict  pass" in ended.out


def test_a_wrong_one_exits_with_six_and_names_the_cause(run: Run) -> None:
    ended = run(*SLOPES, *WRONG)
    assert ended.code == 6
    assert "the transfer does not hold" in ended.message
    assert "π-damping" in ended.message
    assert "verdict  fail" in ended.out
    assert "warning: pi-damping" in ended.err


def test_json_has_verdict_layers_drift_and_regret(run: Run) -> None:
    document = run(*SLOPES, *RIGHT, "--json").json
    assert document["verdict"] == "pass"
    assert {layer["name"] for layer in document["layers"]} >= {"input", "input.weight", "output.bias"}
    assert document["drift"] == document["regret"] == []
    checks = {row["quantity"] for layer in document["layers"] for row in layer["checks"]}
    assert checks == {"init", "Δh", "own", "size", "ridge"}


def test_junit_and_figures_are_written(run: Run, tmp_path: Path) -> None:
    ended = run(*SLOPES, *WRONG, "--junit", "out/junit.xml", "--figures", "figures")
    assert ended.code == 6
    suite = ElementTree.parse(tmp_path / "out" / "junit.xml").getroot()[0]
    assert int(suite.attrib["failures"]) > 0
    assert (tmp_path / "figures" / "coordinate.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "figures" / "coordinate.svg").read_bytes()


def test_a_file_that_cannot_be_written_does_not_cost_the_verdict(run: Run) -> None:
    ended = run(*SLOPES, *RIGHT, "--figures", "/dev/null/figures")
    assert ended.code == 7
    assert "cannot write" in ended.message
    assert "verdict  pass" in ended.out


def test_quick_sweeps_three_widths(run: Run) -> None:
    small = ["--optimizer", "sgd", "--lr", "0.5", "--width", "16", "--widths", "16,32,64", "--steps", "10"]
    document = run(*VERIFY, *small, "--quick", "--json").json
    assert [entry["hyperparameter"] for entry in document["drift"]] == ["lr"]
    assert [entry["width"] for entry in document["regret"]] == [16, 32, 64]
    assert [entry["width"] for entry in document["wider"]] == [16, 32, 64]
    assert document["late"]


def test_a_recipe_is_verified_at_its_base_width_and_overrides_are_told(run: Run, tuned: Path) -> None:
    run("transfer", tuned, "--width", "32", "-o", "wide.toml")
    arguments = ["--slopes-only", "--widths", "8,16,32", "--seeds", "0", "--threads", "1", "--json"]
    plain = run("verify", "wide.toml", *arguments, "--run-dir", "a")
    assert plain.json["widths"] == [8, 16, 32]
    changed = run("verify", "wide.toml", *arguments, "--set", "train.batch_size=32", "--run-dir", "b")
    codes = [finding["code"] for finding in changed.json["findings"]]
    assert "proxy-and-target-differ" in codes
    assert "proxy-and-target-differ" not in [finding["code"] for finding in plain.json["findings"]]


def test_a_search_configuration_is_verified_at_the_centre_of_its_ranges(run: Run, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[search.space.lr]\nlow = 0.01\nhigh = 0.25\n")
    ended = run("verify", "c.toml", *SLOPES[1:], "--optimizer", "sgd", "--json")
    assert "lr is a range: its centre 0.05 is verified" in ended.err


def test_the_same_command_continues_and_another_is_refused(run: Run) -> None:
    first = run(*SLOPES, *RIGHT, "--run-dir", "v")
    again = run(*SLOPES, *RIGHT, "--run-dir", "v")
    assert (first.code, again.code) == (0, 0)
    assert first.out == again.out
    other = run(*SLOPES, *WRONG, "--run-dir", "v")
    assert other.code == 4
    assert "damping_rule" in other.message
    assert run(*SLOPES, *WRONG, "--run-dir", "v", "--fresh").code == 6


def test_status_tells_how_far_a_verification_is(run: Run) -> None:
    run(*SLOPES, *WRONG, "--run-dir", "v")
    told = run("status", "v", "--json").json
    assert (told["kind"], told["state"], told["measured"], told["verdict"]) == (
        "verification",
        "finished",
        3,
        "fail",
    )
    assert "π-damping" in run("status", "v").out


def test_a_search_and_a_verification_share_a_folder_without_mixing(run: Run) -> None:
    run(*SLOPES, *RIGHT, "--run-dir", "v")
    tune = ["tune", "--data", "synthetic", "--optimizer", "sgd", "--width", "8", "--steps", "4"]
    assert run(*tune, "--trials", "2", "--threads", "1", "--run-dir", "v").code == 0
    again = run(*SLOPES, *RIGHT, "--run-dir", "v")
    assert again.code == 0
    assert run("status", "v", "--json").json["kind"] == "study"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--widths", "64"], 2, "compares widths and got one"),
        (["--widths", "64,wide"], 2, "--widths takes whole numbers"),
        (["--widths", "0,64"], 2, "--widths takes whole numbers"),
        (["--seeds", "-1"], 2, "--seeds takes whole numbers"),
        (["--at", "0"], 2, "--at takes whole numbers"),
        (["--optimizer", "kfca"], 2, "did you mean 'kfac'"),
        (["--lr", "1e-3:1"], 2, "only `mupx tune` searches"),
        (["--damping-rule", "pie"], 2, "did you mean 'pi'"),
        (["nowhere.toml"], 3, "cannot read nowhere.toml"),
        (["--lr", "1e39", "--optimizer", "sgd"], 2, "less than or equal to 1000000000"),
    ],
)
def test_a_mistake_is_one_sentence(run: Run, arguments: list[str], code: int, message: str) -> None:
    ended = run(*SLOPES, *arguments)
    assert ended.code == code, ended.err
    assert message in ended.message
