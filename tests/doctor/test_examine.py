"""The whole examination: order, faulty checks, and torch that is missing, broken or hangs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mupx import doctor
from mupx.doctor import CHECKS, TORCH_CHECKS, examine, this_system
from mupx.doctor.base import System
from mupx.doctor.torch_facts import ask_torch
from tests.doctor.conftest import FACTS


def test_torch_is_asked_only_after_everything_that_does_not_need_it(system: System) -> None:
    seen: list[str] = []

    def ask(environment: Any) -> Any:
        seen.append("asked")
        return FACTS

    for name, finding in examine(system, ask):
        seen.append(name)
        assert finding.status == "ok", finding
    assert seen == [*CHECKS, "asked", *TORCH_CHECKS]


def test_a_faulty_check_is_a_warning_and_the_rest_goes_on(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(*_: Any) -> Any:
        raise KeyError("surprise\nin two lines")

    monkeypatch.setattr(doctor, "CHECKS", {"first": faulty, **CHECKS})
    monkeypatch.setattr(doctor, "TORCH_CHECKS", {**TORCH_CHECKS, "last": faulty})
    found = dict(examine(system, lambda environment: FACTS))
    assert list(found) == ["first", *CHECKS, *TORCH_CHECKS, "last"]
    for name in ("first", "last"):
        assert found[name].status == "warn"
        assert "KeyError" in found[name].found
        assert "\n" not in found[name].found


@pytest.mark.parametrize("ask", [lambda _: {"error": "no torch"}, lambda _: 1 / 0, lambda _: {}])
def test_without_torch_every_check_still_answers(system: System, ask: Any) -> None:
    found = dict(examine(system, ask))
    assert list(found) == [*CHECKS, *TORCH_CHECKS]
    assert {found[name].status for name in TORCH_CHECKS} <= {"fail", "warn"}


@pytest.mark.parametrize(
    ("torch", "reason"),
    [
        ("raise OSError('libcudart.so.12: cannot open shared object file')", "libcudart.so.12"),
        ("import os; os.abort()", "SIGABRT"),
        ("raise SystemExit(3)", "exit status 3"),
        ("import nothing_of_that_name", "nothing_of_that_name"),
        ("import time; time.sleep(60)", "did not end within 2 s"),
        ("", "AttributeError"),
    ],
)
def test_a_torch_that_cannot_be_imported_is_a_reason_and_no_crash(
    tmp_path: Path, torch: str, reason: str
) -> None:
    (tmp_path / "torch.py").write_text(torch)
    facts = ask_torch({**os.environ, "PYTHONPATH": str(tmp_path)}, seconds=2)
    assert reason in facts["error"]


def test_this_machine_is_described_by_what_it_says_itself() -> None:
    system = this_system(Path("runs"))
    assert system.cores >= 1
    assert any(line.startswith("python") for line in system.requires)
    assert system.version_of("torch") is not None
    assert system.version_of("no-such-distribution") is None
    assert system.find("json") is not None
    assert system.find("no_such_module") is None


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(_: str) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(doctor, "cache_folder", homeless)
    assert this_system(Path("runs")).cache is None
