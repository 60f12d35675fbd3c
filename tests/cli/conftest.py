from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mupx.cli import app

TUNE = ["tune", "--model", "mlp", "--data", "fashion-mnist-14", "--optimizer", "kfac", "--width", "8"]
TUNE += ["--trials", "3", "--steps", "10", "--threads", "1"]


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        document = json.loads(self.out, parse_constant=_refuse)
        assert document["schema"] == "mupx/1"
        return document

    @property
    def message(self) -> str:
        """The one sentence of an error; no traceback."""
        assert "Traceback" not in self.err + self.out
        found = re.findall(r"^error: (.*)$", self.err, re.M)
        assert len(found) == 1, self.err
        return found[0]


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def invoke(*arguments: str | Path) -> Ended:
    ended = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return Ended(ended.exit_code, ended.stdout, ended.stderr)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """Run ``mupx`` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return invoke


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a finished search of three tiny proxies; tests do not change it."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    ended = invoke(*TUNE, "--run-dir", folder)
    assert ended.code == 0, ended.err
    return folder
