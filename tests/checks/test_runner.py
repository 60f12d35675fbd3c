"""A verification from end to end: what it refuses, what it survives, what it keeps."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mupx import check_report, parts, training
from mupx.checks import coordinate, late
from mupx.checks.runner import verify
from mupx.datasets.base import Split
from mupx.errors import MismatchError, NoResultError, UsageError
from mupx.run import Run
from mupx.run_folder import Metrics

from . import settings
from .settings import experiment, slopes

WIDTHS = (16, 32, 64)
TINY: dict[str, Any] = {"base": 16, "train__steps": 8}


def outcome(report: Any) -> dict[str, Any]:
    """What a report says, without where it is kept."""
    document = check_report.document(report)
    del document["storage"]
    return json.loads(json.dumps(document))


def build_with(module: Callable[[int], nn.Module]) -> Callable[..., Any]:
    return lambda experiment, data: module


class Unused(nn.Module):
    """A model with a layer that its forward pass forgets."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input, self.hidden = nn.Linear(24, width), nn.Linear(width, width)
        self.forgotten, self.output = nn.Linear(width, width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.output(torch.tanh(self.hidden(torch.tanh(self.input(x)))))
        return logits


class Noisy(nn.Module):
    """Dropout and batch normalisation: a pass draws random numbers and moves buffers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input, self.norm = nn.Linear(24, width), nn.BatchNorm1d(width)
        self.drop, self.output = nn.Dropout(0.2), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.output(self.drop(torch.tanh(self.norm(self.input(x)))))
        return logits


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"widths": [64]}, "compares widths and got one"),
        ({"widths": [0, 64]}, "whole number of at least 1"),
        ({"seeds": []}, "at least one seed"),
        ({"steps": [0]}, "at least one seed and one step"),
    ],
)
def test_what_cannot_be_compared_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        verify(experiment(settings.SGD), **given)


def test_a_width_without_whole_shapes_is_named() -> None:
    chosen = experiment(settings.SGD, **{"model.args": {"activation": "tanh", "ratios": [0.5, 1.0]}})
    with pytest.raises(MismatchError, match="no whole shape at width 65"):
        slopes(chosen, (64, 65, 128))


def test_a_model_whose_width_changes_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "factory", build_with(lambda width: nn.Linear(24, 10)))
    with pytest.raises(MismatchError, match="nothing grows"):
        slopes(experiment(settings.SGD), WIDTHS)


def test_a_layer_that_never_runs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "factory", build_with(Unused))
    report = slopes(experiment(settings.SGD, base=64), (64, 128, 256), seeds=(0,))
    assert report.verdict == "fail"
    assert any("forgotten never ran" in text for text in report.failures)
    assert {row.name for row in report.rows} >= {"input.weight", "hidden.weight", "output.weight"}


@pytest.mark.parametrize(("log2_lr", "idle"), [(-4, []), (-30, ["lr", "damping"])])
def test_a_line_on_which_nothing_is_learned_is_called_noise(log2_lr: int, idle: list[str]) -> None:
    chosen = experiment(settings.KFAC, **{**TINY, "hyperparameters__lr": 2.0**log2_lr})
    report = verify(chosen, widths=WIDTHS, seeds=(0,), quick=True, beside_sp=True)
    found = [text for text in report.notes if "learned nothing" in text]
    assert len(found) == len(idle)
    for text, axis in zip(found, idle, strict=True):
        assert text.startswith(f"width 16 learned nothing over {axis} 2^")
        assert ("at lr 2^" in text) == (axis == "damping")


def test_a_run_that_breaks_later_keeps_what_was_read_before() -> None:
    chosen = experiment(settings.SGD, hyperparameters__lr=1e9, **{"model.args": {"activation": "relu"}})
    report = slopes(chosen, WIDTHS, seeds=(0,), steps=(1, 5))
    assert report.verdict == "fail"
    assert "not finite after step" in report.failures[0]
    assert any(row.step == 1 for row in report.rows)


def test_a_run_that_breaks_at_once_everywhere_is_no_result() -> None:
    chosen = experiment(settings.SGD)
    data = training.load_data(chosen)
    broken = replace(data, train=replace(data.train, inputs=data.train.inputs * float("nan")))
    with pytest.raises(NoResultError, match="not finite after step 1"):
        slopes(chosen, WIDTHS, seeds=(0,), data=broken)


def test_a_width_beyond_memory_is_left_out_and_the_rest_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    right = coordinate.read

    def read(run: Run, steps: Any) -> Any:
        if run.experiment.scaling.width == 256:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return right(run, steps)

    monkeypatch.setattr(coordinate, "read", read)
    report = slopes(experiment(settings.SGD), (64, 128, 256), seeds=(0,))
    assert report.widths == [64, 128]
    assert any("width 256 does not fit into memory" in text for text in report.notes)
    assert report.rows


def test_another_error_is_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(run: Run, steps: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(coordinate, "read", read)
    with pytest.raises(RuntimeError, match="a bug"):
        slopes(experiment(settings.SGD), (64, 128), seeds=(0,))


def test_an_interrupted_verification_continues_to_the_same_report(tmp_path: Path) -> None:
    chosen = experiment(settings.SGD, **TINY)
    whole = outcome(verify(chosen, widths=WIDTHS, quick=True))
    seen: list[str] = []

    def stop(done: int, total: int, text: str) -> None:
        seen.append(text)
        if len(seen) == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(chosen, widths=WIDTHS, quick=True, run_dir=tmp_path, progress=stop)
    measured: list[str] = []
    right = training.carry_out

    def counted(run: Run, **more: Any) -> Any:
        measured.append(str(run.experiment.scaling.width))
        return right(run, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "carry_out", counted)
        continued = outcome(verify(chosen, widths=WIDTHS, quick=True, run_dir=tmp_path))
        first = len(measured)
        again = outcome(verify(chosen, widths=WIDTHS, quick=True, run_dir=tmp_path))
    assert continued == whole == again
    assert first > 0
    assert len(measured) == first  # nothing is measured twice


def test_a_killed_verification_continues(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mupx", "verify", "--data", "synthetic", "--optimizer", "sgd"]
    command += ["--set", "model.args.bias=false", "--width", "16", "--widths", "16,32,64", "--steps", "8"]
    command += ["--quick", "--json", "--threads", "1", "--lr", "0.1"]
    process = subprocess.Popen(
        [*command, "--run-dir", str(tmp_path / "killed")], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    assert process.stderr is not None
    process.stderr.readline()  # the first measurement is done
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    documents = []
    for name in ("killed", "whole"):
        ended = subprocess.run(
            [*command, "--run-dir", str(tmp_path / name)], capture_output=True, text=True, check=False
        )
        document = json.loads(ended.stdout)
        documents.append({k: v for k, v in document.items() if k not in ("storage", "run_dir")})
    assert documents[0] == documents[1]


def test_a_folder_of_another_experiment_is_refused(tmp_path: Path) -> None:
    slopes(experiment(settings.SGD), (64, 128), seeds=(0,), run_dir=tmp_path)
    with pytest.raises(MismatchError, match=r"hyperparameters\.lr"):
        slopes(experiment(settings.SGD, hyperparameters__lr=0.2), (64, 128), run_dir=tmp_path)


def test_more_widths_reuse_what_was_measured(tmp_path: Path) -> None:
    slopes(experiment(settings.SGD), (64, 128), seeds=(0,), run_dir=tmp_path)
    seen: list[str] = []
    started = time.perf_counter()
    report = slopes(
        experiment(settings.SGD),
        (64, 128, 256),
        seeds=(0,),
        run_dir=tmp_path,
        progress=lambda done, total, text: seen.append(text),
    )
    assert report.widths == [64, 128, 256]
    assert time.perf_counter() > started
    assert len(seen) == 3


def test_reading_changes_neither_the_run_nor_the_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "factory", build_with(Noisy))
    chosen = experiment(settings.SGD)
    data = training.load_data(chosen)
    read, plain = (Run(chosen, data, training.describe(chosen, data)) for _ in range(2))
    torch.manual_seed(5)
    readings = coordinate.read(read, (1, 3))
    torch.manual_seed(5)
    for _ in range(3):
        plain.advance()
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, read.model.state_dict()[name]), name
    assert set(readings.moved) == {1, 3}


def test_own_contribution_is_that_of_the_one_tensor() -> None:
    chosen = experiment(settings.SGD, bias=True)
    data = training.load_data(chosen)
    run = Run(chosen, data, training.describe(chosen, data))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    inputs, _ = run.batch()
    hidden = torch.tanh(inputs @ before["input.weight"].T + before["input.bias"])
    readings = coordinate.read(run, (1,))
    after = dict(run.model.named_parameters())
    with torch.no_grad():
        weight = (hidden @ (after["hidden1.weight"] - before["hidden1.weight"]).T).abs().mean()
        bias = (after["hidden1.bias"] - before["hidden1.bias"]).abs().mean()
        initial = (hidden @ before["hidden1.weight"].T).abs().mean()
    moved = readings.moved[1]
    assert moved.own["hidden1.weight"] == pytest.approx(float(weight), rel=1e-4)
    assert moved.own["hidden1.bias"] == pytest.approx(float(bias), rel=1e-3)
    assert readings.init["hidden1.weight"] == pytest.approx(float(initial), rel=1e-5)
    assert moved.own["hidden1.weight"] != pytest.approx(moved.layers["hidden1"], rel=1e-2)


def test_a_parameter_that_never_moves_fails() -> None:
    chosen = experiment(settings.SGD, hyperparameters__lr_mult_hidden=1e-30)
    report = slopes(chosen, (64, 128, 256), seeds=(0,))
    assert report.verdict == "fail"
    assert any("hidden1.weight: does not move in 10 steps" in cause for cause in report.causes)


@pytest.mark.slow
def test_the_wrong_damping_shows_in_the_sweep_and_the_right_one_transfers() -> None:
    """Over 16× in width, π-damping's best value climbs; that of trace damping stays."""
    drifts = {}
    for name, setup in (("trace", settings.KFAC), ("pi", settings.KFAC_PI)):
        chosen = experiment(setup, base=16, train__steps=20, hyperparameters__lr=0.1)
        report = verify(chosen, widths=(16, 64, 256), beside_sp=False)
        sweep = next(s for s in report.own_sweeps if s.axis == "damping")
        drifts[name] = sweep.drift.value
    assert abs(drifts["trace"]) < 0.15
    assert drifts["pi"] > 0.2


def test_runs_of_a_sweep_evaluate_one_batch_and_train_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = experiment(settings.SGD, **TINY)
    data = parts.load_data(chosen)
    sizes, plain = set(), Run.evaluate

    def evaluate(run: Run, split: Split) -> Metrics:
        sizes.add(len(split))
        return plain(run, split)

    monkeypatch.setattr(Run, "evaluate", evaluate)
    report = verify(chosen, data=data, widths=WIDTHS, quick=True)
    assert sizes == {chosen.train.batch_size}
    assert len(data.validation) > chosen.train.batch_size
    line = report.sweeps[0].lines[0]
    whole = training.train(chosen.updated({"hyperparameters.lr": 2.0 ** line.values[0]}), data=data)
    assert line.losses[0][0] == whole.train_loss


def test_a_first_batch_without_labels_is_not_all_that_is_evaluated() -> None:
    chosen = experiment(settings.SGD, **TINY)
    data = parts.load_data(chosen)
    targets = data.validation.targets.clone()
    targets[: chosen.train.batch_size] = -100
    unlabelled = replace(data, validation=Split(data.validation.inputs, targets))
    report = verify(chosen, data=unlabelled, widths=WIDTHS, quick=True)
    assert report.sweeps[0].lines == verify(chosen, data=data, widths=WIDTHS, quick=True).sweeps[0].lines


def test_the_late_check_reads_the_base_runs_of_the_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = experiment(settings.KFAC, **TINY)
    data = parts.load_data(chosen)
    trained, plain = [], training.carry_out

    def carry_out(run: Run, progress: Any) -> Any:
        trained.append(run.experiment)
        return plain(run, progress)

    monkeypatch.setattr(training, "carry_out", carry_out)
    report = verify(chosen, data=data, widths=WIDTHS, quick=True)
    assert len({repr(one) for one in trained}) == len(trained)  # nothing is trained twice
    row = next(row for row in report.late if (row.name, row.quantity) == ("hidden1.weight", "norm"))
    assert {(width, seed) for width, seed, _ in row.series} == {(w, s) for w in WIDTHS for s in (0, 1)}
    for width, seed, norm in row.series:
        one = chosen.updated({"scaling.width": width, "train.seed": seed})
        parameters = training.describe(chosen, data)
        assert norm == late.read(Run(one, data, parameters), parameters)["hidden1.weight"].norm
        other = one.updated({"hyperparameters.lr": chosen.hyperparameters.lr * 2**0.5})
        assert norm != late.read(Run(other, data, parameters), parameters)["hidden1.weight"].norm


def test_a_late_check_beyond_memory_costs_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    right = late.LastUpdate.reading

    def reading(last: late.LastUpdate) -> Any:
        if last._run.experiment.scaling.width == 64:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return right(last)

    monkeypatch.setattr(late.LastUpdate, "reading", reading)
    report = verify(experiment(settings.SGD, **TINY), widths=WIDTHS, quick=True)
    assert report.notes == ["the late check does not fit into memory at width 64"]
    assert {line.width for line in report.sweeps[0].lines} == set(WIDTHS)
    assert {width for row in report.late for width, _, _ in row.series} == {16, 32}

    def broken(last: late.LastUpdate) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(late.LastUpdate, "reading", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        verify(experiment(settings.SGD, **TINY), widths=WIDTHS, quick=True)
