import itertools
import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from mupx import checkpoint, config, parts, training
from mupx.datasets.base import Split
from mupx.dotted import merge
from mupx.errors import MismatchError, UsageError
from mupx.run import Run, schedule_factor, total_steps
from mupx.training import train
from mupx.usercode import hand_over

SMALL = {
    "scaling.width": 16,
    "scaling.base_width": 8,
    "train.batch_size": 32,
    "train.steps": 12,
    "train.threads": 1,
    "hyperparameters.lr": 0.05,
    "hyperparameters.damping": 0.1,
    "optimizer.refresh": 5,
    "optimizer.staleness": 0.5,
}
OPTIMIZERS = [
    ("sgd", None),
    ("adamw", None),
    ("kfac", "trace"),
    ("kfac", "absolute"),
    ("shampoo", "relative"),
]


def experiment(**changes):
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return config.parse(merge({}, {**SMALL, **dotted}))


@pytest.fixture(scope="module")
def data():
    full = training.load_data(experiment())
    cut = {
        name: Split(getattr(full, name).inputs[:400], getattr(full, name).targets[:400])
        for name in ("train", "validation", "test")
    }
    return replace(full, **cut)


def optimizer(name, rule):
    return {"optimizer__name": name, "optimizer__damping_rule": rule}


@pytest.mark.parametrize(("name", "rule"), OPTIMIZERS)
def test_every_optimizer_learns_and_repeats_itself_to_the_last_bit(data, name, rule):
    chosen = experiment(**optimizer(name, rule), train__steps=40)
    first, second = train(chosen, data=data), train(chosen, data=data)
    assert first.outcome == "finished"
    assert first.validation.loss < first.untrained["validation"]
    assert (first.train_loss, first.validation) == (second.train_loss, second.validation)


def test_another_seed_gives_other_numbers(data):
    chosen = experiment()
    assert (
        train(chosen, data=data).train_loss != train(chosen.updated({"train.seed": 1}), data=data).train_loss
    )


@pytest.mark.parametrize(("name", "rule"), OPTIMIZERS)
def test_at_base_width_standard_and_maximal_update_parametrization_are_the_same_run(data, name, rule):
    mup = experiment(**optimizer(name, rule), scaling__width=8)
    sp = mup.updated({"scaling.parametrization": "sp"})
    assert train(mup, data=data).train_loss == train(sp, data=data).train_loss
    wider = {"scaling.width": 16}
    assert train(mup.updated(wider), data=data).train_loss != train(sp.updated(wider), data=data).train_loss


@pytest.mark.parametrize(("name", "rule"), OPTIMIZERS)
@pytest.mark.parametrize("fisher", ["empirical", "mc"])
def test_a_run_continued_from_a_checkpoint_equals_an_undisturbed_one(tmp_path, data, name, rule, fisher):
    chosen = experiment(**optimizer(name, rule), optimizer__fisher=fisher, train__checkpoint_every=5)
    whole = train(chosen, data=data, run_dir=tmp_path / "whole")

    class KilledError(Exception):
        pass

    def kill(step, steps, loss):
        if step == 8:
            raise KilledError

    with pytest.raises(KilledError):
        train(chosen, data=data, run_dir=tmp_path / "cut", progress=kill)
    torch.manual_seed(999)  # whatever happens between the two processes must not matter
    continued = train(chosen, data=data, run_dir=tmp_path / "cut")
    assert continued.train_loss == whole.train_loss
    assert continued.validation == whole.validation
    losses = [(tmp_path / n / "metrics.jsonl").read_text() for n in ("whole", "cut")]
    assert losses[0] == losses[1]
    assert len(losses[0].splitlines()) == 12 + 1


