"""What is searched, in which order, and when a trial is cut short.

The sampler is made anew for every trial and seeded from (search seed, number of finished trials,
number of failed ones): Optuna stores neither sampler nor seed, so this is what makes a search that
was killed and resumed propose the same trials as one that was not.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial

from mupx.config import Experiment
from mupx.errors import UsageError, unknown_name
from mupx.optim import OPTIMIZERS
from mupx.scaling import GRAFTED, find_rule
from mupx.sections import Range
from mupx.usercode import is_reference

if TYPE_CHECKING:
    from optuna import Study

REPORTS = 12  # reports per trial
RUNGS = 6  # reports per trial of a population: every other one of those
MODELLED = 1000  # trials of which TPE makes its model, beside the best ones and those that run
STARTUP = 10  # quasi-random trials before a model is fitted (TPE and GP)
PRUNE_AFTER = 10  # complete trials before the first one may be pruned
Box = Mapping[str, Range]

# (optimizer, damping rule) → default ranges at the base width: three octaves or more to either side of
# the optimum that benchmarks/transfer.py finds at width 64. Trace damping stops at 2^-8 (FOOF 2^-10, EKFAC
# 2^-14, where one ridge stands for the product of two): far below, the ridge is smaller than the noise of
# a batch-sized factor, and what is best there does not transfer.
DEFAULT_SPACES: Mapping[tuple[str, str | None], Mapping[str, tuple[float, float]]] = {
    ("sgd", None): {"lr": (2**-5, 2**3)},
    ("adamw", None): {"lr": (2**-10, 2**-3)},
    ("lion", None): {"lr": (2**-12, 2**-4)},
    ("adam-atan2", None): {"lr": (2**-10, 2**-3)},
    ("muon", None): {"lr": (2**-8, 2**-1)},
    ("psgd", None): {"lr": (2**-8, 2**-1)},
    ("kfac", "absolute"): {"lr": (2**-6, 1.0), "damping": (2**-6, 2.0)},
    ("kfac", "trace"): {"lr": (2**-8, 2**-1), "damping": (2**-8, 2**-3)},
    ("kfac", "pi"): {"lr": (2**-6, 1.0), "damping": (2**-10, 2**-2)},
    ("kfac", "exact"): {"lr": (2**-6, 1.0), "damping": (2**-10, 2**-2)},
    ("foof", "trace"): {"lr": (2**-5, 2**2), "damping": (2**-10, 2**-3)},
    ("foof", "absolute"): {"lr": (2**-4, 2**3), "damping": (2**-6, 2**3)},
    ("ekfac", "trace"): {"lr": (2**-8, 2**-2), "damping": (2**-14, 2**-6)},
    ("ekfac", "absolute"): {"lr": (2**-7, 1.0), "damping": (2**-10, 1.0)},
    ("gauss-newton", "trace"): {"lr": (2**-6, 2.0), "damping": (2**-12, 2**-3)},
    ("gauss-newton", "absolute"): {"lr": (2**-5, 2.0), "damping": (2**-4, 2**4)},
    ("gauss-newton-full", "trace"): {"lr": (2**-6, 2.0), "damping": (2**-12, 2**-3)},
    ("gauss-newton-full", "absolute"): {"lr": (2**-5, 2.0), "damping": (2**-4, 2**4)},
    ("shampoo", "relative"): {"lr": (2**-7, 2**-1), "damping": (2**-16, 2**-5)},
    ("shampoo", "absolute"): {"lr": (2**-7, 2**-1), "damping": (2**-24, 2**-8)},
    ("shampoo-half", "relative"): {"lr": (2**-10, 2**-2), "damping": (2**-16, 2**-3)},
    ("shampoo-left", "relative"): {"lr": (2**-6, 1.0), "damping": (2**-20, 2**-5)},
    ("shampoo-right", "relative"): {"lr": (2**-6, 1.0), "damping": (2**-20, 2**-5)},
    ("soap", None): {"lr": (2**-9, 2**-2)},
    ("soap-left", None): {"lr": (2**-9, 2**-2)},
    ("soap-right", None): {"lr": (2**-9, 2**-2)},
}
BETAS = frozenset({"adamw", "lion", "adam-atan2"})  # their momentum is `optimizer.betas`
# Host of a grafted or normalised update → range of its lr.
SIZED_LR: Mapping[str, tuple[float, float]] = {
    "sgd": (2**-5, 2**3),
    "adamw": (2**-10, 2**-3),
    "rms": (2**-10, 2**-3),
    "spectral": (2**-8, 1.0),
}
# Ranges around the base model's own values; the last column says whether the scale is logarithmic.
ROLE_RANGES: Mapping[str, tuple[float, float, bool]] = {
    "lr_mult_input": (0.125, 8.0, True),
    "lr_mult_hidden": (0.125, 8.0, True),
    "lr_mult_output": (0.125, 8.0, True),
    "init_mult_input": (0.25, 4.0, True),
    "init_mult_hidden": (0.25, 4.0, True),
    "init_mult_output": (0.25, 4.0, True),
    "output_scale": (0.25, 16.0, True),
    # Beyond 0.98 the average is longer than a proxy run's tail; below it a linear scale resolves enough.
    "momentum": (0.0, 0.98, False),
}


def default_space(optimizer: str, damping_rule: str | None = None) -> dict[str, Range]:
    """Return the ranges searched when none are given.

    Args:
        optimizer: Name of the optimizer.
        damping_rule: Its damping rule; None takes the optimizer's default one.

    Raises:
        UsageError: No default is known for the optimizer.
    """
    if optimizer not in OPTIMIZERS:
        raise unknown_name("optimizer", optimizer, OPTIMIZERS)
    key = (optimizer, damping_rule or find_rule(optimizer).default_damping)
    if key not in DEFAULT_SPACES:
        raise UsageError(f"{optimizer} with {key[1]} damping has no default ranges; give --lr low:high")
    return {name: Range(low=low, high=high) for name, (low, high) in DEFAULT_SPACES[key].items()}


def space_of(experiment: Experiment) -> dict[str, Range]:
    """Return the ranges searched for an experiment when none are given; none for a rule without a default."""
    optimizer = experiment.optimizer
    rule = optimizer.scaling_rule
    damping_rule = optimizer.damping_rule or rule.default_damping
    host, grafts, guest = rule.name.rpartition(GRAFTED)
    if grafts:
        lr = Range(low=SIZED_LR[host][0], high=SIZED_LR[host][1])
        return {**default_space(guest, damping_rule), "lr": lr}
    if is_reference(optimizer.name) and (rule.name, damping_rule) not in DEFAULT_SPACES:
        return {}
    return default_space(rule.name, damping_rule)


def role_space(experiment: Experiment) -> dict[str, Range]:
    """Return ranges for what transfers besides lr and damping: role multipliers, output scale, momentum.

    A range is moved so that the experiment's own value stays inside; an optimizer whose momentum is
    ``optimizer.betas`` has no momentum range.
    """
    hyper = experiment.hyperparameters
    by_betas = experiment.optimizer.scaling_rule.name in BETAS
    return {
        name: Range(low=min(low, getattr(hyper, name)), high=max(high, getattr(hyper, name)), log=log)
        for name, (low, high, log) in ROLE_RANGES.items()
        if not (by_betas and name == "momentum")
    }


def distributions(space: Box) -> dict[str, FloatDistribution]:
    """Return Optuna's form of a search space, in a fixed order."""
    return {
        name: FloatDistribution(interval.low, interval.high, log=interval.log)
        for name, interval in sorted(space.items())
    }


