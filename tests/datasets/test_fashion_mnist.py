from __future__ import annotations

import importlib.util
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from mupx.datasets import fashion_mnist, fashion_mnist_14, fashion_mnist_14_full
from mupx.datasets.fashion_mnist_14_full import halve
from mupx.errors import MismatchError

from .toys import FASHION_MNIST

ROOT = Path(__file__).parents[2]
EMBEDDED = ROOT / "mupx" / "datasets" / "data" / fashion_mnist_14.FILE
needs_official_files = pytest.mark.skipif(
    not FASHION_MNIST.is_dir(), reason=f"no {FASHION_MNIST}; install Debian's dataset-fashion-mnist"
)


# Published results name these: a change of cut, order or rounding must not pass unseen.
CHECKSUMS = {
    "fashion-mnist-14": "509baf44c37e6fd5e64576f89942be1fa94b1a10acbe232ae5c15364b4fa5f79",
    "fashion-mnist-14-full": "0ad394c6d722edbd89448bedcb07d6ebbdb9437c3e880b578f28af0ce072b0e3",
    "fashion-mnist": "4b2d94f036b919dbaa62d7ad38bf562a4fa2fb30801b4d08a7b1fde9c2142bf2",
}


def images_of(split: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in split}


def test_embedded_set_is_balanced_and_disjoint() -> None:
    data = fashion_mnist_14.load()
    assert data.checksum == CHECKSUMS[data.name]
    splits = (data.train, data.validation, data.test)
    for split, per_class in zip(splits, (800, 200, 200), strict=True):
        assert torch.bincount(split.targets).tolist() == [per_class] * 10
    seen = [images_of(split.inputs) for split in splits]
    # Equal images within a split would be dropped by the set, so the sum shows that there are none.
    assert len(set.union(*seen)) == 12_000


def test_altered_embedded_file() -> None:
    content = bytearray(EMBEDDED.read_bytes())
    content[1000] ^= 1
    with pytest.raises(MismatchError, match=rf"sha256 \w{{64}}, expected {fashion_mnist_14.SHA256}"):
        fashion_mnist_14.parse(bytes(content))


def test_licence_travels_with_the_file() -> None:
    text = (EMBEDDED.parent / "LICENSE.fashion-mnist").read_text()
    assert "MIT" in text
    assert "Zalando SE" in text


def test_halve_averages_blocks_and_rounds_halves_up() -> None:
    blocks = np.array([[[0, 1, 255, 255], [0, 1, 255, 255], [0, 0, 9, 9], [0, 1, 9, 8]]], dtype=np.uint8)
    assert halve(blocks).tolist() == [[[1, 255], [0, 9]]]


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make", ROOT / "scripts" / "make_fashion_mnist_14.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_official_files
@pytest.mark.skipif(
    "ng" in zlib.ZLIB_RUNTIME_VERSION, reason="zlib-ng packs the same arrays into other bytes"
)
def test_script_makes_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "made.npz"
    script().main(["--source", str(FASHION_MNIST), "--output", str(output)])
    assert output.read_bytes() == EMBEDDED.read_bytes()
    assert fashion_mnist_14.SHA256 in capsys.readouterr().out


@needs_official_files
def test_full_sets_share_their_cut() -> None:
    full, half = fashion_mnist.load(FASHION_MNIST), fashion_mnist_14_full.load(FASHION_MNIST)
    assert all(data.checksum == CHECKSUMS[data.name] for data in (full, half))
    for name, count in (("train", 55_000), ("validation", 5_000), ("test", 10_000)):
        large, small = getattr(full, name), getattr(half, name)
        assert len(large) == len(small) == count
        assert torch.equal(large.targets, small.targets)
    assert torch.bincount(full.validation.targets).tolist() == [500] * 10
    assert (full.input_shape, half.input_shape) == ((1, 28, 28), (1, 14, 14))
    # Averaging commutes with normalising up to scale and rounding: the images must correlate fully.
    pooled = torch.nn.functional.avg_pool2d(full.test.inputs.double(), 2).flatten()
    assert torch.corrcoef(torch.stack([pooled, half.test.inputs.double().flatten()]))[0, 1] > 0.99999
    assert images_of(half.train.inputs).isdisjoint(images_of(fashion_mnist_14.load().test.inputs))
