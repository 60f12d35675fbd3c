"""How a trial is judged: hyperparameters in, an :class:`Outcome` out; training is one way of doing it.

Divergence is a value. A diverged trial is told as *complete* with min(loss, loss of the untrained
model): told as failed it would vanish from the sampler's sight, and the sampler would keep asking for
more like it; told as a huge number it would flatten everything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from mupx.config import Experiment
from mupx.errors import MupxError, UserCodeError
from mupx.layers import Parameter
from mupx.recipe import Recipe
from mupx.sections import Hyperparameters

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from mupx.datasets.base import Dataset
    from mupx.run_folder import Result

Report = Callable[[int, int, float], bool]  # (step, total steps, value) -> True asks to stop


@dataclass(frozen=True)
class Outcome:
    """What an evaluation found.

    Attributes:
        outcome: ``finished``, ``diverged`` (the value is then ignored) or ``pruned``.
        value: The objective, lower is better.
        untrained: The objective before the first step, where it is known.
        attributes: What else is kept with the trial: losses, steps. Numbers must be finite.
    """

    outcome: Literal["finished", "diverged", "pruned"]
    value: float
    untrained: float | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)


MemberReport = Callable[[int, int, int, float], bool]  # (member, step, total steps, value) -> stop?


class Evaluation(Protocol):
    """Judges one set of hyperparameters; a ``report`` that returns True asks it to stop."""

    def __call__(self, hyperparameters: Hyperparameters, report: Report) -> Outcome:
        """Evaluate; raise only for what is a bug or a lack of memory, never for divergence."""
        ...


def told_value(outcome: Outcome, finished: Iterable[FrozenTrial]) -> float:
    """Return the finite number the sampler sees: min(loss, loss of the untrained model).

    The loss of a diverged trial counts as infinite, also when it was low before it blew up. As init
    and output scale can be searched, the untrained loss differs between trials; the smallest one so
    far is taken, lest a trial that starts from a huge loss set a huge penalty. Where no untrained
    loss is known (a foreign objective), the worst finite value so far stands in.

    Raises:
        ValueError: The first trial of a foreign objective is not finite.
    """
    trials = list(finished)
    own = [] if outcome.untrained is None else [outcome.untrained]
    earlier: list[float] = [t.user_attrs["untrained"] for t in trials if "untrained" in t.user_attrs]
    ceilings: list[float] = [x for x in own + earlier if math.isfinite(x)]
    loss = outcome.value if outcome.outcome != "diverged" else math.inf
    if ceilings:
        return min(ceilings) if math.isnan(loss) else min(loss, *ceilings)
    if math.isfinite(loss):
        return loss
    values = [t.value for t in trials if t.value is not None]
    if not values:
        raise ValueError(
            "the objective was not finite before any finite value was known; pass untrained=, "
            "the value of an untrained model"
        )
    return max(values)


@dataclass(frozen=True)
class Proxy:
    """Trains the experiment's proxy; the data is loaded once and its test split left out.

    Args:
        experiment: What to train, at ``scaling.width``.
        data: The data of every trial.
        parameters: Description of the model, made once.
        reports: How often a trial reports its objective.
    """

    experiment: Experiment
    data: Dataset
    parameters: tuple[Parameter, ...]
    reports: int

    def __call__(self, hyperparameters: Hyperparameters, report: Report) -> Outcome:
        """Train once and return the objective of ``search.objective`` with both losses beside it."""
        from mupx import training

        experiment = self._with(hyperparameters)
        result = training.train(
            experiment,
            data=self.data,
            recipe=Recipe(experiment, self.parameters),
            report=report,
            reports=self.reports,
        )
        if result.outcome == "interrupted":
            raise KeyboardInterrupt
        return self._outcome(result)

    def obstacle(self) -> str | None:
        """Return why trials cannot be trained in lock-step, in a clause; None where they can."""
        from mupx import stackable
        from mupx.run import Run

        try:
            run = Run(self.experiment, self.data, self.parameters)
        except Exception as error:
            return f"{type(error).__name__} before the first step"  # the first trial will say it in full
        return stackable.obstacle(run)

    def together(
        self,
        hyperparameters: Sequence[Hyperparameters],
        report: MemberReport,
        reports: int,
        seeds: Sequence[int] | None = None,
    ) -> list[Outcome | None]:
        """Train in lock-step, where given on seeds of their own; None for what has to be run by itself."""
        from mupx import population

        experiments = [self._with(each) for each in hyperparameters]
        if seeds is not None:
            experiments = [e.updated({"train.seed": s}) for e, s in zip(experiments, seeds, strict=True)]
        results = population.train_population(
            experiments,
            data=self.data,
            parameters=self.parameters,
            report=report,
            reports=min(reports, self.reports),
        )
        return [None if result is None else self._outcome(result) for result in results]

    def _with(self, hyperparameters: Hyperparameters) -> Experiment:
        values = hyperparameters.model_dump()
        return self.experiment.updated({f"hyperparameters.{key}": value for key, value in values.items()})

    def _outcome(self, result: Result) -> Outcome:
        losses = {"train": result.train_loss}
        if result.validation is not None:
            losses["validation"] = result.validation.loss
        objective = self.experiment.search.objective
        attributes = {f"{name}_loss": loss for name, loss in losses.items() if math.isfinite(loss)}
        if result.validation is not None and result.validation.accuracy is not None:
            attributes["validation_accuracy"] = result.validation.accuracy
        return Outcome(
            _outcome(result.outcome),
            losses.get(objective, math.inf),
            result.untrained.get(objective),
            {**attributes, "steps": result.steps},
        )


def stops_the_search(error: Exception) -> bool:
    """Whether an exception concerns every trial: mupx's own do, those of the user's code may not."""
    return isinstance(error, MupxError) and not isinstance(error, UserCodeError)


def together_or_none(evaluate: Callable[[], list[Outcome | None]], members: int) -> list[Outcome | None]:
    """Return what a population finds, or None for each where it fails.

    A single trial can do what a population cannot, such as fit into the memory; or it fails by itself, and
    it is known which one.
    """
    try:
        return evaluate()
    except Exception as error:
        if stops_the_search(error):
            raise
        return [None] * members


def _outcome(name: str) -> Literal["finished", "diverged", "pruned"]:
    if name == "diverged":
        return "diverged"
    return "pruned" if name == "pruned" else "finished"


def without_test(data: Dataset) -> Dataset:
    """Return the data with an empty test split: a search cannot use what it does not hold."""
    empty = replace(data.test, inputs=data.test.inputs[:0], targets=data.test.targets[:0])
    return replace(data, test=empty)


@dataclass(frozen=True)
class Foreign:
    """Calls somebody else's training loop, which returns a loss or is not finite when it diverged.

    Args:
        function: Hyperparameters → loss.
        untrained: Loss of an untrained model, told for diverged trials.
    """

    function: Callable[[Hyperparameters], float]
    untrained: float | None = None

    def __call__(self, hyperparameters: Hyperparameters, report: Report) -> Outcome:
        """Call the function; it reports nothing on the way, so it is never pruned."""
        loss = float(self.function(hyperparameters))
        outcome: Literal["finished", "diverged"] = "finished" if math.isfinite(loss) else "diverged"
        return Outcome(outcome, loss, self.untrained)
