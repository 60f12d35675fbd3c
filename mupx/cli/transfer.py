"""``mupx transfer``: the same hyperparameters at another width or depth, as a recipe with its layer table."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mupx import interop
from mupx import recipe as recipes
from mupx.cli import _options as o
from mupx.cli._console import note, number, parameters, print_json, print_table, say
from mupx.cli._explain import explain as explain_recipe
from mupx.cli._sources import find_study, is_study
from mupx.config import Experiment
from mupx.errors import NotFoundError, UsageError
from mupx.layers import Layer, decay_factor, decay_per_step
from mupx.recipe import Recipe

# Flags that describe a model and its values, for a transfer without a study.
DESCRIBING: tuple[str, ...] = (
    "model",
    "data",
    "data_dir",
    "optimizer",
    "loss",
    "damping_rule",
    "refresh",
    "parametrization",
    "batch_size",
)
DESCRIBING += (
    "epochs",
    "steps",
    "base_width",
    "base_depth",
    "base_shapes",
    "lr",
    "damping",
    "momentum",
    "weight_decay",
)
TARGET, VALUES = "What is transferred", "Without SOURCE: values from anywhere, with the flags below"
DECAY = "lr·wd"
NUMBERS = ("r_in", "r_out", "init_std", "lr", "damping_A", "damping_B", "eps", "weight_decay")


def command(
    context: typer.Context,
    source: Annotated[
        str | None,
        typer.Argument(metavar="SOURCE", help="RUN_DIR, STORAGE#STUDY or RECIPE.", show_default=False),
    ] = None,
    width: Annotated[int | None, o.whole("--width", TARGET, "Width of the target.")] = None,
    depth: Annotated[
        int | None, o.whole("--depth", TARGET, "Depth of the target, in residual blocks; builds the model.")
    ] = None,
    pick: Annotated[
        str | None, o.flag("--pick", panel=TARGET, help="Which trial: best (default), robust or its number.")
    ] = None,
    model: o.Model = None,
    data: o.Data = None,
    data_dir: o.DataDir = None,
    optimizer: o.Optimizer = None,
    loss: o.Loss = None,
    damping_rule: o.DampingRule = None,
    refresh: o.Refresh = None,
    parametrization: o.Parametrization = None,
    batch_size: o.BatchSize = None,
    epochs: o.Epochs = None,
    steps: o.Steps = None,
    base_width: Annotated[
        int | None, o.whole("--base-width", VALUES, "Width the values were tuned at.")
    ] = None,
    base_depth: Annotated[
        int | None, o.whole("--base-depth", VALUES, "Depth they were tuned at; the model's own if left out.")
    ] = None,
    base_shapes: Annotated[
        Path | None,
        o.flag("--base-shapes", panel=VALUES, help="Instead of a width: microsoft/mup's .bsh file."),
    ] = None,
    lr: Annotated[str | None, o.flag("--lr", panel=VALUES, help="Learning rate.")] = None,
    damping: Annotated[str | None, o.flag("--damping", panel=VALUES, help="Damping.")] = None,
    momentum: Annotated[str | None, o.flag("--momentum", panel=VALUES, help="Momentum.")] = None,
    weight_decay: Annotated[str | None, o.flag("--weight-decay", panel=VALUES, help="Weight decay.")] = None,
    set_: o.Set = None,
    allow_code: o.AllowCode = None,
    storage: o.Storage = None,
    output: Annotated[
        Path | None,
        o.flag("--output", "-o", panel=o.WHERE, help="Recipe to write; next to SOURCE when left out."),
    ] = None,
    explain: Annotated[
        bool,
        o.flag("--explain", panel=o.WHERE, help="Also say why each role was given, and the rules."),
    ] = False,
    json: o.Json = False,
) -> None:
    """Carry tuned values over to another width, depth or both, and write a recipe.

    Example: mupx transfer runs/mlp-fashion-mnist-14-kfac-w64 --width 1024
    """
    if width is None and depth is None:
        raise UsageError("give the target's width, its depth, or both, for example --width 1024")
    if source is None:
        base, place = _described(context.params, set_), Path("recipe.toml")
    else:
        _refuse_description(context.params, set_, depth)
        base, place = _found(source, pick, storage)
    if depth is not None:
        if source is not None:
            o.require_allowed(context, base.experiment, (), allow_code)
        base = _deepened(base, depth, None if source is None else data_dir)
    target = base if width is None else base.transfer(width)
    path = output or place.with_name(_stem(place) + _size(target, depth) + ".toml")
    if source is not None and _same(path, Path(source)):
        raise UsageError(f"-o {path} is the recipe it starts from; give another name")
    target.write(path)
    scaling, deep = target.experiment.scaling, target.experiment.depth
    if scaling.width == scaling.base_width and deep.ratio == 1.0:
        note(f"width {scaling.width} is the base width: every multiplier is 1")
    if json:
        sizes = {"base_width": scaling.base_width, "width": scaling.width}
        depths = {"base_depth": deep.base, "depth": deep.depth} if deep.depth is not None else {}
        print_json(
            {"recipe": path, **sizes, **depths, "layers": [layer.as_dict() for layer in target.layers]}
        )
        return
    _print_layers(target)
    if explain:
        explain_recipe(target)
    say(f"recipe  {path}")
    say(f"next    {shlex.join(['mupx', 'train', str(path), *o.allow_flags(target.experiment)])}")


def _found(source: str, pick: str | None, storage: str | None) -> tuple[Recipe, Path]:
    """Return the recipe of a study's chosen trial or of a file, and the place to write next to."""
    path = Path(source)
    if is_study(source):
        from mupx.search.choice import choose, recipe_from_study

        found = find_study(source, storage)
        choice = choose(found.study, found.experiment, pick or "best")
        name = "recipe.toml" if found.run_dir else f"{found.study.study_name}.toml"
        return recipe_from_study(found.study, choice, storage=found.storage), found.folder / name
    if path.is_dir():
        path /= "recipe.toml"
        if not path.exists():
            raise NotFoundError(
                f"neither a study nor a recipe in {source}; `mupx tune --run-dir {source}` makes both"
            )
    if pick is not None:
        raise UsageError(
            f"--pick {pick}: recipe {path} holds one choice already; give its run folder instead"
        )
    return recipes.read(path), path


