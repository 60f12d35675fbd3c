"""Data of the user's own: arrays, tensors, torch data sets and loaders become a :class:`Dataset`.

Accepted are a :class:`Dataset`, a dictionary or a tuple of splits (train, validation and perhaps test).
A split is (inputs, targets), tensors or arrays, or a ``torch.utils.data`` Dataset or DataLoader of such
pairs, which is read once into memory. Integer targets are classes, floating-point ones are regressed on.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mupx.datasets.base import Dataset, Split
from mupx.errors import UsageError

NAMES = ("train", "validation", "test")
LOG = logging.getLogger("mupx")
EXAMPLE = "{'train': (inputs, targets), 'validation': (inputs, targets)}"
READ_BATCH = 1024
MOST_COMPARED = 200_000  # examples; beyond that, looking for repeated ones takes longer than it is worth


def dataset_from(name: str, given: Any) -> Dataset:
    """Return a checked Dataset of what a loader returned or a user handed over.

    Args:
        name: Where it comes from, for error messages and as the data set's name.
        given: See the module's docstring.

    Raises:
        UsageError: What is wrong, in which split.
    """
    splits = [_split(name, part, item) for part, item in _splits(name, given).items()]
    if len(splits) == 2:
        LOG.warning("%s has no test split: only the validation data is measured at the end", name)
        splits.append(Split(splits[0].inputs[:0], splits[0].targets[:0]))
    _require_one_kind(name, splits)
    _warn_of_repeats(name, splits[0], splits[1])
    train, validation, test = splits
    return Dataset(name, train, validation, test, _outputs(name, splits), checksum(splits))


def checksum(splits: Sequence[Split]) -> str:
    """Return the sha256 of every split's shapes, types and values."""
    digest = hashlib.sha256()
    for split in splits:
        for tensor in (split.inputs, split.targets):
            array = tensor.detach().cpu().contiguous().numpy()
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()


def _splits(name: str, given: Any) -> dict[str, Any]:
    if isinstance(given, Dataset):
        parts = {"train": given.train, "validation": given.validation, "test": given.test}
        return {part: split for part, split in parts.items() if part != "test" or len(split)}
    if isinstance(given, Mapping):
        parts = dict(given)
    elif isinstance(given, (tuple, list)) and len(given) in (2, 3) and not any(map(_array, given)):
        parts = dict(zip(NAMES, given, strict=False))
    else:
        raise UsageError(f"data {name} is {_kind(given)}; give splits, such as {EXAMPLE}, or mupx's Dataset")
    if not {"train", "validation"} <= parts.keys() <= set(NAMES):
        raise UsageError(
            f"data {name} has the splits {', '.join(map(str, parts)) or 'none'}; "
            "train and validation are needed, test is welcome"
        )
    return {part: parts[part] for part in NAMES if part in parts}


def _split(name: str, part: str, given: Any) -> Split:
    where = f"data {name}, {part}"
    if isinstance(given, Split):
        inputs, targets = given.inputs, given.targets
    elif isinstance(given, (tuple, list)) and len(given) == 2:
        inputs, targets = (_tensor(where, item) for item in given)
    elif hasattr(given, "__getitem__") or isinstance(given, DataLoader):
        inputs, targets = _read(where, given)
    else:
        raise UsageError(f"{where} is {_kind(given)}; give (inputs, targets)")
    _require_values(where, inputs, targets)
    if targets.is_floating_point() and targets.dim() == 1:
        targets = targets.unsqueeze(1)  # [N] against outputs [N, 1] would broadcast to [N, N]
    return Split(inputs, targets if targets.is_floating_point() else targets.long())


def _tensor(where: str, given: Any) -> Tensor:
    if isinstance(given, Tensor):
        return given.detach().cpu()
    if isinstance(given, (np.ndarray, np.generic, list, tuple, int, float)):
        try:
            return torch.as_tensor(np.asarray(given))
        except (TypeError, ValueError) as error:
            raise UsageError(f"{where} is no array of numbers ({error}); give tensors or arrays") from None
    raise UsageError(f"{where} holds {_kind(given)}; give tensors or arrays")


