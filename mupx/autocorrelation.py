"""How the channels of images go with each other a few pixels apart.

    S(s) = Σ a(u) a(u + s)ᵀ over samples and all positions u, [C, C], a = 0 outside the image.

One product of matrices for each shift s; or, where shifts and channels are many, by the cross-spectra of
Wiener and Khinchin: with â the Fourier transform of an image padded to n₁ by n₂,

    S(s) = 1/(n₁ n₂) Σ_f Re[exp(2πi (f₁ s₁ / n₁ + f₂ s₂ / n₂)) Σ conj(â(f)) â(f)ᵀ].

Of real images half of the frequencies tell everything: three real products there, however many the shifts,
where otherwise each shift takes one at all pixels. Images are so small that a product with the matrix of the
transform serves as well as a fast one, and it leaves the channels of a frequency together. Either way the
error is that of sums in the input's precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

SLOWER = 2.0  # an operation on spectra beside one of a product of large matrices, measured on a CPU
AT_ONCE = 2**25  # bytes of input at a time
FEWEST = 32  # samples at a time at least: the products of a frequency sum over them
SPECTRA = 2**26  # bytes of transforms and spectra at a time

Shift = tuple[int, int]
Size = tuple[int, int]


def shifted_sums(h: Tensor, shifts: Sequence[Shift]) -> Tensor:
    """Return S(s) for shifts of images ``[N, C, H, W]``.

    Args:
        h: The images.
        shifts: By rows and columns; the first not negative, nor the second where the first is zero.

    Returns:
        ``[shifts, C, C]``.
    """
    spectral = _prefers_spectra(h.shape, shifts)
    per_sample = max(1, h[0].numel() * h.element_size())
    count = max(FEWEST if spectral else 1, AT_ONCE // per_sample)
    sums = _by_spectra if spectral else _one_by_one
    first, *others = (sums(samples, shifts) for samples in h.split(count))
    return sum(others, first)


def operations(shape: Sequence[int], shifts: Sequence[Shift]) -> float:
    """Return the operations for images ``[N, C, H, W]``, as many as take that long in one large product."""
    return min(_operations_one_by_one(shape, shifts), SLOWER * _operations_by_spectra(shape, shifts))


def _prefers_spectra(shape: Sequence[int], shifts: Sequence[Shift]) -> bool:
    return SLOWER * _operations_by_spectra(shape, shifts) < _operations_one_by_one(shape, shifts)


def _operations_one_by_one(shape: Sequence[int], shifts: Sequence[Shift]) -> float:
    N, C, *_ = shape
    high, wide = _padded(shape, shifts)
    return 2.0 * len(shifts) * N * high * wide * C**2


def _operations_by_spectra(shape: Sequence[int], shifts: Sequence[Shift]) -> float:
    N, C, H, W = shape
    high, wide = _padded(shape, shifts)
    half = wide // 2 + 1
    transform = 4.0 * N * C * half * (H * W + 2 * high * H)
    return transform + 6.0 * high * half * N * C**2 + 4.0 * len(shifts) * high * half * C**2


def _padded(shape: Sequence[int], shifts: Sequence[Shift]) -> Size:
    """Return the size, zeros behind, at which no shift comes out at another line or at the other end."""
    return shape[-2] + max(down for down, _ in shifts), shape[-1] + max(abs(right) for _, right in shifts)


def _one_by_one(h: Tensor, shifts: Sequence[Shift]) -> Tensor:
    high, wide = _padded(h.shape, shifts)
    planes = F.pad(h.transpose(0, 1), (0, wide - h.shape[-1], 0, high - h.shape[-2])).flatten(1)
    # Zeros behind every line and plane: a shift along all of them meets no other line's entries.
    ways = [down * wide + right for down, right in shifts]
    return torch.stack([planes[:, : planes.shape[1] - way] @ planes[:, way:].mT for way in ways])


def _by_spectra(h: Tensor, shifts: Sequence[Shift]) -> Tensor:
    N, C, H, W = h.shape
    size = _padded(h.shape, shifts)
    high, half = size[0], size[1] // 2 + 1
    pixels = h.flatten(2).flatten(0, 1).mT.contiguous().view(H, W, N * C)
    down, across = _down(H, high, h.dtype, h.device), _across(W, size[1], h.dtype, h.device)
    total = h.new_zeros(len(shifts), C, C)
    for part in _parts(half, 2 * (H + high) * N * C + 2 * high * C**2, h.element_size()):
        lines = torch.bmm(across[:, part].flatten(0, 1).expand(H, -1, -1), pixels)  # [H, 2·f₂, N·C]
        real, imaginary = (down @ lines.view(2 * H, -1)).view(2, -1, N, C)  # [f₁·f₂, N, C] each
        even = torch.bmm(real.mT, real).baddbmm_(imaginary.mT, imaginary)
        odd = torch.bmm(real.mT, imaginary)
        cosines, sines = (
            waves[..., part].flatten(1) for waves in _waves(tuple(shifts), size, h.dtype, h.device)
        )
        turned = (sines @ odd.flatten(1)).view_as(total)
        total += (cosines @ even.flatten(1)).view_as(total) - turned + turned.mT
    return total


def _parts(count: int, numbers: int, itemsize: int) -> Iterator[slice]:
    """Yield as many of ``count`` at a time as fit, each taking so many numbers."""
    step = max(1, SPECTRA // (numbers * itemsize))
    yield from (slice(start, start + step) for start in range(0, count, step))


@lru_cache(maxsize=64)
def _across(length: int, period: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the transform of a real line, ``[2, half, length]``: real and imaginary parts."""
    angles = 2 * math.pi * torch.outer(_numbers(period // 2 + 1), _numbers(length)) / period
    return torch.stack([angles.cos(), -angles.sin()]).to(device, dtype)


@lru_cache(maxsize=64)
def _down(length: int, period: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the transform of a complex line, ``[2·period, length·2]``: parts first, and parts last."""
    angles = 2 * math.pi * torch.outer(_numbers(period), _numbers(length)) / period
    cosine, sine = angles.cos(), angles.sin()
    real, imaginary = torch.stack([cosine, sine], -1), torch.stack([-sine, cosine], -1)
    return torch.cat([real, imaginary]).flatten(1).to(device, dtype)


@lru_cache(maxsize=64)
def _waves(
    shifts: tuple[Shift, ...], size: Size, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the inverse transform at the shifts, ``[shifts, high, half]``."""
    high, wide = size
    down, right = torch.tensor(shifts, dtype=torch.float64).unbind(1)
    rows = torch.outer(down, _numbers(high)) / high
    columns = torch.outer(right, _numbers(wide // 2 + 1)) / wide
    angles = 2 * math.pi * (rows.unsqueeze(-1) + columns.unsqueeze(1))
    twice = torch.full((wide // 2 + 1,), 2.0, dtype=torch.float64)  # for the frequencies left out
    twice[0] = 1.0
    if wide % 2 == 0:
        twice[-1] = 1.0
    weights = twice / (high * wide)
    return (angles.cos() * weights).to(device, dtype), (angles.sin() * weights).to(device, dtype)


def _numbers(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float64)
