"""Named parameter groups: made from the table, compared with it, and found again in wrapped models.

A recipe makes groups too, so torch is imported only where a tensor is at hand.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from mupx.config import Experiment
from mupx.errors import MismatchError, UsageError
from mupx.layers import Layer, Parameter

if TYPE_CHECKING:
    from torch import nn

Group = dict[str, Any]
CHECKED = ("lr", "damping_A", "damping_B", "eps", "weight_decay")
SIZED = ("graft", "normalise")  # what sets the size of an update; stated only where something does
WRAPPED, COMPILED = "module.", "_orig_mod."  # put before names by DistributedDataParallel and torch.compile
ROUNDING = 1e-9


class Grouped(Protocol):
    """Anything with parameter groups: a torch optimizer, or what stands for one."""

    @property
    def param_groups(self) -> list[Group]:
        """The live groups."""


def make_groups(model: nn.Module, layers: Sequence[Layer], experiment: Experiment) -> list[Group]:
    """Return one named parameter group per tensor, carrying the table's values.

    ``name`` says role and width ratios; ``table_lr`` keeps the table's learning rate, which schedulers
    may overwrite elsewhere (see :func:`lr_factor`).
    """
    refuse_other_shapes(model, layers)
    optimizer, hyper = experiment.optimizer, experiment.hyperparameters
    parameters = plain_names(model, layers)
    return [
        {
            "params": [(layer.name, parameters[layer.name])],
            "name": f"{layer.name} ({layer.role}, r_in {layer.r_in:g}, r_out {layer.r_out:g})",
            "algorithm": layer.optimizer,
            "role": layer.role,
            "r_in": layer.r_in,
            "r_out": layer.r_out,
            "reference_shape": layer.reference_shape,
            "table_lr": layer.lr,
            **{key: value for key in CHECKED if (value := getattr(layer, key)) is not None},
            "betas": optimizer.betas,
            "momentum": hyper.momentum,
            "weight_decay_mode": optimizer.weight_decay_mode,
            **{key: value for key in SIZED if (value := getattr(optimizer, key)) != "none"},
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
            if expected is None or key not in group:
                continue
            if not math.isclose(group[key], expected, rel_tol=_rounding(group[key])):
                raise MismatchError(
                    f"{key} of {layer.name} is {float(group[key]):g} in the optimizer but {expected:g} in "
                    "the table: something overwrote it (a scheduler that writes one lr into all groups?)"
                )


def lr_factor(optimizer: Grouped) -> float:
    """Return the factor that a scheduler has put on the learning rates of mupx's groups.

    A scheduler keeps the parametrization when it multiplies every group by the same factor: LambdaLR and
    all that derive from a group's own lr do; OneCycleLR and CyclicLR do when given a *list* of rates,
    ``max_lr=[group["lr"] for group in optimizer.param_groups]``, and write one rate into all groups when
    given a number. That is warned about, with the two groups that disagree most.
    """
    groups = [g for g in optimizer.param_groups if "table_lr" in g]
    if not groups:
        raise UsageError("the optimizer has no groups of mupx's; make them with mupx.param_groups")
    factors = [(float(g["lr"]) / g["table_lr"], str(g["name"])) for g in groups]
    (low, slow), (high, fast) = min(factors), max(factors)
    tolerance = max(1e-6, *(_rounding(g["lr"]) for g in groups))
    if not math.isclose(low, high, rel_tol=tolerance):
        warnings.warn(
            f"the learning rates no longer follow the table: {fast} has {high:.3g} times its own, {slow} "
            f"{low:.3g} times; a scheduler wrote one rate into all groups. Give it a rate per group "
            '(max_lr=[group["lr"] for group in optimizer.param_groups]) or use LambdaLR',
            stacklevel=2,
        )
    return float(high)


def _rounding(value: Any) -> float:
    if not hasattr(value, "dtype"):
        return ROUNDING
    import torch

    return ROUNDING if value.dtype == torch.float64 else 4 * float(torch.finfo(value.dtype).eps)


def with_tensor_lr(groups: list[Group], lr: Any) -> list[Group]:
    """Turn the groups' learning rates into tensors, one each, where ``lr`` was given as a tensor."""
    if hasattr(lr, "dtype"):
        import torch

        # One tensor per group: a scheduler or a captured graph writes into it in place.
        for group in groups:
            group["lr"] = torch.full_like(lr, group["lr"])
    return groups


def plain_names(model: nn.Module, described: Sequence[Layer | Parameter]) -> dict[str, nn.Parameter]:
    """Return the model's parameters by the names the description has, whatever wraps the model."""
    named = dict(model.named_parameters())
    stated = {d.name for d in described}
    if stated != named.keys():
        # A compiled part of a model; what wraps the whole of it goes one prefix at a time, so that a part
        # which is really called "module" keeps its name.
        named = {name.replace(f".{COMPILED}", "."): parameter for name, parameter in named.items()}
    while stated != named.keys() and (prefix := _common_prefix(named)):
        named = {name.removeprefix(prefix): parameter for name, parameter in named.items()}
    return named


def _common_prefix(names: Collection[str]) -> str:
    return next((p for p in (WRAPPED, COMPILED) if names and all(n.startswith(p) for n in names)), "")


def refuse_other_names(named: Collection[str], stated: Sequence[str]) -> None:
    """Refuse a model whose parameters are not those that were described.

    Raises:
        MismatchError: It has others, or lacks some: usually another depth.
    """
    extra = [name for name in named if name not in stated]
    missing = [name for name in stated if name not in named]
    if extra or missing:
        lacks = f"lacks {', '.join(missing[:3])}" if missing else ""
        has = f"has {', '.join(extra[:3])}" if extra else ""
        raise MismatchError(
            f"the model {' and '.join(filter(None, (has, lacks)))} in comparison with the one described at "
            "the base width; width may change shapes only: build both with the same number of layers (depth "
            "has a rule of its own: give it as depth, for a model with residual branches)"
        )


def refuse_other_shapes(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Refuse a model whose parameters are not those of the table.

    Raises:
        MismatchError: A name or a shape differs; both shapes are given.
    """
    actual = {name: tuple(p.shape) for name, p in plain_names(model, layers).items()}
    refuse_other_names(actual, [layer.name for layer in layers])
    for layer in layers:
        if actual[layer.name] != layer.shape:
            raise MismatchError(
                f"{layer.name} has shape {actual[layer.name]} in the model but {layer.shape} in the table; "
                "the model was built at another width or by another factory"
            )
