"""Trials in batches: what is asked, what is told, and what a search that was stopped makes of it."""

import os

import pytest
from optuna.samplers import TPESampler
from optuna.trial import TrialState

from mupx import study as store
from mupx.config import Experiment
from mupx.errors import UsageError
from mupx.search import batch, loop, sampling

from . import synthetic


def reopen(run_dir):
    return store.open_study(store.default_url(run_dir), run_dir.name, create=False, identity=None)


def several(population=4, **changes):
    return synthetic.experiment(**{"search.population": population, "search.trials": 12, **changes})


def record_of(experiment, run_dir, **options):
    loop.tune(experiment, run_dir=run_dir, **options)
    return synthetic.record(reopen(run_dir))


def test_trials_are_asked_and_trained_in_batches_up_to_the_number_wanted(training, tmp_path):
    seen = []
    result = loop.tune(
        several(**{"search.trials": 13}),
        run_dir=tmp_path / "a",
        progress=lambda done, total, best, last: seen.append((done, last.number)),
    )
    assert training.calls.populations == [4, 4, 4]  # the thirteenth is a trial like any other
    assert seen == [(i + 1, i) for i in range(13)]
    assert result.counts["total"] == 13
    assert result.counts["diverged"] > 0
    for trial in store.finished(reopen(tmp_path / "a")):
        assert {"outcome", "train_loss", "seconds", "steps", "untrained"} <= trial.user_attrs.keys()
        assert trial.number == 12 or len(trial.intermediate_values) <= sampling.RUNGS


def test_members_say_once_for_all_of_them_how_far_they_are(training, tmp_path):
    seen = []
    loop.tune(
        several(),
        run_dir=tmp_path / "a",
        stepped=lambda done, total, best, at: seen.append((done, total, at)),
    )
    assert {(done, total, at.first, at.last) for done, total, at in seen} == {
        (0, 12, 0, 3),
        (4, 12, 4, 7),
        (8, 12, 8, 11),
    }
    for first in (0, 4, 8):
        steps = [at.step for *_, at in seen if at.first == first]
        assert 1 < len(steps) <= sampling.RUNGS
        assert steps == sorted(set(steps))
        assert steps[-1] <= seen[0][-1].total


def test_batches_of_one_are_the_search_without_batches(training, tmp_path):
    few = {"search.trials": 3}
    alone = record_of(synthetic.experiment(**few), tmp_path / "b")
    assert record_of(several(1, **few), tmp_path / "a") == alone
    assert training.calls.populations == []


@pytest.mark.parametrize("sampler", ["qmc", "random"])
def test_a_sampler_that_does_not_learn_asks_for_the_same_trials(training, tmp_path, sampler):
    changes = {"search.sampler": sampler, "search.pruner": "none", "search.trials": 5}
    together = record_of(several(3, **changes), tmp_path / "a")
    alone = record_of(synthetic.experiment(**changes), tmp_path / "b")
    assert [(params, value) for params, value, *_ in together] == [(p, value) for p, value, *_ in alone]


def test_a_sampler_that_learns_does_not_ask_twice_for_one_point(training, tmp_path):
    """Without a word about those that are running, TPE asks for the neighbourhood of one optimum."""
    params = [p for p, *_ in record_of(several(5, **{"search.trials": 15}), tmp_path / "a")]
    assert len({tuple(p.values()) for p in params}) == 15


def test_a_sampler_that_learns_sees_those_that_are_running(training, tmp_path, monkeypatch):
    whole, seen = TPESampler._sample, []

    def looking(sampler, study, trial, space):
        trials = study._get_trials(deepcopy=False, use_cache=not sampler._constant_liar)  # as it does
        running = [t for t in trials if t.state == TrialState.RUNNING and t.number != trial.number]
        seen.append([sorted(sampler._get_params(t, study)) for t in running])
        return whole(sampler, study, trial, space)

    monkeypatch.setattr(TPESampler, "_sample", looking)
    loop.tune(several(5, **{"search.trials": 15}), run_dir=tmp_path / "a")
    names = sorted(synthetic.experiment().search.space)
    assert seen == [[names] * others for others in range(5)]  # and what they were given


