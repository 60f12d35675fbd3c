"""A verification as JSON, JUnit XML and figures: a small report made by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from mupx import check_plots, check_report
from mupx.checks import transfer
from mupx.checks.fits import Fit
from mupx.checks.lint import Finding
from mupx.checks.result import Report, Sweep, worse
from mupx.checks.rows import Quantity, Row, Status
from mupx.checks.transfer import Line
from mupx.config import Experiment
from mupx.errors import StorageError

AWKWARD = "block<0>.\"out\" & 'more'"
WIDTHS = (64, 128, 256)
UNTRAINED = 2.3


def row(
    name: str,
    quantity: Quantity,
    status: Status = "pass",
    slope: float = 0.0,
    step: int = 1,
    cause: str = "",
    role: str = "hidden",
) -> Row:
    # A tensor that never moved has no slope and nothing to fit.
    widths = () if math.isnan(slope) else WIDTHS
    series = tuple((width, seed, width**slope * (1 + seed)) for width in widths for seed in (0, 1))
    return Row(
        name, role, quantity, quantity, step, slope, slope - 0.1, slope + 0.1, 0.0, status, cause, series
    )


def sweep(parametrization: str = "mup", axis: str = "lr", drift: float = 0.0) -> Sweep:
    """Losses 0.5 + 0.1·(x − optimum)², the optimum moving by ``drift`` octaves per doubling."""
    values = tuple(-4.0 + 0.5 * i for i in range(-4, 5))
    lines = []
    for doublings, width in enumerate(WIDTHS):
        losses = tuple(0.5 + 0.1 * (value + 4.0 - drift * doublings) ** 2 for value in values)
        lines.append(Line(width, values, {0: losses, 1: losses}))
    regrets = {line.width: transfer.regret(lines[0], line) for line in lines}
    gains = {line.width: UNTRAINED - min(line.mean()) for line in lines}
    moved = transfer.drift(lines)
    return Sweep(parametrization, axis, tuple(lines), moved, regrets, gains, transfer.speed(lines))


def report(**changes: Any) -> Report:
    """What holds, what is noted and what fails: one of each."""
    filled: dict[str, Any] = {
        "rows": [
            row("fc1", "Δh"),
            row("fc1", "Δh", step=10),
            row("fc1.weight", "own", role="input"),
            row("fc1.weight", "size", "warn", 0.4, cause="noisy", role="input"),
            row(AWKWARD, "own", "warn", cause="wide"),
            row(AWKWARD, "own", "fail", -0.5, step=10, cause="shrinks as 'width' < 1 & \"fails\""),
            row("out.weight", "own", "fail", math.nan, cause="does not move", role="output"),
        ],
        "late": [row("fc1.weight", "norm", step=-1)],
        "sweeps": [sweep(), sweep("mup", "damping", -0.5), sweep("sp", "lr", -1.0)],
        "wider": {64: [0.5, 0.7], 128: [0.25, 0.25]},
        "findings": [
            Finding("zero-head", "warning", "starts at zero"),
            Finding("flat", "error", "<all> lr equal", -1.0),
        ],
        "notes": ["width 512 does not fit into memory"],
        "failures": ["the run at width 256 is not finite"],
        "storage": "sqlite:///study.db",
        **changes,
    }
    return Report(Experiment(), list(WIDTHS), [0, 1], **filled)


def holds() -> Report:
    return report(
        rows=[row("fc1", "Δh"), row("fc1.weight", "own")], sweeps=[sweep()], findings=[], failures=[]
    )


# The document


def test_the_document_has_the_keys_that_are_promised() -> None:
    document = check_report.document(report())
    assert {"verdict", "layers", "drift", "regret"} <= document.keys()
    assert (document["widths"], document["seeds"]) == ([64, 128, 256], [0, 1])
    assert document["storage"] == "sqlite:///study.db"
    assert [set(layer) for layer in document["layers"]] == [
        {"name", "role", "verdict", "cause", "checks"}
    ] * 4


def test_the_document_survives_json() -> None:
    document = check_report.document(holds())
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    again = json.loads(json.dumps(check_report.document(report())))  # a tensor that never moved has no slope
    assert again["layers"][3]["checks"][0]["slope"] is not None
    assert math.isnan(again["layers"][3]["checks"][0]["slope"])


def test_a_layer_has_its_worst_verdict_and_the_cause_of_its_failure() -> None:
    layers = {layer["name"]: layer for layer in check_report.document(report())["layers"]}
    found = {name: (layer["role"], layer["verdict"]) for name, layer in layers.items()}
    assert found == {
        "fc1": ("hidden", "pass"),
        "fc1.weight": ("input", "warn"),
        AWKWARD: ("hidden", "fail"),
        "out.weight": ("output", "fail"),
    }
    assert layers["fc1.weight"]["cause"] is None
    assert layers[AWKWARD]["cause"].startswith("shrinks")
    assert len(layers[AWKWARD]["checks"]) == 2


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        (["pass", "pass"], "pass"),
        (["pass", "warn"], "warn"),
        (["warn", "fail", "pass"], "fail"),
        ([], "pass"),
    ],
)
def test_the_worst_of_several_verdicts(statuses: list[Status], expected: str) -> None:
    assert worse(statuses) == expected


@pytest.mark.parametrize(
    "broken",
    [
        {"rows": [row("fc1.weight", "own", "fail", -0.5, cause="x")]},
        {"late": [row("fc1.weight", "norm", "fail", 0.5, cause="x")]},
        {"sweeps": [sweep(drift=-0.5)]},
        {"findings": [Finding("flat", "error", "x")]},
        {"failures": ["not finite"]},
    ],
)
def test_one_failure_of_any_kind_fails_the_verification(broken: dict[str, Any]) -> None:
    assert (check_report.document(holds())["verdict"], holds().causes) == ("pass", [])
    passing = holds()
    for name, value in broken.items():
        setattr(passing, name, value)
    document = check_report.document(passing)
    assert document["verdict"] == "fail"
    assert len(document["causes"]) == 1


@pytest.mark.parametrize(
    "harmless",
    [
        {"rows": [row("fc1.weight", "size", "warn", 0.4)]},
        {"sweeps": [sweep(), sweep("sp", drift=-1.0)]},  # what stands beside is not verified
        {"findings": [Finding("norm-clipping", "warning", "x", -0.5)]},
        {"notes": ["left out"]},
    ],
)
def test_warnings_notes_and_the_other_parametrization_fail_nothing(harmless: dict[str, Any]) -> None:
    passing = holds()
    for name, value in harmless.items():
        setattr(passing, name, value)
    assert check_report.document(passing)["verdict"] == "pass"


def test_drift_has_the_best_value_at_each_width() -> None:
    drift = {(d["parametrization"], d["hyperparameter"]): d for d in check_report.document(report())["drift"]}
    assert set(drift) == {("mup", "lr"), ("mup", "damping"), ("sp", "lr")}
    moving = drift["mup", "damping"]
    assert moving["octaves_per_doubling"] == pytest.approx(-0.5)
    assert moving["best_log2"] == pytest.approx({"64": -4.0, "128": -4.5, "256": -5.0})
    assert (moving["verdict"], drift["mup", "lr"]["verdict"]) == ("fail", "pass")
    assert moving["speed"] is None  # three widths


def test_a_drift_between_ends_of_lines_without_a_minimum_is_a_warning() -> None:
    """A damping that only has to be small enough: lines end where they flatten, and lose next to nothing."""

    def lines(tail: float) -> tuple[Line, ...]:
        found = []
        for doublings, width in enumerate(WIDTHS):
            values = tuple(-8.0 - 0.5 * doublings + 0.5 * i for i in range(-4, 5))
            bottom = values[2]
            losses = tuple(0.5 + 2.0**v + (tail if v < bottom else 0.0) for v in values)
            found.append(Line(width, values, {0: losses, 1: losses}))
        return tuple(found)

    def judged(tail: float) -> Sweep:
        swept = lines(tail)
        regrets = {line.width: transfer.regret(swept[0], line) for line in swept}
        gains = {line.width: UNTRAINED - min(line.mean()) for line in swept}
        return Sweep("mup", "damping", swept, transfer.drift(swept), regrets, gains, None)

    flat, bowl = judged(0.0), judged(0.1)
    assert flat.drift.high < -0.1
    assert bowl.drift.high < -0.1
    assert min(flat.regrets[WIDTHS[-1]]) > 0
    assert min(bowl.regrets[WIDTHS[-1]]) > 0
    assert (flat.status, bowl.status) == ("warn", "fail")
    (entry,) = check_report.document(report(sweeps=[flat]))["drift"]
    assert (entry["verdict"], entry["open_widths"]) == ("warn", list(WIDTHS))
    (entry,) = check_report.document(report(sweeps=[bowl]))["drift"]
    assert (entry["verdict"], entry["open_widths"]) == ("fail", [])


def test_regret_is_told_per_width_and_seed() -> None:
    regret = {
        (r["parametrization"], r["hyperparameter"], r["width"]): r
        for r in check_report.document(report())["regret"]
    }
    assert len(regret) == 3 * len(WIDTHS)
    # The optimum is one octave away from the base choice at the third width: 0.1·1².
    lost = regret["mup", "damping", 256]
    assert lost["per_seed"] == pytest.approx([0.1, 0.1])
    assert (lost["regret"], lost["gain"]) == pytest.approx((0.1, UNTRAINED - 0.5))
    assert lost["verdict"] == "fail"
    assert regret["mup", "damping", 64]["regret"] == 0.0


def test_wider_has_the_mean_of_the_losses_at_the_base_values() -> None:
    assert check_report.document(report())["wider"] == [
        {"width": 64, "losses": [0.5, 0.7], "mean": pytest.approx(0.6)},
        {"width": 128, "losses": [0.25, 0.25], "mean": 0.25},
    ]


# JUnit


def suite(found: Report) -> ElementTree.Element:
    root = ElementTree.fromstring(check_report.junit(found))
    assert root.tag == "testsuites"
    (only,) = root
    return only


def test_junit_counts_rows_own_sweeps_findings_and_failures() -> None:
    # 7 rows, 1 late row, 2 sweeps of μP (that of SP cannot fail), 2 findings, 1 run.
    tests = suite(report())
    assert (tests.get("tests"), tests.get("errors")) == ("13", "0")
    assert len(tests.findall("testcase")) == 13
    # 2 rows, the damping sweep, the lint error and the run.
    assert tests.get("failures") == "5"
    assert len(tests.findall("testcase/failure")) == 5


def test_junit_of_what_holds_has_no_failure() -> None:
    tests = suite(holds())
    assert (tests.get("tests"), tests.get("failures")) == ("4", "0")
    assert tests.find("testcase/failure") is None


def test_junit_names_survive_xml() -> None:
    cases = {(case.get("classname"), case.get("name")): case for case in suite(report())}
    case = cases[f"mupx.verify.{AWKWARD}", "own, step 10"]
    failure = case.find("failure")
    assert failure is not None
    message = failure.get("message", "")
    assert message.startswith("slope -0.500 (-0.600 … -0.400), expected +0.00: ")
    assert message.endswith("shrinks as 'width' < 1 & \"fails\"")
    raw = check_report.junit(report())
    assert raw.startswith(b"<?xml")
    assert b"block<0>" not in raw


def test_junit_says_what_passed_and_what_was_only_noted() -> None:
    cases = {(case.get("classname"), case.get("name")): case for case in suite(report())}
    assert cases["mupx.verify.fc1.weight", "size, step 1"].findtext("system-out", "").endswith(": noisy")
    assert cases["mupx.verify.transfer.lr", "mup"].findtext("system-out", "").startswith("drift +0.000")
    assert cases["mupx.verify.lint", "zero-head"].findtext("system-out") == "starts at zero"
    assert cases["mupx.verify.run", "finite"].find("failure") is not None


# Files


def root_tag(path: Path) -> str:
    return ElementTree.parse(path).getroot().tag


def test_figures_are_written_as_png_and_svg(tmp_path: Path) -> None:
    files = check_report.write(report(), None, tmp_path / "new" / "figures")
    names = ["coordinate.png", "coordinate.svg", "transfer.png", "transfer.svg"]
    assert [path.name for path in files] == names
    assert sorted(path.name for path in (tmp_path / "new" / "figures").iterdir()) == names
    for path in files:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
            with Image.open(path) as image:
                assert len(set(image.convert("RGB").resize((64, 64)).get_flattened_data())) > 10  # not blank
        else:
            assert root_tag(path) == "{http://www.w3.org/2000/svg}svg"


def test_without_sweeps_there_is_one_figure(tmp_path: Path) -> None:
    files = check_report.write(report(sweeps=[]), None, tmp_path)
    assert [path.name for path in files] == ["coordinate.png", "coordinate.svg"]


def test_a_report_that_stopped_at_the_lint_can_still_be_written(tmp_path: Path) -> None:
    stopped = report(rows=[], late=[], sweeps=[], wider={}, failures=[])
    files = check_report.write(stopped, tmp_path / "junit.xml", tmp_path)
    assert all(path.exists() for path in files)
    assert suite(stopped).get("tests") == "2"
    assert check_report.document(stopped)["verdict"] == "fail"


def test_what_was_not_asked_for_is_not_written(tmp_path: Path) -> None:
    assert check_report.write(report(), None, None) == []
    path = tmp_path / "new" / "junit.xml"
    assert check_report.write(report(), path, None) == [path]
    assert path.read_bytes() == check_report.junit(report())
    assert list(tmp_path.rglob("*.*")) == [path]


@pytest.mark.parametrize(
    "asked", [lambda place: (place / "junit.xml", None), lambda place: (None, place / "figures")]
)
def test_a_folder_that_cannot_be_written_is_a_storage_error(
    asked: Callable[[Path], tuple[Path | None, Path | None]], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write") as caught:
        check_report.write(report(), *asked(tmp_path / "file"))
    assert caught.value.exit_code == 7


# What is drawn


def test_coordinates_have_a_column_per_step_and_a_curve_per_layer() -> None:
    figure = check_plots.coordinates(report().rows)
    assert len(figure.axes) == 4  # steps 1 and 10 × Δh and own
    first, second = figure.axes[:2]
    assert [axes.get_title() for axes in (first, second)] == ["after 1 step", "after 10 steps"]
    (curve,) = first.lines
    assert np.asarray(curve.get_xdata()).tolist() == list(WIDTHS)
    assert np.asarray(curve.get_ydata()).tolist() == pytest.approx(
        [math.sqrt(2)] * 3
    )  # geometric mean of 1 and 2
    assert (first.get_xscale(), first.get_yscale()) == ("log", "log")


def test_only_a_row_that_fails_is_dashed() -> None:
    figure = check_plots.coordinates(report().rows)
    one, ten = (
        {str(line.get_label()): line.get_linestyle() for line in figure.axes[i].lines} for i in (2, 3)
    )
    assert one == {"fc1.weight (+0.00)": "-", f"{AWKWARD} (+0.00)": "-"}  # the second one is a warning
    assert ten == {f"{AWKWARD} (-0.50)": "--"}


def test_sweeps_have_a_column_per_parametrization_and_a_curve_per_width() -> None:
    figure = check_plots.sweeps([sweep(), sweep("sp", drift=-0.5)])
    left, right = figure.axes
    assert [axes.get_title() for axes in (left, right)] == ["μP", "SP"]
    assert left.get_ylim() == right.get_ylim()
    assert [line.get_label() for line in left.lines[:3]] == ["64", "128", "256"]
    dots = [tuple(map(float, np.asarray(c.get_offsets())[0])) for c in right.collections]
    assert dots == [(-4.0, 0.5), (-4.5, 0.5), (-5.0, 0.5)]
    assert np.asarray(right.lines[3].get_xdata()).tolist() == [-4.0, -4.0]  # the base choice
    assert "-0.50 octaves" in right.get_xlabel()


def test_drift_without_an_interval_can_be_told_and_drawn(tmp_path: Path) -> None:
    whole = sweep()
    two = Sweep(
        "mup",
        "lr",
        whole.lines[:2],
        Fit(0.0, -math.inf, math.inf),
        {64: [0.0], 128: [0.0]},
        whole.gains,
        None,
    )
    found = report(sweeps=[two])
    assert check_report.document(found)["drift"][0]["low"] == -math.inf
    assert "(-inf … +inf)" in check_report.junit(found).decode()
    check_report.write(found, None, tmp_path)


def test_both_parametrizations_stay_inside_the_shared_axis() -> None:
    low, high = sweep(), sweep("sp")
    raised = tuple(
        Line(line.width, line.values, {s: tuple(x + 0.3 for x in xs) for s, xs in line.losses.items()})
        for line in high.lines
    )
    figure = check_plots.sweeps([low, Sweep("sp", "lr", raised, high.drift, high.regrets, high.gains, None)])
    bottom, top = figure.axes[0].get_ylim()
    assert bottom < 0.5 < 0.8 < top


def test_a_sweep_that_learned_nothing_is_drawn_all_the_same() -> None:
    one = sweep()
    check_plots.sweeps(
        [Sweep("mup", "lr", one.lines, one.drift, one.regrets, dict.fromkeys(WIDTHS, 0.0), None)]
    )


def test_a_name_with_a_leading_underscore_is_in_the_legend() -> None:
    figure = check_plots.coordinates([row("_orig_mod.fc1", "Δh")])
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert "orig_mod.fc1" in legend.get_texts()[0].get_text()


def test_control_characters_do_not_break_the_xml() -> None:
    content = check_report.junit(report(rows=[row("fc\x0b1", "own", "fail", -0.5, cause="bad\x00")]))
    assert b"fc?1" in content
    ElementTree.fromstring(content)


def test_the_base_width_does_not_carry_the_verdict_of_a_larger_one() -> None:
    drifting = sweep(drift=1.0)
    assert drifting.regret_status == "fail"
    assert drifting.regret_at(WIDTHS[0]) == "pass"


def test_a_coarse_sweep_fails_only_for_a_large_loss() -> None:
    """0.1·(2·drift)² against a gain of 1.8: 0.5 octaves per doubling lose 0.1, 1 octave loses 0.4."""
    for drift, fine, coarse in ((0.3, "fail", "pass"), (1.0, "fail", "fail")):
        one = sweep(drift=drift)
        assert one.status == fine
        assert replace(one, coarse=True).regret_status == coarse
