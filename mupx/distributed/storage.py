"""Tensors that ranks hold parts of, on disk: a folder of ``torch.distributed.checkpoint``.

Each rank writes what it has; any number of ranks reads it back, cut up as they need it. The folder must be on
a file system that all of them see. torch keeps the folder's table of contents as a pickle and reads it as
one; here nothing is unpickled but the few plain classes that such a table is made of, and no file outside of
the folder is opened.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mupx.errors import MismatchError, StorageError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

# Without BytesStorageMetadata: torch unpickles what it stands for.
TABLE = "Metadata TensorStorageMetadata ChunkStorageMetadata TensorProperties MetadataIndex StorageMeta"
DTYPES = "bool uint8 int8 int16 int32 int64 float16 bfloat16 float32 float64"
PLAIN = {
    *(("torch.distributed.checkpoint.metadata", name) for name in (*TABLE.split(), "_MEM_FORMAT_ENCODING")),
    *(("torch", name) for name in (*DTYPES.split(), "Size")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
}


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
        load(dict(tensors), storage_reader=_reader(directory), no_dist=alone)


def sizes(directory: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the shape and precision of every tensor in the folder.

    Raises:
        MismatchError: As for :func:`read_parts`.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    with _refusing(f"cannot read the parts of a checkpoint in {directory}", MismatchError):
        entries = _reader(directory).read_metadata().state_dict_metadata
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }


# What a table that is not one makes the reader stumble over.
BROKEN = (pickle.UnpicklingError, AttributeError, KeyError, TypeError, IndexError)


class _Table(pickle.Unpickler):
    """Reads a table of contents and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _memory_format  # how some releases of Python 3.11 write a member of an enumeration
        if (module, name) not in PLAIN:
            raise ValueError(f"it asks for {module}.{name}, which no checkpoint of mupx has")
        return super().find_class(module, name)


def _memory_format(kind: Any, name: str) -> Any:
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    if kind is not _MEM_FORMAT_ENCODING:
        raise ValueError(f"it asks for the attribute {name} of {kind!r}, which no checkpoint of mupx has")
    return _MEM_FORMAT_ENCODING[name]


def _reader(directory: Path) -> FileSystemReader:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            with (directory / ".metadata").open("rb") as file:
                found = _Table(file).load()
            if not isinstance(found, Metadata):
                raise ValueError("it has no table of contents")
            for entry in (found.storage_data or {}).values():
                if Path(entry.relative_path).name != entry.relative_path:
                    raise ValueError(f"it names a file outside of itself, {entry.relative_path!r}")
            found.storage_meta = found.storage_meta or StorageMeta()
            found.storage_meta.load_id = self.load_id
            return found

    return Reader(directory)


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
    except (CheckpointException, OSError, ValueError, RuntimeError, EOFError, *BROKEN) as error:
        causes = getattr(error, "failures", {})
        cause = next(iter(causes.values()))[0] if causes else error
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise kind(f"{what} ({reason}); the folder must be on a disk that all ranks see") from None
