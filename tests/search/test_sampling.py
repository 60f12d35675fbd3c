import inspect
import math
from importlib.util import find_spec

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState

from mupx.config import Experiment
from mupx.errors import UsageError
from mupx.optim import OPTIMIZERS
from mupx.search import sampling
from mupx.search.slots import Ledger
from mupx.sections import Hyperparameters, Range
from tests.search.synthetic import suggest

BOX = {"lr": Range(low=1e-3, high=10.0), "momentum": Range(low=0.0, high=0.98, log=False)}


@given(st.floats(0, 1), st.sampled_from(sorted(BOX)))
def test_the_unit_box_and_back(position, name):
    value = sampling.from_unit(name, position, BOX)
    assert BOX[name].low <= value <= BOX[name].high
    assert sampling.unit(name, value, BOX) == pytest.approx(position, abs=1e-9)


def test_the_middle_of_a_log_range_is_the_geometric_mean():
    assert sampling.from_unit("lr", 0.5, BOX) == pytest.approx(0.1)
    assert sampling.from_unit("momentum", 0.5, BOX) == pytest.approx(0.49)


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_every_optimizer_has_a_default_space_that_is_legal(optimizer):
    space = sampling.default_space(optimizer)
    assert "lr" in space
    dumped = {name: interval.model_dump() for name, interval in space.items()}
    Experiment().updated({"optimizer.name": optimizer, "search.space": dumped})


def test_an_unknown_optimizer_has_no_default_space():
    with pytest.raises(UsageError, match="did you mean 'kfac'"):
        sampling.default_space("kfacc")


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_the_role_space_is_legal_and_holds_the_base_values(optimizer):
    experiment = Experiment().updated({"optimizer.name": optimizer, "hyperparameters.output_scale": 40.0})
    space = sampling.role_space(experiment)
    for name, interval in space.items():
        for value in (interval.low, interval.high):
            Hyperparameters.model_validate({name: value})
        assert interval.low <= getattr(experiment.hyperparameters, name) <= interval.high
    multipliers = {f"{kind}_mult_{role}" for kind in ("lr", "init") for role in ("input", "hidden", "output")}
    assert multipliers | {"output_scale"} <= space.keys()
    assert ("momentum" in space) == ("momentum" in inspect.signature(OPTIMIZERS.load(optimizer)).parameters)


def test_trial_seeds_differ_in_every_argument():
    seeds = {sampling.trial_seed(s, n, f) for s in range(5) for n in range(20) for f in range(3)}
    assert len(seeds) == 5 * 20 * 3


def propose(name, count, seed=3, failed_before=None, lost=()):
    """Ask ``count`` finished trials of a bowl; ``lost`` ones are asked for once in vain."""
    study = optuna.create_study()
    for n in range(count):
        for _ in range(2 if n in lost else 1):
            failed = 0 if failed_before is None or n < failed_before else 1
            study.sampler = sampling.sampler(name, BOX, seed, n, failed, n)
            trial = study.ask()
            values = suggest(trial, BOX)
            if n in lost and trial.number == n + sum(m < n for m in lost):
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, (math.log10(values["lr"]) + 1) ** 2 + values["momentum"] ** 2)
    return [t.params for t in study.trials if t.state.name == "COMPLETE"]


@pytest.mark.parametrize("name", ["tpe", "random", "qmc"] + (["gp"] if find_spec("scipy") else []))
def test_a_lost_trial_changes_nothing(name):
    undisturbed = propose(name, 16)
    assert propose(name, 16, lost=(0, 1, 7, 12)) == undisturbed
    assert propose(name, 16, seed=4) != undisturbed


@pytest.mark.parametrize("name", ["tpe", "random", "qmc"] + (["gp"] if find_spec("scipy") else []))
def test_the_slot_of_a_failed_trial_gets_other_values(name):
    plain, shifted = propose(name, 13), propose(name, 13, failed_before=5)
    assert plain[:5] == shifted[:5]
    assert plain[5] != shifted[5]


def test_one_sampler_for_the_whole_search_would_not_resume():
    """The wrong design: Optuna's sampler object living as long as the process."""

    def run(restart_at):
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=1))
        for n in range(12):
            if n == restart_at:
                study.sampler = optuna.samplers.TPESampler(seed=1)
            trial = study.ask()
            study.tell(trial, suggest(trial, BOX)["lr"])
        return [t.params for t in study.trials]

    assert run(restart_at=6) != run(restart_at=None)


def test_quasi_random_points_cover_the_box_evenly():
    points = np.array([sampling.sobol_point(2, 0, i) for i in range(16)])
    assert points.shape == (16, 2)
    for axis in range(2):  # a (0, 4, 2)-net: one point in each sixteenth of either axis
        assert sorted((points[:, axis] * 16).astype(int)) == list(range(16))
    random = np.random.default_rng(0).random((16, 2))  # which plain random points are not
    assert sorted((random[:, 0] * 16).astype(int)) != list(range(16))


