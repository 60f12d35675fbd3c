"""What a verification found: sweeps, rows, findings, and the one verdict over all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from mupx.checks.causes import root_causes
from mupx.checks.fits import Fit
from mupx.checks.lint import Finding
from mupx.checks.rows import Row, Status
from mupx.checks.transfer import Line, Speed
from mupx.config import Experiment

DRIFT = 0.1  # octaves per doubling that count as none
MOVED, COARSE_MOVED = 0.5, 1.0  # octaves: the grid of the sweeps, the reach of telescoped ones
COARSE_REGRET = 0.05
REGRET = 0.01  # of what training gains at that width (untrained loss − best loss)


def worse(statuses: Iterable[Status]) -> Status:
    """Return the worst of several verdicts."""
    found = set(statuses)
    return "fail" if "fail" in found else "warn" if "warn" in found else "pass"


@dataclass(frozen=True)
class Sweep:
    """One hyperparameter swept over widths under one parametrization.

    Attributes:
        parametrization: ``mup``, ``sp`` …
        axis: ``lr`` or ``damping``.
        lines: One line per width, ascending.
        drift: Octaves per doubling of the best value.
        regrets: Width → honest regret of the base-width choice per seed, in loss units.
        gains: Width → untrained loss − best loss.
        speed: Fast-transfer exponents and audit numbers; None below four widths.
        coarse: From short runs and telescoped lines, which only tell large losses from noise.
    """

    parametrization: str
    axis: str
    lines: tuple[Line, ...]
    drift: Fit
    regrets: Mapping[int, list[float]]
    gains: Mapping[int, float]
    speed: Speed | None
    coarse: bool = False

    @property
    def costly(self) -> bool:
        """Whether the base choice loses at the largest width, on every seed (and much, if coarse)."""
        width = self.lines[-1].width
        return min(self.regrets[width]) > 0 and (not self.coarse or self._loses(width))

    def _loses(self, width: int) -> bool:
        regrets, limit = self.regrets[width], COARSE_REGRET if self.coarse else REGRET
        return min(regrets) > 0 and sum(regrets) / len(regrets) > limit * self.gains[width]

    @property
    def drift_status(self) -> Status:
        """Fail when the interval excludes ±0.1 and the drift costs something; warn when it is free.

        Nor does it fail where a line has no minimum inside and where it ends says little: a damping that
        only has to be small enough is judged by regret alone.
        """
        if not (self.drift.low > DRIFT or self.drift.high < -DRIFT):
            return "pass" if abs(self.drift.value) <= DRIFT else "warn"
        known = not any(line.beyond for line in self.lines)
        return "fail" if known and self.costly else "warn"

    def shift(self, width: int) -> list[float]:
        """Return how far the best value lies from that at the base width, in octaves, per seed."""
        base, wide = self.lines[0], next(line for line in self.lines if line.width == width)
        return [wide.best([seed]).value - base.best([seed]).value for seed in wide.losses]

    def regret_at(self, width: int) -> Status:
        """Judge the regret at a width: it fails when the optimum has moved and the loss shows it.

        That is, when the mean regret exceeds 1 % of the gain, every seed agrees, and on every seed the
        best value has moved the same way, by more than half an octave on average (5 % and one octave if
        coarse). A regret without a move (a cliff beside the optimum, noise in the choice) is a warning.
        """
        if not self._loses(width):
            return "pass"
        moved, least = self.shift(width), COARSE_MOVED if self.coarse else MOVED
        together = min(moved) > 0 or max(moved) < 0
        return "fail" if together and abs(sum(moved)) / len(moved) > least else "warn"

    @property
    def regret_status(self) -> Status:
        """The worst of all widths."""
        return worse(self.regret_at(width) for width in self.regrets)

    @property
    def status(self) -> Status:
        """The worse of the two."""
        return worse((self.drift_status, self.regret_status))


@dataclass
class Report:
    """The result of a verification.

    Attributes:
        experiment: What was verified.
        widths: Widths that could be measured.
        seeds: Seeds.
        rows: Power laws with verdicts.
        sweeps: Sweeps of the verified parametrization and, beside it, of SP.
        wider: Width → loss at fixed base values per seed.
        late: Rows of the last update of a run.
        findings: What the lint says.
        notes: What was left out or broke, one sentence each.
        storage: Where the measurements are kept.
    """

    experiment: Experiment
    widths: list[int]
    seeds: list[int]
    rows: list[Row] = field(default_factory=list)
    sweeps: list[Sweep] = field(default_factory=list)
    wider: dict[int, list[float]] = field(default_factory=dict)
    late: list[Row] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    storage: str | None = None

    @property
    def own_sweeps(self) -> list[Sweep]:
        """The sweeps of the parametrization that is verified."""
        return [s for s in self.sweeps if s.parametrization == self.experiment.scaling.parametrization]

    @property
    def verdict(self) -> Literal["pass", "fail"]:
        """Fail if any row, sweep of the verified parametrization or lint error fails."""
        statuses = [row.status for row in [*self.rows, *self.late]] + [s.status for s in self.own_sweeps]
        errors = [finding for finding in self.findings if finding.level == "error"]
        return "fail" if "fail" in statuses or errors or self.failures else "pass"

    @property
    def causes(self) -> list[str]:
        """The root causes of a failure, in the order of the road through the check."""
        lint_errors = [f"{f.code}: {f.text}" for f in self.findings if f.level == "error"]
        sweeps = [_sweep_cause(s) for s in self.own_sweeps if s.status == "fail"]
        late_rows = [f"{r.name}: {r.cause}" for r in self.late if r.status == "fail"]
        return [*lint_errors, *self.failures, *root_causes(self.rows), *late_rows, *sweeps]


def _sweep_cause(sweep: Sweep) -> str:
    widest = sweep.lines[-1].width
    regrets = sweep.regrets[widest]
    mean = sum(regrets) / len(regrets)
    return (
        f"{sweep.axis} does not transfer: its best value moves {sweep.drift.value:+.2f} octaves per doubling "
        f"({sweep.drift.low:+.2f} … {sweep.drift.high:+.2f}), and the base choice loses {mean:.3g} at width "
        f"{widest}"
    )
