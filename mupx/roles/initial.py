"""The law a parameter is drawn from: torch's defaults are known, others are measured.

A known law has no noise, which matters for small tensors; it counts only while the tensor looks like a
draw from it, so that a constructor with an init of its own is measured.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor, nn

from mupx.roles.axes import CONVOLUTIONS, EMBEDDINGS, RECURRENT, TRANSPOSED

NOISE = 3.0  # standard errors within which a measured std counts as the expected one


class Law(NamedTuple):
    """A zero-mean law.

    Attributes:
        std: Its standard deviation.
        bound: Largest magnitude.
        spread: n × relative variance of the root mean square of n entries.
    """

    std: float
    bound: float
    spread: float


def initial_std(model: nn.Module, name: str) -> float:
    """Return the std of a parameter's initial law.

    For torch's defaults — U(−1/√fan_in, 1/√fan_in) of Linear and convolutions, that is std
    1/√(3 fan_in), U(−1/√hidden, 1/√hidden) of recurrent layers, Xavier's of MultiheadAttention, N(0, 1) of
    embeddings — the law's; otherwise it is measured on the tensor; 0 for constants.
    """
    return _measured(model, name)[0]


def own_std(model: nn.Module, name: str, expected: float) -> float:
    """Return :func:`initial_std`, or ``expected`` where a measured one differs from it by noise alone."""
    std, noise = _measured(model, name)
    return expected if std and expected and abs(std / expected - 1) < NOISE * noise else std


def _measured(model: nn.Module, name: str) -> tuple[float, float]:
    """Return a parameter's initial std and its relative standard error, 0 for a law that is known."""
    tensor = model.get_parameter(name).detach()
    path, _, leaf = name.rpartition(".")
    law = default_law(model.get_submodule(path), leaf)
    if _constant(tensor, drawn=law is not None):
        return 0.0, 0.0
    measured = float(tensor.double().square().mean().sqrt())
    if law is not None:
        close = abs(measured / law.std - 1) < 5 * math.sqrt(law.spread / tensor.numel())
        if close and float(tensor.abs().max()) <= law.bound * (1 + 1e-6):
            return law.std, 0.0
    return measured, math.sqrt(0.5 / tensor.numel())


def default_law(owner: nn.Module, leaf: str) -> Law | None:
    """Return the law torch draws this parameter of ``owner`` from; None where there is none known."""
    if isinstance(owner, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)):
        # torch computes fan-in from axis 1 for every layer type, transposed convolutions included.
        return _uniform(1 / math.sqrt(owner.weight[0].numel())) if leaf in ("weight", "bias") else None
    if isinstance(owner, EMBEDDINGS):
        return _normal(1.0)
    if isinstance(owner, RECURRENT):
        return _uniform(1 / math.sqrt(owner.hidden_size))
    if isinstance(owner, nn.Bilinear):
        return _uniform(1 / math.sqrt(owner.in1_features))
    if isinstance(owner, nn.MultiheadAttention):
        tensor: Tensor = getattr(owner, leaf)
        if leaf.endswith("proj_weight"):
            return _uniform(math.sqrt(6 / sum(tensor.shape)))
        return _normal(1 / math.sqrt(owner.embed_dim)) if leaf in ("bias_k", "bias_v") else None
    return None


def _uniform(bound: float) -> Law:
    return Law(bound / math.sqrt(3), bound, 0.2)


def _normal(std: float) -> Law:
    return Law(std, math.inf, 0.5)


def _constant(tensor: Tensor, drawn: bool) -> bool:
    if tensor.numel() == 1 and drawn:
        # The bias of one output looks constant but is drawn all the same.
        return float(tensor) in (0.0, 1.0)
    return tensor.numel() == 0 or bool((tensor == tensor.flatten()[0]).all())