def test_the_model_based_samplers_beat_random_search_on_a_bowl():
    def best(name, seed):
        return min((math.log10(p["lr"]) + 1) ** 2 + p["momentum"] ** 2 for p in propose(name, 24, seed))

    tpe, random = ([best(name, seed) for seed in range(8)] for name in ("tpe", "random"))
    assert np.mean(tpe) < 0.5 * np.mean(random)


def test_gp_without_scipy_names_the_extra(monkeypatch):
    monkeypatch.setattr(sampling, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install mupx\[gp\]"):
        sampling.require_sampler("gp")
    sampling.require_sampler("tpe")


def test_gp_proposes_inside_the_box():
    pytest.importorskip("scipy", reason="the gp extra is not installed")
    for params in propose("gp", 14):
        assert BOX["lr"].low <= params["lr"] <= BOX["lr"].high


BOWL = {"lr": Range(low=1e-4, high=1.0), "damping": Range(low=1e-4, high=1.0)}


def searched(trials, running=0):
    """A study of random points of a bowl, with its last trials unfinished."""
    study, draw = optuna.create_study(), np.random.default_rng(0)
    for number in range(trials + running):
        point = {name: sampling.from_unit(name, draw.random(), BOWL) for name in BOWL}
        value = float(sum(np.log10(x) ** 2 for x in point.values())) if number < trials else None
        state = TrialState.RUNNING if value is None else TrialState.COMPLETE
        made = {"params": point, "distributions": sampling.distributions(BOWL)}
        study.add_trial(optuna.create_trial(state=state, value=value, **made))
    return study


def drawn(study, slot, trials):
    states = [t.state for t in study.get_trials(deepcopy=False)]
    counts = {"finished": states.count(TrialState.COMPLETE), "running": states.count(TrialState.RUNNING)}
    known = None if trials is None else lambda: trials
    study.sampler = sampling.sampler("tpe", BOWL, 0, slot, known=known, **counts)
    trial = study.ask()
    point = suggest(trial, BOWL)
    study.tell(trial, state=TrialState.FAIL)
    return point


@pytest.mark.parametrize("name", ["tpe", "random", "qmc"] + (["gp"] if find_spec("scipy") else []))
@pytest.mark.parametrize("finished", [4, 14])
def test_what_is_drawn_is_what_optuna_would_suggest(name, finished):
    study = searched(finished)
    space = {**BOWL, "momentum": Range(low=0.0, high=0.98, log=False)}

    def prepare(slot):
        study.sampler = sampling.sampler(name, space, 3, slot, finished=finished)

    prepare(finished)
    ours = sampling.draw(study, optuna.create_trial(state=TrialState.RUNNING), space)
    prepare(finished)
    theirs = suggest(study.ask(), space)
    prepare(finished + 1)
    next_one = suggest(study.ask(), space)
    assert ours == theirs != next_one
    assert list(ours) == sorted(space)


@pytest.mark.parametrize("running", [0, 3])
def test_tpe_that_is_told_draws_what_tpe_finds_out(running):
    study = searched(40, running)
    for slot in range(5):
        alone = drawn(study, slot, None)
        assert drawn(study, slot, study.trials) == alone
        assert drawn(study, slot, study.trials[:30]) != alone


def test_of_many_trials_tpe_is_told_the_best_those_that_run_and_a_thousand():
    study = searched(1500, 2)
    trials = study.trials
    ledger = Ledger(2000, trials)
    told = sampling.told_to_tpe(trials, ledger.settled, ledger.leaders, 0, 1502)
    values = sorted(t.value for t in trials[:1500])
    assert [t.value for t in told] != values
    assert sorted(t.value for t in told if t.value is not None)[:50] == values[:50]
    assert [t.number for t in told[-2:]] == [1500, 1501]
    assert 1002 <= len(told) <= 1052
    assert [t.number for t in told] == sorted({t.number for t in told})
    again = sampling.told_to_tpe(trials, ledger.settled, ledger.leaders, 0, 1502)
    assert [t.number for t in again] == [t.number for t in told]
    assert len(sampling.told_to_tpe(trials[:900], 900, [], 0, 900)) == 900


def test_a_thousand_trials_tell_tpe_what_all_do():
    """Judged by where it draws next: the share of points in the good corner, over forty draws."""
    study = searched(3000)
    trials = study.trials
    ledger = Ledger(4000, trials)

    def corner(told):
        points = [drawn(study, slot, told(slot)) for slot in range(3000, 3040)]
        return np.mean([max(abs(np.log10(x)) for x in point.values()) for point in points])

    some = corner(lambda slot: sampling.told_to_tpe(trials, ledger.settled, ledger.leaders, 0, slot))
    worst = corner(lambda slot: trials[:10])
    assert abs(some - corner(lambda slot: trials)) < 0.1
    assert worst > some + 0.1  # the wrong variant
