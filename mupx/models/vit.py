"""A vision transformer: linear patches, learned positions, pre-norm blocks.

*Source*: A. Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, arXiv:2010.11929, with
torch's default init of the linear layers and no dropout.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mupx.errors import UsageError
from mupx.models.arguments import require_choice, require_image, require_integer, require_sizes
from mupx.models.transformer import Block, SelfAttention, divide_heads

POOLINGS = ("class", "mean")
POSITION_STD = 0.02  # as in the paper's code


class ViT(nn.Module):
    """``patches + positions → blocks → norm → pooling → output``; see `build` for the arguments."""

    residual_blocks = "blocks.*"  # the parameters inside residual branches

    def __init__(
        self, patches: nn.Conv2d, count: int, blocks: list[Block], output: nn.Linear, pooling: str
    ) -> None:
        super().__init__()
        width, tokens = patches.out_channels, count + (pooling == "class")
        self.patches = patches
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if pooling == "class" else None
        self.positions = nn.Parameter(POSITION_STD * torch.randn(1, tokens, width))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, bias=blocks[0].attention_norm.bias is not None)
        self.output = output

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[N, classes]`` of images ``[N, C, H, W]``."""
        x = self.patches(images).flatten(-2).transpose(-2, -1)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.positions
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        logits: Tensor = self.output(x.mean(1) if self.class_token is None else x[:, 0])
        return logits


def build(
    width: int,
    *,
    input_shape: tuple[int, ...],
    classes: int,
    layers: int = 2,
    patch: int = 4,
    pooling: str = "class",
    head_dim: int | None = None,
    heads: int | None = None,
    head_growth: int | None = None,
    qk_norm: bool = False,
    activation: str = "gelu",
    bias: bool = True,
    branch_scale: float = 1.0,
    fused: bool = False,
) -> ViT:
    """Build a ViT with torch's default init; positions are N(0, 0.02²), the class token is 0.

    Args:
        width: Channels of the residual stream: the number of heads × the head size.
        input_shape: ``[C, H, W]`` of one image.
        classes: Number of logits.
        layers: Number of blocks.
        patch: Side of a square patch in pixels; it must divide H and W.
        pooling: What the read-out sees: a ``class`` token, or the ``mean`` over patches.
        head_dim: Size of a head at every width (default 16): width adds heads.
        heads: Number of heads at every width instead: the head size grows, and ``head_growth`` is needed.
        head_growth: Head size d₀ at the base width; logits are then scaled by √d₀ / head size.
        qk_norm: RMS-normalise queries and keys per head.
        activation: A key of `mupx.models.arguments.ACTIVATIONS`.
        bias: Whether linear layers, convolution and norms have biases.
        branch_scale: Factor on every residual branch; base depth / depth transfers over depth.
        fused: Use a fused attention kernel, which has no second derivatives.

    Raises:
        UsageError: An argument is out of range.
    """
    require_sizes(width, input_shape, classes)
    require_image("vit", input_shape, least=1)
    require_integer("layers", layers)
    require_integer("patch", patch)
    require_choice("pooling", pooling, POOLINGS)
    channels, height, across = input_shape
    if height % patch or across % patch:
        fitting = [side for side in range(1, min(height, across) + 1) if not (height % side or across % side)]
        raise UsageError(
            f"patch is {patch}, but must divide {height}×{across} pixels; "
            f"use one of {', '.join(map(str, fitting))}"
        )
    divided = divide_heads(width, head_dim, heads, head_growth)
    patches = nn.Conv2d(channels, width, patch, stride=patch, bias=bias)
    blocks = [
        Block(
            width,
            SelfAttention(width, divided, bias=bias, qk_norm=qk_norm, fused=fused),
            activation=activation,
            bias=bias,
            branch_scale=branch_scale,
        )
        for _ in range(layers)
    ]
    count = (height // patch) * (across // patch)
    return ViT(patches, count, blocks, nn.Linear(width, classes, bias=bias), pooling)
