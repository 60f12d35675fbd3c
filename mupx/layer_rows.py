"""What a layer takes in and gives out, laid out as rows: one for each sample and position."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mupx.roles.axes import factorable

Layer = nn.Linear | nn.Conv2d
UNFOLDED = 2**25  # bytes of a convolution's patches laid out at a time: what a cache holds, not a batch
SHORT_LINE = 4  # positions in a line of a feature map, below which copying line by line is slower


def factorable_layers(model: nn.Module) -> dict[str, Layer]:
    """Return the layers of ``model`` that K-FAC can factor, by qualified name."""
    layers = ((name, m) for name, m in model.named_modules() if factorable(m))
    return {name: m for name, m in layers if m.weight.numel()}  # nothing is known of a side without units


def input_rows(layer: nn.Module, h: Tensor) -> Tensor:
    """Lay a layer's input out as rows ``[N, T, d_in]``."""
    if isinstance(layer, nn.Conv2d):
        return _patches(layer, h)
    return h.reshape(h.shape[0], -1, h.shape[-1])


def _patches(layer: nn.Conv2d, h: Tensor) -> Tensor:
    """Lay out the patches ``[N, T, d_in]`` with one copy.

    Position by position, as a row has them, what is copied lies scattered. With the positions of a patch's
    entry side by side whole lines are copied, which is four times as fast unless lines are short.
    """
    left, right, top, bottom = padding_of(layer)
    windows = F.pad(h, (left, right, top, bottom))
    for axis, (size, gap, stride) in enumerate(
        zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)
    ):
        windows = windows.unfold(2 + axis, (size - 1) * gap + 1, stride)[..., ::gap]
    N, C, rows, columns, high, wide = windows.shape
    d_in, T = C * high * wide, rows * columns
    if columns < SHORT_LINE:
        return windows.permute(0, 2, 3, 1, 4, 5).reshape(N, T, d_in)
    return windows.permute(1, 4, 5, 0, 2, 3).reshape(d_in, N, T).permute(1, 2, 0)


def output_rows(layer: nn.Module, delta: Tensor) -> Tensor:
    """Lay a gradient with respect to a layer's output out as rows ``[N·T, d_out]``."""
    if isinstance(layer, nn.Conv2d):
        # Like patches: whole maps are copied, a row's entries lie apart.
        return delta.transpose(0, 1).flatten(1).mT
    return delta.reshape(-1, delta.shape[-1])


def unfolded_bytes(layer: nn.Module, rows: int) -> int:
    """Return the bytes that laying out so many rows takes beyond the input; none but a convolution's."""
    if not isinstance(layer, nn.Conv2d):
        return 0
    return rows * layer.weight[0].numel() * layer.weight.element_size()


def row_mask(mask: Tensor | None, samples: int, positions: int) -> Tensor | None:
    """Return a loss's mask as ``[N, T]`` or ``[N, 1]`` where it speaks of so many rows, else None."""
    if mask is not None and mask.numel() == samples * positions:
        return mask.reshape(samples, positions)
    return mask.unsqueeze(1) if mask is not None and mask.shape == (samples,) else None


def padding_of(layer: nn.Conv2d) -> tuple[int, int, int, int]:
    """Return the zeros around an input: left, right, top, bottom, the order of ``F.pad``."""
    if isinstance(layer.padding, str):
        # torch keeps the resolved "same"/"valid" padding.
        left, right, top, bottom = layer._reversed_padding_repeated_twice
        return left, right, top, bottom
    vertical, horizontal = layer.padding
    return horizontal, horizontal, vertical, vertical
