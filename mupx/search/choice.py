"""Which trial is used: the best one, or the most central one of the flat region around it (no torch).

The best of many noisy values is biased: it is partly the luckiest one, and near the edge of stability
a lucky one is a dangerous one to scale up. The *robust* choice is an evaluated trial in the middle of
those that are as good as the best.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from mupx import config
from mupx.config import Experiment
from mupx.errors import MismatchError, NoResultError, NotFoundError, UsageError
from mupx.layers import Parameter
from mupx.recipe import Recipe
from mupx.search import confirmation
from mupx.search.sampling import Box, unit
from mupx.sections import Hyperparameters, Range
from mupx.study import finished

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

FLAT = 0.01  # share of the improvement over the untrained model that still counts as equally good
EDGE = 0.05  # share of a range, from either end


@dataclass(frozen=True)
class Choice:
    """A trial, its objective, and the searched hyperparameters' base values."""

    trial: int
    value: float
    params: dict[str, float]


@dataclass(frozen=True)
class Edge:
    """An optimum that lies at the end of what was searched.

    Attributes:
        param: Hyperparameter.
        side: Which end.
        value: Where the optimum was found.
        wider: The range to search next.
        text: Command-line flags that ask for it.
    """

    param: str
    side: str
    value: float
    wider: Range
    text: str


def choose(study: Study, experiment: Experiment, pick: str | int = "best") -> Choice:
    """Choose a trial of a study.

    Args:
        study: The study.
        experiment: What the study was made with; its space is the box in which distance is measured.
        pick: ``best`` (by its mean over fresh seeds where some were confirmed), ``robust`` or a number.

    Raises:
        NoResultError: Every trial diverged, or none has finished.
        NotFoundError: There is no trial of that number.
        UsageError: That trial has no usable result, or ``pick`` is none of the three.
    """
    if pick == "best":
        return _confirmed(study) or _choice(_ranked(study, experiment.search.space)[0])
    if pick == "robust":
        return _choice(_medoid(flat_region(study, experiment.search.space), experiment.search.space))
    try:
        number = int(pick)
    except ValueError:
        raise UsageError(f"pick is {pick!r}; allowed: best, robust or the number of a trial") from None
    return _numbered(study, number)


def _confirmed(study: Study) -> Choice | None:
    """Return the trial with the lowest mean over fresh seeds; None while the leader has none.

    A search that went on after its confirmation may have found a better trial, which must not lose
    unseen.
    """
    means = confirmation.means(study)
    if not means or usable(study)[0].number not in means:
        return None
    number = min(means, key=lambda n: (means[n], n))
    return replace(_numbered(study, number), value=means[number])


def usable(study: Study) -> list[FrozenTrial]:
    """Return the trials that ran to the end and did not diverge, best first."""
    trials = [t for t in finished(study) if t.state.name == "COMPLETE" and not diverged(t)]
    return sorted(trials, key=lambda t: (t.value, t.number))


def diverged(trial: FrozenTrial) -> bool:
    """Tell whether a trial diverged."""
    return trial.user_attrs.get("outcome") == "diverged"


def flat_region(study: Study, space: Box) -> list[FrozenTrial]:
    """Return the trials whose value is within the tolerance of the best, best first.

    tolerance = 1 % of (loss of the untrained model − best loss): a share of what training achieved,
    so it depends neither on the width of the box nor on how many trials were bad. Without an untrained
    loss the median of the usable trials stands in.
    """
    trials = _ranked(study, space)
    best = _value(trials[0])
    untrained = [t.user_attrs["untrained"] for t in trials if "untrained" in t.user_attrs]
    reference = min(untrained) if untrained else statistics.median(_value(t) for t in trials)
    limit = best + FLAT * max(reference - best, 0.0)
    return [t for t in trials if _value(t) <= limit]


def edges(best: Choice, space: Box) -> list[Edge]:
    """List the parameters whose optimum lies within 5 % of a range's end.

    n trials resolve a range to about 1/n at best: with the usual 20 to 32 trials an optimum closer to
    the end than 1/20 of the range cannot be told from one outside. A search whose optimum is anywhere
    inside with equal chance is suspected wrongly in 10 % of the cases, per parameter. An end that is
    the limit of what the hyperparameter may be (momentum 0) is not an edge.
    """
    found = []
    for name, value in best.params.items():
        position = unit(name, value, space)
        side = "low" if position <= EDGE else "high" if position >= 1 - EDGE else None
        wider = side and _widened(name, space[name], side)
        if side and wider:
            found.append(Edge(name, side, value, wider, _flag(name, wider, side)))
    return found


def lowered(interval: Range) -> Range:
    """Return the range of the same size that ends where this one begins (log scale)."""
    return Range(low=_round(interval.low**2 / interval.high), high=interval.low)


def range_text(interval: Range) -> str:
    """Return ``low:high`` as the command line reads it."""
    return f"{interval.low:.6g}:{interval.high:.6g}"


