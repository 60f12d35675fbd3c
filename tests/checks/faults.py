"""Eight faults of width scaling, planted one at a time; each is a context in which a verification runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from mupx import scaling
from mupx.linalg import damped_inverse
from mupx.optim import kfac
from mupx.optim.kfac import KFAC
from mupx.run import Run
from mupx.scaling import ONE, DampingScale, LayerScale, Parametrization, Role, ScalingRule

from . import settings
from .settings import Setup, mutant, registered

MUP = scaling.PARAMETRIZATIONS["mup"]


class Swapped(Parametrization):
    """Learning rates computed with fan-in and fan-out exchanged."""

    def scale(self, rule: ScalingRule, role: Role, r_in: float, r_out: float, **more: Any) -> LayerScale:
        right = Parametrization.scale(self, rule, role, r_in, r_out, **more)
        wrong = Parametrization.scale(self, rule, role, r_out, r_in, **more)
        return right if role == "vector" else replace(right, lr=wrong.lr)


class FoldedKFAC(KFAC):
    """K-FAC with the bias folded into A as a homogeneous coordinate."""

    def __init__(self, params: Any, model: nn.Module, *args: Any, **more: Any) -> None:
        super().__init__(params, model, *args, **{**more, "solver": "dense"})  # reads its inverse below
        self._means: dict[int, Tensor] = {}
        for layer in self._layers.values():
            layer.register_forward_pre_hook(self._keep_mean)

    def _keep_mean(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._means[id(module)] = args[0].detach().flatten(0, -2).mean(0)

    def direction(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        right = super().direction(parameter, gradient, group)
        owner = self._bias_owner.get(id(parameter)) or self._layers[id(parameter)]
        if owner.bias is None:
            return right
        state = self.state[owner.weight]
        mean = self._means[id(owner)]
        A = torch.cat([state["A"], mean.unsqueeze(0)])
        A = torch.cat([A, torch.cat([mean, mean.new_ones(1)]).unsqueeze(1)], dim=1)
        inverse, _ = damped_inverse(A, 0.01 * A.diagonal().sum())
        joint = torch.cat([owner.weight.grad, owner.bias.grad.unsqueeze(1)], dim=1)  # type: ignore[union-attr,list-item]
        update = state["inverse_B"] @ joint @ inverse
        return update[:, -1] if parameter is owner.bias else update[:, :-1]


def flatten_groups(run: Run) -> None:
    """Write one learning rate into every group, as a scheduler that knows nothing of them does."""
    for group in run.optimizer.param_groups:
        group["lr"] = run.experiment.hyperparameters.lr * run.factor


@contextmanager
def ridges_unscaled(side: str) -> Iterator[None]:
    """Leave one absolute ridge of K-FAC at its base value."""
    rule = scaling.RULES["kfac"]
    right = rule.damping["absolute"]
    wrong = DampingScale(ONE, right.B) if side == "A" else DampingScale(right.A, ONE)
    changed = replace(rule, damping={**rule.damping, "absolute": wrong})
    with patch.dict(scaling.RULES, {"kfac": changed}):  # type: ignore[arg-type]
        yield


@contextmanager
def nothing() -> Iterator[None]:
    yield


@dataclass(frozen=True)
class Fault:
    """A planted fault: the setting it is planted in, how, and the words that must name it."""

    setup: Setup
    plant: Callable[[], Any]
    named: str
    where: str
    bias: bool = False
    parametrization: str = "mup"


FAULTS = {
    "lr not divided at the output": Fault(
        settings.SGD,
        lambda: registered(mutant("output", "lr", 1.0)),
        "lr not divided at the output",
        "output.weight",
        parametrization="mutant",
    ),
    "fan-in and fan-out swapped": Fault(
        settings.SGD,
        lambda: registered(Swapped("mutant", MUP.init, MUP.strategy, "")),
        "fan-in and fan-out swapped",
        "input.weight",
        parametrization="mutant",
    ),
    "output std not shrunk": Fault(
        settings.KFAC,
        lambda: registered(mutant("output", "init_std", 0.5)),
        "output std not shrunk",
        "output.weight",
        parametrization="mutant",
    ),
    "ρ_A not scaled": Fault(
        settings.KFAC_ABSOLUTE, lambda: ridges_unscaled("A"), "ρ_A not scaled", "hidden1.weight"
    ),
    "ρ_B not scaled": Fault(
        settings.KFAC_ABSOLUTE, lambda: ridges_unscaled("B"), "ρ_B not scaled", "hidden1.weight"
    ),
    "bias folded into A": Fault(
        settings.KFAC, lambda: patch.object(kfac, "KFAC", FoldedKFAC), "folded into A", "hidden1.bias", True
    ),
    "π-damping": Fault(settings.KFAC_PI, nothing, "π-damping", "input.weight"),
    "schedule flattens the groups": Fault(
        settings.SGD,
        lambda: patch.object(Run, "set_learning_rates", flatten_groups),
        "the schedule overwrites the groups' learning rates",
        "schedule-flattens-groups",
    ),
}
