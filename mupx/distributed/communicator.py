"""What optimizers and the training loop ask of the other processes; for one process it is nothing.

A *rank* is one of the processes that train together. Everything here is collective: every rank calls it in
the same order. Lists of tensors go in one message per destination and precision, not one each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from mupx.errors import MupxError, StorageError

T = TypeVar("T")
Owners = Sequence[int | None]  # rank that gets a sum or gives a value; None: every rank gets it
LOST = (
    "connection closed",
    "connection reset",
    "broken pipe",
    "timed out",
    "timeout",
    "nccl",
    "socket",
    "gloo",
)
STRIP = 64  # rows of a symmetric matrix that travel together, from the diagonal on


class LostRankError(StorageError):
    """Another rank is gone; what it died of is in its own output."""


class Communicator:
    """One process alone, and what every other communicator can do.

    Attributes:
        rank: Which process this is, from 0.
        size: Number of processes.
        shares: Whether optimizers divide their work among ranks (then ``state_dict`` is collective).
        sent: Kind of message → bytes of its tensors, counted once however many ranks get them.
        device: Where this rank is to train; None: as the experiment says.
    """

    rank, size, shares = 0, 1, False
    device: str | None = None

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()

    def gathered(self, value: T) -> list[T]:
        """Return the value of every rank, by rank."""
        return [value]

    def to_first(self, value: T) -> list[T]:
        """Return the value of every rank on rank 0, and this rank's alone elsewhere."""
        return [value]

    def summed(self, *values: float) -> list[float]:
        """Return the sum over ranks of each number, in float64 and the same on all."""
        return list(values)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return flag

    def reduce(self, tensors: Sequence[Tensor], owners: Owners, kind: str) -> None:
        """Replace each tensor by its sum over ranks, on its owner; elsewhere it is left undefined."""

    def broadcast(self, tensors: Sequence[Tensor], owners: Owners, kind: str) -> None:
        """Replace each tensor by its owner's."""

    def collected(
        self, tensors: Sequence[Tensor], lengths: Sequence[Sequence[int]], owners: Owners, kind: str
    ) -> list[list[Tensor]]:
        """Return for each tensor those of all ranks in their order, where this rank is an owner; else ``[]``.

        Args:
            tensors: This rank's, ``[n, …]``, of equal shape but for n.
            lengths: For each tensor n of every rank.
            owners: For each tensor who wants them.
            kind: Under what the bytes are counted.
        """
        return [[tensor] for tensor in tensors]

    def dealt(
        self, tensors: Sequence[Tensor], lengths: Sequence[Sequence[int]], owners: Sequence[int], kind: str
    ) -> list[Tensor]:
        """Return this rank's rows of each tensor, which its owner has whole: the reverse of `collected`.

        Args:
            tensors: Whole on its owner; elsewhere only precision and all axes but the first count.
            lengths: For each tensor the rows that every rank gets.
            owners: For each tensor who has it.
            kind: Under what the bytes are counted.
        """
        return list(tensors)

    @contextmanager
    def guarding(self) -> Generator[None]:
        """Turn the many errors of a lost connection into one sentence."""
        yield

    def first(self, make: Callable[[], T]) -> T:
        """Return what ``make`` returns on rank 0, where alone it runs; an error of ours is raised by all."""
        return make()


