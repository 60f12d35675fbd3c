"""The synthetic setting of the width checks, and wrong variants of everything in it.

tanh MLP 24–M–M–10 with LeCun-normal-sized init (√3 × torch's default), synthetic data, cross-entropy,
batch 64, constant learning rate, curvature of the current batch refreshed at every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal
from unittest.mock import patch

from mupx import config, scaling
from mupx.checks.result import Report
from mupx.checks.runner import verify
from mupx.config import Experiment
from mupx.dotted import merge
from mupx.parametrization import resolved
from mupx.scaling import LayerScale, Parametrization, Role, ScalingRule

# Optimizer, damping rule, lr, damping.
SGD = ("sgd", None, 0.1, 0.01)
ADAMW = ("adamw", None, 0.01, 0.01)
KFAC = ("kfac", "trace", 0.05, 0.01)
KFAC_PI = ("kfac", "pi", 0.05, 0.01)
KFAC_ABSOLUTE = ("kfac", "absolute", 0.05, 0.01)
KFAC_EXACT = ("kfac", "exact", 0.05, 1e-2)
SHAMPOO = ("shampoo", "relative", 0.05, 1e-3)
SHAMPOO_ABSOLUTE = ("shampoo", "absolute", 0.05, 1e-5)
Setup = tuple[str, str | None, float, float]
SETUPS: dict[str, Setup] = {
    "sgd": SGD,
    "adamw": ADAMW,
    "kfac, trace": KFAC,
    "kfac, absolute": KFAC_ABSOLUTE,
    "kfac, exact": KFAC_EXACT,
    "shampoo, relative": SHAMPOO,
    "shampoo, absolute": SHAMPOO_ABSOLUTE,
}

Field = Literal["init_std", "lr", "damping_A", "damping_B", "eps", "weight_decay"]
FIELDS: tuple[Field, ...] = ("init_std", "lr", "damping_A", "damping_B", "eps", "weight_decay")


def experiment(setup: Setup, *, base: int = 64, bias: bool = False, **changes: Any) -> Experiment:
    """Return the synthetic setting's experiment; keyword ``a__b`` sets ``a.b``."""
    optimizer, rule, lr, damping = setup
    gains = {f"hyperparameters.init_mult_{role}": math.sqrt(3) for role in ("input", "hidden", "output")}
    settings: dict[str, Any] = {
        "data.name": "synthetic",
        "model.name": "mlp",
        "model.args": {"activation": "tanh", "bias": bias},
        "optimizer.name": optimizer,
        "optimizer.damping_rule": rule,
        "optimizer.ema": 0.0,
        "optimizer.refresh": 1,
        "scaling.base_width": base,
        "scaling.width": base,
        "train.batch_size": 64,
        "train.schedule": "constant",
        **gains,
        "hyperparameters.lr": lr,
        "hyperparameters.damping": damping,
    }
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return resolved(config.parse(merge({}, {**settings, **dotted})))


def slopes(chosen: Experiment, widths: Sequence[int], seeds: Sequence[int] = (0, 1), **more: Any) -> Report:
    """Verify by slopes alone."""
    return verify(chosen, widths=widths, seeds=seeds, sweeps=False, **more)


@dataclass(frozen=True)
class Mutant(Parametrization):
    """A parametrization with one multiplier of one role off by a power of the width ratio."""

    role: Role = "hidden"
    field: Field = "lr"
    power: float = 0.5

    def scale(self, rule: ScalingRule, role: Role, r_in: float, r_out: float, **more: Any) -> LayerScale:
        right = Parametrization.scale(self, rule, role, r_in, r_out, **more)
        value = getattr(right, self.field)
        if role != self.role or value is None:
            return right
        return replace(right, **{self.field: value * max(r_in, r_out) ** self.power})


def mutant(role: Role, field: Field, power: float, of: str = "mup") -> Mutant:
    """Return a wrong variant of a parametrization."""
    right = scaling.PARAMETRIZATIONS[of]
    return Mutant("mutant", right.init, right.strategy, "", right.forward, role, field, power)


@contextmanager
def registered(wrong: Parametrization) -> Iterator[None]:
    """Make a parametrization known under the name ``mutant`` for the block."""
    with patch.dict(scaling.PARAMETRIZATIONS, {"mutant": wrong}):  # type: ignore[arg-type]
        yield
