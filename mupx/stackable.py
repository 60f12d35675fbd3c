"""Whether to train runs in lock-step, and if not, why; that they can be is found by trying a few examples."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.modules.batchnorm import _NormBase

from mupx.config import Experiment
from mupx.curvature import Captured, functional_gradients, zero_probes
from mupx.layer_rows import factorable_layers
from mupx.optim.captured import Captured as CapturedOptimizer
from mupx.run import Run
from mupx.stacked import UPDATES

EXAMPLES = 8
APART = 1.1  # what the parameters of the second member are multiplied by
CHANNELS = 8  # of a convolution, above which several side by side gain nothing on a CPU, measured
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}


def obstacle(run: Run) -> str | None:
    """Return why runs like this one are not trained in lock-step, in one clause; None where they are.

    Args:
        run: Not started, and of no further use: its weights are changed.
    """
    return obstacle_in_settings(run) or _in_the_model(run) or _slower(run)


def obstacle_in_settings(run: Run) -> str | None:
    """Return which optimizer or setting has no update for several models at once; the run stays as it is."""
    experiment: Experiment = run.experiment
    own, config = experiment.optimizer, experiment.train
    if type(run.optimizer) not in UPDATES:
        return f"{own.name} has no update for several models at once"
    if isinstance(run.optimizer, CapturedOptimizer) and run.optimizer.fisher in ("mc", "exact"):
        return f"the {run.optimizer.fisher} Fisher needs backward passes of its own"
    refused = {
        "optimizer.solver": own.solver == "low-rank" and own.solver,
        "optimizer.graft": own.graft != "none" and own.graft,
        "optimizer.normalise": own.normalise != "none" and own.normalise,
        "train.accumulate": config.accumulate > 1 and config.accumulate,
    }
    found = [f"{key} = {value}" for key, value in refused.items() if value]
    return f"{found[0]} has no update for several models at once" if found else None


def _in_the_model(run: Run) -> str | None:
    for name, module in run.model.named_modules():
        if isinstance(module, _NormBase) and module.running_mean is not None:
            return f"{name or 'the model'} ({type(module).__name__}) keeps running statistics in training"
    for name, parameter in run.model.named_parameters():
        if not parameter.requires_grad:
            return f"{name} is not trained"
    inputs, targets = (part[:EXAMPLES] for part in run.batch())
    run.model.train()
    try:
        return _difference(run, _two_at_once(run, inputs, targets), inputs, targets)
    except Exception as error:  # whatever a model does that vmap does not follow
        said = str(error).strip().splitlines() or [type(error).__name__]
        return f"torch.func.vmap does not run the model ({said[0].partition('. ')[0]})"


def _slower(run: Run) -> str | None:
    """Return which layer makes lock-step no quicker than one run after the other."""
    for name, module in run.model.named_modules():
        if not isinstance(module, nn.Conv2d) or module.weight.device.type != "cpu":
            continue
        if module.in_channels > CHANNELS and module.kernel_size != (1, 1):
            return (
                f"{name or 'the model'} is a convolution of {module.in_channels} channels, and on a CPU"
                " nothing is gained by several of those side by side"
            )
    return None


def _two_at_once(run: Run, inputs: Tensor, targets: Tensor) -> Captured:
    """Return the passes of the model and of one with other weights, as a population does them.

    What autocast makes of them is tried as well, and not returned: it is too coarse to compare.
    """
    values = {name: torch.stack([p.detach(), APART * p.detach()]) for name, p in run.model.named_parameters()}
    probes = zero_probes(run.model, inputs)

    def one(own: dict[str, Tensor], precision: Callable[[], Any]) -> Captured:
        return functional_gradients(run.model, run.loss, own, inputs, targets, probes, precision=precision)

    with warnings.catch_warnings():  # without a batching rule vmap loops over the members
        warnings.filterwarnings("error", message=".*performance drop.*")
        if run.experiment.train.amp != "off":
            vmap(partial(one, precision=run.precision))(values)
        captured: Captured = vmap(partial(one, precision=nullcontext))(values)
    return captured


def _difference(run: Run, together: Captured, inputs: Tensor, targets: Tensor) -> str | None:
    """Compare with the model itself, given the second member's weights."""
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.mul_(APART)
    calls = _backward(run, inputs, targets)
    twice = [name for name, count in calls.items() if count > 1]
    if twice and isinstance(run.optimizer, CapturedOptimizer):
        return f"{twice[0]} runs more than once in one forward pass"
    for name, parameter in run.model.named_parameters():
        if parameter.grad is None:
            return f"{name} gets no gradient"
        other, scale = together.gradients[name][1], parameter.grad.abs().max()
        if not bool((other - parameter.grad).abs().max() <= TOLERANCE[run.dtype] * scale):
            return f"under torch.func.vmap the gradient of {name} is another one"
    return None


def _backward(run: Run, inputs: Tensor, targets: Tensor) -> Counter[str]:
    """Run the passes of the model itself, and return how often each layer ran."""
    calls: Counter[str] = Counter()

    def counting(name: str) -> Callable[..., None]:
        return lambda module, args, output: calls.update([name])

    layers: dict[str, nn.Module] = dict(factorable_layers(run.model))
    handles = [layer.register_forward_hook(counting(name)) for name, layer in layers.items()]
    try:
        run.loss(run.model(inputs), targets).backward()
    finally:
        for handle in handles:
            handle.remove()
    return calls