def unit(name: str, value: float, space: Box) -> float:
    """Return the position of a value in its range, 0 at the low end and 1 at the high end."""
    interval = space[name]
    scale = np.log if interval.log else float
    low, high = scale(interval.low), scale(interval.high)
    return float((scale(value) - low) / (high - low))


def from_unit(name: str, position: float, space: Box) -> float:
    """Return the value at a position of a range; inverse of :func:`unit`, held inside the range."""
    interval = space[name]
    if interval.log:
        value = interval.low * (interval.high / interval.low) ** position
    else:
        value = interval.low + (interval.high - interval.low) * position
    return float(min(max(value, interval.low), interval.high))


def trial_seed(seed: int, slot: int, attempt: int) -> int:
    """Return the seed of a trial; a place that is tried again because the trial failed gets another one."""
    return int(np.random.SeedSequence((seed, slot, attempt)).generate_state(1)[0])


def sampler(
    name: str,
    space: Box,
    seed: int,
    slot: int,
    attempt: int = 0,
    finished: int = 0,
    running: int = 0,
    known: Callable[[], Sequence[FrozenTrial]] | None = None,
) -> BaseSampler:
    """Make the sampler of the next trial.

    What random and qmc draw depends on ``seed``, ``slot`` and ``attempt`` alone: however many workers there
    are, and however often one of them is killed, the search consists of the same trials.

    Args:
        name: tpe, random, qmc or gp.
        space: The search space.
        seed: Seed of the whole search.
        slot: Place of the trial in the search, from 0.
        attempt: Number of trials in this place that raised.
        finished: Number of finished trials.
        running: Number of other trials that are running.
        known: Returns the trials of which TPE makes its model; None lets it read the study.
    """
    own = trial_seed(seed, slot, attempt)
    if name == "qmc" or (name in ("tpe", "gp") and finished < STARTUP):
        # After a failure the same point would fail again: the place's point in another scrambling is random.
        return SobolSampler(space, own if attempt else seed, slot)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        if name == "tpe":
            options: dict[str, Any] = {"multivariate": True, "constant_liar": running > 0}
            options |= {"seed": own, "n_startup_trials": STARTUP}
            if known is None:
                return TPESampler(**options)
            return InformedTPE(distributions(space), known(), **options)
        if name == "gp":
            return GPSampler(seed=own, n_startup_trials=STARTUP)
    return RandomSampler(seed=own)


