"""The flags verbs share, and the experiment they add up to.

Precedence: flags > ``--set a.b=c`` > ``MUPX_A__B`` > CONFIG file > defaults.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mupx import config, dotted
from mupx.config import Experiment
from mupx.datasets import DATASETS
from mupx.errors import UsageError, unknown_name
from mupx.models import MODELS
from mupx.optim import OPTIMIZERS
from mupx.scaling import PARAMETRIZATIONS, find_parametrization
from mupx.sections import LOSSES
from mupx.usercode import is_reference, place

WHAT, HOW, WHERE = "What is trained", "How it is searched", "Where and how to run"
Document = dict[str, Any]


def flag(*names: str, panel: str, help: str, **more: Any) -> Any:
    """Return a Typer option of one of the help's panels."""
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **more)


def whole(name: str, panel: str, help: str, least: int = 1) -> Any:
    """Return a Typer option that takes a whole number of at least ``least``."""

    def check(value: int | None) -> int | None:
        if value is not None and value < least:
            raise UsageError(f"{name} must be a whole number of at least {least}, got {value}")
        return value

    return flag(name, panel=panel, help=help, callback=check)


def known(names: Sequence[str] | Mapping[str, Any]) -> str:
    """Return the names a flag takes, for its help."""
    return ", ".join(names)


Json = Annotated[bool, flag("--json", panel=WHERE, help="Print one JSON document instead of text.")]
Set = Annotated[
    list[str] | None,
    flag("--set", panel=WHERE, metavar="KEY=VALUE", help="Any key of the configuration; repeatable."),
]
RunDir = Annotated[Path | None, flag("--run-dir", panel=WHERE, help="Run folder.")]
Fresh = Annotated[bool, flag("--fresh", panel=WHERE, help="Move an existing run folder aside.")]
Threads = Annotated[int | None, whole("--threads", WHERE, "CPU threads.")]
Seed = Annotated[int | None, whole("--seed", WHERE, "Seed.", least=0)]
Device = Annotated[str | None, flag("--device", panel=WHERE, help="auto, cpu, cuda, cuda:1, mps …")]
Storage = Annotated[
    str | None,
    flag(
        "--storage",
        panel=WHERE,
        envvar="MUPX_SEARCH__STORAGE",
        help="URL of the study's storage; a file in the run folder when left out.",
    ),
]
OWN = "or file.py:attribute"
Model = Annotated[str | None, flag("--model", panel=WHAT, help=f"One of: {known(MODELS)}; {OWN}.")]
Data = Annotated[str | None, flag("--data", panel=WHAT, help=f"One of: {known(DATASETS)}; {OWN}.")]
Loss = Annotated[str | None, flag("--loss", panel=WHAT, help=f"One of: {known(LOSSES)}; {OWN}.")]
AllowCode = Annotated[
    list[str] | None,
    flag(
        "--allow-code",
        panel=WHERE,
        metavar="REF",
        help="Import this code, which the recipe names; repeatable.",
    ),
]
DataDir = Annotated[str | None, flag("--data-dir", panel=WHAT, help="Folder that holds the data.")]
Optimizer = Annotated[
    str | None, flag("--optimizer", panel=WHAT, help=f"One of: {known(OPTIMIZERS)}; {OWN}.")
]
DampingRule = Annotated[
    str | None, flag("--damping-rule", panel=WHAT, help="What the damping is relative to: see `mupx rules`.")
]
Refresh = Annotated[
    str | None,
    flag("--refresh", panel=WHAT, help="Steps between updates of the curvature: 10, or phases 10:0.3%,100."),
]
Parametrization = Annotated[
    str | None, flag("--parametrization", panel=WHAT, help=f"One of: {known(PARAMETRIZATIONS)}.")
]
BatchSize = Annotated[int | None, whole("--batch-size", WHAT, "Examples per step.")]
Epochs = Annotated[float | None, flag("--epochs", panel=WHAT, help="Passes over the training data.")]
Steps = Annotated[int | None, whole("--steps", WHAT, "Steps, instead of epochs.")]

