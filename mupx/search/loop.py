"""The search as a whole: from an experiment to a study, its workers, and what they found."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.pruners import NopPruner
from optuna.trial import FrozenTrial, TrialState

from mupx.config import Experiment
from mupx.errors import NotFoundError, StorageError, UsageError
from mupx.leases import LEASE, Leases, alive
from mupx.locks import LOCK, refuse_held
from mupx.search import choice, confirmation, devices, preparing, sampling, slots
from mupx.search.choice import Choice, Edge
from mupx.search.objective import Evaluation, Foreign
from mupx.search.pool import Pool, command
from mupx.search.trials import TrialInfo
from mupx.search.worker import Progress, Search, Stepped
from mupx.sections import Hyperparameters
from mupx.storage import patiently, redact, require_shared, storage_errors
from mupx.study import default_url, finished, locate, note, noted_name, open_study, unused_name

if TYPE_CHECKING:
    from optuna import Study

    from mupx.datasets.base import Dataset

LOGS = "workers"  # in the run folder: what each worker of this machine said


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        run_dir: Run folder.
        study: Name of the study.
        storage: Its URL, without password.
        best: The trial with the lowest objective.
        robust: The most central trial of those as good as the best.
        counts: Trials by outcome; ``total`` is those that count, ``failed`` is not part of it.
        edges: Ranges at whose end the best trial lies.
        recipe: The file with the best trial's values; None for a foreign objective.
    """

    run_dir: Path
    study: str
    storage: str
    best: Choice
    robust: Choice
    counts: dict[str, int]
    edges: list[Edge]
    recipe: Path | None


@dataclass(frozen=True)
class Made:
    """A study that workers may join.

    Attributes:
        run_dir: Run folder.
        study: Name of the study.
        url: Its storage, with the password.
        experiment: What it searches.
        complete: Whether all of its trials have finished.
    """

    run_dir: Path
    study: str
    url: str
    experiment: Experiment
    complete: bool


@dataclass(frozen=True)
class _Task:
    """What is to be searched, and where."""

    experiment: Experiment
    run_dir: Path
    url: str
    name: str
    identity: Mapping[str, Any]
    data: Dataset | None = None
    foreign: Foreign | None = None


def tune(
    experiment: Experiment,
    *,
    run_dir: Path,
    fresh: bool = False,
    data: Dataset | None = None,
    progress: Progress | None = None,
    objective: Callable[[Hyperparameters], float] | None = None,
    untrained: float | None = None,
    confirmed: confirmation.Progress | None = None,
    stepped: Stepped | None = None,
    remark: Callable[[str], None] | None = None,
) -> SearchResult:
    """Search the hyperparameters on the proxy until ``search.trials`` trials have finished.

    The same call continues a search that was stopped, and returns at once when it is complete.

    Args:
        experiment: What to tune; an empty ``search.space`` takes the optimizer's default ranges.
        run_dir: Folder of the study and the recipe.
        fresh: Move an existing run folder aside (``run_dir.old-1``, …) and start anew.
        data: The loaded data set; by default that of the experiment is loaded, once per worker.
        progress: Called after each trial.
        objective: Somebody else's training loop, hyperparameters → loss; not finite when it diverged.
        untrained: With ``objective``: the loss of an untrained model, told for diverged trials.
        confirmed: Called after each run on a fresh seed (``search.confirm``).
        stepped: Called when the trials that are running in this process have come to another report.
        remark: Called with a sentence where ``search.population`` cannot be trained in lock-step.

    Raises:
        MismatchError: The study in the folder was made with another space or proxy.
        NoResultError: Every trial diverged.
        UsageError: The objective raised the same exception three times in a row.
        StorageError: The storage does not work, or another process is running this study.
    """
    if objective is not None and experiment.search.confirm:
        raise UsageError(
            "search.confirm runs the best trials on other seeds, which an objective of your own does not "
            "take; leave it out and average inside the objective"
        )
    task = _task(experiment, run_dir, fresh, data, objective, untrained)
    workers = _workers(task)
    with storage_errors(task.url):
        study = _existing(task)
        if study is None or not _complete(study, task.experiment):
            study, evaluation = _make(task)
            _refuse_double(study)
            if workers > 1:
                _search_together(task, study, workers, progress)
            else:
                batch = preparing.side_by_side(task.experiment, evaluation, remark)
                leases = Leases(study, task.experiment.search.grace)
                Search(study, task.experiment, evaluation, task.url, leases, batch, progress, stepped).run()
                remark = None  # it has been said
        if experiment.search.confirm:
            _confirm(study, task.experiment, data, confirmed, remark)
        return _result(study, task.experiment, task.run_dir, task.url)


