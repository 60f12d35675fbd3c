"""The one training loop: proxy, target, width sweep and check differ only in their experiment.

Divergence is a result, not an exception. The same experiment gives the same numbers to the last bit on
the same machine and number of threads; a run with a folder continues from its last checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
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
from mupx.optim.adapter import Trainable
from mupx.optim.base import Base
from mupx.parallel import Parallel
from mupx.parametrization import build_optimizer, initialise, resolved
from mupx.parts import describe, load_data, own
from mupx.plain_loss import find_loss
from mupx.quality import Watch
from mupx.recipe import Recipe
from mupx.run_folder import Metrics, Result
from mupx.settling import settle
from mupx.shared_folder import SharedFolder
from mupx.signals import AtStepEnd

DIVERGED_AT = 10.0  # times the untrained loss: no useful run of these losses comes back from there
SKIPPED_AT = 10  # steps in a row without a finite gradient, though the loss is finite: they will not end
TAIL = 0.1  # the training loss is the mean over this last part of the steps
CHECKPOINTS_PER_RUN = 10

Report = Callable[[int, int, float], bool]
Progress = Callable[[int, int, float], None]


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


def train(
    experiment: Experiment,
    *,
    data: Dataset | None = None,
    run_dir: Path | None = None,
    recipe: Recipe | None = None,
    report: Report | None = None,
    reports: int = 0,
    evaluate_test: bool = False,
    progress: Progress | None = None,
    ranks: Communicator | None = None,
    fsdp: bool = False,
) -> Result:
    """Train ``experiment`` at ``experiment.scaling.width`` and say how it ended.

    Args:
        experiment: Everything the numbers depend on.
        data: The loaded data set, when several runs share it.
        run_dir: Folder for metrics, checkpoints and result; a started run there is continued and a
            finished one returned.
        recipe: Where the parameter table comes from, if not from the model itself.
        report: ``(step, steps, objective so far) -> stop?``, called ``reports`` times at even intervals.
        reports: Number of calls of ``report``.
        evaluate_test: Also measure the test split at the end. A search never does.
        progress: ``(step, steps, loss)`` after every step.
        ranks: Who trains together, each calling this (:func:`mupx.distributed.joining.join`); alone if None.
        fsdp: Split parameters, optimizer state and curvature over ranks in place of copies on each.

    Raises:
        UsageError: A name or value of the experiment is wrong.
        MismatchError: The folder belongs to another configuration, or the live parameter groups
            differ from the table.
    """
    experiment = resolved(experiment)
    if experiment.train.threads is not None:
        torch.set_num_threads(experiment.train.threads)
    data = load_data(experiment) if data is None else data
    parallel = Parallel(ranks or Communicator(), fsdp)
    parallel.require_same({**experiment.identity(search=False), "data_checksum": data.checksum})
    folder = None
    if run_dir is not None:
        folder = SharedFolder(parallel.ranks, run_dir, experiment, data.checksum, evaluate_test)
    if folder is not None and (done := folder.result()) is not None:
        return done
    run = Run(experiment, data, describe(experiment, data) if recipe is None else recipe.parameters, parallel)
    if folder is not None:
        folder.restore(run)
    try:
        result = _loop(run, folder, report, reports, progress, evaluate_test)
    except (KeyboardInterrupt, SystemExit):
        # Stopped between two steps, in an evaluation for example; several ranks save together or not at all.
        if folder is not None and run.whole and not parallel.several:
            folder.save(run)
        raise
    if folder is not None:
        folder.finish(run, result)
    return result


def carry_out(run: Run, progress: Progress | None = None) -> Result:
    """Train a run in memory to its end, as :func:`train` does, and write nothing.

    Args:
        run: A run that has not begun.
        progress: ``(step, steps, loss)`` after every step.
    """
    return _loop(run, None, None, 0, progress, False)


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

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits times ``output_scale``, in full precision."""
        config, scale = self.experiment.train, self.experiment.hyperparameters.output_scale
        precision: AbstractContextManager[Any] = nullcontext()
        if config.amp == "bf16":
            precision = torch.autocast(self.device.type, torch.bfloat16)
        with precision:
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
                watch.keep_gradients()
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
        with self.optimizer.curvature(y, loss_scale=weight):
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