# Flag → dotted keys. A flag left out is None and says nothing.
KEYS: Mapping[str, tuple[str, ...]] = {
    "model": ("model.name",),
    "data": ("data.name",),
    "data_dir": ("data.dir",),
    "optimizer": ("optimizer.name",),
    "loss": ("train.loss",),
    "damping_rule": ("optimizer.damping_rule",),
    "refresh": ("optimizer.refresh",),
    "parametrization": ("scaling.parametrization",),
    "batch_size": ("train.batch_size",),
    "epochs": ("train.epochs",),
    "steps": ("train.steps",),
    "curvature_every": ("train.curvature_every",),
    "keep_latest": ("train.keep_latest",),
    "threads": ("train.threads",),
    "device": ("train.device",),
    "trials": ("search.trials",),
    "objective": ("search.objective",),
    "confirm": ("search.confirm",),
    "population": ("search.population",),
    "workers": ("search.workers",),
    "sampler": ("search.sampler",),
    "pruner": ("search.pruner",),
    "storage": ("search.storage",),
    "seed": ("train.seed", "search.seed"),
    "base_width": ("scaling.base_width",),
    "width": ("scaling.width",),
    "base_depth": ("depth.base",),
}
RANGES = ("lr", "damping", "momentum", "weight_decay")  # flags that take a value or a range
LINEAR = ("momentum",)  # searched on a linear scale


def flag_changes(flags: Mapping[str, Any]) -> Document:
    """Return the dotted keys that the flags given on the command line set."""
    changes: Document = {}
    for name, value in flags.items():
        if value is None:
            continue
        if name in RANGES:
            changes |= range_changes(name, value)
        else:
            changes |= dict.fromkeys(KEYS.get(name, ()), value)
    return changes


def range_changes(name: str, text: str) -> Document:
    """Return the key that ``--lr 0.03`` (fixed) or ``--lr 1e-3:1`` (searched) sets.

    >>> range_changes("lr", "0.03")
    {'hyperparameters.lr': 0.03}
    """
    option = f"--{name.replace('_', '-')}"
    if name in LINEAR and text.count(":") == 1:
        low, high = (config.parse_range(option, part) for part in text.split(":"))
        return {f"search.space.{name}": {"low": low, "high": high, "log": False}}
    value = config.parse_range(option, text)
    if isinstance(value, float):
        return {f"hyperparameters.{name}": value}
    return {f"search.space.{name}": value.model_dump()}


def sources(path: Path | None, items: Sequence[str] | None, flags: Mapping[str, Any]) -> list[Document]:
    """Return file, environment, ``--set`` and flags as nested documents, the weakest first."""
    file = {} if path is None else dotted.read_toml(path)
    stated = (dotted.environment_changes(), dotted.assignments(items or ()), flag_changes(flags))
    return [file, *(dotted.merge({}, changes) for changes in stated)]


def fixed_experiment(documents: Sequence[Document]) -> Experiment:
    """Return the experiment of a run without a search.

    Raises:
        UsageError: An unknown key or name, a value out of range, or a range where a value is needed.
    """
    document = combined(documents)
    ranges = _take_space(document)
    if ranges:
        raise UsageError(f"{next(iter(ranges))} is a range, which only `mupx tune` searches; give one value")
    return check_names(config.parse(document))


def searched_experiment(documents: Sequence[Document], roles: bool) -> Experiment:
    """Return the experiment of a search, with its space filled in, at base width and depth.

    The optimizer's default ranges apply unless the file has ranges of its own; a range replaces the one
    before it, a fixed value removes it.

    Args:
        documents: What :func:`sources` returned.
        roles: Also search what else transfers: multipliers per role, output scale, momentum.

    Raises:
        UsageError: An unknown key or name, a value out of range, or nothing left to search.
    """
    document = combined(documents)
    width = _base_width(documents)
    if width is not None:
        document = dotted.merge(document, {"scaling.base_width": width, "scaling.width": width})
    if "depth" in document:
        document = dotted.merge(document, {"depth.depth": None})
    _take_space(document)
    plain = check_names(config.parse(document))
    space = _space(documents, _default_space(documents[0], plain, roles))
    if not space:
        raise UsageError(
            "every hyperparameter has a fixed value and none a default range; give a range to search, such "
            "as --lr 1e-3:1"
        )
    return config.parse(dotted.merge(document, {"search.space": space}))


def combined(documents: Sequence[Document]) -> Document:
    """Return the documents laid over each other; a later value replaces an earlier one."""
    result: Document = {}
    for document in documents:
        result = dotted.merge(result, dict(_leaves(document)))
    return result


def wants_roles(preset: str | None) -> bool:
    """Read ``--search``, whose only preset so far is ``roles``."""
    if preset not in (None, "roles"):
        raise unknown_name("search preset", preset, ("roles",))
    return preset == "roles"


