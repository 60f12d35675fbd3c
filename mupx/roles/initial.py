"""The law a parameter is drawn from: torch's defaults are known, others are measured."""

from __future__ import annotations

import math

from torch import Tensor, nn

from mupx.roles.axes import CONVOLUTIONS, TRANSPOSED


def initial_std(model: nn.Module, name: str) -> float:
    """Return the std of a parameter's initial law.

    For torch's defaults — U(−1/√fan_in, 1/√fan_in), that is 1/√(3 fan_in), of Linear and convolutions,
    N(0, 1) of embeddings — the law's; otherwise it is measured on the tensor; 0 for constants.
    """
    tensor = model.get_parameter(name).detach()
    default = _default_law(model.get_submodule(name.rpartition(".")[0]))
    if _constant(tensor, drawn=default is not None):
        return 0.0
    measured = float(tensor.double().square().mean().sqrt())
    if default is None:
        return measured
    law, bound, spread = default
    close = abs(measured / law - 1) < 5 * math.sqrt(spread / tensor.numel())
    return law if close and float(tensor.abs().max()) <= bound * (1 + 1e-6) else measured


def _default_law(owner: nn.Module) -> tuple[float, float, float] | None:
    """Return (std, bound, n × relative variance of the root mean square of n entries) of torch's default."""
    if isinstance(owner, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)):
        # torch computes fan-in from axis 1 for every layer type, transposed convolutions included.
        bound = 1 / math.sqrt(owner.weight[0].numel())
        return bound / math.sqrt(3), bound, 0.2
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return 1.0, math.inf, 0.5
    return None


def _constant(tensor: Tensor, drawn: bool) -> bool:
    if tensor.numel() == 1 and drawn:
        # The bias of one output looks constant but is drawn all the same.
        return float(tensor) in (0.0, 1.0)
    return tensor.numel() == 0 or bool((tensor == tensor.flatten()[0]).all())
