"""From a model and a table to initialised weights and named parameter groups.

The table of :func:`mupx.layers.derive` is the only source: weights are rescaled to its ``init_std``,
groups carry its values. The target keeps the tensor it drew, times one factor; it is never drawn again.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mupx import config, dotted
from mupx.blame import arguments
from mupx.config import Experiment
from mupx.depth import Source, depth_arguments, describe_at_depth
from mupx.errors import UsageError, unknown_name
from mupx.groups import (
    SIZED,
    Group,
    check_groups,
    lr_factor,
    make_groups,
    plain_names,
    refuse_other_names,
    refuse_other_shapes,
    with_tensor_lr,
)
from mupx.heads import scale_tied_head, tied_scale
from mupx.layers import Layer, Parameter, derive
from mupx.losses import Loss
from mupx.optim import OPTIMIZERS
from mupx.optim.adapter import Trainable
from mupx.optim.base import Base
from mupx.own_optimizer import adapted
from mupx.parts import find_optimizer, own, refuse_unknown, signature, with_rule
from mupx.plain_loss import PlainLoss, find_loss, no_likelihood
from mupx.refresh import Refresh, parse_refresh
from mupx.roles import Factory, initial_std, own_std
from mupx.scaling import find_parametrization
from mupx.sections import Hyperparameters, OptimizerConfig
from mupx.usercode import is_reference

__all__ = [
    "Group",
    "build_optimizer",
    "check_groups",
    "experiment_from",
    "initialise",
    "lr_factor",
    "make_groups",
    "param_groups",
    "parametrize",
    "resolved",
]
STRUCTURE = (
    "fisher",
    "refresh",
    "staleness",
    "statistics",
    "ema",
    "solver",
    "blocks",
    "accumulate",
    *SIZED,
)
DEFAULTED = ("lr", "damping")  # where the caller gives none, the optimizer class has one


def initialise(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Rescale freshly drawn weights in place to the table's init std; constants stay; scale tied heads.

    At base width and depth every factor is exactly 1, so the weights keep every bit.

    Raises:
        MismatchError: The model's parameters are not those of the table.
    """
    refuse_other_shapes(model, layers)
    # A measured law has noise: at the base the draw is taken to have the base's own.
    at_base = all(layer.r_in == layer.r_out == layer.depth == 1 for layer in layers)
    with torch.no_grad():
        for layer in layers:
            unchanged = layer.r_in == layer.r_out == 1
            own = layer.base_std if at_base else initial_std(model, layer.name)
            if unchanged and not at_base:
                own = own_std(model, layer.name, layer.base_std)
            if own and layer.init_std and layer.init_std != own:
                model.get_parameter(layer.name).mul_(layer.init_std / own)
    for layer in layers:
        if layer.tied_head and layer.logit_scale != 1.0:
            scale_tied_head(model, layer.tied_head, layer.logit_scale)


def build_optimizer(
    model: nn.Module,
    layers: Sequence[Layer],
    experiment: Experiment,
    generator: torch.Generator | None = None,
    loss: Loss | None = None,
    steps: int | None = None,
    epoch: int | None = None,
) -> Trainable:
    """Build the experiment's optimizer from the table.

    Args:
        model: The model the table describes.
        layers: The table.
        experiment: Names the optimizer and its structural choices.
        generator: Source of the Monte-Carlo Fisher's labels.
        loss: Found by its name where it is not given.
        steps: Length of the run, which a refresh schedule with phases needs; ``train.steps`` if not given.
        epoch: Steps of one epoch.

    Raises:
        UsageError: The refresh schedule needs a length that neither gives, or an argument is wrong.
    """
    name, rule = experiment.optimizer.name, experiment.optimizer.scaling_rule
    kind: Callable[..., Any] = find_optimizer(name) if is_reference(name) else OPTIMIZERS.load(name)
    groups = make_groups(model, layers, experiment)
    offered: dict[str, Any] = {
        "model": model,
        "loss": find_loss(experiment.train.loss) if loss is None else loss,
        "generator": generator,
        "damping_rule": experiment.optimizer.damping_rule or rule.default_damping,
        **{key: getattr(experiment.optimizer, key) for key in STRUCTURE},
        "refresh": _refresh(experiment, steps, epoch),
    }
    if not (isinstance(kind, type) and issubclass(kind, Base)):
        return adapted(kind, groups, experiment, model)
    for group in groups:  # a Base treats what carries its own name, the rest by AdamW
        group["algorithm"] = kind.algorithm if group["algorithm"] == rule.algorithm else group["algorithm"]
    args = experiment.optimizer.args
    accepted = signature(kind)
    keys = (*Hyperparameters.model_fields, *OptimizerConfig.model_fields)  # the groups carry their values
    refuse_unknown(f"optimizer {name}", args, accepted, offered=("params", *offered, *keys))
    with own(name, lambda: f"made with ({arguments(args)})"):
        built: Base = kind(groups, **{k: v for k, v in offered.items() if k in accepted}, **args)
    return built


