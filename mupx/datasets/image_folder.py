"""Your own images in ImageNet's layout: ``{train,val}/class/*.{jpg,jpeg,png}``.

Pillow decodes them in threads (it releases Python's lock); what is trained on lies in memory.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from mupx.datasets.base import Bytes, Dataset, Raw, assemble, split_off_validation
from mupx.datasets.files import locate, read
from mupx.errors import MismatchError, NotFoundError, UsageError
from mupx.models.arguments import require_integer, require_positive

SUFFIXES = (".jpg", ".jpeg", ".png")
VALIDATION = 1 / 10
NUMBER = 4 + 1  # bytes of a channel of a pixel: float32, and uint8 until all are decoded


def load(
    directory: Path | None = None,
    *,
    size: int = 64,
    per_class: int | None = None,
    memory_gib: float = 8.0,
    threads: int = 4,
) -> Dataset:
    """Load images of shape ``[3, size, size]``: shorter side scaled to ``size``, then the centre cropped.

    With ``train`` and one of ``val`` and ``test``, that one is the test split, and a tenth of the training
    images, the same number of every class, is the validation split. With all three each is what it says.

    Args:
        directory: Folder with the split folders.
        size: Height and width in pixels.
        per_class: Take only the first so many images of every class, by name, in every split.
        memory_gib: Refuse to load more than this.
        threads: Images decoded at once.

    Raises:
        UsageError: An argument is out of range, or the images need more than ``memory_gib``.
        NotFoundError: There is no such folder, or an expected one holds no images.
        MismatchError: An image cannot be decoded, or a class is missing from ``train``.
    """
    require_integer("size", size)
    require_integer("threads", threads)
    require_positive("memory_gib", memory_gib)
    if per_class is not None:
        require_integer("per_class", per_class)
    folder = locate("image-folder", directory, missing)
    if folder is None:
        raise NotFoundError(
            "image-folder has no official source; name the folder that holds train/ and val/ (data.dir)"
        )
    names = _classes(folder / "train")
    listed = {split: _listed(folder / split, names, per_class) for split in _splits(folder)}
    _require_memory(sum(len(files) for files in listed.values()), size, memory_gib)
    raws = {split: _decoded(files, size, threads) for split, files in listed.items()}
    train, *held_out = raws.values()
    test = held_out[-1]
    if len(held_out) == 1:
        train, validation = split_off_validation(train, VALIDATION, len(names))
    else:
        validation = held_out[0]
    return assemble("image-folder", train, validation, test, classes=len(names))


def missing(folder: Path) -> list[str]:
    """List the split folders that ``folder`` lacks."""
    lacking = [] if os.path.isdir(folder / "train") else ["train/"]
    held_out = any(os.path.isdir(folder / name) for name in ("val", "test"))
    return lacking if held_out else [*lacking, "val/ (or test/)"]


def decode(path: Path, size: int) -> Bytes:
    """Decode one image to ``[3, size, size]``.

    Raises:
        MismatchError: It is truncated, or no image.
    """
    from PIL import Image, ImageOps

    content = read(path)
    try:
        with Image.open(io.BytesIO(content)) as image:
            square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow's own message on an unknown format names the buffer it was given.
        reason = "no image" if type(error).__name__ == "UnidentifiedImageError" else error
        raise MismatchError(f"cannot decode {path} ({reason}); replace or remove it") from None
    return np.asarray(square, dtype=np.uint8).transpose(2, 0, 1)


def _splits(folder: Path) -> list[str]:
    return [name for name in ("train", "val", "test") if os.path.isdir(folder / name)]


def _classes(folder: Path) -> dict[str, int]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not names:
        raise NotFoundError(
            f"{folder} has no class folders; put the images of each class into one of its own"
        )
    return {name: i for i, name in enumerate(names)}


def _listed(folder: Path, names: Mapping[str, int], per_class: int | None) -> list[tuple[Path, int]]:
    if unknown := [name for name in _classes(folder) if name not in names]:
        raise MismatchError(
            f"{folder} has the class {unknown[0]}, which train lacks; both must have the same classes"
        )
    result = []
    for name in _classes(folder):
        files = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in SUFFIXES)
        if not files:
            raise NotFoundError(
                f"{folder / name} holds no {', '.join(SUFFIXES)}; put images there or remove it"
            )
        result += [(path, names[name]) for path in files[:per_class]]
    return result


def _require_memory(count: int, size: int, limit: float) -> None:
    needed = count * 3 * size**2 * NUMBER / 2**30
    if needed > limit:
        raise UsageError(
            f"{count:,} images of {size}×{size} pixels need {needed:.1f} GiB, more than "
            f"memory_gib = {limit:g}; choose a smaller size, fewer images (per_class), or raise memory_gib"
        )


def _decoded(files: Sequence[tuple[Path, int]], size: int, threads: int) -> Raw:
    images = np.empty((len(files), 3, size, size), dtype=np.uint8)
    with ThreadPoolExecutor(threads) as pool:
        for i, image in enumerate(pool.map(partial(decode, size=size), (path for path, _ in files))):
            images[i] = image
    return Raw(images, np.array([label for _, label in files], dtype=np.int64))