class Ranks(Communicator):
    """The ranks of torch's default process group.

    Args:
        shares: Divide the work of optimizers among ranks. Each then keeps the state of what it does, and
            ``optimizer.state_dict()`` is to be called by all: rank 0 gets the whole.
    """

    def __init__(self, *, shares: bool = True) -> None:
        super().__init__()
        self.rank, self.size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.shares = shares
        on_gpu = torch.distributed.get_backend() == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def gathered(self, value: T) -> list[T]:
        """Return the value of every rank, by rank."""
        found: list[Any] = [None] * self.size
        with self.guarding():
            torch.distributed.all_gather_object(found, value)
        return found

    def to_first(self, value: T) -> list[T]:
        """Return the value of every rank on rank 0, and this rank's alone elsewhere."""
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        with self.guarding():
            torch.distributed.gather_object(value, found)
        return [value] if found is None else found

    def summed(self, *values: float) -> list[float]:
        """Return the sum over ranks of each number, in float64 and the same on all."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self._device)
        with self.guarding():
            torch.distributed.all_reduce(tensor)
        result: list[float] = tensor.tolist()
        return result

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.summed(float(flag))[0] > 0

    def reduce(self, tensors: Sequence[Tensor], owners: Owners, kind: str) -> None:
        """Replace each tensor by its sum over ranks, on its owner; elsewhere it is left undefined."""

        def start(flat: Tensor, owner: int | None) -> Any:
            if owner is None:
                return torch.distributed.all_reduce(flat, async_op=True)
            return torch.distributed.reduce(flat, owner, async_op=True)

        self._bucketed(tensors, owners, kind, start, lambda owner: owner in (None, self.rank))

    def broadcast(self, tensors: Sequence[Tensor], owners: Owners, kind: str) -> None:
        """Replace each tensor by its owner's."""

        def start(flat: Tensor, owner: int | None) -> Any:
            return torch.distributed.broadcast(flat, owner or 0, async_op=True)

        self._bucketed(tensors, owners, kind, start, lambda owner: owner != self.rank)

    def _bucketed(
        self,
        tensors: Sequence[Tensor],
        owners: Owners,
        kind: str,
        start: Callable[[Tensor, int | None], Any],
        wanted: Callable[[int | None], bool],
    ) -> None:
        buckets: dict[tuple[Any, ...], list[Tensor]] = {}
        for tensor, owner in zip(tensors, owners, strict=True):
            buckets.setdefault((owner, tensor.dtype, tensor.device), []).append(tensor)
        with self.guarding(), torch.no_grad():
            # All are under way before the first is waited for.
            flats = [torch.cat([t.reshape(-1) for t in bucket]) for bucket in buckets.values()]
            works = [start(flat, key[0]) for key, flat in zip(buckets, flats, strict=True)]
            for (key, bucket), flat, work in zip(buckets.items(), flats, works, strict=True):
                self.sent[kind] += flat.numel() * flat.element_size()
                work.wait()
                if wanted(key[0]):
                    for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                        tensor.copy_(part.view(tensor.shape))

    def collected(
        self, tensors: Sequence[Tensor], lengths: Sequence[Sequence[int]], owners: Owners, kind: str
    ) -> list[list[Tensor]]:
        """Return for each tensor those of all ranks in their order, on its owners; elsewhere ``[]``."""
        operations: list[Any] = []
        results: list[list[Tensor]] = []
        p2p, send, receive = torch.distributed.P2POp, torch.distributed.isend, torch.distributed.irecv
        for tag, (given, counts, owner) in enumerate(zip(tensors, lengths, owners, strict=True)):
            tensor, shape = given.contiguous(), given.shape[1:]
            others = [rank for rank in range(self.size) if rank != self.rank]
            if len(tensor):
                self.sent[kind] += tensor.numel() * tensor.element_size()
                operations += [p2p(send, tensor, r, tag=tag) for r in others if owner in (None, r)]
            if owner not in (None, self.rank):
                results.append([])
                continue
            parts = [tensor if r == self.rank else given.new_empty(n, *shape) for r, n in enumerate(counts)]
            operations += [p2p(receive, parts[r], r, tag=tag) for r in others if counts[r]]
            results.append(parts)
        with self.guarding():
            for work in torch.distributed.batch_isend_irecv(operations) if operations else ():
                work.wait()
        return results

    def dealt(
        self, tensors: Sequence[Tensor], lengths: Sequence[Sequence[int]], owners: Sequence[int], kind: str
    ) -> list[Tensor]:
        """Return this rank's rows of each tensor, which its owner has whole: the reverse of `collected`."""
        operations: list[Any] = []
        results: list[Tensor] = []
        p2p, send, receive = torch.distributed.P2POp, torch.distributed.isend, torch.distributed.irecv
        for tag, (tensor, counts, owner) in enumerate(zip(tensors, lengths, owners, strict=True)):
            if owner == self.rank:
                parts = [part.contiguous() for part in tensor.split(list(counts))]
                self.sent[kind] += tensor.numel() * tensor.element_size()
                others = [r for r in range(self.size) if r != self.rank and counts[r]]
                operations += [p2p(send, parts[r], r, tag=tag) for r in others]
                results.append(parts[self.rank])
                continue
            results.append(tensor.new_empty(counts[self.rank], *tensor.shape[1:]))
            if counts[self.rank]:
                operations.append(p2p(receive, results[-1], owner, tag=tag))
        with self.guarding():
            for work in torch.distributed.batch_isend_irecv(operations) if operations else ():
                work.wait()
        return results

    @contextmanager
    def guarding(self) -> Generator[None]:
        """Turn the many errors of a lost connection into one sentence."""
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            if not any(sign in text.lower() for sign in LOST):
                raise
            raise LostRankError(
                f"rank {self.rank} of {self.size} lost contact with another rank "
                f"({text.strip().splitlines()[0]}); the cause is in that rank's output"
            ) from None

    def first(self, make: Callable[[], T]) -> T:
        """Return what ``make`` returns on rank 0, where alone it runs; an error of ours is raised by all."""
        told: list[Any] = [None, None]
        failure: BaseException | None = None
        if self.rank == 0:
            try:
                told = [make(), None]
            except MupxError as error:
                failure, told = error, [None, (type(error), str(error))]
        with self.guarding():
            torch.distributed.broadcast_object_list(told, src=0)
        if failure is not None:
            raise failure
        if told[1] is not None:
            kind, message = told[1]
            raise kind(message)
        result: T = told[0]
        return result