def make(experiment: Experiment, *, run_dir: Path, fresh: bool = False) -> Made:
    """Make the study that :func:`tune` would search in, and run nothing: its workers are elsewhere.

    Raises:
        UsageError: The storage serves one process only.
        MismatchError: The study in the folder was made with another space or proxy.
        StorageError: The storage does not work.
    """
    task = _task(experiment, run_dir, fresh)
    require_shared(task.url)
    with storage_errors(task.url):
        study = _existing(task)
        done = study is not None and _complete(study, task.experiment)
        if not done:
            _make(task)
    return Made(task.run_dir, task.name, task.url, task.experiment, done)


def _task(
    experiment: Experiment,
    run_dir: Path,
    fresh: bool,
    data: Dataset | None = None,
    objective: Callable[[Hyperparameters], float] | None = None,
    untrained: float | None = None,
) -> _Task:
    from mupx.parametrization import resolved  # torch; the rest of this package does without

    run_dir = Path(run_dir)
    experiment = with_space(resolved(experiment))
    if fresh:
        set_aside(run_dir)
    noted = noted_name(run_dir)
    url = experiment.search.storage or (locate(run_dir)[0] if noted else default_url(run_dir))
    name = noted or (unused_name(url, run_dir.name) if fresh else run_dir.absolute().name)
    foreign = Foreign(objective, untrained) if objective else None
    return _Task(experiment, run_dir, url, name, _identity(experiment, objective), data, foreign)


def _workers(task: _Task) -> int:
    """Return how many processes search on this machine.

    Raises:
        UsageError: Several are asked for, and they cannot have what only this process has.
    """
    stated, own = task.experiment.search.workers, [*task.experiment.own_code.values()]
    here = task.foreign is not None or task.data is not None or any(n.startswith("python:") for n in own)
    if stated is None:
        device = task.experiment.train.device
        return 1 if here else devices.default_workers(device, devices.gpus())
    if stated == 0:
        raise UsageError("search.workers is 0, so nobody searches; leave it out, or give 1 or more")
    if stated > 1 and here:
        raise UsageError(
            f"{stated} workers are processes of their own, which cannot have an object of this one; give "
            "model, data, loss and optimizer by name or as file.py:attribute, or leave search.workers out"
        )
    if stated > 1:
        require_shared(task.url)
    return stated


def with_space(experiment: Experiment) -> Experiment:
    """Return the experiment with the optimizer's default ranges when it has none of its own."""
    if experiment.search.space:
        return experiment
    space = sampling.space_of(experiment)
    if not space:
        name = experiment.optimizer.scaling_rule.name
        raise UsageError(f"the rule {name} has no default ranges; give one to search, such as --lr 1e-3:1")
    return experiment.updated({"search.space": {k: v.model_dump() for k, v in space.items()}})


def set_aside(run_dir: Path) -> Path | None:
    """Rename a run folder to the first free ``<name>.old-N`` and return where it went."""
    if not run_dir.exists() or (run_dir.is_dir() and {p.name for p in run_dir.iterdir()} <= {LOCK}):
        return None
    refuse_held(run_dir)
    number = 1
    while (target := run_dir.with_name(f"{run_dir.name}.old-{number}")).exists():
        number += 1
    try:
        return run_dir.rename(target)
    except OSError as error:
        raise StorageError(f"cannot move {run_dir} to {target}: {error.strerror}") from None


def _identity(experiment: Experiment, objective: Callable[..., Any] | None) -> dict[str, Any]:
    identity = experiment.identity(search=True)
    if objective is not None:
        name = getattr(objective, "__qualname__", type(objective).__qualname__)
        identity["objective"] = f"{objective.__module__}:{name}"
    return identity


def _existing(task: _Task) -> Study | None:
    try:
        return open_study(task.url, task.name, create=False, identity=task.identity)
    except NotFoundError:
        return None


def _complete(study: Study, experiment: Experiment) -> bool:
    return _ledger(study, experiment).complete


