"""Optimizers of other packages: by entry point, by reference, and by the rule that is known of them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mupx import config, dotted
from mupx.checks.coordinate import read
from mupx.config import Experiment
from mupx.elsewhere import RULES_OF, installed
from mupx.errors import UsageError
from mupx.parts import describe, load_data
from mupx.run import Run
from mupx.scaling import RULES

ROOT = Path(__file__).parent.parent
MODULE = """\
import torch

class Signed(torch.optim.Optimizer):
    rule = "lion"

    def __init__(self, params, lr, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad.sign())
"""
METADATA = "Metadata-Version: 2.1\nName: signed-descent\nVersion: 1.0\n"
WIDTHS = (256, 512)
ENTRY = "[mupx.optimizers]\nsigned = signed_descent:Signed\nkfac = signed_descent:Signed\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with entry points as pip leaves it in a ``--target`` folder."""
    site = tmp_path / "site"
    about = site / "signed_descent-1.0.dist-info"
    about.mkdir(parents=True)
    (site / "signed_descent.py").write_text(MODULE)
    (about / "METADATA").write_text(METADATA)
    (about / "entry_points.txt").write_text(ENTRY)
    monkeypatch.syspath_prepend(site)
    return site


def mupx(site: Path, *words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(site)])
    environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "120"}
    command = [sys.executable, "-m", "mupx", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, check=False)


def test_an_entry_point_is_a_name_like_any_other(package: Path, tmp_path: Path) -> None:
    parts = ["--model", "mlp", "--data", "synthetic", "--optimizer", "signed", "--base-width", 8]
    ended = mupx(
        package, "transfer", *parts, "--width", 32, "--lr", 0.01, "-o", "w.toml", "--json", cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stderr
    rows = {row["name"]: row for row in json.loads(ended.stdout)["layers"]}
    assert rows["hidden1.weight"]["lr"] == pytest.approx(0.01 / 4)
    assert rows["hidden1.weight"]["optimizer"] == "lion"
    refused = mupx(package, "train", "w.toml", "--set", "train.steps=3", cwd=tmp_path)
    assert refused.returncode == 2
    assert "--allow-code signed_descent:Signed" in refused.stderr
    allowed = ["--allow-code", "signed_descent:Signed", "--set", "train.steps=3", "--json"]
    trained = mupx(package, "train", "w.toml", *allowed, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["outcome"] == "finished"


def test_rules_lists_what_is_installed_and_so_does_an_unknown_name(package: Path, tmp_path: Path) -> None:
    listed = mupx(package, "rules", "--json", cwd=tmp_path)
    found = {entry["name"]: entry["reference"] for entry in json.loads(listed.stdout)["installed"]}
    assert found["signed"] == "signed_descent:Signed"
    assert "signed_descent:Signed" in mupx(package, "rules", cwd=tmp_path).stdout
    ended = mupx(package, "tune", "--optimizer", "sigend", cwd=tmp_path)
    assert ended.returncode == 2
    assert "did you mean 'signed'?" in ended.stderr


def test_discovery_imports_nothing_and_names_of_mupx_come_first(package: Path) -> None:
    code = (
        "import sys; from mupx import config; c = config.parse({'optimizer': {'name': 'signed'}}); "
        "print(c.optimizer.name, sorted({'torch', 'signed_descent'} & set(sys.modules)))"
    )
    paths = os.pathsep.join([str(ROOT), str(package)])
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert ended.stdout.strip() == "signed_descent:Signed []", ended.stderr
    assert installed()["kfac"] == "signed_descent:Signed"
    assert config.parse({"optimizer": {"name": "kfac"}}).optimizer.name == "kfac"


def test_without_the_package_the_name_is_unknown() -> None:
    assert "signed" not in installed()
    with pytest.raises(UsageError, match="unknown scaling rule 'signed'"):
        config.parse({"optimizer": {"name": "signed"}}).optimizer.scaling_rule  # noqa: B018


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"name": "m"}, r"optimizer\.rule\.lr is missing \(a rule has at least name, update, lr,"),
        ({"lr": {"rin": -1}}, r"unknown key 'rin' in optimizer\.rule\.lr; did you mean 'r_in'\?"),
        ({"updte": "G"}, r"unknown key 'updte' in optimizer\.rule; did you mean 'update'\?"),
        ({"lr": {"r_in": "x"}}, r"optimizer\.rule\.lr\.r_in: should be a valid number.*got 'x'"),
        ({"standing": "sure"}, r"optimizer\.rule\.standing: should be .*got 'sure'"),
        ({"damping": {"absolute": 3}}, r"optimizer\.rule\.damping\.absolute: .*got 3"),
        (3, r"optimizer\.rule: should be a valid string, got 3"),
    ],
)
def test_a_malformed_rule_says_what_is_wrong_with_it(rule: Any, message: str) -> None:
    whole = {"name": "m", "update": "G", "lr": {"r_in": -1}, "source": "me", "standing": "derived"}
    given = {**whole, **rule} if isinstance(rule, dict) and len(rule) == 1 and "name" not in rule else rule
    config.parse({"optimizer": {"name": "own.py:Own", "rule": whole}})
    with pytest.raises(UsageError, match=message):
        config.parse({"optimizer": {"name": "own.py:Own", "rule": given}})


@pytest.mark.parametrize("name", sorted(RULES_OF))
def test_every_known_rule_is_a_rule(name: str) -> None:
    assert RULES_OF[name] in RULES
    assert config.parse({"optimizer": {"name": name}}).optimizer.scaling_rule is RULES[RULES_OF[name]]


def chosen(name: str, width: int, rule: str | None = None) -> Experiment:
    gains = {f"hyperparameters.init_mult_{role}": math.sqrt(3) for role in ("input", "hidden", "output")}
    settings = {
        "optimizer.name": name,
        "optimizer.rule": rule,
        "data.name": "synthetic",
        "model.args": {"activation": "tanh", "bias": False},
        "train.dtype": "float64",
        "train.steps": 4,
        "train.schedule": "constant",
        "train.device": "cpu",
        "scaling.width": width,
        "hyperparameters.lr": 1e-3,
        **gains,
    }
    return config.parse(dotted.merge({}, settings))


def exponents(name: str, rule: str | None = None) -> list[float]:
    """Slopes of what three steps of each tensor do to its layer; some spend the first on averages."""
    moved = []
    for width in WIDTHS:
        experiment = chosen(name, width, rule)
        data = load_data(experiment)
        moved.append(read(Run(experiment, data, describe(experiment, data)), [3]).moved[3].own)
    narrow, wide = moved
    return [math.log(wide[name] / narrow[name]) / math.log(WIDTHS[1] / WIDTHS[0]) for name in narrow]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(RULES_OF))
def test_the_rule_that_is_known_keeps_the_size_of_a_step_over_width(name: str) -> None:
    package = name.partition(":")[0]
    if find_spec(package.partition(".")[0]) is None:
        pytest.skip(f"{package} is not installed: pip install --no-deps {package}")
    assert max(map(abs, exponents(name))) < 0.1, name
    other = "psgd-newton" if RULES_OF[name] == "sgd" else "sgd"  # no eps that plain SGD would overwrite
    assert max(map(abs, exponents(name, other))) > 0.4, name
