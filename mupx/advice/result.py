"""The answer of ``mupx advise``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mupx.advice.estimates import Estimate
from mupx.advice.refreshes import Phases
from mupx.advice.statements import Regime, Sizes, Statement
from mupx.config import Experiment


@dataclass(frozen=True)
class Advice:
    """What to know before a run.

    Attributes:
        experiment: The run, at its target width.
        sizes: Its batch, data and steps.
        first: Optimizer to try first.
        phases: Refresh schedule to try with second order.
        estimates: Time and memory, one per registered optimizer; empty where the model is not known.
        free: Bytes free on the device, None where that is not known.
        machine: What the rates were measured on; empty without estimates.
        statements: Everything else, each with its source.
    """

    experiment: Experiment
    sizes: Sizes
    first: str
    phases: Phases
    estimates: tuple[Estimate, ...]
    free: float | None
    machine: Mapping[str, str]
    statements: tuple[Statement, ...]

    @property
    def regime(self) -> Regime:
        """Whether second order is likely to pay: likely, open or unlikely."""
        return self.sizes.regime

    @property
    def warnings(self) -> list[Statement]:
        """The statements about what is likely to go wrong."""
        return [statement for statement in self.statements if statement.level == "warning"]

    def to_json(self) -> dict[str, Any]:
        """Return the advice as a document; times in seconds, memory in bytes."""
        scaling, optimizer = self.experiment.scaling, self.experiment.optimizer
        sizes = {**asdict(self.sizes), "epochs": self.sizes.epochs, "ratio": self.sizes.ratio}
        return {
            "model": self.experiment.model.name,
            "data": self.experiment.data.name,
            "width": scaling.width,
            "base_width": scaling.base_width,
            "sizes": sizes,
            "second_order": self.regime,
            "optimizer": {"configured": optimizer.name, "first": self.first},
            "refresh": {**asdict(self.phases), "notation": self.phases.notation},
            "costs": [estimate.to_json() for estimate in self.estimates],
            "memory": {"free": self.free},
            "machine": dict(self.machine),
            "statements": [statement.to_json() for statement in self.statements],
        }