def recipe_from_study(study: Study, choice: Choice, *, storage: str | None = None) -> Recipe:
    """Build the recipe of a chosen trial from what the study itself holds.

    Raises:
        MismatchError: The study has no description of the model (a foreign objective, or not mupx's).
    """
    attrs = study.user_attrs
    if not {"experiment", "parameters"} <= attrs.keys():
        raise MismatchError(
            f"study {study.study_name!r} holds no model description, so no layer table can be derived; "
            "use the chosen values with your own loop, or tune with `mupx tune`"
        )
    experiment = config.parse(attrs["experiment"])
    tuned = experiment.updated({f"hyperparameters.{k}": v for k, v in choice.params.items()})
    parameters = tuple(_parameter(entry) for entry in attrs["parameters"])
    return Recipe(tuned, parameters, _provenance(study, experiment, choice, storage))


def _provenance(study: Study, experiment: Experiment, choice: Choice, storage: str | None) -> dict[str, Any]:
    trials = finished(study)
    ended = [t.datetime_complete for t in trials if t.datetime_complete is not None]
    robust = choose(study, experiment, "robust")
    return {
        "study": study.study_name,
        "storage": storage,
        "trial": choice.trial,
        "value": choice.value,
        "objective": experiment.search.objective,
        "seed": experiment.search.seed,
        "trials": len(trials),
        **study.user_attrs.get("versions", {}),
        "data_checksum": study.user_attrs.get("data_checksum"),
        "source": study.user_attrs.get("identity", {}).get(config.SOURCE),
        # When the study ended, not when the file was written: the same study gives the same recipe.
        "date": max(ended).astimezone(UTC).isoformat(timespec="seconds") if ended else None,
        "robust": {"trial": robust.trial, "value": robust.value, "params": robust.params},
    }


def _ranked(study: Study, space: Box) -> list[FrozenTrial]:
    trials = usable(study)
    if trials:
        return trials
    done = finished(study)
    if not done:
        raise NoResultError(f"study {study.study_name!r} has no finished trial yet; run `mupx tune`")
    interval = space.get("lr")
    advice = (
        f"lower the range of lr from {range_text(interval)}, for example --lr {range_text(lowered(interval))}"
        if interval
        else "lower hyperparameters.lr, or search it with --lr low:high"
    )
    also = ", or raise the low end of damping" if "damping" in space else ""
    raise NoResultError(
        f"none of the {len(done)} finished trials of study {study.study_name!r} has a usable result, "
        f"{sum(map(diverged, done))} diverged; {advice}{also} (the study is kept)"
    )


def _numbered(study: Study, number: int) -> Choice:
    trials = {t.number: t for t in study.get_trials(deepcopy=False)}
    if number not in trials:
        raise NotFoundError(
            f"study {study.study_name!r} has no trial {number}; it has trials 0 to {len(trials) - 1}"
            if trials
            else f"study {study.study_name!r} has no trials yet"
        )
    trial = trials[number]
    if trial.state.name != "COMPLETE" or diverged(trial):
        outcome = trial.user_attrs.get("outcome", trial.state.name.lower())
        raise UsageError(
            f"trial {number} of study {study.study_name!r} has no usable result ({outcome}); "
            "pick best, robust or the number of a trial that finished"
        )
    return _choice(trial)


def _choice(trial: FrozenTrial) -> Choice:
    return Choice(trial.number, _value(trial), dict(sorted(trial.params.items())))


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None  # a complete trial has one
    return trial.value


def _medoid(region: Sequence[FrozenTrial], space: Box) -> FrozenTrial:
    """Return the trial with the smallest summed distance to the others; ties go to the better one."""
    points = [[unit(name, t.params[name], space) for name in sorted(space)] for t in region]
    sums = [math.fsum(math.dist(p, q) for q in points) for p in points]
    return region[min(range(len(region)), key=lambda i: (round(sums[i], 12), i))]


def _widened(name: str, interval: Range, side: str) -> Range | None:
    """Extend a range by half its size, or by less where the hyperparameter's limit is nearer."""
    share = 0.5
    for _ in range(6):
        end = _round(_beyond(interval, side, share))
        try:
            Hyperparameters.model_validate({name: end})
            wider = Range.model_validate({**interval.model_dump(), side: end})
        except ValidationError:
            share /= 2
            continue
        return wider if end < interval.low or end > interval.high else None
    return None


def _beyond(interval: Range, side: str, share: float) -> float:
    position = -share if side == "low" else 1 + share
    if interval.log:
        return float(interval.low * (interval.high / interval.low) ** position)
    return interval.low + (interval.high - interval.low) * position


def _round(value: float) -> float:
    return float(f"{value:.3g}")


def _flag(name: str, wider: Range, side: str) -> str:
    if name in ("lr", "damping"):
        return f"--{name} {range_text(wider)}"
    return f"--set search.space.{name}.{side}={getattr(wider, side):.6g}"


def _parameter(entry: Mapping[str, Any]) -> Parameter:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
    return Parameter(**fields)
