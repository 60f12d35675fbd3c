"""The second moment of a convolution's patches without laying them out.

The patches of a convolution with K taps overlap: of the K² blocks of

    Σ h hᵀ,  block (i, j) = Σ_x a(x + i) a(x + j)ᵀ,  [C, C],

over output positions x, those whose taps lie the same distance apart sum the same terms, but for the borders.
With zeros outside the image and S the autocorrelation (:mod:`mupx.autocorrelation`),

    block (i, j) = S(j − i) − Σ a(u) a(u + j − i)ᵀ over the u that tap i reaches from no output position,

few lines along the borders. A stride of 1 and 3 by 3 taps need 13 shifts where the upper half of the blocks
are 45. Exact but for rounding, and nothing of the size of the patches is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from itertools import combinations_with_replacement, product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mupx.autocorrelation import Shift, operations, shifted_sums
from mupx.layer_rows import padding_of

GAIN = 2.0  # of patches' operations over ours from which on it pays: their product knows that it is symmetric
LEAST = 7e5  # operations to save for each sum and each block: what a call takes beside them

Span = tuple[int, int]  # start, stop
Pair = tuple[int, int]  # taps, numbered row by row, the first not behind the second


class Axis(NamedTuple):
    """One axis of a convolution of stride 1.

    Attributes:
        length: Of the input.
        size: Number of taps.
        gap: From one tap to the next.
        before: Zeros in front of the input.
        after: Zeros behind it.
    """

    length: int
    size: int
    gap: int
    before: int
    after: int

    @property
    def outputs(self) -> int:
        """Number of output positions."""
        return self.length + self.before + self.after - (self.size - 1) * self.gap

    def both(self, shift: int) -> Span:
        """Return the u that lie in the image together with u + shift."""
        start = max(0, -shift)
        return start, max(start, min(self.length, self.length - shift))

    def missed(self, tap: int, shift: int) -> Iterator[Span]:
        """Yield the u of :meth:`both` that a tap reaches from no output position."""
        start, stop = self.both(shift)
        first = tap * self.gap - self.before
        last = first + self.outputs
        for span in ((start, min(stop, first)), (max(start, last), stop)):
            if span[0] < span[1]:
                yield span


class Strip(NamedTuple):
    """Σ a(u) a(u + shift)ᵀ over a rectangle of u."""

    shift: Shift
    rows: Span
    columns: Span


class Block(NamedTuple):
    """S(shift) without the lines along the borders, where two of them cross but once."""

    shift: Shift
    lines: tuple[Strip, ...]
    corners: tuple[Strip, ...]


@lru_cache(maxsize=1024)
def blocks_of(vertical: Axis, horizontal: Axis) -> dict[Pair, Block]:
    """Return how each block (i, j) is put together."""
    taps = list(product(range(vertical.size), range(horizontal.size)))
    found: dict[Pair, Block] = {}
    for (i, one), (j, other) in combinations_with_replacement(enumerate(taps), 2):
        shift = (other[0] - one[0]) * vertical.gap, (other[1] - one[1]) * horizontal.gap
        rows, columns = vertical.both(shift[0]), horizontal.both(shift[1])
        above, beside = list(vertical.missed(one[0], shift[0])), list(horizontal.missed(one[1], shift[1]))
        lines = *((span, columns) for span in above), *((rows, span) for span in beside)
        found[i, j] = Block(
            shift,
            tuple(Strip(shift, *line) for line in lines),
            tuple(Strip(shift, *corner) for corner in product(above, beside)),
        )
    return found


def pays(layer: nn.Conv2d, h: Tensor) -> bool:
    """Whether :func:`patch_moment` of an input ``[N, C, H, W]`` is far cheaper than laying patches out."""
    return moment_operations(layer, h) > 0


def moment_operations(layer: nn.Conv2d, h: Tensor) -> float:
    """Return the operations of :func:`patch_moment`, 0 where it does not pay or does not apply."""
    # Below float32 the rounding of a spectrum, most of it in one frequency, would be seen.
    if layer.stride != (1, 1) or h.dim() != 4 or not h.numel() or h.element_size() < 4:
        return 0.0
    vertical, horizontal = axes = _axes(layer, h)
    if min(vertical.outputs, horizontal.outputs) < 1:
        return 0.0
    N, C, *_ = h.shape
    pairs = 2.0 * N * C**2
    blocks, shifts = blocks_of(*axes), _shifts(*axes)
    strips = {strip for block in blocks.values() for strip in (*block.lines, *block.corners)}
    found = operations(h.shape, shifts) + pairs * sum(map(_area, strips))
    laid_out = pairs * (vertical.size * horizontal.size) ** 2 * vertical.outputs * horizontal.outputs
    calls = len(blocks) + len(strips) + len(shifts)
    return found if laid_out - GAIN * found >= LEAST * calls else 0.0


def patch_moment(layer: nn.Conv2d, h: Tensor) -> Tensor:
    """Return Σ h hᵀ over all patches, in ``F.unfold`` order.

    Args:
        layer: Of stride 1, without groups, padded by zeros.
        h: Its input ``[N, C, H, W]``.

    Returns:
        ``[C·K, C·K]`` for K taps.
    """
    axes = _axes(layer, h)
    shifts = _shifts(*axes)
    whole = dict(zip(shifts, shifted_sums(h, shifts), strict=True))
    planes = h.transpose(0, 1)
    # Few columns lie scattered over all lines: they are collected once.
    columns = cache(lambda start, stop: planes[..., start:stop].contiguous())
    summed = cache(lambda strip: _sum_over(strip, planes, columns))
    blocks: dict[Pair, Tensor] = {}
    for pair, (shift, lines, corners) in blocks_of(*axes).items():
        blocks[pair] = whole[shift]
        for sign, strips in ((-1, lines), (1, corners)):
            for strip in strips:
                blocks[pair] = blocks[pair].add(summed(strip), alpha=sign)
    return _assembled(blocks, layer.kernel_size[0] * layer.kernel_size[1])


def _sum_over(strip: Strip, planes: Tensor, columns: Callable[[int, int], Tensor]) -> Tensor:
    (down, right), (top, bottom), (left, end) = strip.shift, strip.rows, strip.columns
    narrow = end - left < bottom - top
    cut = columns if narrow else lambda start, stop: planes[..., start:stop]
    one, other = cut(left, end), cut(left + right, end + right)
    return one[..., top:bottom, :].flatten(1) @ other[..., top + down : bottom + down, :].flatten(1).mT


def _assembled(blocks: dict[Pair, Tensor], K: int) -> Tensor:
    """Return the symmetric matrix of the blocks (i, j), i ≤ j, the entries of a channel together."""
    C = len(blocks[0, 0])
    matrix = blocks[0, 0].new_empty(C, K, C, K)
    for i in range(K):
        # Block by block an entry would be written at a time, and every line of memory K times.
        row = [blocks[i, j] if i <= j else blocks[j, i].mT for j in range(K)]
        matrix[:, i] = torch.stack(row).permute(1, 2, 0)
    return matrix.view(C * K, C * K)


def _axes(layer: nn.Conv2d, h: Tensor) -> tuple[Axis, Axis]:
    left, right, top, bottom = padding_of(layer)
    (high, wide), (down, across) = layer.kernel_size, layer.dilation
    return Axis(h.shape[-2], high, down, top, bottom), Axis(h.shape[-1], wide, across, left, right)


@lru_cache(maxsize=1024)
def _shifts(vertical: Axis, horizontal: Axis) -> list[Shift]:
    return list(dict.fromkeys(block.shift for block in blocks_of(vertical, horizontal).values()))


def _area(strip: Strip) -> int:
    return (strip.rows[1] - strip.rows[0]) * (strip.columns[1] - strip.columns[0])
