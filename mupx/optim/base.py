"""What every mupx optimizer shares: groups, momentum, weight decay, the fallback, and one `step`.

An optimizer supplies :meth:`Base.direction`; it never overrides ``step``. Group keys besides torch's
own: ``algorithm`` (the optimizer's own name, or ``adamw`` for what it cannot treat), ``damping_A``,
``damping_B``, ``eps``, ``betas``, ``momentum``, ``weight_decay``, ``weight_decay_mode``, and ``graft`` and
``normalise`` (see :mod:`mupx.update_norm`).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, NamedTuple, get_args, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # as torch.optim: imports the compiler when first needed

from mupx.errors import UsageError
from mupx.gradients import all_finite, name_in, require_dense, require_real
from mupx.linalg import Scalar, counting_repairs, finite, over
from mupx.lowrank import Thin
from mupx.refresh import Refresh as Refresh
from mupx.refresh import refresh_interval as refresh_interval
from mupx.refresh import require_refresh as require_refresh
from mupx.running_means import adam_direction, adam_steps, can_fuse, heavy_ball, running
from mupx.scaling import WeightDecayMode, find_rule
from mupx.update_norm import SIZES, asks_for_size, sized

Groups = Iterable[Any]
Update = Tensor | Thin  # of a parameter's shape, or of its shape as a matrix
Gradient = Tensor | Thin  # likewise
Moving = Sequence[tuple[Tensor, dict[str, Any]]]  # parameters, each with its group
ADAM = ("exp_avg", "exp_avg_sq")  # m and v


class Scale(NamedTuple):
    """How large a statistic of the update is, and the ridge that is added to it.

    Attributes:
        size: λmax of a factor, or the RMS of √v̂ (gradient units).
        ridge: Damping or eps in the same units; None where none is added to this one.
        trace: Trace of the factor; None where there is none.
    """

    size: float
    ridge: float | None
    trace: float | None = None


def decayed(
    parameter: Tensor, gradient: Tensor, mode: str, weight_decay: Scalar, lr: Scalar, reference_lr: Scalar
) -> tuple[Scalar, Tensor]:
    """Return (factor on the weights, gradient) under one weight-decay convention.

    ``independent``: W ← (1 − λ·lr/reference_lr) W, so the decay follows the schedule but not the lr;
    ``adamw``: W ← (1 − λ·lr) W; ``l2``: λ W is added to the gradient.
    """
    if isinstance(weight_decay, float) and weight_decay == 0.0:
        return 1.0, gradient
    if mode == "l2":
        return 1.0, gradient + over(weight_decay, parameter) * parameter
    rate = weight_decay * lr if mode == "adamw" else weight_decay * (lr / reference_lr)
    return 1.0 - over(rate, parameter), gradient


class Base(torch.optim.Optimizer):
    """Shell around functions of tensors.

    Args:
        params: Parameters, ``named_parameters()``, or groups as :func:`mupx.param_groups` makes them.
        defaults: Group defaults; ``lr`` must be positive.

    Raises:
        UsageError: A hyperparameter is out of range.
    """

    algorithm: ClassVar[str]
    kept: ClassVar[tuple[str, ...]] = ()  # attributes that a copy or a pickle needs beside torch's own

    def __init__(self, params: Groups, defaults: dict[str, Any]) -> None:
        super().__init__(params, {"algorithm": self.algorithm, **SKIPS, **defaults})

    def __getstate__(self) -> dict[str, Any]:
        """Return groups, state and :attr:`kept`; torch's own forgets what a subclass adds."""
        return {**super().__getstate__(), **{key: getattr(self, key) for key in self.kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state; :meth:`load_state_dict` comes here too, with groups and state only."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("reference_lr", _copied(group["initial_lr"]))  # written before there was one
            for key, value in SKIPS.items():
                group.setdefault(key, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, filled up with the defaults and checked.

        Raises:
            UsageError: A hyperparameter is out of range, or a parameter is complex.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _validate(group)
        require_real(group)
        # Groups built from one tensor must not share it: a scheduler writes in place.
        group["lr"] = _copied(group["lr"])
        group.setdefault("initial_lr", _copied(group["lr"]))
        # What independent weight decay compares with. Not initial_lr: OneCycleLR writes its start into that.
        group.setdefault("reference_lr", _copied(group["lr"]))

    @abstractmethod
    def direction(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Update:
        """Return u such that the step is W ← W − lr·u; runs without autograd."""

    def gradient_of(self, parameter: Tensor) -> Gradient | None:
        """Return the gradient that the coming step is made from, or None where there is none."""
        return parameter.grad

    def before_gradients(self) -> None:
        """Put together what the passes left of the gradients."""

    def before_step(self) -> None:
        """Refresh whatever the directions of this step need."""

    def curvature(
        self, targets: Tensor | None = None, *, loss_scale: float = 1.0, gradients: bool = True
    ) -> AbstractContextManager[None]:
        """Wrap the forward and backward pass; optimizers with captured curvature override this."""
        return nullcontext()

    def update_curvature(self, outputs: Tensor, labels: Tensor | None = None) -> None:
        """Offer the model's outputs between forward and backward pass."""

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    # Traced as a part of a compiled function, updates of single parameters went wrong once torch had
    # recompiled too often; a step that looks at its gradients is broken into many graphs in any case.
    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Do one step; ``closure`` re-evaluates the model and returns the loss.

        Where a gradient is not finite nothing is done at all: weights, momentum, statistics and step
        counters stay as they are, and :attr:`skipped_steps` counts it. That is found by one norm over all
        gradients, one synchronisation with a GPU per step.

        Raises:
            UsageError: A gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        require_dense(self.param_groups)
        self.before_gradients()
        finite = all_finite(list(self._gradient_tensors()))
        for group in self.param_groups:
            group["skipped_steps"] += int(not finite)
            group["skipped_in_a_row"] = 0 if finite else group["skipped_in_a_row"] + 1
        if not finite:
            self.forget()
            return loss
        self.before_step()
        moving = ((p, g) for g in self.param_groups for p in g["params"] if self.gradient_of(p) is not None)
        self.update_all([(parameter, group) for parameter, group in moving if parameter.numel()])
        return loss

    def _gradient_tensors(self) -> Generator[Tensor]:
        for parameter in (p for group in self.param_groups for p in group["params"]):
            gradient = self.gradient_of(parameter)
            if isinstance(gradient, Thin):
                yield from (gradient.D, gradient.H)
            elif gradient is not None:
                yield gradient

    @property
    def skipped_steps(self) -> int:
        """Steps that were not done because a gradient was not finite."""
        return max(int(group["skipped_steps"]) for group in self.param_groups)

    @property
    def skipped_in_a_row(self) -> int:
        """How many of the last steps were not done, up to the first one that was."""
        return max(int(group["skipped_in_a_row"]) for group in self.param_groups)

    @contextmanager
    def repairing(self, parameter: Tensor) -> Generator[None]:
        """Count for a parameter what is repaired inside (see :func:`mupx.linalg.counting_repairs`)."""
        with counting_repairs() as found:
            yield
        if found.factors:
            state = self.state[parameter]
            state["repairs"] = state.get("repairs", 0) + found.factors

    @property
    def repairs(self) -> Counter[str]:
        """Parameter → factors of it that needed float64 or more damping than was asked for."""
        named = ((name_in(g, i), p) for g in self.param_groups for i, p in enumerate(g["params"]))
        return +Counter({name: self.state.get(p, {}).get("repairs", 0) for name, p in named})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients and what was captured with them, as after a step that a GradScaler skipped."""
        super().zero_grad(set_to_none)
        self.forget()

    def forget(self) -> None:
        """Drop what the passes captured for a step that will not be done."""

    def update_all(self, moving: Moving) -> None:
        """Move the parameters that have a gradient, each with its group."""
        for parameter, group in self.moved_at_once(moving):
            factor, update = self.update_of(parameter, group, self._decayed(parameter, group))
            self.move(parameter, group, factor, update)

    def moved_at_once(self, moving: Moving) -> Moving:
        """Move all that Adam moves, in a call for each lr and eps, and return what it cannot take."""
        rest, calls = [], defaultdict(list)
        for parameter, group in moving:
            numbers = (group["lr"], group["eps"], *group["betas"])
            tensors = self._adam_tensors(parameter) if self.is_adam(group) and _are_fixed(group) else None
            if tensors is None or not can_fuse(*tensors):
                rest.append((parameter, group))
                continue
            factor, gradient = self._decayed(parameter, group)
            if factor != 1.0:
                parameter.mul_(factor)
            state = self.state[parameter]
            step = state["step"] = state.get("step", 0) + 1
            calls[(step, *numbers)].append((parameter, multiplied(gradient, parameter), *tensors[2:]))
        for (step, lr, eps, *betas), together in calls.items():
            adam_steps(together, step, betas, eps, lr)
        return rest

    def is_adam(self, group: dict[str, Any]) -> bool:
        """Whether the updates of a group are those of :meth:`Base.adam`: of a subclass perhaps not."""
        return group["algorithm"] != self.algorithm and self.has_kept(Base, "adam", "update_of", "move")

    def has_kept(self, kind: type, *methods: str) -> bool:
        """Whether the methods are those of a class, overridden by none below it."""
        return all(getattr(type(self), name) is getattr(kind, name) for name in methods)

    def _adam_tensors(self, parameter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (W, g, m, v)."""
        gradient = multiplied(self.gradient_of(parameter), parameter)  # type: ignore[arg-type]
        mean, square = (running(self.state[parameter], key, gradient) for key in ADAM)
        return parameter, gradient, mean, square

    def update_of(
        self, parameter: Tensor, group: dict[str, Any], decayed: tuple[Scalar, Gradient]
    ) -> tuple[Scalar, Update]:
        """Return (factor on the weights, direction) from (that factor, the gradient)."""
        factor, gradient = decayed
        direct = self.adam if group["algorithm"] != self.algorithm else self.direction
        with self.repairing(parameter):
            return factor, direct(parameter, gradient, group)  # type: ignore[arg-type]

    def move(self, parameter: Tensor, group: dict[str, Any], factor: Scalar, update: Update) -> None:
        """Do W ← factor · W − lr · u."""
        fallback = group["algorithm"] != self.algorithm
        lr = group["lr"] if fallback else self.step_size(parameter, group)
        if isinstance(update, Thin):
            plain = parameter.is_contiguous() and parameter.dtype == update.D.dtype
            if plain and not isinstance(lr, Tensor) and not isinstance(factor, Tensor):
                update.add_to(parameter.flatten(1), factor, -lr)
                return
            update = multiplied(update, parameter)
        if not (isinstance(factor, float) and factor == 1.0):
            parameter.mul_(factor)
        if isinstance(lr, Tensor):
            parameter.sub_(lr.to(update.dtype) * update)
        else:
            parameter.add_(update, alpha=-lr)

    def _decayed(self, parameter: Tensor, group: dict[str, Any]) -> tuple[Scalar, Gradient]:
        """Return (factor on the weights, gradient) under the group's weight decay."""
        decay = (group["weight_decay_mode"], group["weight_decay"], group["lr"], group["reference_lr"])
        gradient = self.gradient_of(parameter)
        if isinstance(gradient, Thin) and group["weight_decay_mode"] == "l2":
            gradient = multiplied(gradient, parameter)
        return decayed(parameter, gradient, *decay)  # type: ignore[arg-type]

    def step_size(self, parameter: Tensor, group: dict[str, Any]) -> Scalar:
        """Return what multiplies the direction: the lr, times a scale of the optimizer's own if it has one.

        Weight decay follows the lr alone.
        """
        lr: Scalar = group["lr"]
        return lr

    def _gradient(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the gradient that the parameter's update is made from."""
        l2 = group["weight_decay"] if group["weight_decay_mode"] == "l2" else 0.0
        gradient = multiplied(self.gradient_of(parameter), parameter)  # type: ignore[arg-type]
        return decayed(parameter, gradient, "l2", l2, 1.0, 1.0)[1]

    def adam(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Return Adam's direction: the whole of AdamW, and the fallback of the others."""
        state = self.state[parameter]
        step = state["step"] = state.get("step", 0) + 1
        mean, square = (running(state, key, gradient) for key in ADAM)
        return adam_direction(gradient, mean, square, step, group["betas"], group["eps"])

    def scales(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Scale]:
        """Return the sizes of the statistics behind a parameter's last update, by symbol.

        ``v`` is Adam's: RMS of √v̂ against eps. Optimizers with curvature add ``A``, ``B`` or ``L``, ``R``.
        """
        state = self.state.get(parameter, {})
        if "exp_avg_sq" not in state:
            return {}
        square = state["exp_avg_sq"].mean().item() / (1 - group["betas"][1] ** state["step"])
        return {"v": Scale(math.sqrt(square), float(group["eps"]))}

    def least(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, float]:
        """Return λmin of the statistics of :meth:`scales` whose spectrum is known, by symbol.

        It may cost a decomposition of each.
        """
        return {}

    def precondition(
        self, parameter: Tensor, vector: Tensor, group: dict[str, Any], *, inverse: bool = False
    ) -> Tensor | None:
        """Return P v for the P of the last update, u = P g but for momentum; changes no state.

        Args:
            parameter: The parameter P belongs to.
            vector: v, of the parameter's shape.
            group: The parameter's group.
            inverse: Return P⁻¹ v instead.

        Returns:
            The product, or None where there was no update yet or the optimizer's is no matrix times g.
        """
        if group["algorithm"] == self.algorithm:
            return None
        return self.adam_precondition(parameter, vector, group, inverse)

    def adam_precondition(
        self, parameter: Tensor, vector: Tensor, group: dict[str, Any], inverse: bool
    ) -> Tensor | None:
        """Return P v or P⁻¹ v for Adam's P = diag(1/(√v̂ + eps))."""
        state = self.state.get(parameter, {})
        if "exp_avg_sq" not in state:
            return None
        corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** state["step"])
        diagonal: Tensor = corrected.sqrt() + over(group["eps"], corrected)
        return vector * diagonal if inverse else vector / diagonal

    @overload
    def momentum(self, parameter: Tensor, update: Tensor, group: dict[str, Any]) -> Tensor: ...
    @overload
    def momentum(self, parameter: Tensor, update: Update, group: dict[str, Any]) -> Update: ...
    def momentum(self, parameter: Tensor, update: Update, group: dict[str, Any]) -> Update:
        """Return the heavy-ball buffer after adding ``update`` in the size that the group asks for."""
        momentum = group["momentum"]
        still = isinstance(momentum, float) and momentum == 0.0
        if still and not asks_for_size(group):
            return update
        update = multiplied(update, parameter)
        if asks_for_size(group):
            update = sized(update, self._gradient(parameter, group), self.state[parameter], group)
        if still:
            return update
        state = self.state[parameter]
        buffer = state["momentum_buffer"] = heavy_ball(update, state.get("momentum_buffer"), momentum)
        return buffer


# Kept with the groups: what a copy, a pickle or a sharded checkpoint carries of an optimizer.
SKIPS = {"skipped_steps": 0, "skipped_in_a_row": 0}
DEFAULTS: dict[str, Any] = {
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "weight_decay_mode": "independent",
}


def multiplied(update: Update, parameter: Tensor) -> Tensor:
    """Return an update in its parameter's shape."""
    return update.product.view(parameter.shape) if isinstance(update, Thin) else update


def split_ridge(damping: float, ratio: float) -> tuple[float, float]:
    """Return ρ_A = ρ·√ratio and ρ_B = ρ/√ratio.

    Raises:
        UsageError: Either is not a finite positive number.
    """
    for name, value in (("damping", damping), ("damping_ratio", ratio)):
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"{name} must be a finite number > 0, got {value}")
    return damping * math.sqrt(ratio), damping / math.sqrt(ratio)


def average_weight(ema: float, seen: int, gap: int) -> float:
    """Return the weight of a new factor in a running average: max(1 − ema^gap, 1/(seen + 1)).

    The memory is measured in steps, not in refreshes; a plain mean until the window of ``ema`` is filled
    means that the start needs no bias correction.

    Args:
        ema: Decay per step.
        seen: Factors averaged so far.
        gap: Steps since the last one.
    """
    return max(1.0 - ema**gap, 1.0 / (seen + 1))


def running_average(old: Tensor | None, new: Tensor, ema: float, seen: int, gap: int) -> Tensor:
    """Return (1 − w) old + w new with :func:`average_weight`'s w; the new factor alone at first."""
    return new if old is None else torch.lerp(old, new, average_weight(ema, seen, gap))


def finite_or(new: Tensor, old: Tensor | None) -> Tensor | None:
    """Return ``new``, or ``old`` where an overflow would otherwise stay in a running statistic for ever.

    Of a batch ``[count, d, d]`` each member is kept or replaced, by zero if there is no old one.
    """
    if new.dim() < 3:
        low, high = new.aminmax()
        return new if bool(low.isfinite() & high.isfinite()) else old
    whole = finite(new)
    if bool(whole.all()):
        return new
    return torch.where(whole[..., None, None], new, torch.zeros_like(new) if old is None else old)


def sort_groups(
    params: Groups, fallback_lr: Scalar, treats: Callable[[Tensor], bool]
) -> list[dict[str, Any]]:
    """Split groups that do not state their algorithm into the optimizer's own part and AdamW's.

    Args:
        params: Parameters, (name, parameter) pairs, or groups of either.
        fallback_lr: Learning rate of AdamW's part.
        treats: Whether the optimizer can treat a parameter.
    """
    entries = list(params)
    groups = entries if entries and isinstance(entries[0], dict) else [{"params": entries}]
    result: list[dict[str, Any]] = []
    for group in groups:
        if "algorithm" in group:
            result.append(group)
            continue
        items = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        mine = [i for i in items if treats(i[1] if isinstance(i, tuple) else i)]
        rest = [i for i in items if not treats(i[1] if isinstance(i, tuple) else i)]
        if mine:
            result.append({**group, "params": mine})
        if rest:
            result.append({**group, "params": rest, "algorithm": "adamw", "lr": fallback_lr})
    return result


def require_choice(what: str, given: str, allowed: Iterable[str]) -> str:
    """Return ``given`` or refuse it, naming what is allowed."""
    if given not in (names := list(allowed)):
        raise UsageError(f"{what} must be one of {', '.join(names)}, got {given!r}")
    return given


def require_damping_rule(optimizer: str, given: str) -> str:
    """Return ``given`` if the optimizer's scaling rule knows this damping rule."""
    return require_choice(f"damping_rule of {optimizer}", given, find_rule(optimizer).damping)


def _are_fixed(group: dict[str, Any]) -> bool:
    """Whether no hyperparameter of Adam's is a tensor, which torch may change while a graph is replayed."""
    return not any(isinstance(group[key], Tensor) for key in ("lr", "eps", "weight_decay"))


def _copied(lr: Scalar) -> Scalar:
    return lr.clone() if isinstance(lr, Tensor) else lr


def _validate(group: dict[str, Any]) -> None:
    for key in ("lr", "eps", "weight_decay", "momentum", "damping_A", "damping_B"):
        value = group.get(key)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UsageError(f"{key} must be a finite number ≥ 0, got {float(value)}")
    for key in ("lr", "eps"):
        if not group[key] > 0:
            raise UsageError(f"{key} must be > 0, got {float(group[key])}")
    for key, value in (("momentum", group["momentum"]), *(("betas", beta) for beta in group["betas"])):
        if not 0 <= value < 1:
            raise UsageError(f"{key} must be ≥ 0 and < 1, got {value}")
    require_choice("weight_decay_mode", group["weight_decay_mode"], get_args(WeightDecayMode))
    for key, allowed in SIZES.items():
        require_choice(key, group.get(key, "none"), allowed)