def _refresh(experiment: Experiment, steps: int | None, epoch: int | None) -> Refresh:
    schedule = parse_refresh(experiment.optimizer.refresh)
    if isinstance(schedule, int):
        return schedule
    length = experiment.train.steps if steps is None else steps
    if length is None and schedule.ends:
        raise UsageError(
            f"optimizer.refresh {str(schedule)!r} depends on the length of the run; give build_optimizer its "
            "steps, or set train.steps"
        )
    return schedule.over(length or 0, epoch)


def resolved(experiment: Experiment) -> Experiment:
    """Check every name of an experiment and fill in the optimizer's default damping rule.

    Raises:
        UsageError: Unknown optimizer, damping rule or parametrization; the nearest name is given.
    """
    name = experiment.optimizer.name
    if name not in OPTIMIZERS and not is_reference(name):
        raise OPTIMIZERS.unknown(name)
    find_parametrization(experiment.scaling.parametrization)
    experiment = with_rule(experiment)
    _refuse_size(experiment.optimizer)
    rule = experiment.optimizer.scaling_rule
    loss = find_loss(experiment.train.loss)
    if experiment.optimizer.fisher != "empirical" and type(loss) is PlainLoss:
        raise no_likelihood(experiment.train.loss)
    if experiment.optimizer.damping_rule is None and rule.damping:
        experiment = experiment.updated({"optimizer.damping_rule": rule.default_damping})
    if rule.damping:
        rule.damping_scale(experiment.optimizer.damping_rule)
    elif experiment.optimizer.damping_rule is not None:
        raise UsageError(f"{name} has no damping, but optimizer.damping_rule is set; remove it")
    return experiment


def _refuse_size(optimizer: OptimizerConfig) -> None:
    """Refuse a graft or a normalisation that the optimizer would leave out while its rule counts on it."""
    name = optimizer.name
    takes = signature(find_optimizer(name) if is_reference(name) else OPTIMIZERS.load(name))
    for key in SIZED:
        if getattr(optimizer, key) != "none" and key not in takes:
            able = (n for n in OPTIMIZERS if key in signature(OPTIMIZERS.load(n)))
            raise UsageError(f"{name} takes no optimizer.{key}; leave it out, or use {', '.join(able)}")


def experiment_from(
    *,
    width: int,
    base_width: int,
    optimizer: str,
    parametrization: str = "mup",
    roles: Mapping[str, Any] | None = None,
    depth: int | None = None,
    base_depth: int | None = None,
    **values: Any,
) -> Experiment:
    """Build an experiment from keyword arguments: hyperparameters and optimizer settings by name.

    Args:
        width: Target width.
        base_width: Width at which the values were tuned.
        optimizer: Name in :data:`mupx.optim.OPTIMIZERS`.
        parametrization: Name in :data:`mupx.scaling.PARAMETRIZATIONS`.
        roles: Pattern → role or declaration, as ``[roles]`` in a configuration.
        depth: Target depth, in residual blocks.
        base_depth: Depth at which the values were tuned.
        **values: The rest; without ``lr`` or ``damping`` the optimizer class's own default.

    Raises:
        UsageError: An argument is neither; the known ones are listed.
    """
    changes: dict[str, Any] = {
        "scaling.width": width,
        "scaling.base_width": base_width,
        "scaling.parametrization": parametrization,
        "optimizer.name": optimizer,
        "roles": dict(roles or {}),
        "depth": {"depth": depth, "base": base_depth},
    }
    for key, value in {**_class_defaults(optimizer), **values}.items():
        if key in Hyperparameters.model_fields:
            changes[f"hyperparameters.{key}"] = float(value)
        elif key in OptimizerConfig.model_fields and key != "name":
            changes[f"optimizer.{key}"] = value
        else:
            known = [*Hyperparameters.model_fields, *OptimizerConfig.model_fields]
            raise unknown_name("argument", key, known)
    return resolved(config.parse(dotted.merge({}, changes)))


