"""``mupx advise`` on the command line: one real answer, JSON, recipes and configurations, mistakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.advice.machine import fixed_rates

from .conftest import Ended

Run = Callable[..., Ended]
ADVISE = ["advise", "--model", "mlp", "--optimizer", "kfac", "--width", "512", "--batch-size", "256"]
ADVISE += ["--steps", "2000", "--threads", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _no_measuring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("mupx.advice.measuring.measure", lambda device, dtype: fixed_rates())


def test_the_answer_has_every_part_and_every_sentence_a_source(run: Run) -> None:
    ended = run(*ADVISE)
    assert ended.code == 0, ended.err
    assert "width 512 from 64: batch 256 of 8,000, 2,000 steps" in ended.out
    assert "second order  likely" in ended.out
    assert "try first     kfac" in ended.out
    assert "refresh       10:0.3%," in ended.out
    for name in ("sgd", "adamw", "kfac", "shampoo"):
        assert any(line.startswith(name) and "100%" in line for line in ended.out.splitlines()), name
    sentences = [line for line in ended.out.splitlines() if line.startswith("  ") and "[" in line]
    assert len(sentences) >= 6
    assert all(line.endswith("]") for line in sentences)
    assert "IK: Ishikawa & Karakida, ICLR 2024, arXiv:2312.12226" in ended.out
    assert "next" not in ended.err


def test_json_is_one_document(run: Run) -> None:
    document = run(*ADVISE, "--json").json
    assert document["second_order"] == "likely"
    assert document["sizes"]["ratio"] == 256 / 8000
    assert document["refresh"]["notation"].startswith("10:0.3%,")
    assert {row["optimizer"] for row in document["costs"]} >= {"sgd", "adamw", "kfac", "shampoo"}
    assert all(statement["source"] for statement in document["statements"])
    assert document["machine"]["machine"] == "no machine"


def test_the_rates_are_measured_once_and_again_when_asked(run: Run, monkeypatch, tmp_path: Path) -> None:
    assert run(*ADVISE).code == 0
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 1
    calls = []
    monkeypatch.setattr(
        "mupx.advice.measuring.measure", lambda *given: calls.append(given) or fixed_rates(call=1.0)
    )
    slow = run(*ADVISE, "--json", "--measure").json
    assert len(calls) == 1
    assert run(*ADVISE, "--json").json["costs"] == slow["costs"]
    assert len(calls) == 1


def test_sizes_by_flags_need_no_data(run: Run) -> None:
    flags = ["--data", "mnist", "--data-dir", "nowhere", "--examples", "60000"]
    ended = run(*ADVISE, *flags, "--json")
    assert ended.json["sizes"]["examples"] == 60_000
    assert ended.json["costs"]
    shaped = ["--data", "tiny-shakespeare", "--examples", "9000", "--input-shape", "3,8,8", "--classes", "4"]
    assert run(*ADVISE, *shaped, "--json").json["costs"]


def test_a_recipe_is_read_and_what_differs_is_warned_of(run: Run, tuned: Path) -> None:
    run("transfer", tuned, "--width", "64", "-o", "wide.toml")
    same, other = run("advise", "wide.toml"), run("advise", "wide.toml", "--batch-size", "512")
    assert same.code == other.code == 0, other.err
    assert "differs-from-tuned" not in same.err
    assert "warning: differs-from-tuned: train.batch_size: 64 → 512" in other.err


def test_a_configuration_for_a_search_will_do(run: Run, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(
        '[optimizer]\nname = "shampoo"\n[search.space]\nlr = {low = 0.001, high = 1.0}\n[train]\nsteps = 99\n'
    )
    document = run("advise", "c.toml", "--json").json
    assert document["optimizer"]["configured"] == "shampoo"
    assert document["sizes"]["steps"] == 99


def test_pi_damping_is_warned_of_and_still_advised_on(run: Run) -> None:
    ended = run(*ADVISE, "--damping-rule", "pi")
    assert ended.code == 0
    assert "warning: pi-damping" in ended.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "mpl"], 2, "did you mean 'mlp'"),
        (["--optimizer", "kfca"], 2, "did you mean 'kfac'"),
        (["--input-shape", "3x32"], 2, "--input-shape takes whole numbers"),
        (["--input-shape", "0,2"], 2, "--input-shape takes whole numbers"),
        (["--examples", "0"], 2, "--examples must be a whole number"),
        (["--examples", "100"], 2, "exceeds the 100 examples"),
        (["--classes", "-3"], 2, "--classes must be a whole number"),
        (["--width", "0"], 2, "--width"),
        (["--damping-rule", "traec"], 2, "did you mean 'trace'"),
        (["--set", "train.stepz=3"], 2, "did you mean 'steps'"),
        (["--device", "tpu9"], 2, "tpu9"),
        (["--data", "tiny-shakespeare", "--data-dir", "nowhere"], 3, "nowhere"),
        (["nowhere.toml"], 3, "cannot read nowhere.toml"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_sentence(
    run: Run, arguments: list[str], code: int, message: str
) -> None:
    given = {flag for flag in arguments if flag.startswith("--")}
    kept = [w for i in range(1, len(ADVISE), 2) if ADVISE[i] not in given for w in ADVISE[i : i + 2]]
    ended = run("advise", *kept, *arguments)
    assert ended.code == code, ended.err
    assert message in ended.message
