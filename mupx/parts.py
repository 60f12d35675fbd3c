"""From an experiment's names to its model, data and optimizer: from a registry or the user's own code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mupx.blame import arguments, calling
from mupx.config import Experiment
from mupx.datasets import DATASETS
from mupx.datasets.base import Dataset
from mupx.datasets.given import dataset_from
from mupx.deadlines import deadline
from mupx.depth import Source, completed, depth_arguments, describe_at_depth
from mupx.elsewhere import RULES_OF
from mupx.errors import UsageError
from mupx.layers import Parameter
from mupx.models import MODELS
from mupx.recipe import Recipe
from mupx.roles import Factory
from mupx.roles.tracing import ModelFailedError
from mupx.usercode import is_reference, load, load_callable

Signature = Mapping[str, inspect.Parameter]


def own(name: str, describe: Callable[[], str] | str) -> AbstractContextManager[None]:
    """Wrap a call into what a name stands for: only code of the user's own is blamed for what it raises."""
    return calling(name, describe) if is_reference(name) else nullcontext()


def load_data(experiment: Experiment) -> Dataset:
    """Load the experiment's data set.

    Raises:
        UsageError: The user's own loader raised, or returned what is no data, or targets that the loss
            cannot take.
        StorageError: Loading took longer than ``data.timeout``.
    """
    name, limit = experiment.data.name, experiment.data.timeout
    late = (
        f"data {name} were not there after {limit:g} s: its loader hangs, or waits for a disk or a network; "
        "look at it, or allow more with data.timeout (seconds)"
    )
    with deadline(limit, late):
        data = _loaded(experiment)
    require_targets(data, experiment.train.loss)
    return data


def _loaded(experiment: Experiment) -> Dataset:
    name, args = experiment.data.name, experiment.data.args
    folder = None if experiment.data.dir is None else Path(experiment.data.dir).expanduser()
    if is_reference(name):
        return dataset_from(name, _own_data(name, folder, args))
    loader = DATASETS.load(name)
    refuse_unknown(f"data set {name}", args, signature(loader), offered=("directory",))
    data: Dataset = loader(folder, **args)
    return data


def require_targets(data: Dataset, loss: str) -> None:
    """Refuse regression targets for a loss over classes."""
    if loss == "cross_entropy" and data.train.targets.is_floating_point():
        raise UsageError(
            f"the targets of data {data.name} are {str(data.train.targets.dtype).removeprefix('torch.')}, "
            "but train.loss = cross_entropy takes classes (integers); set train.loss to squared_error "
            "(--loss squared_error), or convert the targets"
        )


def _own_data(name: str, folder: Path | None, args: Mapping[str, Any]) -> Any:
    loader = load(name, "data.name")
    if not callable(loader):
        return loader
    takes = signature(loader)
    refuse_unknown(f"data {name}", args, takes, offered=("directory",))
    if folder is not None and "directory" not in takes:
        raise UsageError(f"data.dir is {folder}, but {name} takes no directory; leave it out")
    given = {"directory": folder} if "directory" in takes else {}
    with calling(name, f"called with ({arguments({**given, **args})})"):
        return loader(**given, **args)


