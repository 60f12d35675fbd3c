"""Several runs trained in lock-step as one.

Members differ in hyperparameters and seed, and in nothing else. They share one clock, one schedule and,
where their seeds agree, the batches. Each gets the numbers it would get alone, to rounding; what only
some of them would need (a skipped step, a repaired overflow) is not imitated: such a member leaves, to be
run alone from the start. A member that diverges leaves before its numbers reach a decomposition.

Places that become free stay empty until the whole population has ended: one clock is what makes one batch,
one schedule and one refresh serve all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from mupx.config import Experiment
from mupx.datasets.base import Dataset, Split
from mupx.errors import UsageError
from mupx.layers import Parameter
from mupx.lockstep import Population, share_buffers
from mupx.parametrization import resolved
from mupx.run import Run
from mupx.run_folder import Metrics, Result
from mupx.stackable import obstacle_in_settings
from mupx.training import even_steps, require_start, result_of

Report = Callable[[int, int, int, float], bool]  # (member, step, steps, objective so far) -> stop?


def train_population(
    experiments: Sequence[Experiment],
    *,
    data: Dataset,
    parameters: tuple[Parameter, ...],
    report: Report | None = None,
    reports: int = 0,
) -> list[Result | None]:
    """Train experiments in lock-step, each as :func:`mupx.training.train` would.

    Args:
        experiments: They differ in hyperparameters and ``train.seed`` only.
        data: The data of all.
        parameters: Description of the model.
        report: ``(member, step, steps, objective so far) -> stop?``, called ``reports`` times at even
            intervals for every member that is still there.
        reports: Number of calls per member.

    Returns:
        One result per experiment; None for a member that left because it has to be run alone.

    Raises:
        UsageError: The experiments differ in more than that, or have no update for several models at once.
    """
    experiments = [resolved(experiment) for experiment in experiments]
    _require_alike(experiments)
    if experiments[0].train.threads is not None:
        torch.set_num_threads(experiments[0].train.threads)
    first = Run(experiments[0], data, parameters)
    if reason := obstacle_in_settings(first):
        raise UsageError(f"these runs cannot be trained in lock-step: {reason}; use train for each")
    shared = replace(data, train=Split(first.inputs, first.targets))  # on its device and in its precision
    runs = [first, *(Run(experiment, shared, parameters) for experiment in experiments[1:])]
    if not share_buffers(runs):
        return [None] * len(runs)
    return _Training(Population(runs), data, report, reports).run()


def _require_alike(experiments: Sequence[Experiment]) -> None:
    same = {"hyperparameters": experiments[0].hyperparameters.model_dump(), "train.seed": 0}
    if len({experiment.updated(same).model_dump_json() for experiment in experiments}) > 1:
        raise UsageError("the members of a population may differ in hyperparameters and train.seed only")


class _Training:
    """The loop around a population: reports, endings, results."""

    def __init__(self, population: Population, data: Dataset, report: Report | None, reports: int) -> None:
        self.population, self.data, self.report = population, data, report
        self.runs = dict(population.runs)
        self.results: dict[int, Result | None] = dict.fromkeys(self.runs)
        self.report_at = even_steps(population.steps, reports) - {population.steps}
        self.reported = 0
        self.started = time.perf_counter()

    def run(self) -> list[Result | None]:
        """Train to the end."""
        population = self.population
        for member, metrics in population.evaluate(self.data.validation).items():
            self.runs[member].untrained["validation"] = metrics.loss
            require_start(self.runs[member])
        while population.runs and population.step < population.steps:
            self._end("diverged", population.advance())
            if self.report is not None and population.step in self.report_at:
                self._ask(self.report)
        self._end("finished", population.runs, population.evaluate(self.data.validation))
        return list(self.results.values())

    def _ask(self, report: Report) -> None:
        """Report the objective of every member, and let go of those that diverged or are to stop."""
        population, step, metrics = self.population, self.population.step, {}
        if next(iter(self.runs.values())).experiment.search.objective == "validation":
            metrics = population.evaluate(self.data.validation)
            values = {member: metrics[member].loss for member in population.runs}
        else:
            values = {member: run.recent_loss(self.reported) for member, run in population.runs.items()}
        self.reported = step
        diverged = {member for member, value in values.items() if self.runs[member].diverged(value)}
        self._end("diverged", diverged)
        population.leave(diverged)
        stopped = {m for m in population.runs if report(m, step, population.steps, values[m])}
        if stopped:
            self._end("pruned", stopped, metrics or population.evaluate(self.data.validation))
            population.leave(stopped)

    def _end(
        self, outcome: str, members: Iterable[int], validation: Mapping[int, Metrics] | None = None
    ) -> None:
        seconds = time.perf_counter() - self.started
        for member in members:
            run, metrics = self.runs[member], None if validation is None else validation[member]
            if metrics is not None and run.diverged(metrics.loss):
                self.results[member] = result_of(run, "diverged", None, None, seconds)
            else:
                self.results[member] = result_of(run, outcome, metrics, None, seconds)
