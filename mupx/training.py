"""The one training loop: proxy, target, width sweep and check differ only in their experiment.

Divergence is a result, not an exception. The same experiment gives the same numbers to the last bit on
the same machine and number of threads; a run with a folder continues from its last checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mupx.config import Experiment
from mupx.datasets.base import Dataset
from mupx.distributed.communicator import Communicator
from mupx.errors import UsageError
from mupx.parallel import Parallel
from mupx.parametrization import resolved
from mupx.parts import describe, load_data
from mupx.quality import Watch
from mupx.recipe import Recipe
from mupx.run import Run
from mupx.run_folder import Metrics, Result
from mupx.shared_folder import SharedFolder
from mupx.signals import AtStepEnd

SKIPPED_AT = 10  # steps in a row without a finite gradient, though the loss is finite: they will not end
CHECKPOINTS_PER_RUN = 10

Report = Callable[[int, int, float], bool]
Progress = Callable[[int, int, float], None]


def train(
    experiment: Experiment,
    *,
    data: Dataset | None = None,
    run_dir: Path | None = None,
    recipe: Recipe | None = None,
    report: Report | None = None,
    reports: int = 0,
    evaluate_test: bool = False,
    progress: Progress | None = None,
    ranks: Communicator | None = None,
    fsdp: bool = False,
) -> Result:
    """Train ``experiment`` at ``experiment.scaling.width`` and say how it ended.

    Args:
        experiment: Everything the numbers depend on.
        data: The loaded data set, when several runs share it.
        run_dir: Folder for metrics, checkpoints and result; a started run there is continued and a
            finished one returned.
        recipe: Where the parameter table comes from, if not from the model itself.
        report: ``(step, steps, objective so far) -> stop?``, called ``reports`` times at even intervals.
        reports: Number of calls of ``report``.
        evaluate_test: Also measure the test split at the end. A search never does.
        progress: ``(step, steps, loss)`` after every step.
        ranks: Who trains together, each calling this (:func:`mupx.distributed.joining.join`); alone if None.
        fsdp: Split parameters, optimizer state and curvature over ranks in place of copies on each.

    Raises:
        UsageError: A name or value of the experiment is wrong.
        MismatchError: The folder belongs to another configuration, or the live parameter groups
            differ from the table.
    """
    experiment = resolved(experiment)
    if experiment.train.threads is not None:
        torch.set_num_threads(experiment.train.threads)
    data = load_data(experiment) if data is None else data
    parallel = Parallel(ranks or Communicator(), fsdp)
    parallel.require_same({**experiment.identity(search=False), "data_checksum": data.checksum})
    folder = None
    if run_dir is not None:
        folder = SharedFolder(parallel.ranks, run_dir, experiment, data.checksum, evaluate_test)
    if folder is not None and (done := folder.result()) is not None:
        return done
    run = Run(experiment, data, describe(experiment, data) if recipe is None else recipe.parameters, parallel)
    if folder is not None and folder.restore(run):
        _record_validation(run, folder)
    try:
        result = _loop(run, folder, report, reports, progress, evaluate_test)
    except (KeyboardInterrupt, SystemExit):
        # Stopped between two steps, in an evaluation for example; several ranks save together or not at all.
        if folder is not None and run.whole and not parallel.several:
            folder.save(run)
        raise
    if folder is not None:
        folder.finish(run, result)
    return result


def carry_out(run: Run, progress: Progress | None = None) -> Result:
    """Train a run in memory to its end, as :func:`train` does, and write nothing.

    Args:
        run: A run that has not begun.
        progress: ``(step, steps, loss)`` after every step.
    """
    return _loop(run, None, None, 0, progress, False)


def _loop(
    run: Run,
    folder: SharedFolder | None,
    report: Report | None,
    reports: int,
    progress: Progress | None,
    evaluate_test: bool,
) -> Result:
    started = time.perf_counter()
    config = run.experiment.train
    save_every = config.checkpoint_every or max(1, run.steps // CHECKPOINTS_PER_RUN)
    report_at = even_steps(run.steps, reports) if report is not None else set()
    reported = 0
    outcome = "finished"
    if "validation" not in run.untrained:
        run.untrained["validation"] = run.evaluate(run.data.validation).loss
        require_start(run)
    while run.step < run.steps:
        with AtStepEnd() as stop:
            watch = None if folder is None else _watch(run)
            loss = run.advance(watch)
            if folder is not None:
                folder.record(run, loss=_finite(loss), lr_factor=_last_factor(run))
                if watch is not None and watch.found:
                    folder.record(run, **watch.found)
            if run.parallel.ranks.any(stop.asked):
                stop.ask()  # one rank was told to stop: none goes on alone
            if folder is not None and stop.asked and math.isfinite(loss):
                folder.save(run)
        stop.release()
        if run.diverged(loss) or run.optimizer.skipped_in_a_row >= SKIPPED_AT:
            outcome = "diverged"
            break
        if progress is not None:
            progress(run.step, run.steps, loss)
        if run.step in report_at and report is not None and run.step < run.steps:
            value = _objective(run, reported)
            reported = run.step
            if run.diverged(value):
                outcome = "diverged"
                break
            if report(run.step, run.steps, value):
                outcome = "pruned"
                break
        if folder is not None and config.eval_every and run.step % config.eval_every == 0:
            _record_validation(run, folder)
        if folder is not None and run.step % save_every == 0 and run.step < run.steps:
            folder.save(run)
    return _result(run, folder, outcome, evaluate_test, started)


def require_start(run: Run) -> None:
    """Tell a loss that is broken before the first step from one that diverged."""
    loss, names = run.untrained["validation"], run.experiment.own_code
    if names and not math.isfinite(loss):
        raise UsageError(
            f"the loss of the untrained model is {loss} at width {run.experiment.scaling.width}, so no step "
            f"can be at fault; look at {', '.join(f'{key} = {name}' for key, name in names.items())}"
        )


def _result(
    run: Run, folder: SharedFolder | None, outcome: str, evaluate_test: bool, started: float
) -> Result:
    validation = test = None
    if outcome != "diverged":
        validation = run.evaluate(run.data.validation)
        if run.diverged(validation.loss):
            outcome, validation = "diverged", None
    if outcome == "finished" and evaluate_test and len(run.data.test):
        test = run.evaluate(run.data.test)
    if folder is not None and validation is not None:
        folder.record(run, validation_loss=validation.loss, validation_accuracy=validation.accuracy)
    return result_of(run, outcome, validation, test, time.perf_counter() - started)


def result_of(
    run: Run, outcome: str, validation: Metrics | None, test: Metrics | None, seconds: float
) -> Result:
    """Return the result of a run that has ended."""
    return Result(
        outcome,
        run.step,
        run.untrained["train"] if outcome == "diverged" else run.tail_loss(),
        validation,
        test,
        dict(run.untrained),
        seconds,
        skipped_steps=run.optimizer.skipped_steps,
        repairs=dict(run.optimizer.repairs),
    )


def _objective(run: Run, since: int) -> float:
    if run.experiment.search.objective == "train":
        return run.recent_loss(since)
    return run.evaluate(run.data.validation).loss


def _record_validation(run: Run, folder: SharedFolder) -> None:
    metrics = run.evaluate(run.data.validation)
    folder.record(run, validation_loss=metrics.loss, validation_accuracy=metrics.accuracy)


def _watch(run: Run) -> Watch | None:
    every = run.experiment.train.curvature_every
    return Watch(run.model, run.device) if every and (run.step + 1) % every == 0 else None


def even_steps(steps: int, count: int) -> set[int]:
    """Return ``count`` steps at even intervals, the last one of ``steps`` included."""
    return {round(steps * (i + 1) / count) for i in range(count)} if count else set()


def _last_factor(run: Run) -> float:
    group = run.optimizer.param_groups[0]
    return float(group["lr"] / group["initial_lr"])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