ALONE = Communicator()


def found(shares: bool = False) -> Communicator:
    """Return the communicator of the process group that is there: this process alone, where there is none."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return Ranks(shares=shares) if several and torch.distributed.get_world_size() > 1 else ALONE


def upper(matrix: Tensor) -> list[Tensor]:
    """Return the parts of a symmetric matrix ``[d, d]`` on and above the diagonal, in strips: views of it.

    Little more than half the bytes, without a list of indices as large as the matrix.
    """
    return [matrix[i : i + STRIP, i:] for i in range(0, len(matrix), STRIP)]


def mirror(matrix: Tensor) -> None:
    """Fill in below the diagonal what is above it, in place."""
    for i in range(0, len(matrix), STRIP):
        matrix[i + STRIP :, i : i + STRIP] = matrix[i : i + STRIP, i + STRIP :].mT


def packed(entries: Mapping[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    """Split a dictionary into a description without tensors, and its tensors in order."""
    tensors = [value for value in entries.values() if isinstance(value, Tensor)]
    described = {
        key: (tuple(value.shape), value.dtype, _order(value)) if isinstance(value, Tensor) else [value]
        for key, value in entries.items()
    }
    return described, tensors


def unpacked(described: Mapping[str, Any], device: torch.device) -> tuple[dict[str, Any], list[Tensor]]:
    """Return the dictionary with empty tensors in it, and those tensors in order."""
    entries: dict[str, Any] = {}
    for key, value in described.items():
        if isinstance(value, list):
            entries[key] = value[0]
            continue
        shape, dtype, order = value
        laid_out = torch.empty([shape[axis] for axis in order], dtype=dtype, device=device)
        entries[key] = laid_out.permute([order.index(axis) for axis in range(len(order))])
    return entries, [value for value in entries.values() if isinstance(value, Tensor)]


def _order(tensor: Tensor) -> list[int]:
    """Return the axes as they lie in memory: laid out otherwise the last bits of products differ."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=strides.__getitem__, reverse=True)


def flattened(groups: Iterable[Iterable[Tensor]]) -> list[Tensor]:
    """Return the tensors of all groups in one list."""
    return [tensor for group in groups for tensor in group]
