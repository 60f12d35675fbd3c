from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mupx.datasets.base import Raw, Split, assemble, carve, channel_statistics
from mupx.errors import MismatchError


def raw(seed: int, count: int = 20) -> Raw:
    random = np.random.default_rng(seed)
    return Raw(
        random.integers(0, 256, (count, 2, 4, 4), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 10
    )


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_carve_is_a_balanced_partition(seed: int, per_class: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.arange(60) % 10).astype(np.uint8)
    kept, chosen = carve(labels, per_class, seed)
    assert np.bincount(labels[chosen], minlength=10).tolist() == [per_class] * 10
    assert sorted([*kept, *chosen]) == list(range(60))
    np.testing.assert_array_equal(chosen, carve(labels, per_class, seed)[1])


def test_carve_depends_on_the_seed() -> None:
    labels = np.arange(60, dtype=np.uint8) % 10
    assert carve(labels, 3, 0)[1].tolist() != carve(labels, 3, 1)[1].tolist()


def test_statistics_match_numpy() -> None:
    images = raw(0).images
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, images.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, images.std(axis=(0, 2, 3)), rtol=1e-12)


def test_every_split_is_normalised_by_the_training_split() -> None:
    parts = raw(0), raw(1), raw(2)
    data = assemble("toy", *parts, classes=10)
    mean, std = (np.reshape(v, (1, 2, 1, 1)) for v in channel_statistics(parts[0].images))
    for split, part in zip((data.train, data.validation, data.test), parts, strict=True):
        torch.testing.assert_close(split.inputs, torch.tensor((part.images - mean) / std).float())
        assert split.targets.tolist() == part.labels.tolist()


def test_a_constant_channel_becomes_zero() -> None:
    flat = Raw(np.full((20, 2, 4, 4), 7, dtype=np.uint8), raw(0).labels)
    assert assemble("toy", flat, flat, flat, classes=10).train.inputs.abs().max() == 0


def test_checksum_sees_every_pixel_label_and_the_cut() -> None:
    parts = [raw(0), raw(1), raw(2)]
    original = assemble("toy", *parts, classes=10).checksum
    assert assemble("renamed", *parts, classes=10).checksum == original
    assert assemble("toy", parts[1], parts[0], parts[2], classes=10).checksum != original
    for field in ("images", "labels"):
        altered = getattr(parts[2], field).copy()
        altered.flat[-1] ^= 1
        assert (
            assemble("toy", *parts[:2], parts[2]._replace(**{field: altered}), classes=10).checksum
            != original
        )


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(MismatchError, match="3 inputs and 2 targets"):
        Split(torch.zeros(3, 1), torch.zeros(2, dtype=torch.int64))


def test_images_of_one_channel_are_not_taken_for_channels_last() -> None:
    images = torch.empty_strided((5, 1, 6, 6), (36, 1, 6, 1)).normal_()
    convolution = torch.nn.Conv2d(1, 3, 3)
    assert not convolution(images).is_contiguous()  # what PyTorch makes of such strides
    split = Split(images, torch.zeros(5, dtype=torch.long))
    assert torch.equal(split.inputs, images)
    assert split.inputs.data_ptr() == images.data_ptr()
    assert convolution(split.inputs[torch.tensor([2, 0])]).is_contiguous()
    chosen = torch.randn(5, 3, 6, 6).to(memory_format=torch.channels_last)
    assert Split(chosen, split.targets).inputs.stride() == chosen.stride()
    assert Split(images[:0], split.targets[:0]).inputs.shape == (0, 1, 6, 6)
