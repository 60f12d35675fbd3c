"""Sums over shifted images: one by one and by spectra they are those of a loop over pixels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mupx import autocorrelation
from mupx.autocorrelation import Shift, operations, shifted_sums

SHIFTS: list[Shift] = [(0, 0), (0, 1), (0, 2), (1, -2), (1, 0), (2, 1)]


def images(samples: int, channels: int, high: int, wide: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(samples, channels, high, wide, generator=generator, dtype=torch.double)


def pixel_by_pixel(h: Tensor, shifts: list[Shift]) -> Tensor:
    _, C, H, W = h.shape
    sums = torch.zeros(len(shifts), C, C, dtype=h.dtype)
    for number, (down, right) in enumerate(shifts):
        for row in range(H - down):
            for column in range(max(0, -right), W - max(0, right)):
                sums[number] += h[:, :, row, column].mT @ h[:, :, row + down, column + right]
    return sums


def by(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autocorrelation, "SLOWER", 0.0 if way == "spectra" else 1e9)


@pytest.mark.parametrize("way", ["one by one", "spectra"])
@pytest.mark.parametrize("size", [(4, 4), (5, 6), (6, 5), (7, 3), (1, 2)])
@pytest.mark.parametrize("shifts", [SHIFTS, [(0, 0)], [(0, 0), (0, 3)], [(0, 0), (3, -1)]], ids=str)
def test_the_sums_are_those_over_pixels(
    way: str, size: tuple[int, int], shifts: list[Shift], monkeypatch: pytest.MonkeyPatch
) -> None:
    by(way, monkeypatch)
    h = images(3, 2, *size)
    torch.testing.assert_close(shifted_sums(h, shifts), pixel_by_pixel(h, shifts), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", ["one by one", "spectra"])
def test_memory_is_bounded_without_changing_the_sums(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    by(way, monkeypatch)
    h = images(7, 2, 5, 6)
    whole = shifted_sums(h, SHIFTS)
    for name, value in (("AT_ONCE", 2 * h[0].nbytes), ("FEWEST", 2), ("SPECTRA", 1)):
        monkeypatch.setattr(autocorrelation, name, value)
        torch.testing.assert_close(shifted_sums(h, SHIFTS), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", ["one by one", "spectra"])
def test_the_error_is_that_of_sums_in_the_inputs_precision(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    by(way, monkeypatch)
    h = images(8, 16, 32, 32)  # a mean far from zero, as behind a ReLU: the lowest frequency has nearly all
    exact, found = shifted_sums(h, SHIFTS), shifted_sums(h.float(), SHIFTS)
    assert float((found - exact).norm() / exact.norm()) < 1e-6
    assert float((found - exact).abs().max() / exact.abs().max()) < 1e-6


def test_a_period_without_zeros_between_the_ends_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    by("spectra", monkeypatch)
    h = images(3, 2, 5, 6)
    monkeypatch.setattr(autocorrelation, "_padded", lambda shape, shifts: shape[-2:])
    assert not torch.allclose(shifted_sums(h, SHIFTS), pixel_by_pixel(h, SHIFTS))


def test_spectra_are_taken_where_they_need_fewer_operations() -> None:
    prefers = autocorrelation._prefers_spectra
    thirteen = [(0, 0), (0, 1), (0, 2), *((down, right) for down in (1, 2) for right in range(-2, 3))]
    assert prefers((64, 64, 32, 32), thirteen)
    assert not prefers((64, 3, 32, 32), thirteen)  # the transform is more than it saves
    assert not prefers((16, 64, 224, 224), thirteen)  # a transform by products grows with the side
    assert not prefers((64, 64, 32, 32), [(0, 0)])
    assert not prefers((1, 512, 8, 8), thirteen)  # a spectrum of one sample is as large as its sum
    few, many = (operations((64, 64, 32, 32), shifts) for shifts in (SHIFTS, thirteen))
    assert few < many < autocorrelation._operations_one_by_one((64, 64, 32, 32), thirteen)
