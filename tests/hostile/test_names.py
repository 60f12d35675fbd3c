"""Names come from somebody else's file: into XML, into figures, onto a terminal, into a folder's name."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import optuna
import pytest

from mupx import check_plots, check_report, plots
from mupx.checks.result import Report
from mupx.checks.rows import Row
from mupx.config import Experiment
from mupx.study import default_url, note

from ..cli.conftest import invoke

SCRIPT = "<script>alert(1)</script>"
NAMES = [
    SCRIPT,
    'a"onload="x',
    "]]><!--",
    "$\\frac{",
    "$",
    "\x1b[2J\x1b]0;owned\x07",
    "[red]x[/]",
    "a\u202eb",
]
NAMES += ["_", "\ud800", "\x00", "\n"]


def report_of(name: str) -> Report:
    series = ((8, 0, 1.0), (16, 0, 2.0))
    rows = [
        Row(name, "hidden", kind, kind, 1, 1.0, 0.9, 1.1, 0.0, "fail", name, series)  # type: ignore[arg-type]
        for kind in ("own", "Δh")
    ]
    return Report(Experiment(), [8, 16], [0], rows=rows, failures=[name])


@pytest.mark.parametrize("name", NAMES)
def test_a_junit_report_holds_names_as_text(name: str) -> None:
    root = ElementTree.fromstring(check_report.junit(report_of(name)))
    assert {element.tag for element in root.iter()} == {"testsuites", "testsuite", "testcase", "failure"}
    assert {key for e in root.iter("testcase") for key in e.attrib} == {"classname", "name"}
    if name == SCRIPT:
        assert root.findall(".//failure")[0].attrib["message"].endswith(SCRIPT)


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_figures_hold_names_as_text(tmp_path: Path, suffix: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # glyphs that no font has
        figure = check_plots.coordinates([row for name in NAMES for row in report_of(name).rows])
        path = plots.save(figure, tmp_path / f"figure.{suffix}")
        found = {name: {"A": {"lambda_max": 1.0}} for name in NAMES}
        entry = {"step": 1, "curvature": found, "curvature_c": 0.5}
        plots.save(plots.curvature_curves([entry]), tmp_path / f"curvature.{suffix}")
    if suffix == "svg":
        root = ElementTree.fromstring(path.read_bytes())
        assert not [e for e in root.iter() if e.tag.endswith(("script", "foreignObject"))]
        assert not [key for e in root.iter() for key in e.attrib if key.startswith("on")]


def test_what_a_study_holds_steers_no_terminal(run: Any, tuned: Path, tmp_path: Path) -> None:
    shutil.copytree(tuned, tmp_path / "run")
    study = optuna.load_study(storage=default_url(tmp_path / "run"), study_name="run")
    steering = "\x1b[2J\x1b]0;owned\x07\u202e[bold]"
    for trial in study.get_trials(deepcopy=False):
        study._storage._backend.engine.raw_connection().close()
        connection = study._storage._backend.engine.raw_connection()
        connection.execute(
            "UPDATE trial_user_attributes SET value_json = ? WHERE key = 'outcome' AND trial_id = ?",
            (json.dumps(steering), trial._trial_id),
        )
        connection.commit()
        connection.close()
    for verb in (["status", "run"], ["report", "run"]):
        ended = invoke(*verb)
        assert ended.code == 0, ended.err
        assert not {"\x1b", "\x07", "\u202e"} & {*ended.out, *ended.err}
    assert "\\x1b[2J" in invoke("report", "run").out
    ended = invoke("status", f"run#{steering}")
    assert not {"\x1b", "\u202e"} & {*ended.out, *ended.err}


@pytest.mark.parametrize("name", ["../../outside", "/tmp/outside", "..", "a/../../b", "\x00"])
@pytest.mark.parametrize("key", ["model.name", "data.name", "optimizer.name", "train.loss"])
def test_a_name_with_a_path_in_it_makes_no_folder(run: Any, tmp_path: Path, name: str, key: str) -> None:
    ended = run("tune", "--set", f"{key}={json.dumps(name)}", "--trials", "1", "--steps", "1")
    assert ended.code == 2, ended.err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_names_a_study_with_a_path_in_it_is_only_a_name(
    run: Any, tmp_path: Path, outside: Path
) -> None:
    note(tmp_path / "run", default_url(tmp_path / "run"), "../outside/victim")
    ended = run(
        "tune", "--optimizer", "sgd", "--width", "4", "--steps", "2", "--trials", "1", "--run-dir", "run"
    )
    assert ended.code == 0, ended.err
    assert {path.name for path in tmp_path.iterdir()} == {"run", "outside"}
