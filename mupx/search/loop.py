"""The search itself: ask, evaluate, tell, until enough trials have finished."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.pruners import BasePruner, NopPruner
from optuna.trial import TrialState

from mupx.config import Experiment, Hyperparameters, refuse_difference
from mupx.errors import (
    MupxError,
    NoResultError,
    NotFoundError,
    StorageError,
    UsageError,
    UserCodeError,
    out_of_memory,
)
from mupx.search import choice, confirmation, sampling
from mupx.search.choice import Choice, Edge
from mupx.search.objective import Evaluation, Foreign, Outcome, Proxy, told_value, without_test
from mupx.study import (
    default_url,
    finished,
    hold,
    note,
    noted_name,
    open_study,
    reap,
    redact,
    storage_errors,
    unused_name,
)

if TYPE_CHECKING:
    from optuna import Study, Trial

    from mupx.datasets.base import Dataset

RENEW = 30.0  # seconds between two renewals of a lease; far below its hour
SAME_ERRORS = 3  # equal exceptions in a row that stop a search


@dataclass(frozen=True)
class TrialInfo:
    """The trial that has just ended; ``value`` is None when it raised."""

    number: int
    outcome: str
    value: float | None
    params: dict[str, float]
    seconds: float


Progress = Callable[[int, int, float | None, TrialInfo], None]  # (finished, wanted, best value, last trial)


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
) -> SearchResult:
    """Search the hyperparameters on the proxy until ``search.trials`` trials have finished.

    The same call continues a search that was stopped, and returns at once when it is complete.

    Args:
        experiment: What to tune; an empty ``search.space`` takes the optimizer's default ranges.
        run_dir: Folder of the study and the recipe.
        fresh: Move an existing run folder aside (``run_dir.old-1``, …) and start anew.
        data: The loaded data set; by default that of the experiment is loaded, once.
        progress: Called after each trial.
        objective: Somebody else's training loop, hyperparameters → loss; not finite when it diverged.
        untrained: With ``objective``: the loss of an untrained model, told for diverged trials.
        confirmed: Called after each run on a fresh seed (``search.confirm``).

    Raises:
        MismatchError: The study in the folder was made with another space or proxy.
        NoResultError: Every trial diverged.
        UsageError: The objective raised the same exception three times in a row.
        StorageError: The storage does not work, or another process is running this study.
    """
    from mupx.parametrization import resolved  # torch; the rest of this package does without

    if objective is not None and experiment.search.confirm:
        raise UsageError(
            "search.confirm runs the best trials on other seeds, which an objective of your own does not "
            "take; leave it out and average inside the objective"
        )
    run_dir = Path(run_dir)
    experiment = with_space(resolved(experiment))
    if fresh:
        set_aside(run_dir)
    url = experiment.search.storage or default_url(run_dir)
    name = noted_name(run_dir) or (unused_name(url, run_dir.name) if fresh else run_dir.absolute().name)
    identity = _identity(experiment, objective)
    with storage_errors(url):
        study = _existing(url, name, identity)
        if study is None or len(finished(study)) < experiment.search.trials:
            foreign = Foreign(objective, untrained) if objective else None
            study = _continue(experiment, data, foreign, url, name, identity, run_dir, progress)
        if experiment.search.confirm:
            _confirm(study, experiment, data, confirmed)
        return _result(study, experiment, run_dir, url)


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
    if not run_dir.exists():
        return None
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


def _existing(url: str, name: str, identity: Mapping[str, Any]) -> Study | None:
    try:
        return open_study(url, name, create=False, identity=identity)
    except NotFoundError:
        return None


def _continue(
    experiment: Experiment,
    data: Dataset | None,
    foreign: Foreign | None,
    url: str,
    name: str,
    identity: Mapping[str, Any],
    run_dir: Path,
    progress: Progress | None,
) -> Study:
    """Create or reopen the study and run the missing trials.

    The evaluation is prepared first: a wrong data or model name leaves no empty study behind.
    """
    sampling.require_sampler(experiment.search.sampler)
    evaluation, facts, pruner = (foreign, {}, NopPruner()) if foreign else _proxy(experiment, data)
    note(run_dir, url, name)
    study = open_study(url, name, create=True, identity=identity)
    _describe(study, experiment, facts)
    study.pruner = pruner
    busy = reap(study)
    if busy:
        raise StorageError(
            f"trial {busy[0]} of study {name!r} is being run by another process on this machine; "
            "wait for it or stop it, then run the same command again"
        )
    Search(study, experiment, evaluation, url).run(progress)
    return study


def _proxy(experiment: Experiment, data: Dataset | None) -> tuple[Evaluation, dict[str, Any], BasePruner]:
    """Return the evaluation by training, what the study must remember about it, and the pruner."""
    from mupx import parts, training

    data = parts.load_data(experiment) if data is None else data
    parameters = parts.describe(experiment, data)
    total = training.total_steps(experiment, len(data.train))
    facts = {"parameters": [asdict(p) for p in parameters], "data_checksum": data.checksum}
    evaluation = Proxy(experiment, without_test(data), parameters, min(sampling.REPORTS, total))
    return evaluation, facts, sampling.pruner(experiment.search.pruner, total)


def _confirm(
    study: Study, experiment: Experiment, data: Dataset | None, progress: confirmation.Progress | None
) -> None:
    leaders = choice.usable(study)[: experiment.search.confirm]
    if confirmation.missing(study, leaders):
        proxy, *_ = _proxy(experiment, data)
        assert isinstance(proxy, Proxy)
        confirmation.confirm(study, leaders, proxy, progress)


def _describe(study: Study, experiment: Experiment, facts: Mapping[str, Any]) -> None:
    """Keep in the study what a recipe needs, so that making one needs neither data nor torch."""
    stored = study.user_attrs
    if "data_checksum" in stored and "data_checksum" in facts:
        refuse_difference(
            f"study {study.study_name!r}",
            {"data.checksum": stored["data_checksum"]},
            {"data.checksum": facts["data_checksum"]},
            "restore the data, or give --fresh to start anew",
        )
    document = experiment.model_dump(mode="json")
    if experiment.search.storage is not None:
        document["search"]["storage"] = redact(experiment.search.storage)
    versions = {package: _version(package) for package in ("mupx", "torch", "optuna")}
    defaults = {**facts, "versions": versions, "mupx": versions["mupx"]}
    for key, value in {
        **{k: v for k, v in defaults.items() if k not in stored},
        "experiment": document,
    }.items():
        if stored.get(key) != value:
            study.set_user_attr(key, value)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


class _Reporter:
    """Hands a value on the way to Optuna, renews the lease, and says whether to stop."""

    def __init__(self, trial: Trial, url: str) -> None:
        self.trial, self.url = trial, url
        self.renewed = time.monotonic()

    def __call__(self, step: int, total: int, value: float) -> bool:
        if not math.isfinite(value):
            return False  # training notices divergence itself; the storage sees finite numbers only
        with storage_errors(self.url):
            self.trial.report(value, step)
            self._renew()
            # The pruner reads every trial from the storage, only to say no before a third of the way.
            return step >= sampling.earliest_pruning(total) and self.trial.should_prune()

    def _renew(self) -> None:
        if time.monotonic() - self.renewed > RENEW:
            hold(self.trial)
            self.renewed = time.monotonic()


@dataclass(frozen=True)
class Search:
    """Asks, evaluates and tells one trial after the other.

    Args:
        study: Where trials are kept.
        experiment: Its ``search`` section says what to do, its hyperparameters are the fixed values.
        evaluation: Judges a set of hyperparameters.
        url: Storage, for error messages.
    """

    study: Study
    experiment: Experiment
    evaluation: Evaluation
    url: str

    def run(self, progress: Progress | None = None) -> None:
        """Run trials until ``search.trials`` have finished.

        Raises:
            UsageError: The same exception three times in a row, or more failures than trials wanted.
        """
        wanted = self.experiment.search.trials
        failures: list[Exception] = []
        streak = 0
        while len(finished(self.study)) < wanted:
            info, error = self._trial()
            if progress is not None:
                best = choice.usable(self.study)
                progress(len(finished(self.study)), wanted, best[0].value if best else None, info)
            streak = 0 if error is None else streak + 1
            if error is not None:
                failures.append(error)
                _stop_if_hopeless(failures, streak, wanted)

    def _trial(self) -> tuple[TrialInfo, Exception | None]:
        self._reseed()
        trial = self.study.ask()
        hold(trial)
        started = time.perf_counter()
        try:
            values = sampling.suggest(trial, self.experiment.search.space)
            base = self.experiment.hyperparameters.model_dump()
            outcome = self.evaluation(Hyperparameters(**{**base, **values}), _Reporter(trial, self.url))
            value = told_value(outcome, finished(self.study))
        except Exception as error:
            if isinstance(error, MupxError) and not isinstance(error, UserCodeError):
                self._abandon(trial, "interrupted")
                raise
            self._abandon(trial, "failed", error)
            seconds = time.perf_counter() - started
            return TrialInfo(trial.number, "failed", None, trial.params, seconds), error
        except BaseException:  # Ctrl-C, SIGTERM
            self._abandon(trial, "interrupted")
            raise
        seconds = time.perf_counter() - started
        self._tell(trial, outcome, value, seconds)
        return TrialInfo(trial.number, outcome.outcome, value, trial.params, seconds), None

    def _reseed(self) -> None:
        search = self.experiment.search
        failed = sum(t.user_attrs.get("outcome") == "failed" for t in self.study.get_trials(deepcopy=False))
        done = len(finished(self.study))
        self.study.sampler = sampling.sampler(search.sampler, search.space, search.seed, done, failed)

    def _tell(self, trial: Trial, outcome: Outcome, value: float, seconds: float) -> None:
        attributes = {**outcome.attributes, "outcome": outcome.outcome, "seconds": seconds}
        if outcome.untrained is not None and math.isfinite(outcome.untrained):
            attributes["untrained"] = outcome.untrained
        for key, item in attributes.items():
            trial.set_user_attr(key, item)
        if outcome.outcome == "pruned":
            self.study.tell(trial, state=TrialState.PRUNED)
        else:
            self.study.tell(trial, value)

    def _abandon(self, trial: Trial, outcome: str, error: Exception | None = None) -> None:
        # Where the storage itself is what failed, the trial stays RUNNING and is reaped later.
        with suppress(Exception):
            trial.set_user_attr("outcome", outcome)
            if error is not None:
                log = getattr(error, "details", "") or _text(error)
                trial.set_user_attr("error", redact(log)[-2000:])
            self.study.tell(trial, state=TrialState.FAIL)


def _text(error: Exception) -> str:
    return redact(f"{type(error).__name__}: {error}")


def _shape(error: Exception) -> str:
    # A message with the trial's own numbers in it is still the same message.
    return re.sub(r"[-+.\d]+(e[-+]?\d+)?", "#", _text(error))


def _stop_if_hopeless(failures: list[Exception], streak: int, wanted: int) -> None:
    last = failures[-SAME_ERRORS:]
    same = streak >= SAME_ERRORS and len({_shape(error) for error in last}) == 1
    if not same and len(failures) <= max(SAME_ERRORS, wanted):
        return
    count = "3 times in a row with the same error" if same else f"{len(failures)} times"
    message = f"a trial failed {count} ({_text(failures[-1])}); "
    if all(map(out_of_memory, last)):
        raise NoResultError(message + "use a smaller batch, width or model") from failures[-1]
    message += "correct the code that raised it and run the same command again"
    raise UserCodeError(message, getattr(failures[-1], "details", "")) from failures[-1]


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
