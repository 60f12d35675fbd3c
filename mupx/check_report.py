"""A verification as JSON, as JUnit XML and as figures."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from mupx.checks.result import Report, Sweep, worse
from mupx.checks.rows import Row
from mupx.files import write_atomically

FORMATS = ("png", "svg")
UNPRINTABLE = re.compile(r"[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # not allowed in XML 1.0


def document(report: Report) -> dict[str, Any]:
    """Return ``{verdict, causes, layers, drift, regret, …}`` for ``--json``."""
    return {
        "verdict": report.verdict,
        "causes": report.causes,
        "widths": report.widths,
        "seeds": report.seeds,
        "layers": _layers(report.rows),
        "late": [row.as_dict() for row in report.late],
        "drift": [_drift(sweep) for sweep in report.sweeps],
        "regret": [entry for sweep in report.sweeps for entry in _regrets(sweep)],
        "wider": [
            {"width": w, "losses": losses, "mean": _mean(losses)} for w, losses in report.wider.items()
        ],
        "findings": [asdict(finding) for finding in report.findings],
        "notes": report.notes,
        "storage": report.storage,
    }


def _layers(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Group the rows by parameter (or module, for Δh), with the worst verdict of each."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row.name, []).append(row)
    return [
        {
            "name": name,
            "role": own[0].role,
            "verdict": worse(row.status for row in own),
            "cause": next((row.cause for row in own if row.status == "fail"), None),
            "checks": [row.as_dict() for row in own],
        }
        for name, own in grouped.items()
    ]


def _drift(sweep: Sweep) -> dict[str, Any]:
    return {
        "parametrization": sweep.parametrization,
        "hyperparameter": sweep.axis,
        "octaves_per_doubling": sweep.drift.value,
        "low": sweep.drift.low,
        "high": sweep.drift.high,
        "verdict": sweep.drift_status,
        "best_log2": {str(line.width): line.best().value for line in sweep.lines},
        "open_widths": [line.width for line in sweep.lines if line.beyond],
        "speed": None if sweep.speed is None else asdict(sweep.speed),
    }


def _regrets(sweep: Sweep) -> list[dict[str, Any]]:
    return [
        {
            "parametrization": sweep.parametrization,
            "hyperparameter": sweep.axis,
            "width": width,
            "regret": _mean(regrets),
            "per_seed": regrets,
            "gain": sweep.gains[width],
            "verdict": sweep.regret_at(width),
        }
        for width, regrets in sweep.regrets.items()
    ]


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def junit(report: Report) -> bytes:
    """Return the report as JUnit XML: one test case per row, sweep and finding that can fail."""
    cases = [
        *(
            _case(f"{row.name}", f"{row.label}, step {row.step}", row.status, _row_text(row))
            for row in report.rows
        ),
        *(_case(row.name, row.label, row.status, _row_text(row)) for row in report.late),
        *(
            _case(f"transfer.{s.axis}", s.parametrization, s.status, _sweep_text(s))
            for s in report.own_sweeps
        ),
        *(_case("lint", f.code, "fail" if f.level == "error" else "pass", f.text) for f in report.findings),
        *(_case("run", "finite", "fail", text) for text in report.failures),
    ]
    failures = sum(case.find("failure") is not None for case in cases)
    suite = ElementTree.Element(
        "testsuite", name="mupx.verify", tests=str(len(cases)), failures=str(failures), errors="0"
    )
    suite.extend(cases)
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    content: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return content


def _case(classname: str, name: str, status: str, text: str) -> ElementTree.Element:
    classname, name, text = (UNPRINTABLE.sub("?", part) for part in (classname, name, text))
    case = ElementTree.Element("testcase", classname=f"mupx.verify.{classname}", name=name)
    if status == "fail":
        ElementTree.SubElement(case, "failure", message=text)
    elif text:
        ElementTree.SubElement(case, "system-out").text = text
    return case


def _row_text(row: Row) -> str:
    numbers = f"slope {row.slope:+.3f} ({row.low:+.3f} … {row.high:+.3f}), expected {row.expected:+.2f}"
    return f"{numbers}: {row.cause}" if row.cause else numbers


def _sweep_text(sweep: Sweep) -> str:
    widest = sweep.lines[-1].width
    return (
        f"drift {sweep.drift.value:+.3f} octaves per doubling ({sweep.drift.low:+.3f} … "
        f"{sweep.drift.high:+.3f}), regret {_mean(sweep.regrets[widest]):.4g} at width {widest}"
    )


def write(report: Report, junit_file: Path | None, figures: Path | None) -> list[Path]:
    """Write what was asked for and return the files written.

    Raises:
        StorageError: A file cannot be written.
    """
    written = []
    if junit_file is not None:
        write_atomically(junit_file, junit(report))
        written.append(junit_file)
    if figures is not None:
        from mupx import check_plots, plots

        drawn = {"coordinate": check_plots.coordinates(report.rows)}
        if report.sweeps:
            drawn["transfer"] = check_plots.sweeps(report.sweeps)
        written += [
            plots.save(figure, figures / f"{name}.{suffix}")
            for name, figure in drawn.items()
            for suffix in FORMATS
        ]
    return written