def _read(where: str, given: Any) -> tuple[Tensor, Tensor]:
    """Read a finite torch Dataset or DataLoader into memory, in its own order."""
    loader = given if isinstance(given, DataLoader) else DataLoader(given, batch_size=READ_BATCH)
    try:
        len(loader)
    except TypeError:
        raise UsageError(f"{where} is a loader without a length; mupx reads data that is finite") from None
    batches = [batch for batch in loader if isinstance(batch, (tuple, list)) and len(batch) == 2]
    if len(batches) != len(loader) or not batches:
        raise UsageError(f"{where} yields no (inputs, targets) pairs; give a loader of such pairs")
    inputs, targets = (torch.cat([_tensor(where, batch[i]) for batch in batches]) for i in (0, 1))
    megabytes = (inputs.nbytes + targets.nbytes) / 1e6
    LOG.warning(
        "%s: %d examples (%.1f MB) were read into memory; mupx forms its own batches, and random "
        "augmentation is frozen",
        where,
        len(targets),
        megabytes,
    )
    return inputs, targets


def _require_values(where: str, inputs: Tensor, targets: Tensor) -> None:
    if not inputs.dim() or not targets.dim() or len(inputs) != len(targets):
        raise UsageError(
            f"{where} has inputs of shape {list(inputs.shape)} and targets of shape {list(targets.shape)}; "
            "give one target for each input, along the first axis"
        )
    if not len(inputs):
        raise UsageError(f"{where} is empty")
    if not (inputs.is_floating_point() or inputs.dtype == torch.int64):
        raise UsageError(
            f"{where} has inputs of type {_dtype(inputs)}; give floating-point numbers (images: divide and "
            "normalise them first), or int64 for tokens"
        )
    if targets.is_complex() or targets.dtype == torch.bool:
        raise UsageError(f"{where} has targets of type {_dtype(targets)}; give integers or real numbers")
    for what, tensor in (("inputs", inputs), ("targets", targets)):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise UsageError(f"{where} has {bad} {what} that are NaN or infinite; remove or replace them")


def _require_one_kind(name: str, splits: Sequence[Split]) -> None:
    for part, (a, b) in zip(NAMES[1:], pairwise(splits), strict=False):
        for what, x, y in (("inputs", a.inputs, b.inputs), ("targets", a.targets, b.targets)):
            if x.shape[1:] != y.shape[1:] or x.is_floating_point() != y.is_floating_point():
                raise UsageError(
                    f"data {name}, {part} has {what} {_dtype(y)} {list(y.shape[1:])} but the split before it "
                    f"{_dtype(x)} {list(x.shape[1:])}; every split needs the same shape and type"
                )


def _outputs(name: str, splits: Sequence[Split]) -> int:
    """Return the number of classes, or of values to regress on."""
    if splits[0].targets.is_floating_point():
        return splits[0].targets.shape[-1]
    targets = torch.cat([split.targets.flatten() for split in splits])
    if int(targets.min()) < 0:
        raise UsageError(f"data {name} has the class {int(targets.min())}; number classes from 0")
    return int(targets.max()) + 1


def _warn_of_repeats(name: str, train: Split, validation: Split) -> None:
    if len(train) + len(validation) > MOST_COMPARED:
        return
    seen, rows = (
        [row.tobytes() for row in split.inputs.numpy()] if split.inputs.dtype != torch.bfloat16 else []
        for split in (train, validation)
    )
    repeated = sum(row in known for known in [set(seen)] for row in rows)
    if repeated:
        LOG.warning("%s: %d of %d validation inputs are also in train", name, repeated, len(rows))


def _array(item: Any) -> bool:
    return isinstance(item, (Tensor, np.ndarray))


def _kind(given: Any) -> str:
    if isinstance(given, (tuple, list)):
        return f"a {type(given).__name__} of {len(given)} ({', '.join(type(i).__name__ for i in given[:3])})"
    return f"a {type(given).__name__}"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
