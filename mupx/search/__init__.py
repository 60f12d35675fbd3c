"""The search on the proxy: what is searched, how a trial is judged, and which trial is chosen.

Everything here is imported on first use: choosing a trial of a finished study needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mupx.search.choice import Choice, Edge, choose, edges, recipe_from_study
    from mupx.search.joining import join, opened
    from mupx.search.loop import Made, SearchResult, make, tune
    from mupx.search.objective import Outcome
    from mupx.search.sampling import default_space, role_space
    from mupx.search.trials import TrialInfo

__all__ = [
    "Choice",
    "Edge",
    "Made",
    "Outcome",
    "SearchResult",
    "TrialInfo",
    "choose",
    "default_space",
    "edges",
    "join",
    "make",
    "opened",
    "recipe_from_study",
    "role_space",
    "tune",
]

_HOMES = {
    "choice": ("Choice", "Edge", "choose", "edges", "recipe_from_study"),
    "joining": ("join", "opened"),
    "loop": ("Made", "SearchResult", "make", "tune"),
    "objective": ("Outcome",),
    "sampling": ("default_space", "role_space"),
    "trials": ("TrialInfo",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"mupx.search.{module}"), name)
    raise AttributeError(f"module 'mupx.search' has no attribute {name!r}")