def _loop(
    run: Run,
    folder: SharedFolder | None,
    report: Report | None,
    reports: int,
    progress: Progress | None,
    evaluate_test: bool,
) -> Result:
    started = time.perf_counter()
    config = run.experiment.train
    save_every = config.checkpoint_every or max(1, run.steps // CHECKPOINTS_PER_RUN)
    report_at = even_steps(run.steps, reports) if report is not None else set()
    reported = 0
    outcome = "finished"
    if "validation" not in run.untrained:
        run.untrained["validation"] = run.evaluate(run.data.validation).loss
        require_start(run)
    while run.step < run.steps:
        with AtStepEnd() as stop:
            watch = None if folder is None else _watch(run)
            loss = run.advance(watch)
            if folder is not None:
                folder.record(run, loss=_finite(loss), lr_factor=_last_factor(run))
                if watch is not None and watch.found:
                    folder.record(run, **watch.found)
            if run.parallel.ranks.any(stop.asked):
                stop.ask()  # one rank was told to stop: none goes on alone
            if folder is not None and stop.asked and math.isfinite(loss):
                folder.save(run)
        stop.release()
        if run.diverged(loss) or run.optimizer.skipped_in_a_row >= SKIPPED_AT:
            outcome = "diverged"
            break
        if progress is not None:
            progress(run.step, run.steps, loss)
        if run.step in report_at and report is not None and run.step < run.steps:
            value = _objective(run, reported)
            reported = run.step
            if run.diverged(value):
                outcome = "diverged"
                break
            if report(run.step, run.steps, value):
                outcome = "pruned"
                break
        if folder is not None and config.eval_every and run.step % config.eval_every == 0:
            _record_validation(run, folder)
        if folder is not None and run.step % save_every == 0 and run.step < run.steps:
            folder.save(run)
    return _result(run, folder, outcome, evaluate_test, started)


def require_start(run: Run) -> None:
    """Tell a loss that is broken before the first step from one that diverged."""
    loss, names = run.untrained["validation"], run.experiment.own_code
    if names and not math.isfinite(loss):
        raise UsageError(
            f"the loss of the untrained model is {loss} at width {run.experiment.scaling.width}, so no step "
            f"can be at fault; look at {', '.join(f'{key} = {name}' for key, name in names.items())}"
        )


def _result(
    run: Run, folder: SharedFolder | None, outcome: str, evaluate_test: bool, started: float
) -> Result:
    validation = test = None
    if outcome != "diverged":
        validation = run.evaluate(run.data.validation)
        if run.diverged(validation.loss):
            outcome, validation = "diverged", None
    if outcome == "finished" and evaluate_test and len(run.data.test):
        test = run.evaluate(run.data.test)
    if folder is not None and validation is not None:
        folder.record(run, validation_loss=validation.loss, validation_accuracy=validation.accuracy)
    return result_of(run, outcome, validation, test, time.perf_counter() - started)


def result_of(
    run: Run, outcome: str, validation: Metrics | None, test: Metrics | None, seconds: float
) -> Result:
    """Return the result of a run that has ended."""
    return Result(
        outcome,
        run.step,
        run.untrained["train"] if outcome == "diverged" else run.tail_loss(),
        validation,
        test,
        dict(run.untrained),
        seconds,
        skipped_steps=run.optimizer.skipped_steps,
        repairs=dict(run.optimizer.repairs),
    )


def _objective(run: Run, since: int) -> float:
    if run.experiment.search.objective == "train":
        return run.recent_loss(since)
    return run.evaluate(run.data.validation).loss


def _record_validation(run: Run, folder: SharedFolder) -> None:
    metrics = run.evaluate(run.data.validation)
    folder.record(run, validation_loss=metrics.loss, validation_accuracy=metrics.accuracy)


def _watch(run: Run) -> Watch | None:
    every = run.experiment.train.curvature_every
    return Watch(run.model, run.device) if every and (run.step + 1) % every == 0 else None


def even_steps(steps: int, count: int) -> set[int]:
    """Return ``count`` steps at even intervals, the last one of ``steps`` included."""
    return {round(steps * (i + 1) / count) for i in range(count)} if count else set()


def _last_factor(run: Run) -> float:
    group = run.optimizer.param_groups[0]
    return float(group["lr"] / group["initial_lr"])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
