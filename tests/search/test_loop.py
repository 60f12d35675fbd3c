import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from mupx import bulk, leases, processes, recipe, storage
from mupx import study as store
from mupx.errors import MismatchError, NoResultError, StorageError, UsageError
from mupx.search import choice, loop, sampling, worker
from mupx.sections import Hyperparameters

from . import synthetic

ROOT = Path(__file__).parents[2]


def reopen(result):
    url = store.default_url(result.run_dir)
    return store.open_study(url, result.study, create=False, identity=None)


def bowl(hyper):
    return 0.5 + (math.log10(hyper.lr) + 1) ** 2


@pytest.fixture(scope="module")
def cache():
    return {}


@pytest.fixture
def undisturbed(training, tmp_path_factory, cache):
    """What the search of ``synthetic.experiment()`` is when nothing happens to it."""
    if not cache:
        result = loop.tune(synthetic.experiment(), run_dir=tmp_path_factory.mktemp("undisturbed") / "b")
        cache["record"] = synthetic.record(reopen(result))
    return cache["record"]


def test_tune_finds_the_valley_and_writes_a_recipe(training, tmp_path):
    experiment = synthetic.experiment(**{"search.trials": 24})
    result = loop.tune(experiment, run_dir=tmp_path / "kfac")
    assert result.best.value < 0.45
    assert result.counts["total"] == 24 == sum(result.counts[k] for k in ("finished", "pruned", "diverged"))
    assert result.counts["diverged"] > 0
    written = recipe.read(result.recipe)
    assert written.experiment.hyperparameters.lr == result.best.params["lr"]
    assert written.experiment.hyperparameters.damping == result.best.params["damping"]
    provenance = written.provenance
    assert (provenance["trial"], provenance["trials"]) == (result.best.trial, 24)
    assert provenance["robust"]["params"] == result.robust.params
    assert provenance["data_checksum"] == "c0ffee"
    assert {"study", "storage", "value", "objective", "seed", "mupx", "torch", "optuna", "date"} <= {
        *provenance
    }


def test_the_data_is_loaded_once_and_without_its_test_split(training, tmp_path):
    loop.tune(synthetic.experiment(**{"search.trials": 3}), run_dir=tmp_path / "a")
    assert synthetic.calls.loads == 1
    assert synthetic.calls.test_sizes == {0}


def test_every_trial_records_both_losses_and_how_it_ended(training, tmp_path):
    study = reopen(loop.tune(synthetic.experiment(), run_dir=tmp_path / "a"))
    for trial in store.finished(study):
        attrs = trial.user_attrs
        assert {"outcome", "train_loss", "seconds", "steps", "untrained"} <= attrs.keys()
        if attrs["outcome"] == "finished":
            assert trial.value == attrs["validation_loss"]
            assert attrs["train_loss"] == pytest.approx(attrs["validation_loss"] - 0.1)
        assert len(trial.intermediate_values) <= sampling.REPORTS


def test_a_diverged_trial_is_complete_with_the_untrained_loss(training, tmp_path):
    study = reopen(loop.tune(synthetic.experiment(**{"search.trials": 6}), run_dir=tmp_path / "a"))
    blown = [t for t in study.trials if t.params["lr"] > 1.0]
    assert blown
    for trial in blown:
        assert (trial.state, trial.value) == (TrialState.COMPLETE, synthetic.UNTRAINED["validation"])
        assert trial.user_attrs["outcome"] == "diverged"


def test_a_complete_search_returns_at_once_with_the_same_result(training, tmp_path, monkeypatch):
    first = loop.tune(synthetic.experiment(**{"search.trials": 5}), run_dir=tmp_path / "a")
    text = first.recipe.read_text()
    monkeypatch.setattr(synthetic, "train", None)
    monkeypatch.setattr(synthetic, "load_data", None)
    assert loop.tune(synthetic.experiment(**{"search.trials": 5}), run_dir=tmp_path / "a") == first
    assert first.recipe.read_text() == text