def _class_defaults(optimizer: str) -> dict[str, float]:
    if optimizer not in OPTIMIZERS:
        return {}
    accepted = inspect.signature(OPTIMIZERS.load(optimizer)).parameters
    found = {key: accepted[key].default for key in DEFAULTED if key in accepted}
    return {key: value for key, value in found.items() if isinstance(value, float)}


def parametrize(
    build: Factory,
    *,
    width: int,
    base_width: int,
    optimizer: str,
    example: Tensor | None = None,
    roles: Mapping[str, Any] | None = None,
    depth: int | None = None,
    base_depth: int | None = None,
    **values: Any,
) -> tuple[nn.Module, list[Group]]:
    """Build the model at ``width`` with scaled initial weights, and its parameter groups.

    ``model, groups = mupx.parametrize(build, width=1024, base_width=64, optimizer="kfac", lr=0.1,
    damping=1e-2)``; hand the groups to ``mupx.optim.KFAC(groups, model)``.

    Args:
        build: ``build(width) -> nn.Module``; for a depth ``build(width, layers=…, branch_scale=…)``, whose
            model names the parameters inside its branches by a pattern, ``residual_blocks``.
        width: Target width.
        base_width: Width at which the values were tuned.
        optimizer: Name in :data:`mupx.optim.OPTIMIZERS`.
        example: A batch of inputs, to find the read-out by a traced forward pass.
        roles: Name pattern → role or declaration, as ``[roles]`` in a configuration.
        depth: Target depth, the number of residual blocks; left out, depth is that of ``build(width)``.
        base_depth: Depth at which the values were tuned; the default of ``layers`` when left out.
        **values: ``lr`` (a tensor gives every group a tensor of its own), ``damping``, ``momentum``,
            ``weight_decay``, ``parametrization``, ``damping_rule``, … as in the configuration.
    """
    experiment = _experiment(width, base_width, optimizer, roles, depth, base_depth, values)
    parameters = _described(build, experiment, example)
    model = _deep(build, experiment)(width)
    layers = _table(model, parameters, experiment)
    initialise(model, layers)
    return model, with_tensor_lr(make_groups(model, layers, experiment), values.get("lr"))


def param_groups(
    model: nn.Module,
    *,
    build: Factory,
    width: int,
    base_width: int,
    optimizer: str,
    example: Tensor | None = None,
    roles: Mapping[str, Any] | None = None,
    depth: int | None = None,
    base_depth: int | None = None,
    **values: Any,
) -> list[Group]:
    """Return parameter groups for an existing model; its weights are never touched.

    Args: as :func:`parametrize`; ``model`` was built by ``build(width)`` at some time, and may be wrapped
    by ``DistributedDataParallel`` or ``torch.compile``. A tied head that :func:`parametrize` has not made
    is warned about, with the number to multiply its logits by.
    """
    experiment = _experiment(width, base_width, optimizer, roles, depth, base_depth, values)
    parameters = _described(build, experiment, example)
    layers = _table(model, parameters, experiment)
    named = plain_names(model, layers)
    for layer in layers:
        if layer.tied_head and not math.isclose(tied_scale(named[layer.name], model), layer.logit_scale):
            warnings.warn(
                f"{layer.tied_head} is tied to {layer.name}: multiply its logits by {layer.logit_scale:g} in "
                "the model (param_groups changes no model; mupx.parametrize builds one that does it)",
                stacklevel=2,
            )
    return with_tensor_lr(make_groups(model, layers, experiment), values.get("lr"))


def _experiment(
    width: int,
    base_width: int,
    optimizer: str,
    roles: Mapping[str, Any] | None,
    depth: int | None,
    base_depth: int | None,
    values: Mapping[str, Any],
) -> Experiment:
    if width == base_width and depth is None:
        warnings.warn(
            f"width {width} is the base width: every multiplier is 1, nothing is transferred", stacklevel=3
        )
    return experiment_from(
        width=width,
        base_width=base_width,
        optimizer=optimizer,
        roles=roles,
        depth=depth,
        base_depth=base_depth,
        **values,
    )


def _deep(build: Factory, experiment: Experiment) -> Factory:
    return partial(build, **depth_arguments(experiment, Source(signature(build), {})))


def _described(build: Factory, experiment: Experiment, example: Tensor | None) -> tuple[Parameter, ...]:
    return describe_at_depth(partial(_deep, build), experiment, Source(signature(build), {}), example)


def _table(model: nn.Module, parameters: Sequence[Parameter], experiment: Experiment) -> list[Layer]:
    named = plain_names(model, parameters)
    refuse_other_names(named, [p.name for p in parameters])
    return derive(parameters, experiment, {name: tuple(p.shape) for name, p in named.items()})
