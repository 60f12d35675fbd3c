"""Rows and evidence: what verdicts are made of (one power law, and everything it is drawn from)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mupx.checks import fits
from mupx.checks.coordinate import Readings
from mupx.checks.curvature_orders import count
from mupx.config import Experiment
from mupx.layers import Layer

Status = Literal["pass", "warn", "fail"]
Key = tuple[int, int]  # (width, seed)
Quantity = Literal["init", "Δh", "own", "size", "ridge", "decay", "norm", "rank", "effective"]


@dataclass(frozen=True)
class Row:
    """One power law and its verdict.

    Attributes:
        name: Parameter, or module for Δh.
        role: Its role; of the module's weight for Δh.
        quantity: ``init``, ``Δh``, ``own`` (contribution of this tensor alone), ``size`` (λmax or √v),
            ``ridge`` (damping or eps over that), ``decay`` (weight decay per step), ``norm`` and ``rank``
            (operator norm and stable rank of the last update of a run), ``effective`` (tr/λmax of a
            statistic after it).
        label: The quantity as it is printed.
        step: Steps of training done.
        slope: Fitted exponent of width.
        low: Lower end of its 95 % interval.
        high: Upper end.
        expected: Exponent of theory.
        status: ``pass``, ``warn`` (off, but only a consequence or a diagnosis) or ``fail``.
        cause: Likely cause of a failure.
        series: (width, seed, value), what was fitted.
    """

    name: str
    role: str
    quantity: Quantity
    label: str
    step: int
    slope: float
    low: float
    high: float
    expected: float
    status: Status
    cause: str = ""
    series: tuple[tuple[int, int, float], ...] = ()

    @property
    def off(self) -> float:
        """Fitted minus expected exponent."""
        return self.slope - self.expected

    def as_dict(self) -> dict[str, Any]:
        """Return the row without its series."""
        row = asdict(self)
        del row["series"]
        return row


@dataclass(frozen=True)
class Evidence:
    """Everything a verdict is drawn from.

    Attributes:
        experiment: What was verified.
        tables: Width → the derived table at that width.
        readings: (width, seed) → what one run showed.
    """

    experiment: Experiment
    tables: Mapping[int, Sequence[Layer]]
    readings: Mapping[Key, Readings]

    @property
    def widths(self) -> list[int]:
        """Widths, ascending."""
        return sorted({width for width, _ in self.readings})

    @property
    def layers(self) -> Sequence[Layer]:
        """The table at the smallest width, for names and roles."""
        return self.tables[self.widths[0]]

    def grows(self, name: str) -> bool:
        """Whether any dimension of a parameter depends on width."""
        return any(self.exponent(name, ratio) for ratio in ("r_in", "r_out"))

    def blocks(self, name: str) -> float:
        """Return the exponent of the number of blocks of a parameter."""
        rows = [
            (w, count(self.experiment, row))
            for w in self.widths
            for row in self.tables[w]
            if row.name == name
        ]
        return fits.power_law(*zip(*rows, strict=True)).value

    def exponent(self, name: str, field: str) -> float | None:
        """Return the exponent of one column of the table for a parameter; None where it has none."""
        pairs = [(w, getattr(row, field)) for w in self.widths for row in self.tables[w] if row.name == name]
        if any(value is None or not value > 0 for _, value in pairs):
            return None
        return fits.power_law(*zip(*pairs, strict=True)).value
