"""Put the advice together: sizes, the model without its storage, the machine's rates, the lint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from mupx import parts
from mupx.advice.choosing import SECOND, about_memory, about_refreshes, first_choice
from mupx.advice.estimates import Estimate, estimate, not_modelled
from mupx.advice.measuring import rates_of
from mupx.advice.network import Network, network_of, outline
from mupx.advice.rates import Rates
from mupx.advice.refreshes import Phases, recommended
from mupx.advice.result import Advice
from mupx.advice.statements import (
    DERIVED,
    IK,
    MEASURED,
    Level,
    Sizes,
    Statement,
    iterations,
    not_transferred,
    pays,
)
from mupx.checks.lint import examine, forgotten
from mupx.config import Experiment
from mupx.datasets.base import Dataset, Split
from mupx.datasets.facts import FACTS, Facts
from mupx.doctor import this_system
from mupx.doctor.compute import free_memory
from mupx.errors import MismatchError, UsageError, out_of_memory
from mupx.layers import Parameter
from mupx.optim import OPTIMIZERS
from mupx.parametrization import resolved
from mupx.roles.tracing import ModelFailedError
from mupx.run import pick_device, total_steps

# Lint code → where it is known from; what is not here was derived for mupx.
LINT_SOURCES = {
    "pi-damping": f"{IK}, §4.2",
    "unscaled-ridge": f"{IK}, Prop. 4.1",
    "zero-head": f"{IK}, §4.3",
    "under-damped": MEASURED,
}
HOW = "give --input-shape and --classes, or leave --examples out and the data are read"


def advise(
    experiment: Experiment,
    *,
    data: Dataset | None = None,
    examples: int | None = None,
    input_shape: Sequence[int] | None = None,
    classes: int | None = None,
    tuned: Experiment | None = None,
    parameters: Sequence[Parameter] = (),
    rates: Rates | None = None,
    measure: bool = False,
) -> Advice:
    """Say what to know before a run; nothing is trained and the model is never allocated.

    The data are read only for what neither the arguments nor :data:`mupx.datasets.facts.FACTS` know, and not
    at all once ``examples`` is given.

    Args:
        experiment: The run at its target width.
        data: The data where they are at hand.
        examples: Number of training examples.
        input_shape: Shape of one input; whole numbers (tokens) where the model takes no others.
        classes: Number of classes.
        tuned: The experiment as it was tuned, to compare with.
        parameters: The model's parameters where they are known, as from a recipe.
        rates: The machine's; from the cache, or measured, when left out.
        measure: Measure the rates again.

    Raises:
        UsageError: A name, a size or the model is wrong.
        MismatchError: Nothing in the model grows with width.
    """
    experiment = resolved(experiment)
    facts, data = _facts(experiment, data, examples, input_shape, classes)
    sizes = Sizes(facts.examples, experiment.train.batch_size, total_steps(experiment, facts.examples))
    device = pick_device(experiment.train.device)
    estimates: tuple[Estimate, ...] = ()
    network: Network | None = None
    if facts.input_shape:
        stand_in, parameters = _described(experiment, facts, data)
        network, extra = _network(experiment, stand_in, parameters)
    else:
        extra = [_unknown(f"times and memory need the shape of an input: {HOW}")]
    free, where = _free(device)
    if network is not None:
        if rates is None:
            rates = _rates(experiment, device, measure)
        estimates = tuple(_estimates(experiment, network, rates, sizes, facts))
    by_name = {found.optimizer: found for found in estimates}
    first, reasons = first_choice(sizes, by_name, free)
    curved = by_name.get(first) if first in by_name and by_name[first].refresh else by_name.get("kfac")
    epoch = sizes.examples // sizes.batch_size
    known = (curved.step, curved.refresh) if curved else (None, None)
    phases = recommended(sizes.steps, *known, epoch)
    second = curved.optimizer if curved else SECOND[0]
    statements = [
        *pays(sizes),
        *reasons,
        *about_refreshes(phases, sizes, curved),
        *_forgotten(experiment, second, phases, sizes),
        *extra,
        *about_memory(estimates, free, where),
        *not_transferred(experiment, sizes, tuned),
        *_lint(experiment, parameters, facts),
        *iterations(sizes, experiment.optimizer.name, list(OPTIMIZERS)),
    ]
    machine = rates.about if rates is not None and network is not None else {}
    return Advice(experiment, sizes, first, phases, estimates, free, machine, tuple(statements))


def _facts(
    experiment: Experiment,
    data: Dataset | None,
    examples: int | None,
    input_shape: Sequence[int] | None,
    classes: int | None,
) -> tuple[Facts, Dataset | None]:
    """Return the sizes of the data: what was given, what is known, what the loader says."""
    for name, values in (
        ("examples", [examples]),
        ("input_shape", input_shape or ()),
        ("classes", [classes]),
    ):
        if any(value is not None and value < 1 for value in values):
            raise UsageError(f"{name} takes whole numbers of at least 1, got {input_shape or values[0]}")
    known = FACTS.get(experiment.data.name) if not experiment.data.args else None
    if data is None and known is None and examples is None:
        data = parts.load_data(experiment)
    if data is not None:
        known = Facts(len(data.train), data.input_shape, data.classes)
    if known is None:
        known = Facts(0, (), 0)
    shape = known.input_shape if input_shape is None else tuple(input_shape)
    count = known.classes if classes is None else classes
    return Facts(examples or known.examples, shape if count else (), count), data


def _described(
    experiment: Experiment, facts: Facts, data: Dataset | None
) -> tuple[Dataset, Sequence[Parameter]]:
    """Return data of the right shape, and the model's parameters."""
    if data is not None and data.input_shape == facts.input_shape and data.classes == facts.classes:
        return data, parts.describe(experiment, data)
    real, tokens = (_stand_in(facts, dtype) for dtype in (torch.float32, torch.long))
    try:
        return real, parts.describe(experiment, real)
    except (ModelFailedError, RuntimeError) as error:  # a user's own model raises what it raises
        if out_of_memory(error):
            raise
        try:
            return tokens, parts.describe(experiment, tokens)
        except (ModelFailedError, RuntimeError):
            raise UsageError(
                f"model {experiment.model.name} does not run on inputs of shape {facts.input_shape}, neither "
                f"on real numbers nor on tokens ({error}); give the shape of one input: --input-shape"
            ) from None


