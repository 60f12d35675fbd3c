"""``mupx advise``: what to know before a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mupx import config as configs
from mupx import dotted
from mupx import recipe as recipes
from mupx.advice.statements import REFERENCES
from mupx.cli import _options as o
from mupx.cli._console import NONE, number, print_json, print_table, say, warn
from mupx.config import Experiment
from mupx.errors import UsageError
from mupx.recipe import Recipe

if TYPE_CHECKING:
    from mupx.advice.estimates import Estimate
    from mupx.advice.result import Advice

SIZES = "Sizes, where the data need not be read"
HEADS = ("optimizer", "ms_per_step", "ms_per_refresh", "MiB_weights", "MiB_state", "MiB_peak", "treated")
TOPICS: Mapping[str, str] = {
    "pays": "does second order pay?",
    "first": "what to try first",
    "refresh": "how often to refresh curvature",
    "cost": "what does not fit or is not known",
    "iterations": "too few iterations?",
    "transfer": "what does not transfer",
}
NOT_CHANGES = ("config", "examples", "input_shape", "classes", "measure", "allow_code", "set_", "json")


def command(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG|RECIPE", help="TOML file; flags override it.", show_default=False),
    ] = None,
    model: o.Model = None,
    data: o.Data = None,
    data_dir: o.DataDir = None,
    optimizer: o.Optimizer = None,
    loss: o.Loss = None,
    damping_rule: o.DampingRule = None,
    parametrization: o.Parametrization = None,
    base_width: Annotated[int | None, o.whole("--base-width", o.WHAT, "Width of the proxy.")] = None,
    width: Annotated[int | None, o.whole("--width", o.WHAT, "Width of the target.")] = None,
    batch_size: o.BatchSize = None,
    epochs: o.Epochs = None,
    steps: o.Steps = None,
    examples: Annotated[int | None, o.whole("--examples", SIZES, "Number of training examples.")] = None,
    input_shape: Annotated[
        str | None, o.flag("--input-shape", panel=SIZES, help="Shape of one input, such as 3,32,32.")
    ] = None,
    classes: Annotated[int | None, o.whole("--classes", SIZES, "Number of classes.")] = None,
    threads: o.Threads = None,
    device: o.Device = None,
    measure: Annotated[
        bool, o.flag("--measure", panel=o.WHERE, help="Measure the machine's rates again, a few seconds.")
    ] = False,
    allow_code: o.AllowCode = None,
    set_: o.Set = None,
    json: o.Json = False,
) -> None:
    """Say whether second order is likely to pay, what a step costs when wide, and what will not transfer.

    Nothing is trained; the rates of the machine are measured once and kept.

    Example: mupx advise --model mlp --optimizer kfac --width 1024 --batch-size 256 --steps 2000
    """
    flags = {name: value for name, value in context.params.items() if name not in NOT_CHANGES}
    experiment, recipe = _experiment(context, config, set_, flags, allow_code)
    shape = None if input_shape is None else _shape(input_shape)

    from mupx.advice.advising import advise

    advice = advise(
        experiment,
        examples=examples,
        input_shape=shape,
        classes=classes,
        tuned=None if recipe is None else recipe.experiment,
        parameters=() if recipe is None else recipe.parameters,
        measure=measure,
    )
    for statement in advice.warnings:
        warn(f"{statement.code}: {statement.text} [{statement.source}]")
    if json:
        print_json(advice.to_json())
    else:
        _print(advice)


def _experiment(
    context: typer.Context,
    path: Path | None,
    items: Sequence[str] | None,
    flags: dict[str, Any],
    allowed: Sequence[str] | None,
) -> tuple[Experiment, Recipe | None]:
    """Return the run at its target width, and the recipe it is from."""
    document = {} if path is None else dotted.read_toml(path)
    if path is None or "parameters" not in document:
        combined = configs.parse(o.combined(o.sources(path, items, flags)))
        return o.check_names(combined), None
    recipe = recipes.read(path)
    changes = {**dotted.environment_changes(), **dotted.assignments(items or ()), **o.flag_changes(flags)}
    changed = recipe.experiment.updated(changes)
    o.require_allowed(context, changed, changes, allowed)
    return o.check_names(changed), recipe


def _shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise UsageError(
            "--input-shape takes whole numbers of at least 1, separated by commas, such as 3,32,32; got "
            f"{text!r}"
        )
    return sizes


def _print(advice: Advice) -> None:
    experiment, sizes = advice.experiment, advice.sizes
    scaling = experiment.scaling
    say(
        f"{experiment.model.name} on {experiment.data.name}, width {scaling.width} from "
        f"{scaling.base_width}: batch {sizes.batch_size:,} of {sizes.examples:,}, {sizes.steps:,} steps "
        f"({number(sizes.epochs)} passes)"
    )
    say(f"second order  {advice.regime}")
    configured = experiment.optimizer.name
    beside = f" (configured: {configured})" if configured != advice.first else ""
    say(f"try first     {advice.first}{beside}")
    say(f"refresh       {advice.phases.notation}")
    say()
    if advice.estimates:
        _print_costs(advice)
    for topic, title in TOPICS.items():
        found = [statement for statement in advice.statements if statement.topic == topic]
        if found:
            say(f"[{title}]")
        for statement in found:
            say(f"  {statement.text} [{statement.source}]")
    cited = {statement.key for statement in advice.statements}
    for key, reference in REFERENCES.items():
        if key in cited:
            say(f"{key}: {reference}")


def _print_costs(advice: Advice) -> None:
    machine = advice.machine
    free = "" if advice.free is None else f"; {_mebibytes(advice.free)} MiB free"
    print_table(
        f"time and memory on {machine['machine']}, {machine['device']}, threads {machine['threads']}, "
        f"{machine['dtype']}{free}",
        HEADS,
        [_row(estimate) for estimate in advice.estimates],
    )
    for text in dict.fromkeys(estimate.note for estimate in advice.estimates):
        names = [estimate.optimizer for estimate in advice.estimates if estimate.note == text]
        say(f"{', '.join(names)}: {text}")
    say()


def _row(estimate: Estimate) -> list[str]:
    memory = estimate.memory
    if memory is None:
        return [estimate.optimizer, *[NONE] * (len(HEADS) - 1)]
    times = [None if s is None else 1e3 * s for s in (estimate.seconds, estimate.refresh or None)]
    sizes = (memory.parameters, memory.state, memory.peak)
    return [
        estimate.optimizer,
        *map(number, times),
        *map(_mebibytes, sizes),
        f"{estimate.treated:.0%}",
    ]


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:,.1f}" if count < 2**30 else f"{count / 2**20:,.0f}"
