"""A decoder-only transformer language model with pre-norm blocks.

*Source*: A. Radford et al., "Language Models are Unsupervised Multitask Learners", 2019 (GPT-2), with
torch's default init, an untied read-out and no dropout.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mupx.errors import UsageError
from mupx.models.arguments import (
    require_choice,
    require_integer,
    require_sequence,
    require_sizes,
    require_token_ids,
)
from mupx.models.transformer import Block, SelfAttention, divide_heads

POSITIONS = ("learned", "rotary")


class GPT(nn.Module):
    """``embedding (+ positions) → blocks → norm → output``; see `build` for the arguments."""

    residual_blocks = "blocks.*"  # the parameters inside residual branches

    def __init__(
        self, embedding: nn.Embedding, positions: nn.Embedding | None, blocks: list[Block], output: nn.Linear
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.positions = positions
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(embedding.embedding_dim, bias=blocks[0].attention_norm.bias is not None)
        self.output = output

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits ``[N, T, classes]`` of the token after each of ``[N, T]``."""
        require_token_ids("gpt", tokens)
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions(torch.arange(tokens.shape[-1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.output(self.norm(x))
        return logits


def build(
    width: int,
    *,
    input_shape: tuple[int, ...],
    classes: int,
    layers: int = 2,
    head_dim: int | None = None,
    heads: int | None = None,
    head_growth: int | None = None,
    context: int | None = None,
    positions: str = "learned",
    qk_norm: bool = False,
    activation: str = "gelu",
    bias: bool = True,
    branch_scale: float = 1.0,
    fused: bool = False,
    tied: bool = False,
) -> GPT:
    """Build a GPT with torch's default init.

    Args:
        width: Channels of the residual stream: the number of heads × the head size.
        input_shape: ``[T]``, the tokens of one example.
        classes: Vocabulary size.
        layers: Number of blocks.
        head_dim: Size of a head at every width (default 16): width adds heads.
        heads: Number of heads at every width instead: the head size grows, and ``head_growth`` is needed.
        head_growth: Head size d₀ at the base width; logits are then scaled by √d₀ / head size.
        context: Longest sequence (default: T).
        positions: ``learned`` (an embedding) or ``rotary``.
        qk_norm: RMS-normalise queries and keys per head.
        activation: A key of `mupx.models.arguments.ACTIVATIONS`.
        bias: Whether linear layers and norms have biases.
        branch_scale: Factor on every residual branch; base depth / depth transfers over depth.
        fused: Use a fused attention kernel, which has no second derivatives.
        tied: One tensor for embedding and read-out, with the read-out's default law and no read-out
            bias; learned positions are then drawn from the same law.

    Raises:
        UsageError: An argument is out of range.
    """
    require_sizes(width, input_shape, classes)
    require_sequence("gpt", input_shape)
    require_integer("layers", layers)
    require_choice("positions", positions, POSITIONS)
    context = input_shape[0] if context is None else context
    require_integer("context", context)
    if context < input_shape[0]:
        raise UsageError(f"context is {context}, but an example has {input_shape[0]} tokens; raise context")
    divided = divide_heads(width, head_dim, heads, head_growth)
    rotary_context = context if positions == "rotary" else None
    embedding = nn.Embedding(classes, width)
    position_table = nn.Embedding(context, width) if positions == "learned" else None
    blocks = [
        Block(
            width,
            SelfAttention(
                width,
                divided,
                bias=bias,
                causal=True,
                qk_norm=qk_norm,
                rotary_context=rotary_context,
                fused=fused,
            ),
            activation=activation,
            bias=bias,
            branch_scale=branch_scale,
        )
        for _ in range(layers)
    ]
    output = nn.Linear(width, classes, bias=bias and not tied)
    if tied:
        embedding.weight = output.weight
        if position_table is not None:
            nn.init.uniform_(position_table.weight, -(width**-0.5), width**-0.5)
    return GPT(embedding, position_table, blocks, output)