def check_names(experiment: Experiment) -> Experiment:
    """Refuse an unknown model, data set, optimizer, damping rule or parametrization before loading torch.

    Returns:
        The experiment, with the width rule that an optimizer of the user's own states.

    Raises:
        UsageError: The message has the nearest known name.
    """
    optimizer = experiment.optimizer
    for registry, name in (
        (MODELS, experiment.model.name),
        (DATASETS, experiment.data.name),
        (OPTIMIZERS, optimizer.name),
    ):
        if name not in registry and not is_reference(name):
            raise registry.unknown(name)
    find_parametrization(experiment.scaling.parametrization)
    if is_reference(optimizer.name) and optimizer.rule is None:
        from mupx.parts import with_rule

        experiment = with_rule(experiment)
    rule = experiment.optimizer.scaling_rule
    if optimizer.damping_rule is not None and not rule.damping:
        raise UsageError(f"{rule.name} has no damping, but a damping rule is given; leave it out")
    rule.damping_scale(optimizer.damping_rule)
    return experiment


def command_line(context: typer.Context, without: Container[str] = ()) -> list[str]:
    """Return the command that was given, from its parsed flags; passwords are hidden."""
    from mupx.study import redact

    words = ["mupx", str(context.info_name)]
    for parameter in context.command.params:
        name, value = str(parameter.name), context.params.get(str(parameter.name))
        if name in without or value is None or value is False:
            continue
        option = [max(parameter.opts, key=len)] if parameter.param_type_name == "option" else []
        for item in value if isinstance(value, (list, tuple)) else [value]:
            words += option if item is True else [*option, redact(str(item))]
    return words


def allow_flags(experiment: Experiment) -> list[str]:
    """Return the ``--allow-code`` flags that the recipe of an experiment needs."""
    return [word for name in dict.fromkeys(experiment.own_code.values()) for word in ("--allow-code", name)]


def require_allowed(
    context: typer.Context, experiment: Experiment, named: Container[str], allowed: Sequence[str] | None
) -> None:
    """Refuse to import code that a recipe names, as it may come from elsewhere.

    Args:
        context: Of the command.
        experiment: What would be run.
        named: Keys that the command line or the environment sets: these are the user's own words.
        allowed: References the user allows.

    Raises:
        UsageError: With what would be imported, and the command that allows it.
    """
    refused = {
        key: name
        for key, name in experiment.own_code.items()
        if key not in named and name not in (allowed or ()) and not name.startswith("python:")
    }
    if refused:
        listed = ", ".join(f"{key} = {name} ({place(name)})" for key, name in refused.items())
        flags = [word for name in dict.fromkeys(refused.values()) for word in ("--allow-code", name)]
        raise UsageError(
            f"the recipe names code that would be imported and run: {listed}; a recipe may come from "
            f"elsewhere, so read that code, then allow it: {shlex.join([*command_line(context), *flags])}"
        )


def require_positive(option: str, value: float) -> None:
    """Refuse zero, a negative number, NaN and infinity."""
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"{option} must be a positive finite number, got {value:g}; example: {option} 16")


def _base_width(documents: Sequence[Document]) -> Any:
    """Return the base width, or else the width, that the strongest source states."""
    for document in reversed(documents):
        scaling = document.get("scaling")
        if isinstance(scaling, dict) and scaling.keys() & {"base_width", "width"}:
            return scaling.get("base_width", scaling.get("width"))
    return None


def _take_space(document: Document) -> Document:
    """Remove and return the ranges; what is no table stays, for the parser to complain about."""
    search = document.get("search")
    if isinstance(search, dict) and isinstance(search.get("space"), dict):
        space: Document = search.pop("space")
        return space
    return {}


def _default_space(file: Document, experiment: Experiment, roles: bool) -> Document:
    from mupx.search.sampling import role_space, space_of

    own = "space" in file.get("search", {})
    space = {} if own else space_of(experiment)
    more = role_space(experiment) if roles else {}
    return {name: interval.model_dump() for name, interval in {**more, **space}.items()}


def _space(documents: Sequence[Document], space: Document) -> Document:
    for document in documents:
        stated = document.get("search", {}).get("space", {})
        for name in document.get("hyperparameters", {}):
            space.pop(name, None)
        space = dotted.merge(space, dict(_leaves(stated)))
    return space


def _leaves(document: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    # Keys that contain dots (patterns in [roles]) cannot be written as dotted keys: their table stays whole.
    leaves: list[tuple[str, Any]] = []
    for key, value in document.items():
        whole = not isinstance(value, dict) or not value or any("." in name for name in value)
        leaves += [(f"{prefix}{key}", value)] if whole else _leaves(value, f"{prefix}{key}.")
    return leaves