def factory(experiment: Experiment, data: Dataset) -> Factory:
    """Return ``build(width)`` at the experiment's depth.

    The data's input shape and number of classes are filled in where it takes them.
    """
    name, args = experiment.model.name, experiment.model.args
    build, takes = _named_factory(experiment)
    positional = [p.name for p in takes.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if not positional and not any(p.kind is p.VAR_POSITIONAL for p in takes.values()):
        raise UsageError(f"model {name} takes no width; give a function build(width)")
    shape = {"input_shape": data.input_shape, "classes": data.classes}
    offered = {key: value for key, value in shape.items() if key in takes}
    refuse_unknown(f"model {name}", args, takes, offered=(*shape, *positional[:1]))
    filled = {**offered, **args, **depth_arguments(experiment, _source(experiment))}
    return partial(_build_own, name, build, filled) if is_reference(name) else partial(build, **filled)


def _named_factory(experiment: Experiment) -> tuple[Callable[..., Any], Signature]:
    name = experiment.model.name
    build: Callable[..., Any] = (
        load_callable(name, "model.name", "a function build(width) that returns a torch.nn.Module")
        if is_reference(name)
        else MODELS.load(name)
    )
    return build, signature(build)


def _source(experiment: Experiment) -> Source:
    return Source(_named_factory(experiment)[1], experiment.model.args, f"model {experiment.model.name}")


def _build_own(name: str, build: Callable[..., Any], filled: Mapping[str, Any], width: int) -> nn.Module:
    if torch.get_default_device().type == "meta":
        built: nn.Module = build(width, **filled)
        return built  # what cannot be built without storage is built again with it
    call = f"called as {name.rpartition(':')[2]}({arguments({'width': width, **filled})})"
    with calling(name, call):
        model = build(width, **filled)
    if not isinstance(model, nn.Module):
        raise UsageError(f"model {name}, {call}, returned {type(model).__name__}; return a torch.nn.Module")
    return model


def describe(experiment: Experiment, data: Dataset) -> tuple[Parameter, ...]:
    """Describe the experiment's parameters, at its depth, at the base width and at twice that."""
    example, base = data.train.inputs[:2], experiment.scaling.base_width
    with own(
        experiment.model.name,
        f"built at widths {base} and {2 * base} and run on inputs of shape {list(example.shape)}",
    ):
        try:
            return describe_at_depth(partial(factory, data=data), experiment, _source(experiment), example)
        except ModelFailedError as error:
            if error.__cause__ is None or not is_reference(experiment.model.name):
                raise
            raise error.__cause__ from None  # the user's own exception says more than our sentence


def at_depth(recipe: Recipe, depth: int, data: Dataset) -> Recipe:
    """Return the same hyperparameters for a model of another depth, which is built narrow to describe it.

    Raises:
        UsageError: ``depth`` is not a positive whole number.
        MismatchError: The model has no residual branches, or does not say how its depth changes.
    """
    experiment = recipe.experiment.updated({"depth.depth": depth})
    parameters = describe(experiment, data)
    base = completed(experiment.depth, _source(experiment)).base
    return replace(recipe, experiment=experiment.updated({"depth.base": base}), parameters=parameters)


def find_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """Return the class behind a reference.

    Raises:
        UsageError: It is no subclass of ``torch.optim.Optimizer``.
    """
    kind = load_callable(name, "optimizer.name", "a subclass of torch.optim.Optimizer")
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise UsageError(f"optimizer {name} is no subclass of torch.optim.Optimizer")
    return kind


def with_rule(experiment: Experiment) -> Experiment:
    """Return the experiment with the rule that the user's own optimizer class states, if it has none.

    Raises:
        UsageError: Neither states one; the message has the line to add.
    """
    name = experiment.optimizer.name
    if is_reference(name) and experiment.optimizer.rule is None:
        stated = getattr(find_optimizer(name), "rule", None) or RULES_OF.get(name)
        experiment = experiment.updated({"optimizer.rule": stated})
    if not is_reference(name) and experiment.optimizer.rule:
        raise UsageError(f"{name} takes no optimizer.rule: it is for an optimizer of your own")
    experiment.optimizer.scaling_rule  # noqa: B018 - raises where there is none
    return experiment


def signature(function: Callable[..., Any]) -> Signature:
    """Return the parameters of a callable; ``*args, **kwargs`` where they cannot be told."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        kinds = {"args": inspect.Parameter.VAR_POSITIONAL, "kwargs": inspect.Parameter.VAR_KEYWORD}
        return {name: inspect.Parameter(name, kind) for name, kind in kinds.items()}


def refuse_unknown(what: str, args: Iterable[str], takes: Signature, offered: Iterable[str] = ()) -> None:
    """Refuse arguments that a callable does not take, or that mupx fills in itself."""
    anything = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    named = {n for n, p in takes.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    allowed = sorted(named - {*offered})
    for name in args:
        if name in offered or not (anything or name in allowed):
            raise UsageError(f"{what} takes no argument {name!r} (it takes: {', '.join(allowed) or 'none'})")
