"""What a terminal, a pipe and a program see."""

import json
import os
import pty
import subprocess
import sys

import pytest

from mupx.cli import _console as console

LONG = "encoder.layers.11.self_attention.projection.weight"


def test_json_has_its_schema_and_finite_numbers_only(capsys):
    console.print_json({"loss": float("nan"), "rows": [{"lr": float("inf"), "shape": (2, 3)}], "n": 1})
    text = capsys.readouterr().out
    assert "NaN" not in text
    assert "Infinity" not in text
    document = json.loads(text)
    assert document == {"schema": "mupx/1", "loss": None, "rows": [{"lr": None, "shape": [2, 3]}], "n": 1}
    assert "NaN" in json.dumps({"loss": float("nan")})  # what json does by itself


def test_a_table_in_a_narrow_terminal_cuts_nothing_off(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    console.print_table("title", ["name", "role", "weight_decay"], [[LONG, "hidden", "0.000977"]])
    text = capsys.readouterr().out
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 60
    assert LONG in "".join(line.partition(" ")[0] for line in text.splitlines())


def test_a_table_in_a_pipe_keeps_a_name_in_one_piece(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    console.print_table("title", ["name", "role"], [[LONG, "[bold]hidden"]])
    text = capsys.readouterr().out
    assert LONG in text
    assert "[bold]hidden" in text  # a name is text, not markup


def test_without_a_terminal_progress_is_plain_lines(capsys):
    with console.progress("steps", lines=2) as advance:
        for step in range(1, 101):
            advance(step, 100, "loss 1")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["50/100 steps  loss 1", "100/100 steps  loss 1"]


def test_every_trial_gets_its_line(capsys):
    with console.progress("trials") as advance:
        for done in (1, 2, 3):
            advance(done, 3, "best 1")
    assert len(capsys.readouterr().err.splitlines()) == 3


BAR = """
from mupx.cli._console import print_table, progress
with progress("steps") as advance:
    advance(1, 2, "loss 1")
print_table("title", ["name"], [["x"]])
"""


def seen_by_a_terminal(**environment):
    """Run the script with stdout and stderr on a terminal and return what it received."""
    main, side = pty.openpty()
    variables = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    variables |= {"TERM": "xterm-256color", **environment}
    ended = subprocess.Popen([sys.executable, "-c", BAR], stdout=side, stderr=side, env=variables)
    assert ended.wait(timeout=60) == 0
    os.close(side)
    received = b""
    while True:
        try:
            piece = os.read(main, 65536)
        except OSError:
            break
        if not piece:
            break
        received += piece
    os.close(main)
    return received.decode()


COLOURED = ("\x1b[3", "\x1b[9", "\x1b[38")


def test_a_terminal_gets_a_bar_and_no_color_is_honoured():
    bar = "━"
    coloured, plain = seen_by_a_terminal(), seen_by_a_terminal(NO_COLOR="1")
    assert bar in coloured
    assert any(code in coloured.replace("\x1b[3m", "") for code in COLOURED)
    assert not any(f"\x1b[{n}m" in plain for n in (31, 32, 33, 34, 35, 36))
    assert "38;5" not in plain


def test_a_pipe_gets_neither_bar_nor_colour():
    ended = subprocess.run([sys.executable, "-c", BAR], capture_output=True, text=True, check=True)
    assert "━" not in ended.stderr
    assert "\x1b" not in ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0009765625, "9.77e-4"),
        (None, "–"),
        (float("nan"), "–"),
        (16.0, "16"),
        (1e-8, "1e-8"),
        (-0.0001, "-1e-4"),
        (0.0, "0"),
    ],
)
def test_numbers_are_brief(value, text):
    assert console.number(value) == text
