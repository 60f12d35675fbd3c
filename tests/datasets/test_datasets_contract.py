"""What every entry of DATASETS promises, whatever its format."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mupx.datasets import (
    DATASETS,
    cifar10,
    fashion_mnist,
    fashion_mnist_14_full,
    mnist,
    tiny_shakespeare,
    wikitext_2,
)
from mupx.datasets.base import Dataset
from mupx.errors import NotFoundError, UsageError

from .test_cifar10 import toy_batch
from .test_cifar100 import write_toy as write_cifar100
from .test_image_folder import write_toy as write_images
from .test_text import write_shakespeare, write_wikitext
from .toys import Toy

TEXT = {"wikitext-2", "wikitext-2-small", "tiny-shakespeare"}
MADE = {"fashion-mnist-14", "synthetic"}  # without a file


@pytest.fixture(params=sorted(DATASETS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with toy files of every format, which the loaders take for the official ones."""
    for module in (fashion_mnist, fashion_mnist_14_full, mnist):
        monkeypatch.setattr(module, "SOURCE", replace(toy.source(), name=module.SOURCE.name))
    for seed, file in enumerate(cifar10.SOURCE.files):
        (tmp_path / file).write_bytes(toy_batch(seed))
    write_cifar100(tmp_path)
    write_images(tmp_path)
    monkeypatch.setattr(tiny_shakespeare, "SHA256", write_shakespeare(tmp_path))
    monkeypatch.setattr(wikitext_2, "FILES", write_wikitext(tmp_path))
    return toy.write(tmp_path)


def test_loader_keeps_its_promises(name: str, folder: Path) -> None:
    data: Dataset = DATASETS.load(name)(folder)
    assert data.name == name
    for split in (data.train, data.validation, data.test):
        assert split.inputs.dtype == (torch.int64 if name in TEXT else torch.float32)
        assert split.targets.dtype == torch.int64
        assert split.inputs.shape == (len(split), *data.input_shape)
        assert split.inputs.isfinite().all()
        assert 0 <= split.targets.min() <= split.targets.max() < data.classes


@pytest.mark.parametrize("name", sorted(set(DATASETS) - TEXT))
def test_images_are_normalised_and_their_classes_balanced(name: str, folder: Path) -> None:
    data: Dataset = DATASETS.load(name)(folder)
    for split in (data.train, data.validation, data.test):
        assert torch.bincount(split.targets).numel() == data.classes
    counts = torch.bincount(data.validation.targets)
    assert counts.min() == counts.max() > 0
    assert data.train.inputs.mean().abs() < 1e-4
    assert abs(data.train.inputs.std() - 1) < 1e-2


@pytest.mark.parametrize("name", sorted(TEXT))
def test_token_ids_are_those_of_the_vocabulary(name: str, folder: Path) -> None:
    data: Dataset = DATASETS.load(name)(folder)
    for split in (data.train, data.validation, data.test):
        assert 0 <= split.inputs.min() <= split.inputs.max() < data.classes
    assert len(data.train) > len(data.validation) > 0


def test_loading_twice_gives_the_same_data(name: str, folder: Path) -> None:
    first, second = (DATASETS.load(name)(folder) for _ in range(2))
    assert first.checksum == second.checksum
    assert torch.equal(first.train.inputs, second.train.inputs)
    assert torch.equal(first.validation.inputs, second.validation.inputs)


def test_directory_is_optional(name: str) -> None:
    assert inspect.signature(DATASETS.load(name)).parameters["directory"].default is None


@pytest.mark.parametrize("name", sorted(set(DATASETS) - MADE))
def test_empty_folder_is_not_found(name: str, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="lacks"):
        DATASETS.load(name)(tmp_path)


def test_unknown_name() -> None:
    with pytest.raises(UsageError, match="unknown data set 'cifar'; did you mean 'cifar10'"):
        DATASETS.load("cifar")


@pytest.mark.parametrize("package", ["mupx.datasets", "mupx.models"])
def test_listing_the_names_imports_neither_torch_nor_numpy(package: str) -> None:
    code = f"import sys, {package}; sys.exit(bool({{'torch', 'numpy'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
