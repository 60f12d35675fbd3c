"""Checkpoints: one safetensors file per step, tensors as tensors and everything else as JSON.

A file is written to a temporary name, synced and renamed, so the one before it survives a crash at any
moment; a checksum tells a file that the disk has changed since. Nothing is pickled: reading a checkpoint
cannot run code.
"""

from __future__ import annotations

import json
import logging
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mupx.errors import MismatchError
from mupx.files import write_atomically
from mupx.schema import SCHEMA, migrated, versions

LOG = logging.getLogger("mupx")
PATTERN = re.compile(r"step-(\d{9})\.safetensors")


class DamagedError(MismatchError):
    """A file is no whole checkpoint: torn, changed on the disk, or never one."""


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to continue to the last bit."""

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]


def write(folder: Path, checkpoint: Checkpoint, keep: int = 2) -> Path:
    """Write ``folder/step-NNNNNNNNN.safetensors`` and remove all but the newest ``keep``.

    Raises:
        StorageError: The folder cannot be written or the disk is full; older checkpoints stay.
    """
    path = folder / f"step-{checkpoint.step:09d}.safetensors"
    tensors, orders = _packed(checkpoint.tensors)
    header = {
        "schema": SCHEMA,
        "versions": versions(),
        "step": checkpoint.step,
        "values": checkpoint.values,
        "orders": orders,
    }
    header["crc32"] = _checksum(header, tensors)
    write_atomically(path, save(tensors, metadata={"mupx": json.dumps(header)}))
    for old in _files(folder)[:-keep]:
        old.unlink()
    return path


def latest(folder: Path) -> Checkpoint | None:
    """Return the newest whole checkpoint of a folder, or None if there is none.

    A damaged one is set aside, as ``NAME.damaged``, when one before it is whole.

    Raises:
        MismatchError: All are damaged, or the newest was written by a newer mupx; they are left in place.
    """
    damaged: list[tuple[Path, DamagedError]] = []
    for path in reversed(_files(folder)):
        try:
            found = read(path)
        except DamagedError as error:
            damaged.append((path, error))
            continue
        for bad, reason in damaged:
            LOG.warning("%s; continuing from the one before it, step %d", reason, found.step)
            bad.rename(bad.with_name(f"{bad.name}.damaged"))
        return found
    if damaged:
        raise damaged[0][1]
    return None


def read(path: Path) -> Checkpoint:
    """Read one checkpoint file.

    Raises:
        DamagedError: It is no whole checkpoint.
        MismatchError: It was written by a newer mupx.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("mupx", "{}"))
            # A tensor in the file begins anywhere; decompositions of memory aligned otherwise than torch's
            # own round differently.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
        stated, header = header, migrated("checkpoint", header, f"checkpoint {path}")
        if "crc32" in stated and stated["crc32"] != _checksum(stated, tensors):
            raise ValueError("its checksum is wrong")
        return Checkpoint(int(header["step"]), _unpacked(tensors, header["orders"]), dict(header["values"]))
    except MismatchError:
        raise
    except (
        *(OSError, SafetensorError, RecursionError),  # not readable
        *(ValueError, TypeError, LookupError, AttributeError, RuntimeError),  # readable, but no checkpoint
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DamagedError(f"checkpoint {path} is damaged ({reason})") from None


def flatten_optimizer(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's ``state_dict`` into tensors by path and a JSON document."""
    tensors: dict[str, Tensor] = {}

    def strip(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = value
            return {"tensor": path}
        if isinstance(value, Mapping):
            return {"map": [[key, strip(item, f"{path}/{key}")] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            return [strip(item, f"{path}/{i}") for i, item in enumerate(value)]
        return value

    document = strip(state_dict, "optimizer")
    return tensors, document


def unflatten_optimizer(tensors: Mapping[str, Tensor], document: Any) -> Any:
    """Undo :func:`flatten_optimizer`."""
    if isinstance(document, dict):
        if "tensor" in document:
            return tensors[document["tensor"]]
        return {key: unflatten_optimizer(tensors, item) for key, item in document["map"]}
    if isinstance(document, list):
        return [unflatten_optimizer(tensors, item) for item in document]
    return document


def rng_state() -> Tensor:
    """Return the state of torch's default CPU generator."""
    return torch.get_rng_state()


def _packed(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Return contiguous tensors of their own, and the order of axes of those that were not contiguous.

    A Cholesky inverse and eigenvectors come column by column; products with a copy laid out row by row
    differ in the last bit. What shares memory with a tensor before it, such as a tied read-out, is
    copied, as safetensors refuses it.
    """
    seen: set[int] = set()
    packed, orders = {}, {}
    for name, tensor in tensors.items():
        plain = tensor.detach()
        strides = plain.stride()
        order = sorted(range(plain.dim()), key=strides.__getitem__, reverse=True)
        if not plain.is_contiguous() and plain.permute(order).is_contiguous():
            plain, orders[name] = plain.permute(order), order
        plain = plain.contiguous()
        packed[name] = plain.clone() if plain.data_ptr() in seen else plain
        seen.add(plain.data_ptr())
    return packed, orders


def _unpacked(tensors: dict[str, Tensor], orders: Mapping[str, list[int]]) -> dict[str, Tensor]:
    back = {name: [order.index(axis) for axis in range(len(order))] for name, order in orders.items()}
    return {name: t.permute(back[name]) if name in back else t for name, t in tensors.items()}


def _checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """Return the CRC-32 of the rest of the header, and of all names, types, shapes and values."""
    text = json.dumps({key: value for key, value in header.items() if key != "crc32"}, sort_keys=True)
    checksum = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        checksum = zlib.crc32(repr((name, tensor.dtype, tuple(tensor.shape))).encode(), checksum)
        values = tensor.contiguous().reshape(-1).view(torch.uint8)
        checksum = zlib.crc32(values.numpy().data, checksum)
    return checksum


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if PATTERN.fullmatch(path.name))
