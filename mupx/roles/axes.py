"""Which axes of a tensor are fan-in and which are fan-out: the owning layer's type says it.

Layouts by owner, as torch stores its tensors (kernel positions k belong to fan-in; they do not grow):

* Linear ``[out, in]``, packed projections ``[3·out, in]``, recurrent ``[4·hidden, in]``, Bilinear
  ``[out, in1, in2]`` with fan-in in1·in2;
* convolution ``[out, in/groups, k…]``; with as many groups as channels (depthwise) fan-in is k…, which does
  not grow, so it follows the input rule; transposed ``[in, out/groups, k…]``;
* Embedding ``[vocabulary, out]``: a look-up is a product with a one-hot vector.

What no known layer owns is *bare*: a vector where one axis grows and no contraction is plausible,
otherwise the user declares it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import ParametrizationList

from mupx.layers import Shape

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
OLD_REPARAMETRIZED = ("_g", "_v", "_orig")  # leaves of torch's old weight_norm and spectral_norm


@dataclass(frozen=True)
class Layout:
    """What owns a tensor and which of its axes are fan-in and fan-out.

    Attributes:
        kind: As in :class:`mupx.layers.Parameter`.
        in_axes: Axes that make up fan-in; none for a vector.
        out_axes: Axes that make up fan-out.
        unknown: Why the axes cannot be told; empty where they can.
        advice: What to do instead of declaring it, where that is better.
        growing_head: The query projection of an attention whose head size grows under a fixed 1/√d_head.
        inner: Its output goes back into the layer itself, so it is never the read-out.
    """

    kind: str
    in_axes: Shape = ()
    out_axes: Shape = ()
    unknown: str = ""
    advice: str = ""
    growing_head: bool = False
    inner: bool = False


def factorable(module: nn.Module) -> bool:
    """Whether K-FAC has Kronecker factors for this module: Linear, and ungrouped zero-padded Conv2d.

    The output projection of MultiheadAttention is a Linear whose ``forward`` is never called (its weight
    is handed to one fused function), so its input and output cannot be captured.
    """
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros"
    return isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)


def layout_of(owner: nn.Module, leaf: str, doubled: nn.Module, factored: bool) -> Layout:
    """Return the layout of a parameter.

    Args:
        owner: The module at the base width.
        leaf: Name of the parameter in it.
        doubled: The same module at twice the base width.
        factored: Whether K-FAC can capture this module's input and output in this model.
    """
    tensor: Tensor = getattr(owner, leaf)
    for kinds, read in _READERS:
        if isinstance(owner, kinds):
            known = read(owner, leaf, doubled, factored)
            if known is not None:
                return known
    return _bare(owner, leaf, tensor, getattr(doubled, leaf))


def growing_axes(base: Shape, doubled: Shape) -> set[int]:
    """Return the axes whose length differs."""
    return {i for i, (a, b) in enumerate(zip(base, doubled, strict=True)) if a != b}


def kind_of_axes(in_axes: Shape, out_axes: Shape, axes: int) -> str:
    """Return ``matrix`` where flattening all axes but the first gives a matrix of fan-in and fan-out.

    That is what Shampoo and its kin do; other tensors (``tensor``) go to the fallback.
    """
    if axes < 2 or not in_axes:
        return "vector"
    first, rest = (0,), tuple(range(1, axes))
    return "matrix" if (out_axes, in_axes) in ((first, rest), (rest, first)) else "tensor"


def _linear(owner: Any, leaf: str, doubled: Any, factored: bool) -> Layout | None:
    if leaf == "weight":
        return Layout("linear" if factored else "matrix", (1,), (0,))
    return _bias(leaf, "linear.bias" if factored else "vector")


def _convolution(owner: Any, leaf: str, doubled: Any, factored: bool) -> Layout | None:
    kind = "conv2d" if factored else "conv"
    if leaf == "weight":
        return Layout(kind, (1, *_kernel(owner)), (0,))
    return _bias(leaf, f"{kind}.bias")


def _transposed(owner: Any, leaf: str, doubled: Any, factored: bool) -> Layout | None:
    if leaf != "weight":
        return _bias(leaf, "conv.bias")
    kernel = _kernel(owner)
    if owner.groups == doubled.groups:
        return Layout("conv", (0, *kernel), (1,))
    if owner.in_channels * doubled.groups == doubled.in_channels * owner.groups:
        # in/groups does not grow: fan-in is fixed, and fan-out, groups × out/groups, grows with axis 0.
        return Layout("tensor", kernel, (0, 1))
    return Layout("conv", (0, *kernel), (1,), "both its groups and the channels in a group grow")


def _embedding(owner: Any, leaf: str, doubled: Any, factored: bool) -> Layout | None:
    if owner.num_embeddings != doubled.num_embeddings:
        return Layout("embedding", (0,), (1,), "the number of embeddings grows with width")
    return Layout("embedding", (0,), (1,)) if leaf == "weight" else None


def _norm(owner: Any, leaf: str, doubled: Any, factored: bool) -> Layout | None:
    tensor: Tensor = getattr(owner, leaf)
    return Layout("norm", (), tuple(range(tensor.dim()))) if leaf in ("weight", "bias") else None


def _attention(owner: Any, leaf: str, doubled: Any, factored: bool) -> Layout | None:
    grows = owner.head_dim != doubled.head_dim
    both = grows and owner.num_heads != doubled.num_heads
    size = f"the head size grows with width ({owner.head_dim} → {doubled.head_dim})"
    advice = "keep embed_dim / num_heads fixed and grow num_heads with width"
    if leaf == "in_proj_weight":
        unknown = f"{size} under a fixed 1/√d_head, and q is packed with k and v" if grows else ""
        return Layout("matrix", (1,), (0,), unknown, advice)
    if leaf == "q_proj_weight":
        return Layout(
            "matrix", (1,), (0,), f"{size}, and so does the number of heads" if both else "", advice, grows
        )
    if leaf in ("k_proj_weight", "v_proj_weight"):
        return Layout("matrix", (1,), (0,))
    if leaf == "in_proj_bias":
        # Of its three parts only q's acts by itself: k's adds the same to every logit of a row, v's
        # passes through as a constant that the output projection's bias holds too.
        return Layout("vector", (), (0,), growing_head=grows)
    return Layout("vector", (), (2,)) if leaf in ("bias_k", "bias_v") else None


def _recurrent(owner: Any, leaf: str, doubled: Any, factored: bool) -> Layout | None:
    if leaf.startswith("weight_"):
        return Layout("matrix", (1,), (0,), inner=True)
    return Layout("vector", (), (0,)) if leaf.startswith("bias_") else None


def _bilinear(owner: Any, leaf: str, doubled: Any, factored: bool) -> Layout | None:
    return Layout("matrix", (1, 2), (0,)) if leaf == "weight" else _bias(leaf, "vector")


def _bias(leaf: str, kind: str) -> Layout | None:
    return Layout(kind, (), (0,)) if leaf == "bias" else None


def _kernel(owner: Any) -> Shape:
    weight: Tensor = owner.weight
    return tuple(range(2, weight.dim()))


def _bare(owner: nn.Module, leaf: str, tensor: Tensor, doubled: Tensor) -> Layout:
    shape, axes = tuple(tensor.shape), tensor.dim()
    growing = growing_axes(shape, tuple(doubled.shape))
    everything = tuple(range(axes))
    if isinstance(owner, ParametrizationList):
        names = ", ".join(type(module).__name__.strip("_") for module in owner)
        return Layout("tensor", (), everything, f"it is parametrized ({names}), {_OTHER}", _REMOVE)
    if hasattr(owner, leaf.rpartition("_")[0]) and leaf.endswith(OLD_REPARAMETRIZED):
        return Layout("tensor", (), everything, f"it is reparametrized, {_OTHER}", _REMOVE)
    if axes < 2:
        return Layout("vector", (), everything)
    alone = len(growing) == 1 and all(size == 1 for i, size in enumerate(shape) if i not in growing)
    if axes > 2 and (alone or growing <= {axes - 1}):
        return Layout("vector", (), tuple(growing))
    reason = "a bare parameter does not say which of its axes are fan-in, fan-out or neither"
    return Layout("matrix" if axes == 2 else "tensor", (), everything, reason if growing else "")


_OTHER = "so its update follows another rule than a plain weight's"
_REMOVE = "take that off (torch.nn.utils.parametrize.remove_parametrizations)"
_Reader = Callable[..., Layout | None]
_READERS: tuple[tuple[type | tuple[type, ...], _Reader], ...] = (
    (nn.Linear, _linear),
    (CONVOLUTIONS, _convolution),
    (TRANSPOSED, _transposed),
    (EMBEDDINGS, _embedding),
    (NORMS, _norm),
    (nn.MultiheadAttention, _attention),
    (RECURRENT, _recurrent),
    (nn.Bilinear, _bilinear),
)
