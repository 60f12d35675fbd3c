"""Rates of a machine that does not exist: every prediction from them is arithmetic."""

from __future__ import annotations

from mupx.advice.rates import TABLES, Rates, Table


def fixed_rates(call: float = 1e-6, **changed: float) -> Rates:
    """Return rates of 10¹⁰ per second at every size, or as named."""
    speeds = dict.fromkeys(TABLES, 1e10) | changed
    tables = {name: Table((1.0,), (speed,)) for name, speed in speeds.items()}
    about = {"machine": "no machine", "device": "cpu", "threads": "1", "dtype": "float32", "torch": "0"}
    return Rates(**tables, call=call, about=about)
