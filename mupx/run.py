"""One run: model, optimizer and data order of an experiment, at one of its steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mupx import checkpoint, parts, sharded_checkpoint
from mupx.config import Experiment
from mupx.datasets.base import Dataset, Split
from mupx.distributed.communicator import Communicator
from mupx.errors import UsageError
from mupx.evaluation import examples_at_once
from mupx.groups import check_groups
from mupx.layers import Layer, Parameter, derive
from mupx.memory import keep_freed_memory
from mupx.optim.adapter import Trainable
from mupx.optim.base import Base
from mupx.parallel import Parallel
from mupx.parametrization import build_optimizer, initialise
from mupx.parts import own
from mupx.plain_loss import find_loss
from mupx.quality import Watch
from mupx.run_folder import Metrics
from mupx.settling import settle

DIVERGED_AT = 10.0  # times the untrained loss: no useful run of these losses comes back from there
TAIL = 0.1  # the training loss is the mean over this last part of the steps


def total_steps(experiment: Experiment, train_size: int) -> int:
    """Return the number of steps: ``train.steps``, or whole batches in ``train.epochs`` passes."""
    if experiment.train.batch_size > train_size:
        raise UsageError(f"train.batch_size {experiment.train.batch_size} exceeds the {train_size} examples")
    if experiment.train.steps is not None:
        return experiment.train.steps
    return max(1, round(experiment.train.epochs * (train_size // experiment.train.batch_size)))


def schedule_factor(step: int, steps: int, schedule: str, warmup: float) -> float:
    """Return the factor on every learning rate at ``step`` (from 0) of ``steps``.

    Linear warm-up over the first ``warmup`` part, then constant, linear decay to zero, or half a cosine.
    """
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    position = (step - rising) / max(1, steps - rising)
    if schedule == "linear":
        return 1.0 - position
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * position))
    return 1.0


def pick_device(name: str) -> torch.device:
    """Return the named device; ``auto`` takes CUDA, then MPS, then the CPU."""
    if name == "auto":
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(best)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {name!r} cannot be used here ({reason}); try auto or cpu") from None
    return device


class Run:
    """Model, optimizer and data order of one experiment, at one step.

    Attributes:
        whole: Whether the run can be continued from here: False inside a step, and after one that broke.
    """

    def __init__(
        self,
        experiment: Experiment,
        data: Dataset,
        parameters: tuple[Parameter, ...],
        parallel: Parallel | None = None,
    ) -> None:
        config = experiment.train
        settle()
        self.parallel = Parallel(Communicator()) if parallel is None else parallel
        self.parallel.require(experiment)
        if config.batch_size % config.accumulate:
            raise UsageError(
                f"train.batch_size {config.batch_size} is not a multiple of "
                f"train.accumulate {config.accumulate}"
            )
        self.experiment, self.data = experiment, data
        self.device = pick_device(self.parallel.ranks.device or config.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.dtype = getattr(torch, config.dtype)
        self.steps = total_steps(experiment, len(data.train))
        self.loss = find_loss(config.loss)
        self.layers: list[Layer] = derive(parameters, experiment)
        self.step, self.whole = 0, True
        self.model, self.optimizer = self._build()
        self.inputs = self.placed(data.train.inputs)
        self.targets = data.train.targets.to(self.device)
        self.losses: list[float] = []
        self.untrained: dict[str, float] = {}
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def _build(self) -> tuple[nn.Module, Trainable]:
        seed = self.experiment.train.seed
        torch.manual_seed(seed)
        model = parts.factory(self.experiment, self.data)(self.experiment.scaling.width)
        initialise(model, self.layers)
        self.model = model = model.to(self.device, self.dtype)
        self.parallel.wrap(model, lambda: self.forward(self.placed(self.data.train.inputs[:2])), self.device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        epoch = len(self.data.train) // self.experiment.train.batch_size
        optimizer = build_optimizer(
            model, self.layers, self.experiment, self.generator, self.loss, self.steps, epoch
        )
        self.parallel.prepare(optimizer)
        return model, optimizer

    @property
    def factor(self) -> float:
        """The schedule's factor for the coming step."""
        config = self.experiment.train
        return schedule_factor(self.step, self.steps, config.schedule, config.warmup)

    def set_learning_rates(self) -> None:
        """Scale every group's learning rate by the same factor: the ratios between groups survive."""
        factor = self.factor
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return the batch of the current step; the order depends on seed and epoch alone."""
        size = self.experiment.train.batch_size
        epoch, position = divmod(self.step, len(self.targets) // size)
        if epoch != self._epoch:
            # A generator per epoch makes the order a function of the step: resuming needs no replay.
            generator = torch.Generator().manual_seed(1_000_003 * self.experiment.train.seed + epoch)
            self._order = torch.randperm(len(self.targets), generator=generator).to(self.device)
            self._epoch = epoch
        chosen = self._order[position * size : (position + 1) * size]
        return self.inputs[chosen], self.targets[chosen]

    def placed(self, inputs: Tensor) -> Tensor:
        """Return inputs on the run's device, in its precision; token ids stay whole numbers."""
        return inputs.to(self.device, self.dtype if inputs.is_floating_point() else None)

    def precision(self) -> AbstractContextManager[Any]:
        """Return the context in which the model runs forward: autocast where ``train.amp`` asks for it."""
        if self.experiment.train.amp == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits times ``output_scale``, in full precision."""
        scale = self.experiment.hyperparameters.output_scale
        with self.precision():
            outputs = self._outputs(inputs)
        outputs = outputs.to(self.dtype)
        return outputs if scale == 1.0 else outputs * scale

    def _outputs(self, inputs: Tensor) -> Tensor:
        name = self.experiment.model.name
        where = own(name, lambda: f"run forward at {self._where} on inputs of shape {list(inputs.shape)}")
        with where, self.parallel.ranks.guarding():
            outputs = self.parallel.model(self.model)(inputs)
        if not isinstance(outputs, Tensor):
            raise UsageError(f"model {name} returned {type(outputs).__name__}; return one tensor of outputs")
        return outputs

    @property
    def _where(self) -> str:
        return f"width {self.experiment.scaling.width}, step {self.step}"

    def advance(self, watch: Watch | None = None) -> float:
        """Do one optimizer step and return the loss of its batch before the step.

        Args:
            watch: Measures the curvature along the step.
        """
        config = self.experiment.train
        self.whole = False
        if not self.model.training:  # on a deep network that is narrow the walk takes longer than a layer
            self.model.train()
        self.set_learning_rates()
        if self.step <= 1:
            check_groups(self.optimizer, self.layers, self.factor)
        inputs, targets = self.batch()
        self.parallel.draw(config.seed, self.step, self.generator)
        total = 0.0
        self.optimizer.zero_grad()
        with self.parallel.ranks.guarding():
            for x, y, share, last in self._parts(inputs, targets):
                with self.parallel.passing(last):
                    total += self._pass(x, y, share)
        total = self.parallel.ranks.summed(total)[0]
        if math.isfinite(total):
            if watch is not None:
                watch.keep_gradients(self.optimizer)
            if config.grad_clip is not None:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
            with own(self.experiment.optimizer.name, lambda: f"doing its step at {self._where}"):
                self.optimizer.step()
            if watch is not None:
                watch.finish(self.optimizer, lambda wanted: self._gradients(inputs, targets, wanted))
        if self.step == 0:
            self.untrained["train"] = total
        self.losses.append(total)
        self.step += 1
        self.whole = math.isfinite(total)
        return total

    def _pass(self, x: Tensor, y: Tensor, share: float) -> float:
        """Add one micro-batch's gradients and statistics; return its part of the batch's loss."""
        where = own(self.experiment.model.name, lambda: f"run backward at {self._where}")
        if share == 0.0:  # the mean over no term is not a number, but other ranks wait for this backward pass
            with where:
                (self.forward(x).sum() * 0.0).backward()
            return 0.0
        weight = share * self.parallel.ranks.size  # the exchange takes the ranks' mean
        clipped = self.experiment.train.grad_clip is not None
        with self.optimizer.curvature(y, loss_scale=weight, gradients=clipped):
            outputs = self.forward(x)
            self.optimizer.update_curvature(outputs)
            loss = self.loss(outputs, y)
            with where, self.parallel.ranks.guarding():
                (loss * weight if weight != 1.0 else loss).backward()
        return loss.item() * share

    def _parts(self, inputs: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor, float, bool]]:
        """Yield this rank's micro-batches, each with its part of the batch's terms, and if it is the last.

        One without terms is left out where nobody waits for it.
        """
        count, several = self.experiment.train.accumulate, self.parallel.several
        pieces = (self.parallel.pieces(tensor, count) for tensor in (inputs, targets))
        for i, (x, y) in enumerate(zip(*pieces, strict=True)):
            share = self._share(y, targets) if several or count > 1 else 1.0
            if several or share != 0.0:
                yield x, y, share, i == count - 1

    def _gradients(self, inputs: Tensor, targets: Tensor, wanted: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the gradients of a batch's loss, apart from those the parameters carry."""
        totals: list[Tensor | None] = [None] * len(wanted)
        for x, y, share, _ in self._parts(inputs, targets):
            loss = self.loss(self.forward(x), y) * share
            for i, new in enumerate(torch.autograd.grad(loss, wanted, allow_unused=True)):
                old = totals[i]
                totals[i] = new if old is None or new is None else old + new
        return totals

    def _share(self, part: Tensor, whole: Tensor) -> float:
        """Return the part of a batch's terms that one micro-batch holds."""
        return int(self.loss.normaliser(part)) / max(1, int(self.loss.normaliser(whole)))

    @torch.no_grad()
    def evaluate(self, split: Split) -> Metrics:
        """Return mean loss and accuracy over the terms of a split that count."""
        self.model.eval()
        total, right, terms, labelled = 0.0, 0, 0, True
        size = examples_at_once(self.model, self.forward, self.placed(split.inputs[:2]))
        for x, y, counts in self.parallel.evaluated(split, size):
            targets = y.to(self.device)
            counted = int(self.loss.normaliser(targets)) if counts else 0
            if counted == 0 and not self.parallel.shard:
                continue  # the mean over no term is not a number
            outputs = self.forward(self.placed(x))
            if counted == 0:
                continue  # sharded parameters are put together by all ranks or none
            total += self.loss(outputs, targets).item() * counted
            labelled = not targets.is_floating_point() and targets.shape == outputs.shape[:-1]
            if labelled:
                # An ignored target is no class, so it is never right.
                right += int((outputs.argmax(-1) == targets).sum())
            terms += counted
        total, all_right, all_terms, unlabelled = self.parallel.ranks.summed(
            total, right, terms, not labelled
        )
        return Metrics(total / all_terms, None if unlabelled else all_right / all_terms)

    def diverged(self, loss: float) -> bool:
        """Whether a loss is beyond return."""
        return not loss <= DIVERGED_AT * max(self.untrained.values())

    def recent_loss(self, since: int) -> float:
        """Return the mean training loss of the steps from ``since`` on."""
        recent = self.losses[since:]
        return sum(recent) / len(recent)

    def tail_loss(self) -> float:
        """Return the mean training loss over the last 10 % of the steps done."""
        return self.recent_loss(len(self.losses) - max(1, round(TAIL * len(self.losses))))

    def snapshot(self) -> checkpoint.Checkpoint:
        """Return everything needed to continue to the last bit; all ranks call it, rank 0 has the whole."""
        tensors, optimizer = checkpoint.flatten_optimizer(self.optimizer.state_dict())
        tensors |= {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        return self._beside(tensors, {"optimizer": optimizer})

    def _beside(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> checkpoint.Checkpoint:
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        tensors["rng/torch"] = checkpoint.rng_state()
        tensors["rng/labels"] = self.generator.get_state()
        return checkpoint.Checkpoint(self.step, tensors, {**values, "untrained": self.untrained})

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Continue from a snapshot, of however many ranks."""
        prefix = "model/"
        weights = {
            name.removeprefix(prefix): tensor
            for name, tensor in saved.tensors.items()
            if name.startswith(prefix)
        }
        state = checkpoint.unflatten_optimizer(saved.tensors, saved.values["optimizer"])
        if self.parallel.shard:
            weights = sharded_checkpoint.cut_weights(self.model, weights)
            state = sharded_checkpoint.cut_state(self.optimizer, state)
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(state)
        self._continue(saved)

    def write_parts(self, directory: Path) -> checkpoint.Checkpoint | None:
        """Write each rank's part of sharded tensors and return the rest; None where nothing is sharded."""
        if not self.parallel.shard:
            return None
        assert isinstance(self.optimizer, Base)
        written = sharded_checkpoint.write(directory, self.model, self.optimizer, self.parallel.ranks)
        optimizer = checkpoint.flatten_optimizer(written)[1]
        return self._beside({}, {"optimizer": optimizer, "parts": directory.name})

    def restore_parts(self, saved: checkpoint.Checkpoint, directory: Path) -> None:
        """Continue from what :meth:`write_parts` wrote and returned, of however many ranks."""
        assert isinstance(self.optimizer, Base)
        rest = checkpoint.unflatten_optimizer({}, saved.values["optimizer"])
        sharded_checkpoint.read(directory, rest, self.model, self.optimizer, self.parallel.ranks)
        self._continue(saved)

    def _continue(self, saved: checkpoint.Checkpoint) -> None:
        self.losses = saved.tensors["losses"].tolist()
        torch.set_rng_state(saved.tensors["rng/torch"])
        self.generator.set_state(saved.tensors["rng/labels"])
        self.step, self.untrained = saved.step, dict(saved.values["untrained"])
