"""Time per step and memory of each registered optimizer: what a network does, times what a machine can."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mupx.advice.costs import COSTS, Cost, Declared, Setting, Shape
from mupx.advice.network import Network
from mupx.advice.rates import Rates, elementwise
from mupx.advice.refreshes import configured_interval, count_refreshes
from mupx.config import Experiment
from mupx.scaling import RULES, ScalingRule

LOOP_CALLS = 120.0  # operations of the training loop around the passes: batch, schedule, loss, checks
BACKWARD = 1 / 3  # part of the passes that sends one more signal back, without weight gradients


@dataclass(frozen=True)
class Memory:
    """Bytes at the target width, on the device that trains.

    Attributes:
        parameters: With buffers.
        gradients: Of what trains, but for what the optimizer does without.
        state: The optimizer's.
        activations: Kept between forward and backward pass, at the whole batch.
        captured: Rows or products that wait for the optimizer.
        workspace: What the optimizer needs for one tensor at a time, at its largest.
        data: The training split.
    """

    parameters: float
    gradients: float
    state: float
    activations: float
    captured: float
    workspace: float
    data: float = 0.0

    @property
    def peak(self) -> float:
        """The most that lives at one time: at the end of the backward pass, or during the update."""
        lasting = self.parameters + self.gradients + self.state + self.data
        return lasting + self.captured + max(self.activations, self.workspace)


@dataclass(frozen=True)
class Estimate:
    """What an optimizer would cost.

    Attributes:
        optimizer: Its registered name.
        seconds: Per step, refreshes included; None where it is not modelled.
        step: Of a step without refresh.
        refresh: More for a refresh; zero for an optimizer without.
        refreshes: Refreshes in the whole run.
        memory: None where it is not modelled.
        treated: Part of the parameters that it treats itself; the rest goes to its fallback.
        note: How sure the numbers are, or why there are none.
    """

    optimizer: str
    seconds: float | None
    step: float | None
    refresh: float | None
    refreshes: int
    memory: Memory | None
    treated: float
    note: str

    def to_json(self) -> dict[str, Any]:
        """Return the estimate as a document."""
        memory = None if self.memory is None else {**asdict(self.memory), "peak": self.memory.peak}
        return {**asdict(self), "memory": memory, "modelled": self.memory is not None}


def not_modelled(name: str) -> Estimate:
    """Return the entry of an optimizer whose cost nobody has declared."""
    note = "not modelled: no cost is declared in mupx/advice/costs.py"
    return Estimate(name, None, None, None, 0, None, 0.0, note)


def estimate(
    name: str,
    network: Network,
    rates: Rates,
    experiment: Experiment,
    steps: int,
    data: float = 0.0,
    classes: int = 10,
    epoch: int | None = None,
    costs: Mapping[str, Declared] = COSTS,
) -> Estimate:
    """Predict time per step and memory of one optimizer.

    Args:
        name: Registered name.
        network: The model at its target width.
        rates: Of the machine.
        experiment: Its optimizer section decides how, whichever optimizer is named there.
        steps: Steps of the run.
        data: Bytes of the training split.
        classes: Outputs per term of the loss.
        epoch: Steps of one epoch.
        costs: Declared costs.
    """
    declared, rule = costs.get(name), RULES.get(name)
    if declared is None or rule is None:
        return not_modelled(name)
    refreshes = (
        count_refreshes(configured_interval(experiment.optimizer, steps, epoch), steps)
        if declared.refreshes
        else 0
    )
    setting = setting_of(experiment, rule, steps, refreshes, classes)
    own = [shape for shape in network.shapes if rule.kinds is None or shape.kind in rule.kinds]
    rest = [shape for shape in network.shapes if shape not in own]
    all_costs = [*_costs(declared.cost, own, setting), *_costs(COSTS[rule.fallback].cost, rest, setting)]
    passes = rates.seconds(network.passes)
    loop = rates.seconds(elementwise(0.0, 0.0, LOOP_CALLS))
    step = passes + loop + rates.seconds(op for cost in all_costs for op in cost.step)
    more = rates.seconds(op for cost in all_costs for op in cost.refresh)
    more += passes * BACKWARD * max((cost.passes for cost in all_costs), default=0.0)
    memory = Memory(
        network.parameters,
        network.gradients - sum(cost.spared for cost in all_costs),
        sum(cost.state for cost in all_costs),
        network.activations,
        sum(cost.captured for cost in all_costs),
        max((cost.workspace for cost in all_costs), default=0.0),
        data,
    )
    whole = sum(shape.numel for shape in network.shapes)
    treated = sum(shape.numel for shape in own) / whole if whole else 0.0
    note = (
        "compared with measured steps, benchmarks/cost_model.py"
        if declared.compared
        else ("from its operations; not compared with measured steps")
    )
    return Estimate(name, step + more * refreshes / steps, step, more, refreshes, memory, treated, note)


def setting_of(
    experiment: Experiment, rule: ScalingRule, steps: int, refreshes: int, classes: int
) -> Setting:
    """Return what decides an optimizer's cost in this experiment, whichever optimizer it names."""
    optimizer, hyper = experiment.optimizer, experiment.hyperparameters
    named = optimizer.damping_rule if optimizer.damping_rule in rule.damping else rule.default_damping
    return Setting(
        itemsize=8 if experiment.train.dtype == "float64" else 4,
        momentum=hyper.momentum > 0 or "momentum" in experiment.search.space,
        solver=optimizer.solver,
        damping_rule=named,
        fisher=optimizer.fisher,
        damping=hyper.damping,
        ema=optimizer.ema,
        interval=steps / max(refreshes, 1),
        blocks=optimizer.blocks,
        classes=classes,
        clipped=experiment.train.grad_clip is not None,
    )


def _costs(cost: Callable[[Shape, Setting], Cost], shapes: Iterable[Shape], setting: Setting) -> list[Cost]:
    return [cost(shape, setting) for shape in shapes]
