"""Muon: the momentum of a matrix gradient, orthogonalised by a Newton–Schulz iteration.

Update: W ← W − lr · s(d_out, d_in) · O with O ≈ U Vᵀ for the momentum U Σ Vᵀ, ``[d_out, d_in]``. Matrices:
weights flattened after their first axis (Linear ``[out, in]``, convolutions ``[out, in·k…]``); a packed
weight (query, key and value of one attention, the gates of a recurrent layer) is cut into equal parts of
its rows, each a matrix of its own. What is no matrix (biases, gains), and embeddings, go to AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from mupx.errors import UsageError
from mupx.linalg import Scalar, over
from mupx.optim.base import DEFAULTS, Groups, Scale, require_choice, sort_groups
from mupx.optim.divided import Divided
from mupx.running_means import running

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steepest at zero: singular values end near 1, not at it
MOST_STEPS = 100
# s(d_out, d_in) by torch's name of it; fan_ratio is a third one.
SCALES: Mapping[str, Callable[[float, float], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "fan_ratio": lambda rows, columns: math.sqrt(rows / columns),
}
DTYPES = ("bfloat16", "parameter")
PACKED: Mapping[type[nn.Module], tuple[str, int]] = {  # torch's own: leaf names that start so, parts
    nn.MultiheadAttention: ("in_proj_weight", 3),
    nn.LSTM: ("weight_", 4),
    nn.LSTMCell: ("weight_", 4),
    nn.GRU: ("weight_", 3),
    nn.GRUCell: ("weight_", 3),
}


def averaged(gradient: Tensor, mean: Tensor, momentum: Scalar, nesterov: bool = True) -> Tensor:
    """Return what is orthogonalised: m ← μ m + (1 − μ) g, and with ``nesterov`` (1 − μ) g + μ m.

    Args:
        gradient: g, ``[..., *shape]``.
        mean: m before this step, zeros at first; overwritten.
        momentum: μ, broadcastable against ``[...]``.
        nesterov: Look one step ahead.
    """
    weight = over(momentum, gradient)
    mean.lerp_(gradient, 1 - weight)
    return torch.lerp(gradient, mean, weight) if nesterov else mean


def newton_schulz(
    matrix: Tensor,
    steps: int = 5,
    coefficients: Sequence[float] = COEFFICIENTS,
    eps: Scalar = 1e-7,
) -> Tensor:
    """Return p∘…∘p(M / max(‖M‖_F, eps)) with p(X) = a X + b (X Xᵀ) X + c (X Xᵀ)² X, in M's precision.

    p acts on the singular values alone and drives them towards 1: the result is near U Vᵀ of M = U Σ Vᵀ.

    Args:
        matrix: M, ``[..., m, n]``.
        steps: Number of iterations.
        coefficients: (a, b, c).
        eps: Smallest norm that is divided by, in the units of M, broadcastable against ``[...]``.
    """
    a, b, c = coefficients
    tall = matrix.shape[-2] > matrix.shape[-1]
    X = matrix.mT if tall else matrix  # the Gram matrix of the shorter side
    norm = X.norm(dim=(-2, -1), keepdim=True)
    X = X / norm.clamp(min=torch.as_tensor(over(eps, norm), dtype=norm.dtype, device=norm.device))
    for _ in range(steps):
        gram = X @ X.mT
        X = _plus_product(X, _plus_product(gram, gram, gram, b, c), X, a, 1.0)
    return X.mT if tall else X


def _plus_product(base: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float) -> Tensor:
    """Return β base + α left right, in one rounding."""
    if base.dim() == 2:
        return torch.addmm(base, left, right, beta=beta, alpha=alpha)
    stack = [tensor.flatten(0, -3) for tensor in (base, left, right)]
    return torch.baddbmm(*stack, beta=beta, alpha=alpha).view_as(base)


class Muon(Divided):
    """Muon with Nesterov momentum, to the last bit that of ``torch.optim.Muon`` where no width has grown.

    s is ``original``: √max(1, d_out/d_in), ``match_rms_adamw``: 0.2 √max(d_out, d_in), or ``fan_ratio``:
    √(d_out/d_in). Width rule (arXiv:2512.05620, 2603.00541): lr × (r_out/r_in)^½, the same as for O alone,
    because s is taken at the shape the tensor has at the base width (``reference_shape`` of a group of
    :func:`mupx.param_groups`): there lr means what it means in torch, and growth is the rule's alone.
    torch's s, taken at the grown shape, would grow once more, for an input layer by another √r_out.

    Args:
        params: Parameters or groups; tensors with fewer than two axes go to AdamW. Without groups an
            embedding's weight cannot be told from a matrix: give it a group with ``"algorithm": "adamw"``.
        lr: Learning rate.
        momentum: μ of the running mean of the gradient.
        nesterov: Look one step ahead.
        adjust_lr_fn: Which s.
        ns_steps: Newton–Schulz iterations.
        ns_coefficients: (a, b, c) of :func:`newton_schulz`.
        dtype: What the iteration is done in: ``bfloat16``, as torch does, or ``parameter``: the weight's
            own. Weights in float64 are always iterated in float64.
        parts: Name pattern → number of equal parts that a packed weight's rows are cut into; 1 elsewhere.
        model: The module the parameters belong to: with it the packed weights of torch's own attention and
            recurrent layers need no pattern.
        fallback_lr: AdamW's learning rate for biases and gains.
        betas: AdamW's betas for the same.
        eps: Smallest norm of a gradient that is divided by; and AdamW's eps.
        weight_decay: λ under ``weight_decay_mode``; torch's default is 0.1 in the convention ``adamw``.
        weight_decay_mode: ``independent``, ``adamw`` or ``l2``.

    Raises:
        UsageError: A hyperparameter is out of range, or a weight cannot be cut as ``parts`` says.

    Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; the RMS of
    AdamW: J. Liu et al., "Muon is Scalable for LLM Training", arXiv:2502.16982.
    """

    algorithm = "muon"
    dispatches = True
    kept = ("nesterov", "adjust_lr_fn", "ns_steps", "ns_coefficients", "dtype")

    def __init__(
        self,
        params: Groups,
        lr: Scalar = 1e-3,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        adjust_lr_fn: str = "original",
        ns_steps: int = 5,
        ns_coefficients: Sequence[float] = COEFFICIENTS,
        dtype: str = "bfloat16",
        parts: Mapping[str, int] | None = None,
        model: nn.Module | None = None,
        fallback_lr: Scalar = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-7,
        weight_decay: float = 0.0,
        weight_decay_mode: str = "independent",
    ) -> None:
        if not 1 <= ns_steps < MOST_STEPS or len(ns_coefficients) != 3:
            raise UsageError(
                f"ns_steps must be 1 to {MOST_STEPS - 1} and ns_coefficients three numbers, got {ns_steps} "
                f"and {ns_coefficients}"
            )
        self.nesterov, self.ns_steps = nesterov, ns_steps
        self.adjust_lr_fn = require_choice("adjust_lr_fn", adjust_lr_fn, SCALES)
        self.ns_coefficients = tuple(ns_coefficients)
        self.dtype = require_choice("dtype", dtype, DTYPES)
        defaults = {
            **DEFAULTS,
            "lr": lr,
            "momentum": momentum,
            "parts": 1,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "weight_decay_mode": weight_decay_mode,
        }
        groups = sort_groups(params, fallback_lr, lambda p: p.dim() >= 2)
        super().__init__(_cut(groups, parts or {}, model), defaults)

    def cost(self, parameter: Tensor) -> float:
        """Return the multiplications of one iteration, 2 m² n + m³ for the shorter side m of a part."""
        parts = next(g["parts"] for g in self.param_groups if any(p is parameter for p in g["params"]))
        rows, columns = parameter.flatten(1).shape
        m, n = sorted((rows // parts, columns))
        return float(parts * (2 * m**2 * n + m**3))

    def direction(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Return O, part by part."""
        mean = running(self.state[parameter], "momentum_buffer", gradient)
        matrix = averaged(gradient, mean, group["momentum"], self.nesterov).flatten(1)
        if self.dtype == "bfloat16" and matrix.dtype != torch.float64:
            matrix = matrix.bfloat16()
        parts = [
            newton_schulz(part, self.ns_steps, self.ns_coefficients, group["eps"])
            for part in matrix.chunk(group["parts"])
        ]
        return torch.cat(parts).to(gradient.dtype).view_as(gradient)

    def step_size(self, parameter: Tensor, group: dict[str, Any]) -> Scalar:
        """Return lr · s at the shape of a part at the base width."""
        rows, *columns = group.get("reference_shape") or parameter.shape
        lr: Scalar = group["lr"]
        return lr * SCALES[self.adjust_lr_fn](rows / group["parts"], math.prod(columns))

    def scales(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Scale]:
        """Return the Frobenius norm of the momentum, the least of its parts, against eps."""
        mean = self.state.get(parameter, {}).get("momentum_buffer")
        if mean is None:
            return super().scales(parameter, group)
        norms = torch.stack([part.norm() for part in mean.chunk(group["parts"])])
        return {"G": Scale(norms.min().item(), float(group["eps"]))}


