"""Named parameter groups: one per tensor, carrying the table's values (no torch)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from mupx.config import Experiment
from mupx.errors import MismatchError
from mupx.layers import Layer, Shape

if TYPE_CHECKING:
    from torch import nn

Group = dict[str, Any]


class Grouped(Protocol):
    """Anything with parameter groups: a torch optimizer, or what stands for one."""

    @property
    def param_groups(self) -> list[Group]:
        """The live groups."""


CHECKED = ("lr", "damping_A", "damping_B", "eps", "weight_decay")


def make_groups(model: nn.Module, layers: Sequence[Layer], experiment: Experiment) -> list[Group]:
    """Return one named parameter group per tensor, carrying the table's values."""
    refuse_other_shapes(model, layers)
    optimizer, hyper = experiment.optimizer, experiment.hyperparameters
    return [
        {
            "params": [(layer.name, model.get_parameter(layer.name))],
            "algorithm": layer.optimizer,
            "role": layer.role,
            "r_in": layer.r_in,
            "r_out": layer.r_out,
            **{key: value for key in CHECKED if (value := getattr(layer, key)) is not None},
            "betas": optimizer.betas,
            "momentum": hyper.momentum,
            "weight_decay_mode": optimizer.weight_decay_mode,
        }
        for layer in layers
    ]


def check_groups(optimizer: Grouped, layers: Sequence[Layer], factor: float = 1.0) -> None:
    """Compare the live parameter groups with the table.

    Args:
        optimizer: Its groups are read.
        layers: The table. A value that an optimizer of the user's own does not take is not compared.
        factor: The schedule's current factor on every learning rate.

    Raises:
        MismatchError: A value differs by more than rel. 1e-9: something overwrote it.
    """
    live = {name: g for g in optimizer.param_groups for name in g.get("param_names", ())}
    for layer in layers:
        group = live.get(layer.name)
        if group is None:
            raise MismatchError(f"the optimizer has no parameter group for {layer.name}")
        for key in CHECKED:
            wanted = getattr(layer, key)
            expected = None if wanted is None else wanted * (factor if key == "lr" else 1.0)
            if expected is not None and key in group and not math.isclose(group[key], expected, rel_tol=1e-9):
                raise MismatchError(
                    f"{key} of {layer.name} is {float(group[key]):g} in the optimizer but {expected:g} in "
                    "the table: something overwrote it (a scheduler that writes one lr into all groups?)"
                )


def shapes_of(model: nn.Module) -> dict[str, Shape]:
    """Return the shape of every parameter by name."""
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def refuse_other_shapes(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Raise a MismatchError unless the model's parameters are those of the table."""
    actual = shapes_of(model)
    stated = {layer.name: layer.shape for layer in layers}
    for name in {**actual, **stated}:
        if actual.get(name) != stated.get(name):
            raise MismatchError(
                f"{name} has shape {actual.get(name)} in the model but {stated.get(name)} in the table; "
                "the model was built at another width or by another factory"
            )
