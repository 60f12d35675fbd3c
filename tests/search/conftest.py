import pytest

from . import synthetic


@pytest.fixture
def training(monkeypatch):
    """The synthetic training module in place of the real one, with fresh call counts."""
    synthetic.install(monkeypatch.setitem, lambda *args: monkeypatch.setattr(*args, raising=False))
    monkeypatch.setattr(synthetic, "calls", synthetic.Calls())
    return synthetic
