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
MEASURED = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
CAPTURED = {"capture_output": True, "text": True, "check": True}
TABLE = re.compile(r"^\| (?:adamw|kfac|sgd|shampoo) .*$", re.M)


LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)")


@pytest.mark.parametrize(
    ("page", "link", "anchor"),
    [("README.md", *found) for found in LINK.findall(README)]
    + [("benchmarks/README.md", *found) for found in LINK.findall(MEASURED)],
)
def test_every_linked_file_and_section_exists(page, link, anchor):
    target = (ROOT / page).parent / link if link else ROOT / page
    assert target.is_file()
    if anchor:
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
        assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


NAMED = re.findall(r"(?:mupx|benchmarks|examples)/[\w/]+\.\w+", README + MEASURED)


@pytest.mark.parametrize("path", sorted(set(NAMED)))
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
    stated = [row for page in (README, MEASURED) for row in TABLE.findall(_section("transfer", page))]
    assert len(stated) > 40
    for row in stated:
        assert any(set(_numbers(row)) <= set(full) for full in printed), row


@pytest.mark.parametrize(
    ("section", "script", "least"),
    [
        ("warm", "transfer.py --setting warm-up --widths 64 128 256 512 1024 2048", 10),
        ("verdicts", "verdicts.py", 8),
        ("slopes", "slopes.py", 14),
        ("drift", "damping_drift.py", 4),
        ("alarms", "false_alarms.py", 10),
        ("zoo", "zoo_verdicts.py", 9),
        ("quick", "zoo_verdicts.py --quick", 4),
        ("depth", "depth.py", 3),
        ("versus", "versus_direct.py", 60),
        ("optimizers", "optimizer_verdicts.py", 18),
        ("solvers", "solvers.py", 8),
        ("costs", "cost_model.py", 35),
        ("poster", "poster_refresh.py", 9),
        ("pays", "poster.py", 30),
        ("text", "zoo.py", 11),
        ("late", "late_drift.py", 9),
        ("population", "population.py", 24),
        ("ranks", "ranks.py", 14),
        ("workers", "reliability/workers.py", 6),
        ("kills", "reliability/kills.py", 3),
        ("disks", "reliability/disks.py", 3),
        ("fuzz", "reliability/fuzz.py", 10),
        ("long", "reliability/long_run.py", 12),
        ("peers", "peers.py", 12),
        ("growth", "peers.py --growth", 10),
        ("memory", "peers.py --memory", 12),
        ("floor", "floor.py", 12),
        ("roots", "warm_roots.py", 36),
        ("waiting", "waiting.py", 20),
        ("patches", "patches.py", 10),
        ("allocator", "allocator.py", 6),
        ("padded", "padded.py", 26),
        ("modes", "modes.py", 28),
        ("overhead", "overhead.py", 3),
        ("sketch", "sketch.py", 3),
    ],
)
def test_the_readme_prints_what_a_benchmark_gives(section, script, least):
    name, *arguments = script.split()
    command = [sys.executable, str(ROOT / "benchmarks" / name), "--table", *arguments]
    printed = [_numbers(row) for row in subprocess.run(command, **CAPTURED).stdout.splitlines()]
    pages = [page for page in (README, MEASURED) if f"<!-- {section} -->" in page]
    stated = [row for page in pages for row in _rows(_section(section, page))]
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


def _rows(text):
    """Return the rows of every table in a text, without the heads."""
    lines = text.splitlines()
    rules = [i for i, line in enumerate(lines) if line.startswith("| ---")]
    heads = {*rules, *(i - 1 for i in rules)}
    return [line for i, line in enumerate(lines) if line.startswith("|") and i not in heads]


def _section(name, page):
    return re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", page, re.S)[1]
