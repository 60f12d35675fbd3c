"""How good is the curvature? Spectra, damping, and the criterion c(P) along the step that was taken.

A step moves the weights by δθ, and the gradient of the same batch by δg; P is what the optimizer
multiplies gradients by. c(P) = E[δgᵀ P δg + δθᵀ P⁻¹ δθ] (PSGD, arXiv:1512.04202; as a measure of quality:
Ishikawa & Yokota, ICLR Tiny 2024) is lowest for the P that would have turned δg into δθ. It has the units
of a loss and grows with the square of the step, so what is written down is its value at the best multiple
of P over the lower bound of both terms, 2 |δθᵀ δg|:

    c = √(δgᵀ P δg · δθᵀ P⁻¹ δθ) / |δθᵀ δg|  ≥ 1  (Cauchy–Schwarz),

one sample of the expectation. It is 1 where P δg ∥ δθ, and depends neither on the lr nor on any factor on
the loss or on P. ``best_scale`` = √(δθᵀ Q⁻¹ δθ / δgᵀ Q δg) with Q = lr · P is that best multiple: above 1
the curvature along the step would have allowed a longer one.

δθ is the whole step, with momentum and weight decay, at the length it was taken: where the loss is no
quadratic, another lr gives another c. A layer's δg contains what other layers' steps did to its gradient: a
block-diagonal P cannot know that, and c says what it costs.

P is taken without the factor by which a graft or a normalisation (:mod:`mupx.update_norm`) changes the size
of an update: a tensor's c does not depend on it, but its ``best_scale`` and the c of all together do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mupx.optim.adapter import Trainable
from mupx.optim.base import multiplied

Gradients = Sequence[Tensor | None]


@dataclass(frozen=True)
class Criterion:
    """The terms of c(Q), Q = lr · P, for one tensor or, added up, for several.

    Attributes:
        gradients: δgᵀ Q δg.
        weights: δθᵀ Q⁻¹ δθ.
        overlap: δθᵀ δg.
    """

    gradients: float
    weights: float
    overlap: float

    def __add__(self, other: Criterion) -> Criterion:
        """Return the terms of both together."""
        return Criterion(
            self.gradients + other.gradients, self.weights + other.weights, self.overlap + other.overlap
        )

    @property
    def usable(self) -> bool:
        """Whether c is a number: something moved, and P is positive along it."""
        terms = (self.gradients, self.weights, abs(self.overlap))
        return all(math.isfinite(term) and term > 0 for term in terms)

    def report(self) -> dict[str, float | None]:
        """Return ``c`` and ``best_scale``, None where they are not numbers."""
        if not self.usable:
            return {"c": None, "best_scale": None}
        c = math.sqrt(self.gradients) * math.sqrt(self.weights) / abs(self.overlap)
        return {"c": c, "best_scale": math.sqrt(self.weights / self.gradients)}


def criterion(
    optimizer: Trainable, parameter: Tensor, group: dict[str, Any], moved: Tensor, change: Tensor
) -> Criterion | None:
    """Return the terms of one tensor, or None where the optimizer's P is not known.

    Args:
        optimizer: After its step.
        parameter: The tensor.
        group: Its group, with the lr of the step.
        moved: δθ, of the tensor's shape.
        change: δg, likewise.
    """
    lr = float(group["lr"])
    forth = optimizer.precondition(parameter, change, group)
    if forth is None:
        return None
    gradients = lr * _inner(change, forth)
    if not gradients > 0:  # an unusable factor makes P zero, which has no inverse
        return Criterion(gradients, 0.0, _inner(moved, change))
    back = optimizer.precondition(parameter, moved, group, inverse=True)
    return None if back is None else Criterion(gradients, _inner(moved, back) / lr, _inner(moved, change))


def spectra(optimizer: Trainable, parameter: Tensor, group: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return, by symbol of a statistic, ``lambda_max``, ``damping`` = ρ/λmax and ``condition``.

    ``condition`` is (λmax + ρ)/(λmin + ρ), where the optimizer knows λmin.
    """
    found: dict[str, dict[str, Any]] = {}
    least = optimizer.least(parameter, group)
    for symbol, scale in optimizer.scales(parameter, group).items():
        entry: dict[str, Any] = {"lambda_max": _finite(scale.size)}
        if scale.ridge is not None:
            entry["damping"] = _ratio(scale.ridge, scale.size)
            if symbol in least:
                entry["condition"] = _ratio(scale.size + scale.ridge, least[symbol] + scale.ridge)
        found[symbol] = entry
    return found


class Watch:
    """One step under observation: made before its forward pass, read after the optimizer's step.

    It costs a copy of the weights and gradients, one more forward and backward pass, and per factor one
    decomposition; the run goes on to the last bit as it would without.

    Args:
        model: The model.
        device: Where it is.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._weights = [p.detach().clone() for p in self._named.values()]
        self._buffers = [b.clone() for b in model.buffers()]
        self._random = _random_state(device)
        self._gradients: Gradients = ()
        self.found: dict[str, Any] = {}

    def keep_gradients(self, optimizer: Trainable) -> None:
        """Keep the gradients at the old weights, before anything edits them.

        Args:
            optimizer: After the backward pass.
        """
        found = ((p, optimizer.gradient_of(p)) for p in self._named.values())
        self._gradients = [None if g is None else multiplied(g, p).clone() for p, g in found]

    def finish(self, optimizer: Trainable, again: Callable[[Sequence[Tensor]], Gradients]) -> None:
        """Measure after the step; the result is :attr:`found`.

        Args:
            optimizer: After its step.
            again: Return the gradients of the same batch with respect to these parameters.
        """
        after = self._replayed(lambda: again(list(self._named.values())))
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        tensors: dict[str, Any] = {}
        total: Criterion | None = None
        with torch.no_grad():
            for name, p, moved, change in self._changes(after):
                group = groups[id(p)]
                tensors[name] = spectra(optimizer, p, group)
                own = criterion(optimizer, p, group, moved, change)
                if own is not None:
                    tensors[name] |= own.report()
                if own is not None and own.usable:
                    total = own if total is None else total + own
        whole = {} if total is None else {f"curvature_{key}": value for key, value in total.report().items()}
        self.found = {**whole, "curvature": tensors}

    def _changes(self, after: Gradients) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        kept = zip(self._named.items(), self._weights, self._gradients, after, strict=True)
        for (name, p), weight, old, new in kept:
            if old is not None and new is not None:
                yield name, p, p.detach() - weight, new - old

    def _replayed(self, passes: Callable[[], Gradients]) -> Gradients:
        """Run the passes with the random numbers and buffers of the first time; put both back."""
        buffers = list(self._model.buffers())
        later = [b.clone() for b in buffers]
        random = _random_state(self._device)
        try:
            _set_buffers(buffers, self._buffers)
            _set_random_state(self._device, self._random)
            return passes()
        finally:
            _set_buffers(buffers, later)
            _set_random_state(self._device, random)


def _inner(a: Tensor, b: Tensor) -> float:
    # In float64, which not every device has: a long sum in float32 would drown a small overlap.
    x, y = (tensor.flatten().cpu().double() for tensor in (a, b))
    return float(x @ y)


def _set_buffers(buffers: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _ratio(a: float, b: float) -> float | None:
    return _finite(a / b) if b > 0 else None