def _cut(groups: list[dict[str, Any]], parts: Mapping[str, int], model: nn.Module | None) -> list[Any]:
    """Split groups so that one says of all its weights into how many parts they are cut."""
    own = {} if model is None else _packed(model)
    unused, result = set(parts), []
    for group in groups:
        if group.get("algorithm", Muon.algorithm) != Muon.algorithm or "parts" in group:
            result.append(group)
            continue
        items = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        by_number: dict[int, list[Any]] = {}
        for item in items:
            name, parameter = item if isinstance(item, tuple) else ("", item)
            matched = [pattern for pattern in parts if fnmatchcase(name, pattern)]
            unused.difference_update(matched)
            number = parts[matched[-1]] if matched else own.get(id(parameter), 1)
            by_number.setdefault(_number(name, parameter, number), []).append(item)
        result += [{**group, "params": found, "parts": number} for number, found in by_number.items()]
    if unused:
        raise UsageError(
            f"parts: no named weight of two or more axes matches {sorted(unused)[0]!r}; the patterns are of "
            "names as in model.named_parameters(), which have to be given with the parameters"
        )
    return result


def _packed(model: nn.Module) -> dict[int, int]:
    found = {}
    for module in model.modules():
        prefix, number = PACKED.get(type(module), ("", 1))
        for leaf, parameter in module.named_parameters(recurse=False):
            # An LSTM's projection (weight_hr) is one matrix.
            if number > 1 and leaf.startswith(prefix) and not leaf.startswith("weight_hr"):
                found[id(parameter)] = number
    return found


def _number(name: str, parameter: Tensor, number: int) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or number < 1 or len(parameter) % number:
        raise UsageError(
            f"parts: {name or 'a weight'} has {len(parameter)} rows, which cannot be cut into {number!r} "
            "equal parts"
        )
    return number