def _stand_in(facts: Facts, dtype: torch.dtype) -> Dataset:
    split = Split(torch.zeros(2, *facts.input_shape, dtype=dtype), torch.zeros(2, dtype=torch.long))
    return Dataset("stand-in", split, split, split, facts.classes, "")


def _network(
    experiment: Experiment, data: Dataset, parameters: Sequence[Parameter]
) -> tuple[Network | None, list[Statement]]:
    train = experiment.train
    try:
        model = outline(parts.factory(experiment, data), experiment.scaling.width)
        dtype = getattr(torch, train.dtype)
        example = data.train.inputs[:2]
        network = network_of(
            model.to(dtype),
            {p.name: p for p in parameters},
            example.to(dtype) if example.is_floating_point() else example,
            train.batch_size,
            train.loss,
            train.accumulate,
        )
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        if out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        return None, [
            _unknown(f"times and memory are not modelled: the model does not run without numbers ({reason})")
        ]
    extra = (
        []
        if train.amp == "off"
        else [_unknown(f"times are those of {train.dtype}: amp = {train.amp} is not modelled")]
    )
    if experiment.optimizer.statistics is not None:
        extra.append(_unknown("optimizer.statistics is not modelled: factors count as averaged at refreshes"))
    return network, extra


def _unknown(text: str) -> Statement:
    return Statement("cost", "not-modelled", "note", text, DERIVED)


def _rates(experiment: Experiment, device: torch.device, again: bool) -> Rates:
    if experiment.train.threads is not None:
        torch.set_num_threads(experiment.train.threads)
    return rates_of(device, getattr(torch, experiment.train.dtype), again)


def _estimates(
    experiment: Experiment, network: Network, rates: Rates, sizes: Sizes, facts: Facts
) -> Iterator[Estimate]:
    data = float(
        sizes.examples * math.prod(facts.input_shape) * (8 if experiment.train.dtype == "float64" else 4)
    )
    names = dict.fromkeys([*OPTIMIZERS, experiment.optimizer.name])
    epoch = sizes.examples // sizes.batch_size
    for name in names:
        if name in OPTIMIZERS:
            yield estimate(name, network, rates, experiment, sizes.steps, data, facts.classes, epoch)
        else:
            yield not_modelled(name)


def _free(device: torch.device) -> tuple[float | None, str]:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0]), f"{device}"
    free = free_memory(this_system(Path("runs"))) if device.type == "cpu" else None
    return None if free is None else float(free), "main memory"


def _forgotten(experiment: Experiment, name: str, phases: Phases, sizes: Sizes) -> Iterator[Statement]:
    """Say of the recommended schedule what the lint says of the configured one."""
    if any(forgotten(experiment, sizes.examples)):
        return
    section = {"name": name, "refresh": phases.notation}
    advised = experiment.model_copy(update={"optimizer": experiment.optimizer.model_copy(update=section)})
    for finding in forgotten(advised, sizes.examples):
        text = f"{name} with {phases.notation}: {finding.text}"
        yield Statement("refresh", finding.code, "note", text, DERIVED)


def _lint(experiment: Experiment, parameters: Sequence[Parameter], facts: Facts) -> Iterator[Statement]:
    if not parameters:
        found = list(forgotten(experiment, facts.examples))
    else:
        try:
            width = experiment.scaling.width
            found = examine(experiment, parameters, facts.classes, width, facts.examples)
        except MismatchError as error:
            yield Statement("transfer", "no-whole-shape", "warning", str(error), DERIVED)
            return
    for finding in found:
        source = LINT_SOURCES.get(finding.code, DERIVED)
        level: Level = "note" if finding.level == "note" else "warning"
        yield Statement("transfer", finding.code, level, finding.text, source)