def test_every_running_trial_of_a_batch_is_held(training, tmp_path, monkeypatch):
    whole, held = synthetic.train_population, []

    def looking(*args, **options):
        trials = reopen(tmp_path / "a").get_trials(states=(TrialState.RUNNING,))
        held.append([trial.user_attrs["lease"]["pid"] for trial in trials])
        return whole(*args, **options)

    monkeypatch.setattr(synthetic, "train_population", looking)
    loop.tune(several(2, **{"search.trials": 4}), run_dir=tmp_path / "a")
    assert held == [[os.getpid()] * 2] * 2


LONG = {"search.trials": 15}


@pytest.fixture(scope="module")
def cache():
    return {}


@pytest.fixture
def undisturbed(training, tmp_path, cache):
    """What ``LONG`` finds when nothing happens to it; its third batch is asked for by TPE."""
    if not cache:
        cache["record"] = record_of(several(5, **LONG), tmp_path / "undisturbed")
    return cache["record"]


def test_a_search_stopped_in_the_middle_of_a_batch_resumes(undisturbed, tmp_path, monkeypatch):
    train, count = synthetic.train, []

    def interrupted(*args, **options):
        count.append(1)
        if len(count) == 13:  # the third batch has begun
            raise KeyboardInterrupt
        return train(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.tune(several(5, **LONG), run_dir=tmp_path / "a")
    outcomes = [trial.user_attrs["outcome"] for trial in reopen(tmp_path / "a").trials]
    assert outcomes[10:] == ["interrupted"] * 5
    assert "interrupted" not in outcomes[:10]
    assert record_of(several(5, **LONG), tmp_path / "a") == undisturbed


def stop_telling(monkeypatch, number, run_dir):
    """Be killed when the ``number``-th trial is to be told: nothing is closed any more."""
    tell, told = loop.Search.tell, []

    def killed(search, ended):
        told.append(1)
        if len(told) == number:
            raise KeyboardInterrupt
        return tell(search, ended)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Search, "tell", killed)
        patch.setattr(loop.Search, "_leave", lambda search: None)
        with pytest.raises(KeyboardInterrupt):
            loop.tune(several(5, **LONG), run_dir=run_dir)
    states = [trial.state for trial in reopen(run_dir).trials]
    assert states[10:] == [TrialState.COMPLETE, *[TrialState.RUNNING] * 4]


def test_a_search_killed_while_it_tells_a_batch_has_told_all_of_it(undisturbed, tmp_path, monkeypatch):
    stop_telling(monkeypatch, 12, tmp_path / "a")
    assert record_of(several(5, **LONG), tmp_path / "a") == undisturbed
    assert not any(trial.state == TrialState.FAIL for trial in reopen(tmp_path / "a").trials)


def test_a_search_interrupted_while_it_tells_a_batch_tells_the_rest(undisturbed, tmp_path, monkeypatch):
    told = []

    def interrupt(*args):
        told.append(1)
        if len(told) == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.tune(several(5, **LONG), run_dir=tmp_path / "a", progress=interrupt)
    assert [trial.state.is_finished() for trial in reopen(tmp_path / "a").trials] == [True] * 15
    assert record_of(several(5, **LONG), tmp_path / "a") == undisturbed


def test_telling_without_writing_it_down_first_would_not_resume(undisturbed, tmp_path, monkeypatch):
    """The wrong way: four trials of the batch are lost, and their places are filled otherwise."""
    monkeypatch.setattr(batch, "write_down", lambda ended: None)
    stop_telling(monkeypatch, 12, tmp_path / "a")
    assert record_of(several(5, **LONG), tmp_path / "a") != undisturbed


def test_a_member_that_leaves_its_population_is_run_alone_and_reports_nothing_twice(
    training, tmp_path, recwarn
):
    changes = {"search.sampler": "qmc", "search.pruner": "none", "search.trials": 4}
    alone = record_of(synthetic.experiment(**changes), tmp_path / "b")
    training.calls.trained.clear()
    training.calls.leaving.update({1, 2})
    together = record_of(several(**changes), tmp_path / "a")
    assert len(training.calls.trained) == 4 + 2
    assert [(params, value) for params, value, *_ in together] == [(p, value) for p, value, *_ in alone]
    assert not recwarn.list  # Optuna warns of a step that is reported again


