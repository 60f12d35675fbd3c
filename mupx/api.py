"""The verbs in Python: ``tune``, ``transfer``, ``train``, ``verify`` and ``advise`` of what is at hand.

Each takes an :class:`~mupx.config.Experiment`, or a model factory ``build(width)`` (a callable, or a name as
on the command line) with the rest as keywords: ``optimizer``, ``loss``, ``base_width``, and every key of
the configuration by its own name, ``lr=0.1`` or ``lr=(1e-3, 1)`` (a range), ``batch_size=64``; two keys of
one name need their section, ``train__accumulate=2``. Data are names, loaders, or the arrays themselves.

What is handed over as an object has a name that only this process knows, ``python:module.name``: a recipe
that was tuned with it says so, and ``mupx train`` cannot run it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from mupx import recipe as recipes
from mupx.config import Experiment, parse
from mupx.dotted import merge
from mupx.errors import UsageError, unknown_name
from mupx.locks import held
from mupx.recipe import Recipe
from mupx.sections import Hyperparameters, Range
from mupx.usercode import hand_over, is_loaded

if TYPE_CHECKING:
    from mupx.advice.result import Advice
    from mupx.checks.result import Report
    from mupx.datasets.base import Dataset
    from mupx.run_folder import Result
    from mupx.search.loop import SearchResult

SECTIONS = ("hyperparameters", "train", "optimizer", "scaling", "search")
ARGUMENTS = {"model_args": "model.args", "data_args": "data.args", "optimizer_args": "optimizer.args"}
NAMED = {"optimizer": "optimizer.name", "loss": "train.loss"}
DEPTHS = {"depth": "depth.depth", "base_depth": "depth.base"}
Model = Experiment | Callable[..., Any] | str
Values = Mapping[str, Any]


def tune(
    what: Model | None = None,
    *,
    data: Any = None,
    run_dir: Path | str | None = None,
    fresh: bool = False,
    objective: Callable[[Hyperparameters], float] | None = None,
    untrained: float | None = None,
    progress: Any = None,
    confirmed: Any = None,
    stepped: Any = None,
    **settings: Any,
) -> SearchResult:
    """Search the hyperparameters on the proxy; see :func:`mupx.search.loop.tune`.

    ``mupx.tune(build, data=(train, validation), optimizer="kfac", base_width=64, lr=(1e-3, 1))``, or with a
    training loop of your own ``mupx.tune(objective=loss_of, space={"lr": (1e-3, 1)})``.

    Args:
        what: The experiment or the model; nothing with an ``objective``.
        data: A name, a loader, a :class:`~mupx.datasets.base.Dataset`, or splits: (train, validation) or
            (train, validation, test), each (inputs, targets) or a torch data set or loader.
        run_dir: Folder of the study and the recipe; ``runs/<model>-<data>-…`` when left out.
        fresh: Move an existing run folder aside.
        objective: Hyperparameters → loss; not finite when it diverged.
        untrained: With ``objective``: the loss of an untrained model.
        progress: Called after each trial.
        confirmed: Called after each run on a fresh seed.
        stepped: Called when the trials that are running in this process have come to another report.
        **settings: See the module's docstring; ``space`` is name → (low, high).

    Raises:
        UsageError: Nothing to tune, an unknown setting, or what the user's code raised.
    """
    from mupx.search import loop

    if what is None and objective is None:
        raise UsageError("nothing to tune: give an experiment, a model factory build(width), or an objective")
    experiment, loaded = _understood(Experiment() if what is None else what, data, settings)
    if objective is None and not isinstance(what, Experiment) and "space" not in settings:
        experiment = _with_defaults(experiment, settings)
    folder = Path(run_dir) if run_dir is not None else Path("runs") / experiment.run_name
    if fresh:
        loop.set_aside(folder)
    with held(folder, "tune"):
        return loop.tune(
            experiment,
            run_dir=folder,
            fresh=fresh,
            data=loaded,
            objective=objective,
            untrained=untrained,
            progress=progress,
            confirmed=confirmed,
            stepped=stepped,
        )


def transfer(
    what: Recipe | Path | SearchResult | Model,
    width: int | None = None,
    *,
    depth: int | None = None,
    data: Any = None,
    allow_code: Sequence[str] = (),
    **settings: Any,
) -> Recipe:
    """Return the same hyperparameters for a model of ``width`` and ``depth``.

    Args:
        what: A recipe, its file or the result of :func:`tune`; or a model, with the tuned values as keywords.
        width: Target width; that of the recipe when left out.
        depth: Target depth, in residual blocks; to see what it repeats, the model is built.
        data: As for :func:`tune`; with a model or a depth, whose inputs must be known.
        allow_code: References that a recipe names and that may be imported, for a depth.
        **settings: With a model: ``base_width``, ``base_depth``, ``optimizer``, ``lr``, … where they were
            tuned.

    Raises:
        UsageError: Neither width nor depth is given, or one is no positive whole number.
        MismatchError: The model has no whole shape at that width, or its depth does not transfer.
    """
    if width is None and depth is None:
        raise UsageError("give the target's width, its depth, or both: mupx.transfer(recipe, width=1024)")
    found = getattr(what, "recipe", what)
    if not isinstance(found, (Recipe, Path)):
        recipe = _described(what, depth, data, settings)  # type: ignore[arg-type]
    elif depth is None:
        recipe = found if isinstance(found, Recipe) else recipes.read(found)
    else:
        from mupx import parts

        recipe, experiment = _allowed(found, allow_code)
        experiment, loaded = _understood(experiment, data, {})
        recipe = parts.at_depth(recipe, depth, parts.load_data(experiment) if loaded is None else loaded)
    return recipe if width is None else recipe.transfer(width)


def _described(what: Model, depth: int | None, data: Any, settings: Values) -> Recipe:
    """Return the recipe of a model at its base width with the values given."""
    from mupx import parts
    from mupx.parametrization import resolved

    experiment, loaded = _understood(what, data, settings)
    experiment = resolved(experiment)
    loaded = parts.load_data(experiment) if loaded is None else loaded
    recipe = Recipe(experiment, parts.describe(experiment, loaded), {"origin": "values given in Python"})
    return recipe if depth is None else parts.at_depth(recipe, depth, loaded)


def train(
    what: Recipe | Path | Model,
    *,
    data: Any = None,
    run_dir: Path | str | None = None,
    allow_code: Sequence[str] = (),
    **more: Any,
) -> Result:
    """Train once and say how it ended; see :func:`mupx.training.train`.

    Args:
        what: An experiment, a recipe or its file, or a model with ``width``, ``base_width`` and the values.
        data: As for :func:`tune`; needed again for a recipe that was tuned on data handed over.
        run_dir: Folder that keeps the run.
        allow_code: References that a recipe names and that may be imported.
        **more: ``recipe``, ``report``, ``reports``, ``evaluate_test``, ``progress``, ``ranks`` and ``fsdp``
            of :func:`mupx.training.train`; the rest are settings.
    """
    from mupx import training

    names = ("recipe", "report", "reports", "evaluate_test", "progress", "ranks", "fsdp")
    options = {key: more.pop(key) for key in names if key in more}
    if isinstance(what, (Recipe, Path)):
        options["recipe"], what = _allowed(what, allow_code)
    experiment, loaded = _understood(what, data, more)
    folder = None if run_dir is None else Path(run_dir)
    with _held(folder, "train"):
        return training.train(experiment, data=loaded, run_dir=folder, **options)


def verify(
    what: Recipe | Path | Model,
    *,
    data: Any = None,
    run_dir: Path | str | None = None,
    allow_code: Sequence[str] = (),
    **more: Any,
) -> Report:
    """Measure whether hyperparameters transfer over width; see :func:`mupx.checks.runner.verify`.

    Args:
        what: An experiment, a recipe or its file, or a model with ``base_width`` and the values.
        data: As for :func:`tune`.
        run_dir: Folder that keeps every measurement.
        allow_code: References that a recipe names and that may be imported.
        **more: ``widths``, ``seeds``, ``quick``, … of :func:`mupx.checks.runner.verify`; ``steps`` are those
            at which the coordinate check reads. The rest are settings.
    """
    from mupx.checks import runner

    names = ("widths", "seeds", "steps", "quick", "sweeps", "beside_sp", "provenance", "progress")
    options = {key: more.pop(key) for key in names if key in more}
    if isinstance(what, (Recipe, Path)):
        recipe, what = _allowed(what, allow_code)
        options.setdefault("provenance", recipe.provenance)
    experiment, loaded = _understood(what, data, more)
    folder = None if run_dir is None else Path(run_dir)
    with _held(folder, "verify"):
        return runner.verify(experiment, data=loaded, run_dir=folder, **options)


def advise(
    what: Recipe | Path | Model,
    *,
    data: Any = None,
    allow_code: Sequence[str] = (),
    **more: Any,
) -> Advice:
    """Say what to know before a run; see :func:`mupx.advice.advising.advise`. Nothing is trained.

    Args:
        what: A recipe or its file, an experiment, or a model, at the width of the target.
        data: As for :func:`tune`; not needed where ``examples``, ``input_shape`` and ``classes`` are given.
        allow_code: References that a recipe names and that may be imported.
        **more: ``examples``, ``input_shape``, ``classes``, ``rates`` and ``measure`` of
            :func:`mupx.advice.advising.advise`; the rest are settings.
    """
    from mupx.advice import advising

    names = ("examples", "input_shape", "classes", "rates", "measure")
    options = {key: more.pop(key) for key in names if key in more}
    if isinstance(what, (Recipe, Path)):
        recipe, what = _allowed(what, allow_code)
        options |= {"tuned": recipe.experiment, "parameters": recipe.parameters}
    experiment, loaded = _understood(what, data, more)
    return advising.advise(experiment, data=loaded, **options)


def _held(folder: Path | None, what: str) -> AbstractContextManager[None]:
    return nullcontext() if folder is None else held(folder, what)


def _allowed(what: Recipe | Path, allow_code: Sequence[str]) -> tuple[Recipe, Experiment]:
    """Return a recipe and its experiment, unless it names code that nobody asked for in this process."""
    recipe = what if isinstance(what, Recipe) else recipes.read(what)
    names = recipe.experiment.own_code.values()
    refused = sorted({n for n in names if n not in allow_code and not is_loaded(n)} - _here(names))
    if refused:
        raise UsageError(
            f"the recipe names code that would be imported and run ({', '.join(refused)}); a recipe may come "
            f"from elsewhere, so read that code, then give allow_code={refused}"
        )
    return recipe, recipe.experiment


def _here(names: Iterable[str]) -> set[str]:
    return {name for name in names if name.startswith("python:")}


def _understood(what: Model, data: Any, settings: Values) -> tuple[Experiment, Dataset | None]:
    """Return the experiment of a model and its settings, and the data where they are at hand."""
    changes: dict[str, Any] = {}
    loaded = None
    if isinstance(data, str):
        changes["data.name"] = data
    elif callable(data):
        changes["data.name"] = hand_over(data)
    elif data is not None:
        loaded = _given_data(data, keep=isinstance(what, Experiment))
        if not isinstance(what, Experiment) or loaded is not data:
            changes["data.name"] = loaded.name
    for name, value in settings.items():
        changes |= _setting(name, value)
    if isinstance(what, Experiment):
        experiment = what.updated(changes) if changes else what
    else:
        name = what if isinstance(what, str) else hand_over(what)
        widths = {key: settings[key] for key in ("width", "base_width") if settings.get(key)}
        for key, other in (("width", "base_width"), ("base_width", "width")):
            if key not in widths and other in widths:
                changes[f"scaling.{key}"] = widths[other]
        experiment = parse(merge({}, {"model.name": name, **changes}))
    if loaded is not None:
        from mupx.parts import require_targets

        require_targets(loaded, experiment.train.loss)
    return experiment, loaded


def _given_data(data: Any, keep: bool) -> Dataset:
    from mupx.datasets.base import Dataset
    from mupx.datasets.given import dataset_from

    if keep and isinstance(data, Dataset):
        return data  # the experiment names it
    checked = dataset_from("given in Python", data)
    return replace(checked, name=f"python:data_{checked.checksum[:8]}")


def _setting(name: str, value: Any) -> dict[str, Any]:
    """Return the dotted keys of one keyword."""
    if name in NAMED:
        return {NAMED[name]: value if isinstance(value, str) else hand_over(value)}
    if name in ARGUMENTS:
        return {ARGUMENTS[name]: dict(value)}
    if name == "space":
        return {f"search.space.{key}": _range(interval) for key, interval in value.items()}
    if name == "seed":
        return {"train.seed": value, "search.seed": value}
    if name == "roles":
        return {"roles": dict(value)}
    if name in DEPTHS:
        return {DEPTHS[name]: value}
    if "__" in name:
        return {name.replace("__", "."): value}
    places = [section for section in SECTIONS if name in _fields(section)]
    if not places:
        known = [
            *NAMED,
            *ARGUMENTS,
            *DEPTHS,
            "space",
            "seed",
            "roles",
            *(f for s in SECTIONS for f in _fields(s)),
        ]
        raise unknown_name("setting", name, set(known))
    if len(places) > 1:
        raise UsageError(f"{name} is a key of {' and '.join(places)}; say {places[0]}__{name}")
    if places == ["hyperparameters"] and isinstance(value, (tuple, list, Range)):
        return {f"search.space.{name}": _range(value)}
    return {f"{places[0]}.{name}": value}


def _fields(section: str) -> Iterable[str]:
    annotation = Experiment.model_fields[section].annotation
    assert isinstance(annotation, type)
    assert issubclass(annotation, BaseModel)
    return annotation.model_fields


def _range(interval: Any) -> dict[str, Any]:
    if isinstance(interval, Range):
        return interval.model_dump()
    if isinstance(interval, Mapping):
        return dict(interval)
    try:
        low, high = map(float, interval)
    except (TypeError, ValueError):
        raise UsageError(
            f"a range is (low, high), got {interval!r}; a fixed value is a plain number"
        ) from None
    return {"low": low, "high": high, "log": low > 0}


def _with_defaults(experiment: Experiment, settings: Values) -> Experiment:
    """Add the optimizer's default ranges of what has neither a value nor a range of its own."""
    from mupx.parametrization import resolved
    from mupx.search.sampling import space_of

    experiment = resolved(experiment)
    default = {name: interval.model_dump() for name, interval in space_of(experiment).items()}
    missing = {f"search.space.{name}": range_ for name, range_ in default.items() if name not in settings}
    return experiment.updated(missing) if missing else experiment
