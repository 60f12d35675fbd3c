"""A run on disk: its configuration, metrics, checkpoints and result."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mupx import checkpoint
from mupx.config import Experiment
from mupx.dotted import refuse_difference
from mupx.errors import MismatchError, out_of_memory
from mupx.files import append, read_json, write_atomically
from mupx.schema import SCHEMA, migrated, versions


@dataclass(frozen=True)
class Metrics:
    """Mean loss in nats (cross-entropy) and the fraction of right answers, over the terms that count.

    A term is an example, or a token where every token has a target; real-valued targets have no accuracy.
    """

    loss: float
    accuracy: float | None


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        outcome: ``finished``, ``diverged`` or ``pruned``.
        steps: Steps done.
        train_loss: Mean training loss over the last 10 % of the steps; the untrained loss if diverged.
        validation: At the end; None when the run did not finish.
        test: Only when asked for.
        untrained: Loss before the first step: ``train`` on the first batch, ``validation`` on the split.
        seconds: Wall time of the steps and evaluations done by this process.
        skipped_steps: Steps not done because a gradient was not finite; ten in a row end a run.
        repairs: Parameter → factors that needed float64 or more damping than was asked for.
    """

    outcome: str
    steps: int
    train_loss: float
    validation: Metrics | None
    test: Metrics | None
    untrained: Mapping[str, float]
    seconds: float
    skipped_steps: int = 0
    repairs: Mapping[str, int] = field(default_factory=dict)


class Continuable(Protocol):
    """A run at one step, which can be written down and continued."""

    step: int

    def snapshot(self) -> checkpoint.Checkpoint:
        """Return everything needed to continue to the last bit."""

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Continue from a snapshot."""


@contextmanager
def taking_over(saved: checkpoint.Checkpoint, folder: Path) -> Iterator[None]:
    """Say of a checkpoint that the block cannot continue from that it is another run's.

    Raises:
        MismatchError: With what it stumbled over.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise MismatchError(
            f"the checkpoint of step {saved.step} in {folder} is not one of this run "
            f"({reason}); use another --run-dir, or --fresh"
        ) from None


class RunFolder:
    """A run on disk: ``run.json``, ``metrics.jsonl``, ``checkpoints/``, ``result.json``."""

    def __init__(self, path: Path, experiment: Experiment, checksum: str, evaluate_test: bool) -> None:
        self.path, self.checkpoints, self._keep = path, path / "checkpoints", experiment.train.keep_latest
        self._metrics: list[str] = []
        self._eval_every = experiment.train.eval_every
        identity = {**experiment.identity(search=False), "data_checksum": checksum}
        document = {
            "schema": SCHEMA,
            "versions": versions(),
            "identity": identity,
            "evaluate_test": evaluate_test,
        }
        if (path / "run.json").exists():
            stored = migrated("run", self._read("run.json"), str(path / "run.json")).get("identity", {})
            refuse_difference(f"the run in {path}", stored, identity, "use another --run-dir, or --fresh")
        else:
            self._write("run.json", document)

    def result(self) -> Result | None:
        """Return the result of a finished run."""
        if not (self.path / "result.json").exists():
            return None
        document = self._read("result.json")
        try:
            for split in ("validation", "test"):
                document[split] = None if document[split] is None else Metrics(**document[split])
            return Result(**document)
        except (KeyError, TypeError) as error:
            raise MismatchError(
                f"{self.path / 'result.json'} is no result of this mupx ({error}); train again with --fresh"
            ) from None

    def restore(self, run: Continuable) -> bool:
        """Continue from the newest whole checkpoint and drop metrics written after it.

        Returns:
            Whether the validation that belongs to its step is still to be recorded: a run that is told to
            stop saves the step before it.

        Raises:
            MismatchError: No checkpoint is whole, or the newest is not one of this run.
        """
        saved = checkpoint.latest(self.checkpoints)
        if saved is not None:
            with taking_over(saved, self.checkpoints):
                run.restore(saved)
        due = bool(self._eval_every and run.step and run.step % self._eval_every == 0)
        return self._keep_metrics_until(run.step, int(due)) < due

    def record(self, run: Continuable, **values: Any) -> None:
        """Queue one line of metrics; it reaches the file with the next checkpoint.

        Keys: ``step`` and, in lines of their own, ``loss`` and ``lr_factor`` of every step;
        ``validation_loss`` and ``validation_accuracy``; ``curvature_c``, ``curvature_best_scale`` (c(P) of
        all tensors together) and ``curvature``: by parameter its ``c`` and ``best_scale``, and by symbol of
        a statistic ``lambda_max``, ``damping`` and ``condition``, as :mod:`mupx.quality` defines them.
        """
        self._metrics.append(json.dumps({"step": run.step, **values}))

    def save(self, run: Continuable) -> None:
        """Write the queued metrics, then a checkpoint."""
        append(self.path / "metrics.jsonl", "".join(f"{line}\n" for line in self._metrics).encode())
        self._metrics.clear()
        checkpoint.write(self.checkpoints, run.snapshot(), self._keep)

    def finish(self, run: Continuable, result: Result) -> None:
        """Write what is queued, the last checkpoint and the result."""
        self.save(run)
        self._write("result.json", asdict(result))

    def _keep_metrics_until(self, step: int, validations: int) -> int:
        """Drop what is of later steps, and return how many validations of this one were kept.

        Args:
            step: The last step to keep.
            validations: The most to keep of it. What a run that ended evaluates once more at its last step it
                will do again, if it was killed before it had a result.
        """
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return 0
        kept, found = [], 0
        for line in path.read_bytes().splitlines():
            try:
                values = json.loads(line)
                written = values["step"]
            except (ValueError, RecursionError, LookupError, TypeError):
                continue  # the torn last line of a killed run
            if not isinstance(written, int) or written > step:
                continue
            if written == step and "validation_loss" in values:
                if found == validations:
                    continue
                found += 1
            kept.append(line + b"\n")
        write_atomically(path, b"".join(kept))
        return found

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return read_json(self.path / name)
        except (OSError, ValueError) as error:
            raise MismatchError(
                f"{self.path / name} cannot be read ({error}); use another --run-dir"
            ) from None

    def _write(self, name: str, document: Mapping[str, Any]) -> None:
        write_atomically(self.path / name, json.dumps(document, indent=1).encode())