def _deepened(recipe: Recipe, depth: int, data_dir: str | None) -> Recipe:
    """Return the recipe at another depth; what the model is given is read from ``data_dir``, if stated."""
    from mupx import parts

    here = recipe.experiment if data_dir is None else recipe.experiment.updated({"data.dir": data_dir})
    return parts.at_depth(recipe, depth, parts.load_data(here))


def _size(recipe: Recipe, depth: int | None) -> str:
    return f"-w{recipe.experiment.scaling.width}" + (f"-d{depth}" if depth is not None else "")


def _described(flags: Mapping[str, Any], items: list[str] | None) -> Recipe:
    """Return the recipe of values from anywhere; the model is built to describe it."""
    stated = {name: flags[name] for name in DESCRIBING}
    width, shapes = flags["base_width"], None
    provenance: dict[str, Any] = {"origin": "values given on the command line"}
    if flags["base_shapes"] is not None:
        if width is not None:
            raise UsageError("--base-shapes says the base width already; leave --base-width out")
        shapes = interop.read_base_shapes(flags["base_shapes"])
        stated["base_width"] = width = interop.likely_width(shapes)
        provenance["base_shapes"] = flags["base_shapes"].name
    experiment = o.fixed_experiment(o.sources(None, items, {**stated, "width": width}))
    _refuse_missing(stated, experiment)

    from mupx import parts
    from mupx.parametrization import resolved

    experiment = resolved(experiment)
    data = parts.load_data(experiment)
    parameters = parts.describe(experiment, data)
    if shapes is not None:
        found = interop.base_width_of(shapes, parameters, width)
        if found != width:
            experiment = experiment.updated({"scaling.base_width": found, "scaling.width": found})
            parameters = parts.describe(experiment, data)
    if sources := experiment.sources():
        provenance["source"] = sources
    return Recipe(experiment, parameters, provenance)


def _refuse_missing(stated: Mapping[str, Any], experiment: Experiment) -> None:
    needed = ["base_width", "lr", *(["damping"] if experiment.optimizer.scaling_rule.damping else [])]
    missing = [f"--{name.replace('_', '-')}" for name in needed if stated[name] is None]
    if missing:
        raise UsageError(
            f"give a SOURCE (run folder, STORAGE#STUDY or recipe) or the tuned values: {', '.join(missing)}"
        )


def _refuse_description(flags: Mapping[str, Any], items: list[str] | None, depth: int | None) -> None:
    # Another depth builds the model, for which the data may be in another place than where it was tuned.
    refused = [name for name in DESCRIBING if depth is None or name != "data_dir"]
    given = [f"--{name.replace('_', '-')}" for name in refused if flags[name] is not None]
    if given or items:
        raise UsageError(
            f"{', '.join(given or ['--set'])}: the source says that already; leave it out, or SOURCE"
        )


def _same(path: Path, source: Path) -> bool:
    return path.exists() and source.exists() and path.samefile(source)


def _stem(path: Path) -> str:
    return re.sub(r"-w\d+(-d\d+)?$", "", path.stem)


def _print_layers(recipe: Recipe) -> None:
    """Print the layer table without the columns that say nothing, which are named in a line instead."""
    layers, scaling = recipe.layers, recipe.experiment.scaling
    mode = recipe.experiment.optimizer.weight_decay_mode
    optimizers = {layer.optimizer for layer in layers}
    texts = ["name", "role", *(["optimizer"] if len(optimizers) > 1 else []), "shape"]
    numbers = [name for name in NUMBERS if any(getattr(layer, name) for layer in layers)]
    hyper = parameters({"lr": recipe.experiment.hyperparameters.lr, **_tuned(recipe)})
    deep = recipe.experiment.depth
    depth = f", depth {deep.depth} from {deep.base}" if deep.ratio != 1.0 else ""
    print_table(
        f"{recipe.experiment.model.name} with {recipe.experiment.optimizer.name}, width {scaling.width} from "
        f"{scaling.base_width}{depth} ({scaling.parametrization}); base {hyper}",
        [*texts, *numbers, *([DECAY] if "weight_decay" in numbers else [])],
        [
            [
                *(_text(layer, name) for name in texts),
                *(number(getattr(layer, name)) for name in numbers),
                *([number(decay_per_step(layer, mode))] if "weight_decay" in numbers else []),
            ]
            for layer in layers
        ],
        left=len(texts),
    )
    if "weight_decay" in numbers:
        over = number(decay_factor(recipe.experiment))
        say(f"{DECAY}   what a step takes off a weight at full lr ({mode} weight decay, × {over} for width)")
    absent = [name for name in NUMBERS if name not in numbers]
    if absent:
        say(f"zero or not used: {', '.join(absent)}")


def _tuned(recipe: Recipe) -> dict[str, float]:
    hyper = recipe.experiment.hyperparameters
    return {"damping": hyper.damping} if recipe.experiment.optimizer.scaling_rule.damping else {}


def _text(layer: Layer, name: str) -> str:
    value = getattr(layer, name)
    return "×".join(map(str, value)) if name == "shape" else str(value)
