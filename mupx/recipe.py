"""A recipe: the whole experiment, the tuned base-width values, their provenance and the layer table.

Transfer is the identity on hyperparameters: only ``scaling.width`` changes, and the table is derived
again. The file carries the derived table for readers and for other trainers; reading recomputes it
and refuses a file whose table and base values disagree by more than rel. 1e-12.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mupx import config, dotted
from mupx.config import Experiment
from mupx.errors import MismatchError, NotFoundError, UsageError
from mupx.files import write_atomically
from mupx.groups import Group, make_groups
from mupx.layers import Layer, Parameter, derive, parse_role
from mupx.schema import SCHEMA, migrated

if TYPE_CHECKING:
    from torch import nn

TOLERANCE = 1e-12
HEADER = "# A mupx recipe. [experiment] holds base-width values; [[layers]] is derived from them.\n\n"


@dataclass(frozen=True)
class Recipe:
    """Base-width values and everything needed to build the model they are for.

    Attributes:
        experiment: The experiment; ``scaling.base_width`` is where it was tuned, ``scaling.width``
            where it is to be used.
        parameters: Every parameter's name, role and shape at two widths.
        provenance: Where the values come from: study, trial, objective, versions.
    """

    experiment: Experiment
    parameters: tuple[Parameter, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> list[Layer]:
        """The derived table: absolute init std, lr, damping, eps and weight decay per tensor."""
        return derive(self.parameters, self.experiment)

    def transfer(self, width: int) -> Recipe:
        """Return the same hyperparameters for a model of another width.

        Raises:
            UsageError: ``width`` is not a positive whole number.
            MismatchError: The model has no whole shape at that width.
        """
        if width == self.experiment.scaling.width:
            return self
        moved = replace(self, experiment=self.experiment.updated({"scaling.width": width}))
        derive(moved.parameters, moved.experiment)
        return moved

    def apply(self, model: nn.Module) -> list[Group]:
        """Return named parameter groups for an existing model; its weights are never touched.

        Any optimizer that knows the keys ``lr``, ``eps``, ``weight_decay`` takes them:
        ``torch.optim.AdamW(recipe.apply(model))``.

        Raises:
            MismatchError: The model's parameters are not those of the recipe at its width.
        """
        return make_groups(model, self.layers, self.experiment)

    def to_dict(self) -> dict[str, Any]:
        """Return the document that is written to the file (TOML has no null: absent means none)."""
        return {
            "schema": SCHEMA,
            "experiment": _without_none(self.experiment.model_dump(mode="json")),
            "provenance": _without_none(dict(self.provenance)),
            "layers": [_without_none(layer.as_dict()) for layer in self.layers],
            "parameters": [_plain(asdict(parameter)) for parameter in self.parameters],
        }

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe as TOML; the old file stays whole until the new one is on disk.

        Raises:
            StorageError: The folder is not writable or the disk is full.
        """
        import tomli_w

        write_atomically(Path(path), (HEADER + tomli_w.dumps(self.to_dict())).encode())


def transfer(recipe: Recipe | str | os.PathLike[str], width: int) -> Recipe:
    """Return a recipe, or the recipe in a file, for a model of ``width``; see :meth:`Recipe.transfer`."""
    return (recipe if isinstance(recipe, Recipe) else read(recipe)).transfer(width)


def read(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe and check its table against its base values.

    Raises:
        NotFoundError: There is no such file.
        UsageError: The file is not a recipe.
        MismatchError: Newer schema, or a table that does not follow from the base values.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"no recipe at {path}; `mupx tune` and `mupx transfer -o` write one")
    return from_dict(dotted.read_toml(path), origin=str(path))


def from_dict(document: Mapping[str, Any], origin: str) -> Recipe:
    """Build a recipe from its document and check it; ``origin`` names it in errors."""
    document = migrated("recipe", document, origin)
    try:
        experiment = config.parse(document["experiment"])
        parameters = tuple(_parameter(entry) for entry in document["parameters"])
        recipe = Recipe(experiment, parameters, dict(document.get("provenance", {})))
        derived, stated = recipe.layers, [dict(row) for row in document["layers"]]
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UsageError(f"{origin} is not a whole recipe: missing or malformed {error}") from None
    _refuse_altered(derived, stated, origin)
    return recipe


def _parameter(entry: Mapping[str, Any]) -> Parameter:
    parse_role(str(entry["name"]), entry["role"])
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
    return Parameter(**fields)


def _refuse_altered(derived: list[Layer], stated: Sequence[Mapping[str, Any]], origin: str) -> None:
    rows = [_without_none(layer.as_dict()) for layer in derived]
    if [r["name"] for r in rows] != [s.get("name") for s in stated]:
        raise MismatchError(f"{origin}: the layer table does not list the recipe's parameters")
    for row, given in zip(rows, stated, strict=True):
        for key in {*row, *given}:
            if not _agree(row.get(key), given.get(key)):
                raise MismatchError(
                    f"{origin}: {key} of {row['name']} is {given.get(key)!r} in the table but the base "
                    f"values give {row.get(key)!r}: one of the two was edited by hand; undo it, or make "
                    "the recipe again with `mupx transfer` and the values you want"
                )


def _agree(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=TOLERANCE)
    return bool(a == b)


def _without_none(document: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in document.items()
        if value is not None
    }


def _plain(document: Mapping[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in document.items()}
