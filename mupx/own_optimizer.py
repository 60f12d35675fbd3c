"""Groups for an optimizer of the user's own: what its constructor takes, under the names it knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from mupx.blame import arguments, calling
from mupx.config import Experiment
from mupx.errors import UsageError
from mupx.groups import Group
from mupx.optim.adam import AdamW
from mupx.optim.adapter import Adapter
from mupx.parts import refuse_unknown, signature

DERIVED = ("lr", "eps", "weight_decay", "weight_decay_mode", "damping", "damping_A", "damping_B", "momentum")


def adapted(
    kind: Callable[..., Any], groups: Sequence[Group], experiment: Experiment, model: nn.Module
) -> Adapter:
    """Build an optimizer from the table's groups.

    Args:
        kind: A subclass of ``torch.optim.Optimizer``.
        groups: What :func:`mupx.groups.make_groups` returned.
        experiment: Names the rule, and ``optimizer.args``.
        model: Passed on where the constructor takes it.

    Raises:
        UsageError: A hyperparameter that is set, or must scale with width, has nowhere to go.
    """
    own = experiment.optimizer
    name, args, rule = own.name, own.args, own.scaling_rule
    takes = signature(kind)
    mine = [_with_damping(group) for group in groups if group["algorithm"] == rule.algorithm]
    rest = [group for group in groups if group["algorithm"] != rule.algorithm]
    if not mine:
        raise UsageError(f"the rule {rule.name} of optimizer {name} treats no parameter of this model")
    _refuse_lost(name, takes, experiment)
    keys = [key for key in DERIVED if key in takes and key in mine[0]]
    if "momentum" in args and not experiment.hyperparameters.momentum:
        keys.remove("momentum")  # it is fixed, not searched
    refuse_unknown(f"optimizer {name}", args, takes, offered=("params", "model", *keys))
    more = {"model": model} if "model" in takes else {}
    base = {key: mine[0][key] for key in keys}
    own_groups = [{"params": group["params"], **{key: group[key] for key in keys}} for group in mine]
    with calling(name, f"made with ({arguments({**base, **args})})"):
        optimizer = kind(own_groups, **base, **more, **args)
    return Adapter(optimizer, AdamW(rest) if rest else None)


def _with_damping(group: Group) -> Group:
    """Add ``damping``, the one ridge of an optimizer that has only one."""
    ridges = {group[key] for key in ("damping_A", "damping_B") if key in group}
    return {**group, "damping": ridges.pop()} if len(ridges) == 1 else group


def _refuse_lost(name: str, takes: Mapping[str, Any], experiment: Experiment) -> None:
    hyper, optimizer = experiment.hyperparameters, experiment.optimizer
    needed = ["lr", *(key for key in ("weight_decay", "momentum") if getattr(hyper, key))]
    for key in needed:
        if key not in takes:
            raise UsageError(
                f"optimizer {name} takes no {key}, but hyperparameters.{key} is {getattr(hyper, key):g}; add "
                "it to the constructor, or leave it out of the experiment"
            )
    if optimizer.scaling_rule.damping and not takes.keys() & {"damping", "damping_A", "damping_B"}:
        raise UsageError(
            f"optimizer {name} follows the rule {optimizer.scaling_rule.name}, which has damping, but takes "
            "neither damping nor damping_A and damping_B; add them to the constructor, or name another rule"
        )
    independent = optimizer.weight_decay_mode == "independent"
    if hyper.weight_decay and independent and "weight_decay_mode" not in takes:
        raise UsageError(
            f"optimizer {name} has its own convention of weight decay; say which: --set "
            "optimizer.weight_decay_mode=adamw (decay times lr) or l2 (added to the gradient)"
        )