def test_trials_is_a_total_and_raising_it_continues_the_same_search(undisturbed, tmp_path):
    loop.tune(synthetic.experiment(**{"search.trials": 6}), run_dir=tmp_path / "a")
    more = loop.tune(synthetic.experiment(**{"search.trials": 14}), run_dir=tmp_path / "a")
    assert more.counts["total"] == 14
    assert synthetic.record(reopen(more)) == undisturbed


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"] + (["gp"] if find_spec("scipy") else []))
def test_the_same_seed_gives_the_same_trials_and_another_one_does_not(training, tmp_path, sampler):
    trials = 12 if sampler in ("tpe", "gp") else 4  # past the quasi-random start

    def run(name, seed):
        changes = {"search.sampler": sampler, "search.seed": seed, "search.trials": trials}
        experiment = synthetic.experiment(**changes)
        return synthetic.record(reopen(loop.tune(experiment, run_dir=tmp_path / name)))

    assert run("a", 0) == run("b", 0)
    assert run("c", 1) != run("a", 0)


def test_a_killed_search_resumes_to_the_undisturbed_one(training, tmp_path, undisturbed):
    """``kill -9`` in the middle of trial 12, when the sampler's model and the pruner are at work."""
    mark = tmp_path / "mark"
    environment = {**os.environ, "HANG_AT": "12", "HANG_MARK": str(mark), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.search.synthetic", str(tmp_path / "a")]
    process = subprocess.Popen(command, env=environment, cwd=ROOT)
    try:
        deadline = time.time() + 60
        while not mark.exists() and process.poll() is None and time.time() < deadline:
            time.sleep(0.02)
        assert mark.exists()
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()

    resumed = reopen(loop.tune(synthetic.experiment(), run_dir=tmp_path / "a"))
    assert [t.user_attrs.get("outcome") for t in resumed.trials].count("lost") == 1
    assert synthetic.record(resumed) == undisturbed


def test_numbering_seeds_by_all_trials_would_not_resume(training, tmp_path, monkeypatch):
    """The wrong key: the lost trial of the killed run shifts every seed after it."""
    right = sampling.sampler

    def wrong(name, space, seed, slot, *others):
        return right(name, space, seed, next(numbers), *others)

    monkeypatch.setattr(sampling, "sampler", wrong)
    numbers = itertools.count()
    undisturbed = reopen(loop.tune(synthetic.experiment(), run_dir=tmp_path / "b"))
    numbers = itertools.count()
    interrupt_at(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        loop.tune(synthetic.experiment(), run_dir=tmp_path / "a")
    resumed = reopen(loop.tune(synthetic.experiment(), run_dir=tmp_path / "a"))
    assert synthetic.record(resumed) != synthetic.record(undisturbed)


def interrupt_at(monkeypatch, number, error=KeyboardInterrupt):
    """Raise in the ``number``-th training, once."""
    train = synthetic.train

    def interrupted(*args, **options):
        if len(synthetic.calls.trained) + 1 == number and not synthetic.calls.loads < 0:
            synthetic.calls.loads = -100
            raise error
        return train(*args, **options)

    monkeypatch.setattr(synthetic, "train", interrupted)
    synthetic.calls.trained.clear()
    synthetic.calls.loads = 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_trial_is_closed_and_the_search_resumes(undisturbed, tmp_path, monkeypatch, error):
    interrupt_at(monkeypatch, 5, error)
    with pytest.raises(error):
        loop.tune(synthetic.experiment(), run_dir=tmp_path / "a")
    study = store.open_study(store.default_url(tmp_path / "a"), "a", create=False, identity=None)
    assert study.trials[4].state == TrialState.FAIL
    assert study.trials[4].user_attrs["outcome"] == "interrupted"
    resumed = reopen(loop.tune(synthetic.experiment(), run_dir=tmp_path / "a"))
    assert synthetic.record(resumed) == undisturbed


def interrupt_after(monkeypatch, number):
    """Raise after the ``number``-th operation that changes the storage, once."""
    count = itertools.count(1)

    def interrupting(operation):
        def interrupted(*args, **options):
            made = operation(*args, **options)
            if next(count) == number:
                raise KeyboardInterrupt
            return made

        return interrupted

    for name in ("create", "write"):
        monkeypatch.setattr(bulk, name, interrupting(getattr(bulk, name)))


@pytest.mark.parametrize("operation", range(1, 8))  # of two trials: made, drawn, told
def test_wherever_the_interrupt_comes_no_trial_is_left_running(undisturbed, tmp_path, monkeypatch, operation):
    with monkeypatch.context() as patch:
        interrupt_after(patch, operation)
        with pytest.raises(KeyboardInterrupt):
            loop.tune(synthetic.experiment(), run_dir=tmp_path / "a")
    study = store.open_study(store.default_url(tmp_path / "a"), "a", create=False, identity=None)
    assert all(trial.state.is_finished() for trial in study.trials)
    failed = [trial.user_attrs["outcome"] for trial in study.trials if trial.state == TrialState.FAIL]
    assert set(failed) <= {"interrupted"}
    resumed = reopen(loop.tune(synthetic.experiment(), run_dir=tmp_path / "a"))
    assert synthetic.record(resumed) == undisturbed


def test_a_worker_that_just_left_would_leave_trials_running(training, tmp_path, monkeypatch):
    """The wrong way: who looks at the study sees a trial run for as long as nobody joins the search."""
    monkeypatch.setattr(loop.Search, "_leave", lambda search: None)
    interrupt_after(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        loop.tune(synthetic.experiment(), run_dir=tmp_path / "a")
    study = store.open_study(store.default_url(tmp_path / "a"), "a", create=False, identity=None)
    assert [trial.state for trial in study.trials] == [TrialState.RUNNING]


def test_one_failing_trial_is_recorded_and_its_slot_run_again_with_other_values(
    training, tmp_path, monkeypatch
):
    interrupt_at(monkeypatch, 4, RuntimeError("a bad day"))
    infos = []
    result = loop.tune(
        synthetic.experiment(), run_dir=tmp_path / "a", progress=lambda *args: infos.append(args)
    )
    study = reopen(result)
    failed = study.trials[3]
    assert (failed.state, failed.user_attrs["outcome"]) == (TrialState.FAIL, "failed")
    assert failed.user_attrs["error"] == "RuntimeError: a bad day"
    assert study.trials[4].params != failed.params
    assert result.counts["failed"] == 1
    assert result.counts["total"] == 14
    assert (infos[3][0], infos[3][3].outcome, infos[3][3].value) == (3, "failed", None)


def test_three_equal_errors_from_the_start_stop_the_search_and_show_the_error(training, tmp_path):
    calls = []

    def broken(hyper):
        calls.append(hyper)
        raise TypeError(f"unsupported lr {hyper.lr}")  # the trial's own number does not make it another

    with pytest.raises(UsageError, match=r"3 times in a row.*TypeError: unsupported lr") as caught:
        loop.tune(synthetic.experiment(), run_dir=tmp_path / "a", objective=broken)
    assert len(calls) == 3
    assert isinstance(caught.value.__cause__, TypeError)
    assert len({hyper.lr for hyper in calls}) == 3


def test_different_errors_are_bounded_too(training, tmp_path):
    names = iter(f"error {'x' * n}" for n in range(1000))

    def broken(hyper):
        raise RuntimeError(next(names))

    with pytest.raises(UsageError, match="failed 15 times"):
        loop.tune(synthetic.experiment(), run_dir=tmp_path / "a", objective=broken)


def test_out_of_memory_three_times_is_no_result(training, tmp_path):
    def hungry(hyper):
        raise MemoryError("no room")

    with pytest.raises(NoResultError, match="smaller batch, width or model"):
        loop.tune(synthetic.experiment(), run_dir=tmp_path / "a", objective=hungry)


def test_a_mupx_error_stops_at_once(training, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 1, UsageError("train.batch_size is wrong"))
    with pytest.raises(UsageError, match="batch_size is wrong"):
        loop.tune(synthetic.experiment(), run_dir=tmp_path / "a")


def test_when_every_trial_diverges_the_study_is_kept(training, tmp_path):
    box = {"lr": {"low": 2.0, "high": 10.0}}
    experiment = synthetic.experiment(**{"search.trials": 5})
    experiment = experiment.updated({"search.space": box})
    with pytest.raises(NoResultError, match=r"5 diverged; lower the range of lr from 2:10.*--lr 0\.4:2"):
        loop.tune(experiment, run_dir=tmp_path / "a")
    study = store.open_study(store.default_url(tmp_path / "a"), "a", create=False, identity=None)
    assert len(store.finished(study)) == 5


CHANGES = [
    ({"search.space.lr.high": 3.0}, r"search\.space\.lr\.high: 10\.0 → 3\.0"),
    ({"search.seed": 1}, r"search\.seed: 0 → 1"),
    ({"train.batch_size": 32}, r"train\.batch_size: 64 → 32"),
    ({"hyperparameters.momentum": 0.5}, r"hyperparameters\.momentum: 0\.\d+ → 0\.5"),
]


@pytest.mark.parametrize(("change", "shown"), CHANGES)
def test_a_changed_search_is_refused_with_the_difference(training, tmp_path, change, shown):
    experiment = synthetic.experiment(**{"search.trials": 2})
    loop.tune(experiment, run_dir=tmp_path / "a")
    with pytest.raises(MismatchError, match=shown):
        loop.tune(experiment.updated(change), run_dir=tmp_path / "a")


def test_altered_data_is_refused(training, tmp_path, monkeypatch):
    loop.tune(synthetic.experiment(**{"search.trials": 2}), run_dir=tmp_path / "a")
    monkeypatch.setattr(synthetic, "load_data", lambda experiment: synthetic.Data(checksum="decaf"))
    with pytest.raises(MismatchError, match=r"data\.checksum: 'c0ffee' → 'decaf'"):
        loop.tune(synthetic.experiment(**{"search.trials": 3}), run_dir=tmp_path / "a")


def test_fresh_moves_the_old_folder_aside_and_loses_nothing(training, tmp_path):
    experiment = synthetic.experiment(**{"search.trials": 2})
    first = loop.tune(experiment, run_dir=tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    changed = experiment.updated({"search.seed": 1})
    second = loop.tune(changed, run_dir=tmp_path / "a", fresh=True)
    third = loop.tune(changed, run_dir=tmp_path / "a", fresh=True)
    assert second.best == third.best != first.best
    assert (tmp_path / "a.old-1" / "notes.txt").read_text() == "mine"
    old = store.open_study(*store.locate(tmp_path / "a.old-1"), create=False, identity=None)
    assert choice.choose(old, experiment) == first.best
    assert (tmp_path / "a.old-2").is_dir()


def test_fresh_in_a_shared_storage_takes_another_study_name_and_keeps_it(training, tmp_path):
    url = store.file_url(tmp_path / "shared.db")
    experiment = synthetic.experiment(**{"search.trials": 2, "search.storage": url})
    assert loop.tune(experiment, run_dir=tmp_path / "a").study == "a"
    changed = experiment.updated({"search.seed": 1})
    assert loop.tune(changed, run_dir=tmp_path / "a", fresh=True).study == "a-2"
    assert loop.tune(changed, run_dir=tmp_path / "a").study == "a-2"
    assert not (tmp_path / "a" / "study.db").exists()


@pytest.mark.parametrize("kind", ["tune", "worker"])
def test_a_second_search_by_mistake_is_refused_and_beside_a_worker_it_waits(
    training, tmp_path, monkeypatch, kind
):
    experiment = synthetic.experiment(**{"search.trials": 3})
    loop.tune(experiment.updated({"search.trials": 2}), run_dir=tmp_path / "a")
    study = store.open_study(store.default_url(tmp_path / "a"), "a", create=False, identity=None)
    trial = study.ask()
    parent = {"pid": os.getppid(), "start": processes.born(os.getppid()), "kind": kind}
    trial.set_user_attr("lease", {**leases.Leases(study, 60).lease(), **parent})
    trial.set_user_attr("slot", 2)
    synthetic.suggest(trial, experiment.search.space)

    def told(seconds):  # instead of a pause: the other one ends its trial
        study.tell(trial, 0.5)

    monkeypatch.setattr(worker.time, "sleep", told)
    if kind == "tune":
        with pytest.raises(StorageError, match=r"trial 2 .* another process"):
            loop.tune(experiment, run_dir=tmp_path / "a")
        assert study.trials[-1].state == TrialState.RUNNING
    else:
        assert loop.tune(experiment, run_dir=tmp_path / "a").counts["total"] == 3
        assert len(study.trials) == 3


def test_a_wrong_experiment_leaves_no_empty_study_behind(training, tmp_path, monkeypatch):
    def missing(experiment):
        raise UsageError("unknown data set")

    monkeypatch.setattr(synthetic, "load_data", missing)
    with pytest.raises(UsageError, match="unknown data set"):
        loop.tune(synthetic.experiment(), run_dir=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_empty_space_takes_the_optimizer_s_default(training, tmp_path):
    experiment = synthetic.experiment(**{"search.trials": 2, "search.space": {}})
    result = loop.tune(experiment, run_dir=tmp_path / "a")
    assert result.best.params.keys() == {"lr", "damping"}


def test_any_hyperparameter_can_be_searched(training, tmp_path):
    box = {name: {"low": 0.1, "high": 0.9} for name in Hyperparameters.model_fields}
    experiment = synthetic.experiment(**{"search.trials": 3}).updated({"search.space": box})
    result = loop.tune(experiment, run_dir=tmp_path / "a")
    assert result.best.params.keys() == Hyperparameters.model_fields.keys()
    written = recipe.read(result.recipe).experiment.hyperparameters.model_dump()
    assert written == result.best.params


def test_progress_counts_finished_trials_and_shows_the_best_so_far(training, tmp_path):
    seen = []
    loop.tune(
        synthetic.experiment(),
        run_dir=tmp_path / "a",
        progress=lambda done, total, best, last: seen.append((done, total, best, last)),
    )
    assert [done for done, *_ in seen] == list(range(1, 15))
    assert {total for _, total, *_ in seen} == {14}
    bests = [best for _, _, best, _ in seen if best is not None]
    assert bests == sorted(bests, reverse=True)
    for _, _, best, last in seen:
        if last.outcome == "finished":
            assert best <= last.value


def test_a_running_trial_says_at_each_report_how_far_it_is(training, tmp_path):
    seen = []
    loop.tune(
        synthetic.experiment(**{"search.trials": 3}),
        run_dir=tmp_path / "a",
        progress=lambda done, total, best, last: seen.append((done, total, best, last.number)),
        stepped=lambda done, total, best, at: seen.append((done, total, best, at)),
    )
    ended = -1
    for done, total, best, at in seen:
        if isinstance(at, int):
            ended = at
        else:
            assert (at.first, at.last, done, total) == (ended + 1, ended + 1, ended + 1, 3)
            assert 0 < at.step <= at.total
            assert (best is None) == (done == 0)
    assert sum(not isinstance(at, int) for *_, at in seen) > 3


def test_the_edge_of_the_box_is_reported(training, tmp_path):
    box = {"lr": {"low": 1e-4, "high": 1e-2}}
    experiment = synthetic.experiment(**{"search.trials": 16}).updated({"search.space": box})
    (edge,) = loop.tune(experiment, run_dir=tmp_path / "a").edges
    assert (edge.param, edge.side, edge.text) == ("lr", "high", "--lr 0.0001:0.1")


def test_a_foreign_loop_is_searched_alike_and_gives_no_recipe(training, tmp_path):
    experiment = synthetic.experiment(**{"search.trials": 20}).updated({"search.space": {"lr": BOX_LR}})
    result = loop.tune(experiment, run_dir=tmp_path / "a", objective=bowl)
    assert result.best.params["lr"] == pytest.approx(0.1, rel=0.6)
    assert result.recipe is None
    assert synthetic.calls.loads == 0


BOX_LR = {"low": 1e-3, "high": 10.0}


def test_a_foreign_loop_may_diverge(training, tmp_path):
    def cliff(hyper):
        return math.nan if hyper.lr > 0.1 else bowl(hyper)

    experiment = synthetic.experiment(**{"search.trials": 8}).updated({"search.space": {"lr": BOX_LR}})
    result = loop.tune(experiment, run_dir=tmp_path / "a", objective=cliff, untrained=2.3)
    diverged = [t for t in reopen(result).trials if t.params["lr"] > 0.1]
    assert diverged
    assert {t.value for t in diverged} == {2.3}
    assert result.best.params["lr"] <= 0.1


def test_another_objective_in_the_same_folder_is_refused(training, tmp_path):
    experiment = synthetic.experiment(**{"search.trials": 2})
    loop.tune(experiment, run_dir=tmp_path / "a", objective=bowl)
    with pytest.raises(MismatchError, match=r"objective: '.*bowl' → None"):
        loop.tune(experiment, run_dir=tmp_path / "a")


def test_no_password_is_written_anywhere(training, tmp_path, monkeypatch):
    """A SQLite study under a URL that pretends to have a password, as PostgreSQL's would."""
    secret = "postgresql://ann:hunter2@db/studies"
    real = store.file_url(tmp_path / "elsewhere.db")
    options = storage._options
    monkeypatch.setattr(
        storage, "_options", lambda url, create: options(real if url == secret else url, create)
    )
    experiment = synthetic.experiment(**{"search.trials": 2, "search.storage": secret})
    result = loop.tune(experiment, run_dir=tmp_path / "a")
    assert result.storage == "postgresql://ann:***@db/studies"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"elsewhere.db", "study.json", "recipe.toml"} <= {path.name for path in files}
    for path in files:
        assert b"hunter2" not in path.read_bytes()


def test_optuna_stays_quiet(training, tmp_path, capsys):
    loop.tune(synthetic.experiment(**{"search.trials": 11}), run_dir=tmp_path / "a")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_recipe_is_made_from_the_study_without_torch(training, tmp_path):
    result = loop.tune(synthetic.experiment(**{"search.trials": 3}), run_dir=tmp_path / "a")
    reference = f"{tmp_path}/a/study.db#a"
    code = f"""
import sys
from mupx import config, study
from mupx.search import choose, recipe_from_study
opened = study.open_study(*study.parse_reference({reference!r}), create=False, identity=None)
experiment = config.parse(opened.user_attrs["experiment"])
recipe = recipe_from_study(opened, choose(opened, experiment, "best")).transfer(1024)
assert "torch" not in sys.modules
import json
print(json.dumps([layer.lr for layer in recipe.layers]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    expected = [layer.lr for layer in recipe.read(result.recipe).transfer(1024).layers]
    assert json.loads(done.stdout) == expected


def test_real_training_end_to_end(tmp_path):
    from mupx.config import Experiment

    experiment = Experiment().updated(
        {
            "optimizer.name": "sgd",
            "hyperparameters.momentum": 0.0,
            "scaling.base_width": 16,
            "scaling.width": 16,
            "train.steps": 40,
            "train.threads": 1,
            "search.trials": 12,
            "search.space": {"lr": {"low": 1e-3, "high": 100.0}},
        }
    )
    result = loop.tune(experiment, run_dir=tmp_path / "sgd")
    assert result.counts["total"] == 12
    assert result.counts["diverged"] > 0
    assert result.best.value < 1.5  # log 10 = 2.3 untrained
    table = recipe.read(result.recipe).transfer(64).layers
    assert all(layer.lr > 0 for layer in table)
    study = reopen(result)
    again = loop.tune(experiment, run_dir=tmp_path / "again")
    assert synthetic.record(reopen(again)) == synthetic.record(study)


def test_the_wrong_way_to_tell_divergence_loses_it():
    """Told as FAIL, a diverged trial does not reach the sampler, and a NaN is not even accepted."""
    study = optuna.create_study()
    trial = study.ask()
    with pytest.raises(ValueError, match="not acceptable"):
        study.tell(trial, math.nan, state=TrialState.COMPLETE)
    study.tell(trial, state=TrialState.FAIL)
    assert store.finished(study) == []
