"""What `gpt` and `vit` share: pre-norm residual blocks of attention and a perceptron.

Query, key, value and output projections are `nn.Linear`s of their own, so that each has its own
Kronecker factors. Attention logits are q·k × scale:

* fixed head size d (the default): scale = 1/√d, and width adds heads;
* growing head size at a fixed number of heads: scale = √d₀ / d, equal to 1/√d at the base head size d₀,
  as trained queries and keys align and q·k is then of order d (arXiv:2203.03466, definition 4.1).
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mupx.errors import UsageError
from mupx.models.arguments import activation_of, require_integer, require_positive

EXPANSION = 4  # hidden units of the perceptron per channel
ROTARY_BASE = 10_000.0


class Heads(NamedTuple):
    """How width is divided among attention heads, and the factor on q·k."""

    number: int
    size: int
    scale: float


def divide_heads(width: int, head_dim: int | None, heads: int | None, head_growth: int | None) -> Heads:
    """Divide ``width`` into heads of fixed size, or into a fixed number of growing heads.

    Args:
        width: Channels of the residual stream.
        head_dim: Size of a head, the same at every width (None: 16 unless ``heads`` is given).
        heads: Number of heads, the same at every width; then ``head_growth`` is needed.
        head_growth: Base head size d₀, at which the logits scale equals 1/√d.

    Raises:
        UsageError: The two ways are mixed, or width is not a multiple.
    """
    if heads is None:
        if head_growth is not None:
            raise UsageError("head_growth needs the number of heads; give heads, or leave head_growth out")
        size = 16 if head_dim is None else head_dim
        require_integer("head_dim", size)
        _require_multiple(width, "head_dim", size)
        return Heads(width // size, size, 1 / math.sqrt(size))
    require_integer("heads", heads)
    if head_dim is not None or head_growth is None:
        raise UsageError(
            f"heads is {heads}, so the head size grows with width: give head_growth, the head size at the "
            "base width, and no head_dim; or leave heads out and give head_dim alone"
        )
    require_integer("head_growth", head_growth)
    _require_multiple(width, "heads", heads)
    size = width // heads
    return Heads(heads, size, math.sqrt(head_growth) / size)


def _require_multiple(width: int, name: str, factor: int) -> None:
    if width % factor:
        near = max(1, round(width / factor)) * factor
        raise UsageError(
            f"width is {width}, but must be a multiple of {name} {factor}; {near} is the nearest"
        )


class Rotary(nn.Module):
    """Rotate pairs of channels by an angle proportional to the position (arXiv:2104.09864).

    Args:
        size: Head size, even.
        context: Longest sequence.
    """

    def __init__(self, size: int, context: int) -> None:
        super().__init__()
        if size % 2:
            raise UsageError(f"rotary positions need an even head size, got {size}; use positions = learned")
        rates = ROTARY_BASE ** -(torch.arange(size // 2) * 2 / size)
        angles = torch.outer(torch.arange(context), rates)
        # Not persistent: derived from the arguments, so no part of a checkpoint.
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate ``[N, heads, T, d]``."""
        cos, sin = self.get_buffer("cos")[: x.shape[-2]], self.get_buffer("sin")[: x.shape[-2]]
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class SelfAttention(nn.Module):
    """softmax(q kᵀ · scale) v over ``[N, T, width]``.

    Args:
        width: Channels.
        heads: How they are divided.
        bias: Whether the projections have biases; that of the keys only where it has an effect.
        causal: Whether a position sees only itself and what precedes it.
        qk_norm: Normalise queries and keys per head (RMS).
        rotary_context: Longest sequence under rotary positions; None for none.
        fused: Let torch choose a fused kernel: less memory for long sequences, but without second
            derivatives, and on the CPU without a batching rule for ``vmap``.
    """

    def __init__(
        self,
        width: int,
        heads: Heads,
        *,
        bias: bool = True,
        causal: bool = False,
        qk_norm: bool = False,
        rotary_context: int | None = None,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.causal, self.fused = heads, causal, fused
        self.query = nn.Linear(width, width, bias=bias)
        # A bias of all keys alike adds one number to all logits of a query, which softmax ignores; its
        # gradient would be rounding. Rotation and normalisation make it matter.
        felt = rotary_context is not None or qk_norm
        self.key = nn.Linear(width, width, bias=bias and felt)
        self.value = nn.Linear(width, width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)
        self.query_norm = nn.RMSNorm(heads.size) if qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(heads.size) if qk_norm else nn.Identity()
        self.rotary = nn.Identity() if rotary_context is None else Rotary(heads.size, rotary_context)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the positions of ``[N, T, width]``."""
        q = self.rotary(self.query_norm(self._divided(self.query(x))))
        k = self.rotary(self.key_norm(self._divided(self.key(x))))
        v = self._divided(self.value(x))
        with self._kernel():
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, scale=self.heads.scale)
        result: Tensor = self.out(mixed.transpose(-3, -2).flatten(-2))
        return result

    def _kernel(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.fused else sdpa_kernel(SDPBackend.MATH)

    def _divided(self, x: Tensor) -> Tensor:
        parts: Tensor = x.unflatten(-1, (self.heads.number, self.heads.size))
        return parts.transpose(-3, -2)


class Perceptron(nn.Module):
    """``up → activation → down`` on every position by itself."""

    def __init__(self, width: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(width, EXPANSION * width, bias=bias)
        self.act = activation_of(activation)()
        self.down = nn.Linear(EXPANSION * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``[N, T, width]``."""
        result: Tensor = self.down(self.act(self.up(x)))
        return result


class Block(nn.Module):
    """x ← x + s · attention(norm x); x ← x + s · perceptron(norm x), s = ``branch_scale``."""

    def __init__(
        self, width: int, attention: SelfAttention, *, activation: str, bias: bool, branch_scale: float
    ) -> None:
        super().__init__()
        require_positive("branch_scale", branch_scale)
        self.branch_scale = float(branch_scale)
        self.attention_norm = nn.LayerNorm(width, bias=bias)
        self.attention = attention
        self.perceptron_norm = nn.LayerNorm(width, bias=bias)
        self.perceptron = Perceptron(width, activation, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``[N, T, width]``."""
        x = x + self.branch_scale * self.attention(self.attention_norm(x))
        result: Tensor = x + self.branch_scale * self.perceptron(self.perceptron_norm(x))
        return result