def test_a_process_killed_with_signal_9_continues_to_the_same_numbers(tmp_path, data):
    script = f"""
import os, signal
from mupx import checkpoint, config, parts, training
from mupx.dotted import merge
chosen = config.parse(merge({{}}, {SMALL!r})).updated({{"train.checkpoint_every": 4}})
def kill(step, steps, loss):
    if step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
training.train(chosen, run_dir=__import__("pathlib").Path("run"), progress=kill)
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=tmp_path)
    assert ended.returncode == -9
    chosen = experiment(train__checkpoint_every=4)
    continued = train(chosen, run_dir=tmp_path / "run")
    assert continued.train_loss == train(chosen).train_loss


def test_a_finished_run_is_returned_and_another_configuration_refused(tmp_path, data):
    chosen = experiment()
    first = train(chosen, data=data, run_dir=tmp_path, evaluate_test=True)
    again = train(chosen, data=data, run_dir=tmp_path, evaluate_test=True)
    assert again == first
    assert first.test is not None
    with pytest.raises(MismatchError, match=r"train\.steps: 12 → 13"):
        train(chosen.updated({"train.steps": 13}), data=data, run_dir=tmp_path)


def test_ctrl_c_inside_a_step_finishes_the_step_and_saves_it(tmp_path, data, monkeypatch):
    whole = train(experiment(), data=data, run_dir=tmp_path / "whole")
    draw = Run.batch

    def interrupted(run):
        if run.step == 6:
            signal.raise_signal(signal.SIGINT)
        return draw(run)

    chosen = experiment(train__checkpoint_every=100)
    # A shell starts its background jobs with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(chosen, data=data, run_dir=tmp_path / "cut")
    assert checkpoint.latest(tmp_path / "cut" / "checkpoints").step == 7
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert train(chosen, data=data, run_dir=tmp_path / "cut").train_loss == whole.train_loss


def test_a_torn_last_line_of_the_metrics_is_dropped_on_resume(tmp_path, data):
    chosen = experiment(train__checkpoint_every=4)

    def stop(step, steps, loss):
        if step == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(chosen, data=data, run_dir=tmp_path, progress=stop)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    train(chosen, data=data, run_dir=tmp_path)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(1, 13), 12]


@pytest.mark.parametrize("every", [None, 5, 6])
def test_a_run_killed_before_it_has_a_result_records_its_last_validation_once(tmp_path, data, every):
    chosen = experiment(train__checkpoint_every=4, train__eval_every=every)
    train(chosen, data=data, run_dir=tmp_path)
    expected = (tmp_path / "metrics.jsonl").read_bytes()
    assert expected.count(b'"step": 12, "validation') == (2 if every == 6 else 1)
    (tmp_path / "result.json").unlink()  # as if killed between the last checkpoint and the result
    train(chosen, data=data, run_dir=tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == expected


@pytest.mark.parametrize("last", [4, 12])
def test_a_run_stopped_before_the_validation_of_its_step_records_it_when_it_continues(tmp_path, data, last):
    chosen = experiment(train__checkpoint_every=100, train__eval_every=4)
    whole = train(chosen, data=data, run_dir=tmp_path / "whole")

    def stop(step, steps, loss):  # told after the step, before its validation
        if step == last:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(chosen, data=data, run_dir=tmp_path / "cut", progress=stop)
    assert checkpoint.latest(tmp_path / "cut" / "checkpoints").step == last
    assert train(chosen, data=data, run_dir=tmp_path / "cut").train_loss == whole.train_loss
    found, expected = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("cut", "whole"))
    assert found == expected


@pytest.mark.parametrize("lr", [1e4, 1e9])
def test_divergence_is_a_result_and_keeps_finite_numbers(data, lr):
    result = train(
        experiment(optimizer__name="sgd", optimizer__damping_rule=None, hyperparameters__lr=lr), data=data
    )
    assert result.outcome == "diverged"
    assert result.validation is None
    assert math.isfinite(result.train_loss)


class _Cracked(torch.nn.Sequential):
    """A network whose gradients are not a number, though its outputs are, in every ``period``-th pass."""

    def __init__(self, width, period):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(196, width), torch.nn.Linear(width, 10))
        self.period, self.passes = period, 0

    def forward(self, x):
        self.passes += self.training
        crack = (0 * self[1].weight.sum()).sqrt()  # 0, with an infinite slope
        return super().forward(x) + (0 * crack if self.passes % self.period == 0 else 0)


@pytest.mark.parametrize(("name", "rule"), OPTIMIZERS)
@pytest.mark.parametrize("period", [5, 1])
def test_steps_without_finite_gradients_are_skipped_and_end_a_run_when_they_persist(data, name, rule, period):
    cracked = hand_over(lambda width: _Cracked(width, period))
    result = train(experiment(**optimizer(name, rule), model__name=cracked), data=data)
    if period == 1:
        assert (result.outcome, result.steps, result.skipped_steps) == ("diverged", 10, 10)
    else:
        assert (result.outcome, result.steps, result.skipped_steps) == ("finished", 12, 2)
        assert result.validation.loss < result.untrained["validation"]


def test_repaired_factors_are_part_of_the_result(data, tmp_path):
    chosen = experiment(hyperparameters__damping=1e-9, optimizer__solver="dense", hyperparameters__lr=1e-6)
    result = train(chosen, data=data, run_dir=tmp_path)
    assert result.repairs  # a ridge far below the rounding of a factor of 32 rows in float32
    assert all(name.endswith(".weight") and count > 0 for name, count in result.repairs.items())
    assert train(chosen, data=data, run_dir=tmp_path).repairs == result.repairs  # as it was written down
    sane = train(experiment(hyperparameters__damping=0.1, optimizer__solver="dense"), data=data)
    assert not sane.repairs


def test_skipped_steps_are_resumed_and_written_down(data, tmp_path):
    def stop(step, steps, loss):
        if step == 6:
            raise KeyboardInterrupt

    chosen = experiment(model__name=hand_over(lambda width: _Cracked(width, 1)), train__checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        train(chosen, data=data, run_dir=tmp_path, progress=stop)
    assert train(chosen, data=data, run_dir=tmp_path).steps == 10
    assert json.loads((tmp_path / "result.json").read_text())["skipped_steps"] == 10


def test_a_report_can_stop_a_run_and_sees_the_objective(data):
    seen = []

    def report(step, steps, value):
        seen.append((step, steps, value))
        return step >= 6

    result = train(experiment(), data=data, report=report, reports=4)
    assert result.outcome == "pruned"
    assert [step for step, _, _ in seen] == [3, 6]
    assert all(math.isfinite(value) for _, _, value in seen)


def test_accumulation_changes_nothing_but_rounding(data):
    for fisher in ("empirical", "exact"):
        whole = experiment(train__dtype="float64", optimizer__fisher=fisher)
        split = whole.updated({"train.accumulate": 4})
        assert train(split, data=data).train_loss == pytest.approx(
            train(whole, data=data).train_loss, rel=1e-9
        )


def test_bf16_autocast_trains(data):
    assert train(experiment(train__amp="bf16", train__steps=30), data=data).outcome == "finished"


def test_the_test_split_is_read_only_when_asked_for(data):
    poisoned = replace(data, test=Split(data.test.inputs * math.nan, data.test.targets))
    chosen = experiment()
    assert train(chosen, data=poisoned).test is None
    assert math.isnan(train(chosen, data=poisoned, evaluate_test=True).test.loss)
    assert train(chosen, data=poisoned).validation == train(chosen, data=data).validation


def test_output_scale_multiplies_the_logits(data):
    flat = experiment(hyperparameters__output_scale=1e-9)
    assert train(flat, data=data).untrained["validation"] == pytest.approx(math.log(10), rel=1e-6)


def test_a_scheduler_that_flattens_the_groups_is_caught(data, monkeypatch):
    def flatten(run):
        for group in run.optimizer.param_groups:
            group["lr"] = 0.05

    chosen = experiment(optimizer__name="sgd", optimizer__damping_rule=None)
    monkeypatch.setattr(Run, "set_learning_rates", flatten)
    with pytest.raises(MismatchError, match="something overwrote it"):
        train(chosen, data=data)


def test_schedules_at_both_ends():
    assert [schedule_factor(i, 4, "linear", 0.0) for i in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert [schedule_factor(i, 4, "constant", 0.0) for i in range(4)] == [1.0] * 4
    assert schedule_factor(2, 4, "cosine", 0.0) == pytest.approx(0.5)
    warm = [schedule_factor(i, 10, "constant", 0.3) for i in range(5)]
    assert warm == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_steps_are_whole_batches():
    assert total_steps(experiment(train__steps=None, train__epochs=1.5), 100) == 4
    assert total_steps(experiment(train__steps=7), 100) == 7
    with pytest.raises(UsageError, match="exceeds"):
        total_steps(experiment(train__batch_size=101), 100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer__name": "kfca"}, "did you mean 'kfac'"),
        ({"model__name": "mpl"}, "did you mean 'mlp'"),
        ({"data__name": "fashion-mnist-15"}, "did you mean 'fashion-mnist-14'"),
        ({"optimizer__damping_rule": "traec"}, "did you mean 'trace'"),
        ({"optimizer__name": "sgd", "optimizer__damping_rule": "trace"}, "has no damping"),
        ({"scaling__parametrization": "mu"}, "did you mean 'mup'"),
        ({"model__args": {"dept": 3}}, "takes no argument 'dept'"),
        ({"train__device": "gpu"}, "cannot be used here"),
        ({"train__accumulate": 5}, "not a multiple"),
        ({"roles": {"nothing.*": "hidden"}}, "matches no parameter"),
    ],
)
def test_a_wrong_name_or_value_is_refused_before_the_first_step(changes, message):
    with pytest.raises(UsageError, match=message):
        train(experiment(**changes))


@pytest.mark.slow
@pytest.mark.parametrize("width", [16, 32])
def test_the_cnn_trains_with_kfac(width):
    settings = {"train__steps": 60, "train__batch_size": 64, "optimizer__staleness": 0.05}
    chosen = experiment(model__name="myrtle5", scaling__width=width, hyperparameters__lr=0.003, **settings)
    result = train(chosen)
    assert result.outcome == "finished"
    assert result.validation.loss < 0.8 * result.untrained["validation"]


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path, data):
    from mupx.errors import StorageError

    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(StorageError, match="cannot write"):
        train(experiment(), data=data, run_dir=Path(blocked) / "run")


def test_data_arguments_reach_the_loader(tmp_path: Path) -> None:
    for split, label, i in itertools.product(("train", "val"), ("dark", "light"), range(20)):
        path = tmp_path / split / label / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (200 if label == "light" else 30, i, i)).save(path)
    folder = {"data.name": "image-folder", "data.dir": str(tmp_path)}
    for size in (8, 12):
        data = parts.load_data(config.parse(merge({}, {**folder, "data.args.size": size})))
        assert data.input_shape == (3, size, size)
    for name, taken in (("image-folder", "memory_gib, per_class, size, threads"), ("synthetic", "none")):
        wrong = config.parse(merge({}, {**folder, "data.name": name, "data.args.siz": 8}))
        with pytest.raises(UsageError, match=rf"takes no argument 'siz' \(it takes: {taken}\)"):
            parts.load_data(wrong)
