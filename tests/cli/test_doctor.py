"""`mupx doctor`: one real run, its exit codes, and a terminal that shows ASCII only."""

import os
import subprocess
import sys

import pytest

from mupx.doctor import CHECKS, TORCH_CHECKS, base

MUPX = [sys.executable, "-m", "mupx"]


@pytest.fixture
def faked(monkeypatch):
    """Replace all checks by one of each kind, so that the verb is quick."""

    def fake(*findings):
        pairs = [(f"check {i}", finding) for i, finding in enumerate(findings)]
        monkeypatch.setattr("mupx.cli.doctor.examine", lambda system: iter(pairs))

    return fake


def test_a_real_run_answers_every_check_and_changes_nothing(run, tmp_path):
    ended = run("doctor", "--json")
    document = ended.json
    assert list(document) == ["schema", "checks"]
    assert [check["name"] for check in document["checks"]] == [*CHECKS, *TORCH_CHECKS]
    assert all(set(check) == {"name", "status", "found", "advice"} for check in document["checks"])
    found = {check["name"]: check for check in document["checks"]}
    assert found["torch import"]["status"] == found["sqlite"]["status"] == "ok"
    assert not any("the check itself failed" in check["found"] for check in document["checks"])
    assert ended.code == (6 if any(c["status"] == "fail" for c in document["checks"]) else 0)
    assert list(tmp_path.iterdir()) == []


def test_warnings_are_exit_0_with_their_advice(run, faked):
    faked(base.ok("fine"), base.warn("so so", "do this"))
    ended = run("doctor")
    assert ended.code == 0
    lines = ["ok    check 0       fine", "warn  check 1       so so", f"{'':<20}do this"]
    assert ended.out.splitlines() == lines


def test_a_failure_is_exit_6_after_all_findings(run, faked):
    faked(base.fail("bad", "do that"), base.ok("fine"))
    for extra in ((), ("--json",)):
        ended = run("doctor", *extra)
        assert ended.code == 6
        assert "check 1" in ended.out
        assert ended.message == "1 of 2 checks failed: check 0"


def test_it_works_where_torch_is_broken_and_the_terminal_takes_ascii_only(tmp_path):
    folder = tmp_path / "größe"
    folder.mkdir()
    (tmp_path / "torch.py").write_text("raise ImportError('no kernel image: ρ')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run(
        [*MUPX, "doctor"], capture_output=True, text=True, cwd=folder, env=environment, check=False
    )
    assert ended.returncode == 6, ended.stderr
    assert "fail  torch import  import torch fails: ImportError: no kernel image" in ended.stdout
    assert "warn  encoding" in ended.stdout
    assert "Traceback" not in ended.stderr
    assert ended.stdout.isascii()
