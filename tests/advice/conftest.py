from __future__ import annotations

from pathlib import Path

import pytest

from .machine import fixed_rates


@pytest.fixture(autouse=True)
def _no_measuring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Give every test fixed rates and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("mupx.advice.measuring.measure", lambda device, dtype: fixed_rates())
