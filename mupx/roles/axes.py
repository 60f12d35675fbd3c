"""Which axes of a tensor are fan-in and which are fan-out: the owning layer's type says it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mupx.layers import Shape
from mupx.scaling import Role

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.RMSNorm)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BARE = ("matrix", "vector")  # parameters no known layer owns


@dataclass(frozen=True)
class Layout:
    """What owns a tensor and which of its axes are fan-in and fan-out."""

    kind: str
    in_axes: Shape
    out_axes: Shape


def layout_of(owner: nn.Module, leaf: str) -> Layout:
    """Return the layout of the parameter ``leaf`` of ``owner``."""
    tensor: Tensor = getattr(owner, leaf)
    kernel = tuple(range(2, tensor.dim()))
    if isinstance(owner, nn.Linear):
        return _weight_or_bias("linear", leaf, Layout("linear", (1,), (0,)))
    if isinstance(owner, CONVOLUTIONS):
        plain = isinstance(owner, nn.Conv2d) and owner.groups == 1 and owner.padding_mode == "zeros"
        kind = "conv2d" if plain else "conv"
        return _weight_or_bias(kind, leaf, Layout(kind, (1, *kernel), (0,)))
    if isinstance(owner, TRANSPOSED):
        return _weight_or_bias("conv", leaf, Layout("conv", (0, *kernel), (1,)))
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return Layout("embedding", (0,), (1,))
    if isinstance(owner, NORMS):
        return Layout("norm", (), (tensor.dim() - 1,))
    if tensor.dim() == 2:
        return Layout("matrix", (1,), (0,))
    return Layout("vector", (), (tensor.dim() - 1,) if tensor.dim() else ())


def _weight_or_bias(kind: str, leaf: str, weight: Layout) -> Layout:
    return Layout(f"{kind}.bias", (), (0,)) if leaf == "bias" else weight


def growing_axes(base: Shape, doubled: Shape) -> set[int]:
    """Return the axes whose length differs."""
    return {i for i, (a, b) in enumerate(zip(base, doubled, strict=True)) if a != b}


def bare_layout(layout: Layout, role: Role, growing: set[int], axes: int) -> Layout:
    """Tell fan-in from fan-out of a bare parameter by the role the user gave it."""
    fixed = tuple(sorted({*range(axes)} - growing))
    grown = tuple(sorted(growing))
    if role == "vector":
        return Layout(layout.kind, (), grown)
    if role == "input":
        return Layout(layout.kind, fixed, grown)
    if role == "output":
        return Layout(layout.kind, grown, fixed)
    return Layout(layout.kind, tuple(range(1, axes)), (0,))
