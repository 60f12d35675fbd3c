"""What an attacker may hand over, and a mark that shows whether his code ran."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..cli.conftest import Ended, invoke, run, tuned

__all__ = ["Ended", "invoke", "run", "tuned"]


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """A path that must not exist at the end of the test."""
    path = tmp_path / "attacker-was-here"
    yield path
    assert not path.exists()


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder beside the run folder, with a file; neither may change."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "victim").write_text("precious")
    yield folder
    assert [path.name for path in folder.iterdir()] == ["victim"]
    assert (folder / "victim").read_text() == "precious"
