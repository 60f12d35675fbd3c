"""Tensors that ranks hold parts of, on disk: a folder of ``torch.distributed.checkpoint``.

Each rank writes what it has; any number of ranks reads it back, cut up as they need it. The folder must be on
a file system that all of them see.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from mupx.errors import MismatchError, StorageError


def write_parts(directory: Path, tensors: Mapping[str, Tensor], alone: bool) -> None:
    """Write this rank's parts; collective.

    Args:
        directory: Made if need be.
        tensors: Name → sharded tensor, or whole one: what several ranks have is written once.
        alone: This is the only process.

    Raises:
        StorageError: A rank could not write.
    """
    from torch.distributed.checkpoint.state_dict_saver import save

    with _refusing(f"cannot write the parts of a checkpoint to {directory}", StorageError):
        save(dict(tensors), checkpoint_id=directory, no_dist=alone)


def read_parts(directory: Path, tensors: Mapping[str, Tensor], alone: bool) -> None:
    """Fill tensors with what was written under their names, whole or this rank's part; collective.

    Raises:
        MismatchError: The folder is damaged or cannot be seen from here.
    """
    from torch.distributed.checkpoint.state_dict_loader import load

    with _refusing(f"cannot read the parts of a checkpoint in {directory}", MismatchError), _quiet():
        load(dict(tensors), checkpoint_id=directory, no_dist=alone)


def sizes(directory: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the shape and precision of every tensor in the folder.

    Raises:
        MismatchError: As for :func:`read_parts`.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    with _refusing(f"cannot read the parts of a checkpoint in {directory}", MismatchError):
        entries = FileSystemReader(directory).read_metadata().state_dict_metadata
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():  # that there is one process is known, and no_dist says so
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


@contextmanager
def _refusing(what: str, kind: type[StorageError] | type[MismatchError]) -> Iterator[None]:
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (CheckpointException, OSError, ValueError, RuntimeError, EOFError) as error:
        causes = getattr(error, "failures", {})
        cause = next(iter(causes.values()))[0] if causes else error
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise kind(f"{what} ({reason}); the folder must be on a disk that all ranks see") from None
