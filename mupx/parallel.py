"""A run's part among several ranks: its share of every batch, its random numbers, its wrapped model.

The order of data depends on seed and step alone and every rank knows it all: rank r of R takes the r-th of R
nearly equal parts of each batch. A run continued on another number of ranks therefore sees the same batches.
Means are over all samples, however unequal the parts: a part's loss weighs as many terms as it has.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mupx.config import Experiment
from mupx.datasets.base import Split
from mupx.distributed.communicator import Communicator
from mupx.distributed.wrapping import batch_norms, fully_sharded, replicated, synchronising
from mupx.dotted import differences
from mupx.errors import MismatchError, UsageError
from mupx.optim.adapter import Adapter, Trainable
from mupx.optim.divided import Divided

SHOWN = 3  # layers a warning names
log = logging.getLogger("mupx")


class Parallel:
    """One rank's view of a run; of one process it is the whole.

    Args:
        ranks: Who takes part.
        shard: Split parameters over ranks (FSDP2) in place of a copy on each.
    """

    def __init__(self, ranks: Communicator, shard: bool = False) -> None:
        if shard and ranks.size == 1:
            raise UsageError("fsdp splits a model over ranks, but this is one process; give --nproc 2 or so")
        self.ranks, self.shard = ranks, shard
        self.several = ranks.size > 1
        self._wrapped: nn.Module | None = None

    def require(self, experiment: Experiment) -> None:
        """Refuse what cannot be done by several ranks.

        Raises:
            UsageError: Some rank would have no example in some micro-batch, or a feature needs one process.
        """
        config, ranks = experiment.train, self.ranks.size
        if self.several and config.batch_size < ranks * config.accumulate:
            micro = f" in {config.accumulate} micro-batches" if config.accumulate > 1 else ""
            raise UsageError(
                f"train.batch_size {config.batch_size}{micro} leaves some of {ranks} ranks without an "
                f"example; start fewer, at most {config.batch_size // config.accumulate}, or raise it"
            )
        if self.several and config.curvature_every:
            raise UsageError(
                "train.curvature_every measures in one process, which has all curvature; leave it out"
            )

    def require_same(self, identity: dict[str, Any]) -> None:
        """Refuse ranks that would train different things.

        Raises:
            MismatchError: With what differs.
        """
        everyone = self.ranks.gathered(identity)
        for rank, other in enumerate(everyone):
            if other != everyone[0]:
                changed = "; ".join(differences(everyone[0], other))
                raise MismatchError(
                    f"rank {rank} has another experiment than rank 0: {changed}; start every rank with the "
                    "same recipe, flags, data and versions"
                )

    def wrap(self, model: nn.Module, outputs: Callable[[], Tensor], device: torch.device) -> None:
        """Take the model that the passes of a step run through.

        Args:
            model: With its initial weights, the same on every rank.
            outputs: Runs it on a few examples, to see which parameters are used.
            device: Where it trains.
        """
        if not self.several:
            return
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        elif (names := batch_norms(model)) and self.ranks.rank == 0:
            shown = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
            log.warning(
                f"{shown} normalise each rank's part of a batch by itself, as torch synchronises them on "
                "GPUs only: the curve is not that of one process"
            )
        if self.shard:
            self._wrapped = fully_sharded(model, device)
        else:
            self._wrapped = replicated(model, _has_unused(model, outputs))

    def prepare(self, optimizer: Trainable) -> None:
        """Tell the optimizer whom it shares its work with.

        Raises:
            UsageError: An optimizer of the user's own is to update sharded parameters.
        """
        if self.shard and isinstance(optimizer, Adapter):
            raise UsageError(
                f"{type(optimizer.own).__name__} is not of mupx, which cannot tell whether it is right on "
                "sharded parameters; train without --fsdp"
            )
        if isinstance(optimizer, Divided):
            optimizer.communicator = self.ranks

    def model(self, plain: nn.Module) -> nn.Module:
        """Return what to call: the wrapped model where gradients are to be exchanged."""
        exchanging = self._wrapped is not None and torch.is_grad_enabled() and plain.training
        return self._wrapped if exchanging and self._wrapped is not None else plain

    def mine(self, tensor: Tensor) -> Tensor:
        """Return this rank's part of a batch."""
        return tensor.tensor_split(self.ranks.size)[self.ranks.rank] if self.several else tensor

    def pieces(self, tensor: Tensor, count: int) -> tuple[Tensor, ...]:
        """Return this rank's micro-batches."""
        return self.mine(tensor).tensor_split(count) if self.several else tensor.chunk(count)

    def passing(self, last: bool) -> AbstractContextManager[Any]:
        """Wrap one forward and backward pass; gradients are exchanged with the last of a step."""
        return nullcontext() if self._wrapped is None else synchronising(self._wrapped, last)

    def evaluated(self, split: Split, size: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
        """Yield this rank's part of a split, at most ``size`` examples at a time, and whether they count.

        Ranks with a sharded model run it equally often, if need be on an example that does not count.
        """
        if not self.several:
            for x, y in zip(split.inputs.split(size), split.targets.split(size), strict=True):
                yield x, y, True
            return
        longest = math.ceil(len(split) / self.ranks.size)
        count = max(1, math.ceil(longest / size))
        for x, y in zip(self.pieces(split.inputs, count), self.pieces(split.targets, count), strict=True):
            if len(x):
                yield x, y, True
            elif self.shard:
                yield split.inputs[:1], split.targets[:1], False

    def draw(self, seed: int, step: int, generator: torch.Generator) -> None:
        """Give every rank but the first random numbers of its own, which depend on seed, rank and step alone.

        Rank 0 has those of a single process, which checkpoints carry.
        """
        if self.ranks.rank:
            text = f"{seed} {self.ranks.rank} {step}".encode()
            number = int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
            torch.manual_seed(number)
            generator.manual_seed(number + 1)


def _has_unused(model: nn.Module, outputs: Callable[[], Tensor]) -> bool:
    """Whether a parameter gets no gradient; looked up without a trace in weights, statistics or seeds."""
    training = model.training
    devices = [p.device for p in model.parameters() if p.is_cuda][:1]
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        model.eval()
        outputs().sum().backward()
    unused = any(p.requires_grad and p.grad is None for p in model.parameters())
    model.zero_grad()
    model.train(training)
    return unused
