"""The search itself: ask, evaluate, tell, until enough trials have finished."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.pruners import BasePruner, NopPruner
from optuna.trial import TrialState

from mupx.config import Experiment, Hyperparameters, refuse_difference
from mupx.errors import (
    NoResultError,
    NotFoundError,
    StorageError,
    UsageError,
    UserCodeError,
    out_of_memory,
)
from mupx.search import choice, confirmation, sampling
from mupx.search.batch import BatchEvaluation, run_batch
from mupx.search.choice import Choice, Edge
from mupx.search.objective import (
    Evaluation,
    Foreign,
    Outcome,
    Proxy,
    stops_the_search,
    told_value,
    without_test,
)
from mupx.search.trials import Ended, Reporter, TrialInfo
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

SAME_ERRORS = 3  # equal exceptions in a row that stop a search


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
    remark: Callable[[str], None] | None = None,
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
        remark: Called with a sentence where ``search.population`` cannot be trained in lock-step.

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
            study = _continue(experiment, data, foreign, url, name, identity, run_dir, progress, remark)
            remark = None  # it has been said
        if experiment.search.confirm:
            _confirm(study, experiment, data, confirmed, remark)
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
    remark: Callable[[str], None] | None,
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
    batch = _batch(experiment, evaluation, remark)
    Search(study, experiment, evaluation, url, batch).run(progress)
    return study


def _batch(
    experiment: Experiment, evaluation: Evaluation, remark: Callable[[str], None] | None
) -> BatchEvaluation | None:
    """Return what judges a population, or None and say why it cannot be one."""
    if experiment.search.population == 1:
        return None
    reason = "an objective of your own takes one trial at a time"
    if isinstance(evaluation, Proxy):
        found = evaluation.obstacle()
        if found is None:
            return evaluation
        reason = found
    if remark is not None:
        remark(f"trials run one at a time, not {experiment.search.population} in lock-step: {reason}")
    return None


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
    study: Study,
    experiment: Experiment,
    data: Dataset | None,
    progress: confirmation.Progress | None,
    remark: Callable[[str], None] | None,
) -> None:
    leaders = choice.usable(study)[: experiment.search.confirm]
    if confirmation.missing(study, leaders):
        proxy, *_ = _proxy(experiment, data)
        assert isinstance(proxy, Proxy)
        population = 1 if _batch(experiment, proxy, remark) is None else experiment.search.population
        confirmation.confirm(study, leaders, proxy, progress, population)


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


@dataclass(frozen=True)
class Search:
    """Asks, evaluates and tells trials.

    Args:
        study: Where trials are kept.
        experiment: Its ``search`` section says what to do, its hyperparameters are the fixed values.
        evaluation: Judges a set of hyperparameters.
        url: Storage, for error messages.
        batch: Judges ``search.population`` sets side by side; None: one after the other.
    """

    study: Study
    experiment: Experiment
    evaluation: Evaluation
    url: str
    batch: BatchEvaluation | None = None

    def run(self, progress: Progress | None = None) -> None:
        """Run trials until ``search.trials`` have finished.

        Raises:
            UsageError: The same exception three times in a row, or more failures than trials wanted.
        """
        wanted = self.experiment.search.trials
        failures: list[Exception] = []
        streak = 0
        while (left := wanted - len(finished(self.study))) > 0:
            for info, error in self._some(left):
                if progress is not None:
                    best = choice.usable(self.study)
                    progress(len(finished(self.study)), wanted, best[0].value if best else None, info)
                streak = 0 if error is None else streak + 1
                if error is not None:
                    failures.append(error)
                    _stop_if_hopeless(failures, streak, wanted)

    def _some(self, left: int) -> Iterator[tuple[TrialInfo, Exception | None]]:
        size = min(self.experiment.search.population, left)
        if self.batch is None or size == 1:
            yield self._trial()
        else:
            yield from run_batch(self, self.batch, size)

    def _trial(self) -> tuple[TrialInfo, Exception | None]:
        trial = self.ask()
        try:
            ended = self.judge(trial, lambda: self.evaluation(self.suggest(trial), Reporter(trial, self.url)))
        except BaseException:  # Ctrl-C, SIGTERM
            self.abandon(trial)
            raise
        self.keep(ended)
        return self.tell(ended)

    def ask(self, ahead: int = 0) -> Trial:
        """Ask for a trial and take its lease, while ``ahead`` trials of the same batch are running."""
        self._reseed(ahead)
        trial = self.study.ask()
        hold(trial)
        return trial

    def suggest(self, trial: Trial) -> Hyperparameters:
        """Draw a trial's values beside those that are fixed."""
        values = sampling.suggest(trial, self.experiment.search.space)
        return Hyperparameters(**{**self.experiment.hyperparameters.model_dump(), **values})

    def judge(self, trial: Trial, evaluate: Callable[[], Outcome], spent: float = 0.0) -> Ended:
        """Evaluate a trial; what only this one raises is a failure.

        Args:
            trial: The trial.
            evaluate: Does it.
            spent: Seconds that went into it before.
        """
        started = time.perf_counter() - spent
        try:
            outcome = evaluate()
            value = told_value(outcome, finished(self.study))
        except Exception as error:
            if stops_the_search(error):
                raise
            return Ended(trial, None, None, time.perf_counter() - started, error)
        return Ended(trial, outcome, value, time.perf_counter() - started)

    def _reseed(self, ahead: int = 0) -> None:
        search = self.experiment.search
        failed = sum(t.user_attrs.get("outcome") == "failed" for t in self.study.get_trials(deepcopy=False))
        done = len(finished(self.study))
        self.study.sampler = sampling.sampler(search.sampler, search.space, search.seed, done, failed, ahead)

    def keep(self, ended: Ended) -> None:
        """Keep with a trial what was found, before it is told."""
        for key, item in ended.attributes.items():
            ended.trial.set_user_attr(key, item)
        if ended.error is not None:
            self._note_failure(ended.trial, "failed", ended.error)

    def tell(self, ended: Ended) -> tuple[TrialInfo, Exception | None]:
        """Tell how a trial ended."""
        with suppress(Exception) if ended.error is not None else nullcontext():
            self.study.tell(ended.trial, ended.told, state=ended.state)
        return ended.info, ended.error

    def abandon(self, trial: Trial) -> None:
        """Close a trial that was interrupted."""
        self._note_failure(trial, "interrupted")
        with suppress(Exception):
            self.study.tell(trial, state=TrialState.FAIL)

    def _note_failure(self, trial: Trial, outcome: str, error: Exception | None = None) -> None:
        # Where the storage itself is what failed, the trial stays RUNNING and is reaped later.
        with suppress(Exception):
            trial.set_user_attr("outcome", outcome)
            if error is not None:
                log = getattr(error, "details", "") or _text(error)
                trial.set_user_attr("error", redact(log)[-2000:])


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
