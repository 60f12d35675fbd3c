"""The second moment of patches that are not laid out: equal to that of the patches, and where it is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mupx import autocorrelation, curvature, patch_moments
from mupx.curvature import EagerCapture
from mupx.factor_sums import FactorRows, FactorSums
from mupx.losses import IGNORED, LOSSES
from mupx.patch_moments import Axis, Block, blocks_of, patch_moment, pays

EXACT = {"rtol": 1e-12, "atol": 1e-12}
LEAST = patch_moments.LEAST
LAYERS: list[dict[str, Any]] = [
    {"padding": 1},
    {"padding": "same", "dilation": 2},
    {},
    {"kernel_size": (3, 5), "padding": (0, 2)},
    {"kernel_size": (1, 3), "padding": (0, 1)},
    {"kernel_size": 4, "padding": "same"},  # one zero more behind than in front
    {"dilation": (2, 1), "padding": (1, 3)},  # beyond the kernel's reach: patches of nothing but zeros
    {"kernel_size": 5, "padding": 1},
    {"kernel_size": 1},
]


@pytest.fixture(autouse=True)
def _however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch_moments, "LEAST", 0.0)


def conv(options: dict[str, Any], channels: int = 2) -> nn.Conv2d:
    return nn.Conv2d(channels, 3, **{"kernel_size": 3, **options}).double()


def naive(layer: nn.Conv2d, h: Tensor) -> Tensor:
    """Σ h hᵀ over the columns of torch's unfold."""
    sides = []
    for size, gap, padding in zip(layer.kernel_size, layer.dilation, padding_by_axis(layer), strict=True):
        reach = (size - 1) * gap
        sides.append((reach // 2, reach - reach // 2) if padding == "same" else (padding, padding))
    (top, bottom), (left, right) = sides
    columns = F.unfold(F.pad(h, (left, right, top, bottom)), layer.kernel_size, layer.dilation)  # type: ignore[arg-type]
    return torch.einsum("nit,njt->ij", columns, columns)


def padding_by_axis(layer: nn.Conv2d) -> tuple[Any, Any]:
    return (layer.padding, layer.padding) if isinstance(layer.padding, str) else layer.padding  # type: ignore[return-value]


def images(samples: int, *size: int, channels: int = 2) -> Tensor:
    return torch.randn(samples, channels, *size, generator=torch.Generator().manual_seed(0)).double()


@pytest.fixture(params=["one by one", "spectra"])
def _by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autocorrelation, "SLOWER", 0.0 if request.param == "spectra" else 1e9)


@pytest.mark.usefixtures("_by")
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("size", [(5, 5), (6, 9), (9, 6)])
@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_the_moment_is_that_of_the_patches(options: dict[str, Any], size: tuple[int, int]) -> None:
    layer, h = conv(options), images(3, *size)
    torch.testing.assert_close(patch_moment(layer, h), naive(layer, h), **EXACT)


@pytest.mark.usefixtures("_by")
@pytest.mark.parametrize("size", [(2, 2), (1, 7), (3, 2)])
def test_images_smaller_than_the_kernel(size: tuple[int, int]) -> None:
    layer, h = conv({"padding": 2, "kernel_size": 5}), images(2, *size)
    torch.testing.assert_close(patch_moment(layer, h), naive(layer, h), **EXACT)


def test_the_moment_is_symmetric_in_any_memory_format() -> None:
    layer, h = conv({"padding": 1}), images(5, 6, 6)
    found = patch_moment(layer, h)
    torch.testing.assert_close(found, found.mT, rtol=0, atol=1e-12)
    torch.testing.assert_close(patch_moment(layer, h.to(memory_format=torch.channels_last)), found, **EXACT)


@pytest.mark.parametrize("left_out", ["lines", "corners"])
def test_without_its_borders_it_would_be_wrong(left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, h = conv({"padding": 1}), images(3, 6, 6)

    def partial(*axes: Axis) -> dict[tuple[int, int], Block]:
        return {pair: block._replace(**{left_out: ()}) for pair, block in blocks_of(*axes).items()}

    monkeypatch.setattr(patch_moments, "blocks_of", partial)
    assert not torch.allclose(patch_moment(layer, h), naive(layer, h))


@pytest.mark.parametrize(
    ("options", "size", "expected"),
    [
        ({"padding": 1}, (32, 32), True),
        ({"padding": 1}, (4, 4), True),
        ({"padding": 1}, (2, 2), False),  # more padding than image
        ({"padding": 2, "kernel_size": 5}, (8, 8), True),
        ({"kernel_size": 1}, (32, 32), False),  # nothing overlaps
        ({"padding": 1, "stride": 2}, (32, 32), False),
        ({"kernel_size": 8}, (8, 8), False),  # a single position
        ({}, (0, 0), False),
    ],
    ids=str,
)
def test_where_it_pays(options: dict[str, Any], size: tuple[int, int], expected: bool) -> None:
    assert pays(conv(options), images(1, *size)) is expected


def test_calls_for_every_block_are_not_made_for_little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch_moments, "LEAST", LEAST)
    layer = conv({"padding": 1}, channels=16)
    assert [pays(layer, images(n, 16, 16, channels=16)) for n in (1, 64)] == [False, True]


def test_coarse_precisions_lay_patches_out() -> None:
    layer, h = conv({"padding": 1}), images(1, 32, 32)
    assert [pays(layer, h.to(dtype)) for dtype in (torch.float32, torch.bfloat16)] == [True, False]


def test_three_by_three_takes_thirteen_shifts() -> None:
    axis = Axis(32, 3, 1, 1, 1)
    blocks = blocks_of(axis, axis).values()
    assert (len(blocks), len({block.shift for block in blocks})) == (45, 13)
    assert len({line for block in blocks for line in block.lines}) == 2 * 3 + 2 * 3  # rows and columns
    assert len({corner for block in blocks for corner in block.corners}) == 4


# --- its use --------------------------------------------------------------------------------------


def collected(make: Any, passes: list[tuple[Tensor, Tensor]]) -> FactorSums:
    """Return what capture leaves of a convolution's inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.LazyLinear(4)).double()
    model(passes[0][0])
    sums: FactorSums = make()
    for x, y in passes:
        with EagerCapture({"0": model[0]}, {"0": sums}, LOSSES["cross_entropy"], y):  # type: ignore[dict-item]
            LOSSES["cross_entropy"](model(x), y).backward()
    return sums


def batch(samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 2, 6, 6, generator=generator).double(), torch.arange(samples) % 4


@pytest.fixture
def laid_out(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Samples of every input that was laid out as patches."""
    found: list[int] = []
    true = curvature.input_rows

    def counted(layer: nn.Module, h: Tensor) -> Tensor:
        found.append(len(h))
        return true(layer, h)

    monkeypatch.setattr(curvature, "input_rows", counted)
    return found


def expected(passes: list[tuple[Tensor, Tensor]]) -> Tensor:
    x = torch.cat([x for x, _ in passes])
    return naive(conv({"padding": 1}), x) / (36 * len(x))


def test_capture_lays_no_patches_out_where_only_their_sum_is_wanted(laid_out: list[int]) -> None:
    passes = [batch(5), batch(3, seed=1)]
    torch.testing.assert_close(collected(FactorSums, passes).factor("A"), expected(passes), **EXACT)
    assert laid_out == []


def test_few_rows_are_kept_as_rows_until_they_are_too_many(laid_out: list[int]) -> None:
    passes = [batch(2), batch(5, seed=1), batch(2, seed=2)]
    few = collected(lambda: FactorRows(limit=100), passes[:1])
    assert few.columns("A") is not None  # type: ignore[attr-defined]
    many = collected(lambda: FactorRows(limit=100), passes)
    assert laid_out == [2, 2]
    assert many.columns("A") is None  # type: ignore[attr-defined]
    torch.testing.assert_close(many.factor("A"), expected(passes), **EXACT)


def test_ignored_samples_count_nothing(laid_out: list[int]) -> None:
    x, y = batch(5)
    y[3:] = IGNORED
    found = collected(FactorSums, [(x, y)])
    assert laid_out == [5]
    torch.testing.assert_close(found.factor("A"), expected([(x[:3], y[:3])]), **EXACT)
