"""What people do to models and optimizers besides training them in a plain loop."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import nn

import mupx
from mupx.optim import OPTIMIZERS
from mupx.optim.base import Base
from tests.factories import small_mlp

# Values under which momentum, decay and several refreshes are in use within a few steps.
VALUES: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    "adamw": {"lr": 0.01, "weight_decay": 0.01},
    "lion": {"lr": 0.003, "weight_decay": 0.01},
    "adam-atan2": {"lr": 0.01, "weight_decay": 0.01},
    "muon": {"lr": 0.02, "weight_decay": 0.01},
    "psgd": {"lr": 0.02, "weight_decay": 0.01},
    "kfac": {"lr": 0.05, "momentum": 0.5, "weight_decay": 0.01, "damping": 0.5},
    "foof": {"lr": 0.05, "momentum": 0.5, "weight_decay": 0.01, "damping": 0.5},
    "ekfac": {"lr": 0.05, "momentum": 0.5, "weight_decay": 0.01, "damping": 0.5},
    "gauss-newton": {"lr": 0.05, "momentum": 0.5, "weight_decay": 0.01, "damping": 0.5},
    "gauss-newton-full": {"lr": 0.05, "momentum": 0.5, "weight_decay": 0.01, "damping": 0.5},
    "shampoo": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    "shampoo-half": {"lr": 0.01, "damping": 0.1},
    "shampoo-left": {"lr": 0.05},
    "shampoo-right": {"lr": 0.05},
    "soap": {"lr": 0.01, "weight_decay": 0.01},
    "soap-left": {"lr": 0.01},
    "soap-right": {"lr": 0.01},
}
STRUCTURE: dict[str, dict[str, Any]] = {
    "kfac": {"refresh": 3, "staleness": 1.0},
    "foof": {"refresh": 3, "staleness": 1.0},
    "ekfac": {"refresh": 3, "staleness": 1.0},
    "gauss-newton": {},
    "gauss-newton-full": {},
    "shampoo": {"refresh": 3, "staleness": 1.0},
    "soap": {"refresh": 2},
}
# Where L or R lacks rank, which bases SOAP takes is decided by rounding: gradients that are equal up to
# rounding do not give equal updates there. tests/optim/test_soap.py has the case of full rank.
SENSITIVE = {"soap", "soap-left", "soap-right"}


def parametrized(name: str, seed: int = 4, **structure: Any) -> tuple[nn.Sequential, Base]:
    """Return small_mlp at twice its base width, with the optimizer of its groups."""
    torch.manual_seed(seed)
    model, groups = mupx.parametrize(small_mlp, width=16, base_width=8, optimizer=name, **VALUES[name])
    return model, optimizer_of(name, groups, model, **structure)  # type: ignore[return-value]


def optimizer_of(name: str, groups: Any, model: nn.Module, **structure: Any) -> Base:
    """Build the optimizer; those with curvature take the model."""
    more = {"model": model} if "model" in signature(OPTIMIZERS.load(name)).parameters else {}
    built: Base = OPTIMIZERS.load(name)(groups, **more, **{**STRUCTURE.get(name, {}), **structure})
    return built