def test_a_population_that_fails_as_a_whole_is_run_one_by_one(training, tmp_path, monkeypatch):
    changes = {"search.sampler": "qmc", "search.pruner": "none", "search.trials": 4}

    def hungry(*args, **options):
        raise MemoryError("no room for four")

    monkeypatch.setattr(synthetic, "train_population", hungry)
    together = record_of(several(**changes), tmp_path / "a")
    assert together == record_of(synthetic.experiment(**changes), tmp_path / "b")


def test_one_failing_trial_of_a_batch_is_recorded_and_its_slot_run_again(training, tmp_path, monkeypatch):
    train, count = synthetic.train, []

    def bad(*args, **options):
        count.append(1)
        if len(count) in (2, 4):  # the second of the population, and again when it is run alone
            raise RuntimeError("a bad day")
        return train(*args, **options)

    monkeypatch.setattr(synthetic, "train", bad)
    result = loop.tune(several(**{"search.trials": 8}), run_dir=tmp_path / "a")
    assert (result.counts["total"], result.counts["failed"]) == (8, 1)
    failed = reopen(tmp_path / "a").trials[1]
    assert (failed.state, failed.user_attrs["error"]) == (TrialState.FAIL, "RuntimeError: a bad day")


def test_a_mupx_error_closes_the_whole_batch_and_stops_at_once(training, tmp_path, monkeypatch):
    def wrong(*args, **options):
        raise UsageError("train.batch_size is wrong")

    monkeypatch.setattr(synthetic, "train_population", wrong)
    with pytest.raises(UsageError, match="batch_size is wrong"):
        loop.tune(several(), run_dir=tmp_path / "a")
    assert [trial.state for trial in reopen(tmp_path / "a").trials] == [TrialState.FAIL] * 4


def test_what_cannot_be_a_population_is_said_once_and_runs_one_by_one(training, tmp_path):
    training.calls.obstacle = "norm keeps running statistics"
    said = []
    few = {"search.trials": 3}
    record = record_of(several(**few), tmp_path / "a", remark=said.append)
    assert said == [
        "trials run one at a time, not 4 in lock-step: norm keeps running statistics",
    ]
    assert training.calls.populations == []
    assert record == record_of(synthetic.experiment(**few), tmp_path / "b")


def test_an_objective_of_one_s_own_runs_one_by_one(training, tmp_path):
    said = []
    loop.tune(
        several(**{"search.trials": 3}),
        run_dir=tmp_path / "a",
        objective=lambda hyper: hyper.lr,
        remark=said.append,
    )
    assert "an objective of your own takes one trial at a time" in said[0]


def test_a_study_may_be_continued_with_another_population(training, tmp_path):
    loop.tune(several(**{"search.trials": 4}), run_dir=tmp_path / "a")
    loop.tune(synthetic.experiment(**{"search.trials": 5}), run_dir=tmp_path / "a")
    assert loop.tune(several(2, **{"search.trials": 7}), run_dir=tmp_path / "a").counts["total"] == 7
    assert training.calls.populations == [4, 2]


def test_real_training_gives_the_same_study_either_way(tmp_path):
    experiment = Experiment().updated(
        {
            "data.name": "synthetic",
            "optimizer.name": "kfac",
            "scaling.base_width": 8,
            "scaling.width": 8,
            "train.steps": 10,
            "train.threads": 1,
            "train.dtype": "float64",
            "search.sampler": "qmc",
            "search.trials": 5,
            "search.space": {"lr": {"low": 1e-3, "high": 1e3}, "damping": {"low": 1e-3, "high": 1.0}},
        }
    )
    alone = record_of(experiment, tmp_path / "a")
    together = record_of(experiment.updated({"search.population": 3}), tmp_path / "b")
    assert {outcome for *_, outcome in alone} == {"finished", "diverged"}
    for (params, value, _, outcome), (own, own_value, _, own_outcome) in zip(alone, together, strict=True):
        assert (params, outcome) == (own, own_outcome)
        assert own_value == pytest.approx(value, rel=1e-8)