class SobolSampler(BaseSampler):
    """Point ``index`` of one scrambled Sobol' sequence in the unit box of the space.

    Optuna's own QMCSampler counts its points in the storage, so that a killed trial skips one.
    """

    def __init__(self, space: Box, seed: int, index: int) -> None:
        self._space = dict(sorted(space.items()))
        self._seed = seed
        self._index = index

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the whole space, from the first trial on."""
        return dict(distributions(self._space))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return all parameters of the trial."""
        point = sobol_point(len(self._space), self._seed, self._index)
        return {name: from_unit(name, x, self._space) for name, x in zip(self._space, point, strict=True)}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Refuse: every parameter is part of the point."""
        raise UsageError(f"{param_name} is not in the search space ({', '.join(self._space)})")


def sobol_point(dimensions: int, seed: int, index: int) -> Sequence[float]:
    """Return point ``index`` (from 0) of a scrambled Sobol' sequence, ``[dimensions]`` in [0, 1)."""
    import torch

    engine = torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=seed)
    points = engine.draw(index + 1, dtype=torch.float64)
    return [float(x) for x in points[index]]


def earliest_pruning(total_steps: int) -> int:
    """Return the first step at which a trial may be pruned: a third of the way."""
    return -(-total_steps // 3)


class InformedTPE(TPESampler):
    """TPE that is told its search space and its trials, where Optuna's finds both out from the whole study.

    Args:
        space: What it draws; every trial has it.
        trials: The trials its model is made of.
        options: Of Optuna's sampler.
    """

    def __init__(
        self, space: dict[str, FloatDistribution], trials: Sequence[FrozenTrial], **options: Any
    ) -> None:
        super().__init__(**options)
        self._space, self._known = {k: v for k, v in space.items() if not v.single()}, trials

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the space."""
        return dict(self._space)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Draw a point."""
        known: Any = _Known(study, self._known)
        return super().sample_relative(known, trial, search_space)


class _Known:
    """A study of which the sampler sees some trials."""

    def __init__(self, study: Study, trials: Sequence[FrozenTrial]) -> None:
        self._study, self._trials = study, trials

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def _get_trials(self, deepcopy: bool, states: Any = None, use_cache: bool = False) -> list[FrozenTrial]:
        return [t for t in self._trials if states is None or t.state in states]


def told_to_tpe(
    trials: Sequence[FrozenTrial], settled: int, best: Sequence[int], seed: int, slot: int
) -> Sequence[FrozenTrial]:
    """Return the trials of which TPE makes its model: all, or of many the best and a random thousand.

    TPE compares the density of its best trials, 25 at most, with that of all others: a thousand of those
    tell it what ten thousand do, and the time it takes stays the same.

    Args:
        trials: All trials of the study, in the order of their numbers.
        settled: How many of the first ones are finished.
        best: Numbers of the best of these.
        seed: Seed of the whole search.
        slot: Place of the trial that is drawn.
    """
    if settled <= MODELLED:
        return trials
    drawn = np.random.default_rng((seed, slot)).choice(settled, MODELLED, replace=False)
    chosen = sorted({*drawn.tolist(), *best, *range(settled, len(trials))})
    return [trials[number] for number in chosen]


def pruner(name: str, total_steps: int) -> BasePruner:
    """Make the pruner: ``none``, or ``median`` with two guards.

    A trial is stopped when its best value so far is worse than the median of the complete trials at
    the same step, from a third of the steps on, and once ten trials have run to that step. Replayed
    on real curves of narrow networks in 100 random orders (the test does it), the eventual winner was
    kept in all of them and 27 % of the reports were saved; without the guards it was kept in 9 of 100
    on the validation loss and in 29 on the training loss.
    """
    if name == "none":
        return NopPruner()
    return MedianPruner(
        n_startup_trials=PRUNE_AFTER,
        n_warmup_steps=earliest_pruning(total_steps),
        n_min_trials=PRUNE_AFTER,
    )


def require_sampler(name: str) -> None:
    """Check that what a sampler needs is installed.

    Raises:
        UsageError: gp without scipy.
    """
    if name == "gp" and find_spec("scipy") is None:
        raise UsageError(
            "sampler 'gp' needs scipy, which is not installed; run `pip install mupx[gp]`, "
            "or use tpe, random or qmc"
        )


def draw(study: Study, trial: FrozenTrial, space: Box) -> dict[str, float]:
    """Draw all parameters of a trial as Optuna's ``Trial.suggest_float`` would, and write none of them.

    Args:
        study: Its study, with the sampler.
        trial: A trial without parameters.
        space: The search space.
    """
    joint = study.sampler.infer_relative_search_space(study, trial)
    together = study.sampler.sample_relative(study, trial, joint)
    return {
        name: together[name]
        if name in together
        else study.sampler.sample_independent(study, trial, name, own)
        for name, own in distributions(space).items()
    }
