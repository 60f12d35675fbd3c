"""What the README says must exist: files, commands, flags, make targets, the table's numbers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mupx.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CAPTURED = {"capture_output": True, "text": True, "check": True}
TABLE = re.compile(r"^\| (?:adamw|kfac|sgd|shampoo) .*$", re.M)


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:)([^)]+)\)", README))
def test_every_linked_file_exists(link):
    assert (ROOT / link).is_file()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:mupx|benchmarks|examples)/[\w/]+\.\w+", README))))
def test_every_named_file_exists(path):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("verb", sorted(set(re.findall(r"`mupx (\w+)|\$ mupx (\w+)", README))))
def test_every_verb_exists(verb):
    assert CliRunner().invoke(app, [verb[0] or verb[1], "--help"]).exit_code == 0


@pytest.mark.parametrize("target", sorted(set(re.findall(r"^make (\w+)|`make (\w+)`", README, re.M))))
def test_every_make_target_exists(target):
    assert re.search(rf"^{target[0] or target[1]}:", (ROOT / "Makefile").read_text(), re.M)


def test_the_readme_prints_the_rows_that_the_committed_results_give():
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "transfer.py"),
        "--table",
        "--widths",
        "64",
        "512",
        "1024",
        "2048",
    ]
    ended = subprocess.run(command, **CAPTURED)
    printed = [_numbers(row) for row in TABLE.findall(ended.stdout)]
    stated = TABLE.findall(_section("transfer"))
    assert stated
    for row in stated:
        assert any(set(_numbers(row)) <= set(full) for full in printed), row


@pytest.mark.parametrize(
    ("section", "script", "least"),
    [
        ("verdicts", "verdicts.py", 8),
        ("slopes", "slopes.py", 14),
        ("drift", "damping_drift.py", 4),
        ("alarms", "false_alarms.py", 10),
        ("zoo", "zoo_verdicts.py", 6),
        ("solvers", "solvers.py", 8),
        ("costs", "cost_model.py", 20),
        ("poster", "poster_refresh.py", 9),
        ("text", "zoo.py", 4),
        ("late", "late_drift.py", 9),
    ],
)
def test_the_readme_prints_what_a_benchmark_gives(section, script, least):
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--table"]
    printed = [_numbers(row) for row in subprocess.run(command, **CAPTURED).stdout.splitlines()]
    stated = [row for row in _section(section).splitlines() if row.startswith("|")][2:]
    assert len(stated) >= least
    for row in stated:
        assert any(set(_numbers(row)) <= set(full) for full in printed), row


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\bmupx\.(\w+(?:\.[A-Z]\w+)?)\(", README))))
def test_every_name_of_the_python_interface_resolves_in_a_fresh_interpreter(name):
    # A fresh one: here something else may have imported the submodule already.
    ended = subprocess.run(
        [sys.executable, "-c", f"import mupx; mupx.{name}"], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr


def _numbers(row):
    return [cell.strip() for cell in row.split("|")]


def _section(name):
    return re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", README, re.S)[1]