def _ledger(study: Study, experiment: Experiment) -> slots.Ledger:
    return slots.Ledger(experiment.search.trials, study.get_trials(deepcopy=False))


def _make(task: _Task) -> tuple[Study, Evaluation]:
    """Create or reopen the study, and return it with what judges its trials.

    The evaluation is prepared first: a wrong data or model name leaves no empty study behind.
    """
    sampling.require_sampler(task.experiment.search.sampler)
    evaluation, facts, pruner = (
        (task.foreign, {}, NopPruner()) if task.foreign else preparing.proxy(task.experiment, task.data)
    )
    note(task.run_dir, task.url, task.name)
    study = open_study(task.url, task.name, create=True, identity=task.identity)
    preparing.describe(study, task.experiment, facts)
    study.pruner = pruner
    return study, evaluation


def _refuse_double(study: Study) -> None:
    """Refuse a second search by mistake; workers may come and go."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        lease = trial.user_attrs.get(LEASE, {})
        if lease.get("kind") == "tune" and alive(lease) and lease["pid"] != os.getpid():
            raise StorageError(
                f"trial {trial.number} of study {study.study_name!r} is being run by another process on this "
                "machine; wait for it or stop it, then run the same command again"
            )


def _search_together(task: _Task, study: Study, workers: int, progress: Progress | None) -> None:
    """Let processes of their own search, and say what they find."""
    experiment, gpus = task.experiment, devices.gpus()
    workers = min(workers, max(_ledger(study, experiment).left, 1))
    threads = devices.threads_each(workers, experiment.train.threads, devices.cores())
    allowed = list(dict.fromkeys(experiment.own_code.values()))
    commands = [
        command(task.name, device, threads, experiment.search.population, allowed)
        for device in devices.assigned(workers, experiment.train.device, gpus)
    ]
    seen = {trial.number for trial in finished(study)}

    def look() -> None:
        done = patiently(lambda: finished(study), task.url, experiment.search.patience)
        for trial in done:
            if trial.number not in seen and progress is not None:
                seen.add(trial.number)
                values = [t.value for t in done if t.value is not None and _useful(t)]
                progress(len(seen), experiment.search.trials, min(values, default=None), _info(trial))

    environment = {"MUPX_SEARCH__STORAGE": task.url, "OMP_NUM_THREADS": str(threads)}
    with Pool(commands, task.run_dir / LOGS, environment) as pool:
        pool.watch(look)


def _useful(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.COMPLETE and not choice.diverged(trial)


def _info(trial: FrozenTrial) -> TrialInfo:
    attrs = trial.user_attrs
    outcome, seconds = attrs.get("outcome", "finished"), attrs.get("seconds", 0.0)
    return TrialInfo(trial.number, outcome, trial.value, trial.params, seconds)


def _confirm(
    study: Study,
    experiment: Experiment,
    data: Dataset | None,
    progress: confirmation.Progress | None,
    remark: Callable[[str], None] | None,
) -> None:
    leaders = choice.usable(study)[: experiment.search.confirm]
    if confirmation.missing(study, leaders):
        proxy, *_ = preparing.proxy(experiment, data)
        batch = preparing.side_by_side(experiment, proxy, remark)
        population = 1 if batch is None else experiment.search.population
        confirmation.confirm(study, leaders, proxy, progress, population)


def _result(study: Study, experiment: Experiment, run_dir: Path, url: str) -> SearchResult:
    best = choice.choose(study, experiment, "best")
    recipe = None
    if "parameters" in study.user_attrs:
        recipe = run_dir / "recipe.toml"
        choice.recipe_from_study(study, best, storage=redact(url)).write(recipe)
    return SearchResult(
        run_dir=run_dir,
        study=study.study_name,
        storage=redact(url),
        best=best,
        robust=choice.choose(study, experiment, "robust"),
        counts=counts(study),
        edges=choice.edges(best, experiment.search.space),
        recipe=recipe,
    )


def counts(study: Study) -> dict[str, int]:
    """Count a study's trials by outcome."""
    done = finished(study)
    diverged = sum(map(choice.diverged, done))
    pruned = sum(t.state == TrialState.PRUNED for t in done)
    failed = len(study.get_trials(deepcopy=False, states=(TrialState.FAIL,)))
    return {
        "finished": len(done) - diverged - pruned,
        "pruned": pruned,
        "diverged": diverged,
        "failed": failed,
        "total": len(done),
    }
