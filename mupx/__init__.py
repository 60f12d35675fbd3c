"""mupx: tune a wide network's optimizer on a narrow proxy, damping included, and transfer it by rule.

Everything is imported on first use, so that importing the package (and ``mupx --help``) stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mupx.api import advise, train, transfer, tune, verify
    from mupx.config import Experiment
    from mupx.groups import lr_factor
    from mupx.parametrization import param_groups, parametrize
    from mupx.recipe import Recipe
    from mupx.sections import Hyperparameters

__version__ = "0.1.0"
__all__ = [
    "Experiment",
    "Hyperparameters",
    "Recipe",
    "advise",
    "lr_factor",
    "param_groups",
    "parametrize",
    "train",
    "transfer",
    "tune",
    "verify",
]

_HOMES = {
    "Experiment": "mupx.config",
    "Hyperparameters": "mupx.sections",
    "Recipe": "mupx.recipe",
    "advise": "mupx.api",
    "lr_factor": "mupx.groups",
    "param_groups": "mupx.parametrization",
    "parametrize": "mupx.parametrization",
    "train": "mupx.api",
    "transfer": "mupx.api",
    "tune": "mupx.api",
    "verify": "mupx.api",
}


def __getattr__(name: str) -> Any:
    if name == "optim":
        return import_module("mupx.optim")
    if name not in _HOMES:
        raise AttributeError(f"module 'mupx' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
