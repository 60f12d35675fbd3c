"""What a trial found, written at one stroke: the same as one by one, whole or not at all."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from optuna.distributions import FloatDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages._rdb import models
from optuna.trial import TrialState

from mupx import bulk
from mupx.study import open_study
from tests.servers import POSTGRES, Postgres

ATTRIBUTES = {"outcome": "finished", "seconds": 0.25, "curve": [[1, 2.5]], "x": "ü'\"%s"}
REPORTS = {3: 0.5, 6: 0.25, 9: -1e300}


@pytest.fixture(params=["sqlite", "journal", POSTGRES])
def study(request: Any, tmp_path: Any) -> Any:
    if request.param == "postgresql":
        with Postgres() as server:
            yield open_study(server.url, "s", create=True, identity=None)
    else:
        urls = {"sqlite": f"sqlite:///{tmp_path}/study.db", "journal": f"journal://{tmp_path}/study.log"}
        yield open_study(urls[request.param], "s", create=True, identity=None)


def found(study: Any, trial: Any) -> Any:
    (frozen,) = (t for t in study.get_trials() if t.number == trial.number)
    return frozen.user_attrs, frozen.intermediate_values


def test_it_writes_what_would_be_written_one_by_one(study):
    together, alone = study.ask(), study.ask()
    together.set_user_attr("outcome", "of before")
    bulk.write(study, together._trial_id, ATTRIBUTES, REPORTS)
    bulk.write(study, together._trial_id, ATTRIBUTES, REPORTS)  # the first time was not heard of
    bulk.write(study, together._trial_id, {}, {})
    bulk.one_by_one(study._storage, alone._trial_id, ATTRIBUTES, REPORTS, None)
    assert found(study, together) == found(study, alone) == (ATTRIBUTES, REPORTS)


@pytest.mark.parametrize(
    "end",
    [
        bulk.End(TrialState.COMPLETE, 0.25),
        bulk.End(TrialState.COMPLETE, float("inf")),
        bulk.End(TrialState.PRUNED, -1.5),
        bulk.End(TrialState.PRUNED, None),
        bulk.End(TrialState.FAIL, None),
    ],
)
def test_it_ends_a_trial_as_optuna_does(study, end):
    together, alone = study.ask(), study.ask()
    bulk.write(study, together._trial_id, ATTRIBUTES, REPORTS, end)
    bulk.one_by_one(study._storage, alone._trial_id, ATTRIBUTES, REPORTS, end)
    assert found(study, together) == found(study, alone)
    first, second = study.get_trials()
    assert (first.state, first.value) == (second.state, second.value) == tuple(end)
    assert first.datetime_start <= first.datetime_complete <= second.datetime_complete
    with pytest.raises(UpdateFinishedTrialError):
        bulk.write(study, together._trial_id, {}, {}, end)


POINT = bulk.Point(
    {"lr": 0.1 + 0.2, "momentum": 0.9},
    {"lr": FloatDistribution(1e-3, 1.0, log=True), "momentum": FloatDistribution(0.0, 0.98)},
)


def test_it_writes_the_parameters_that_optuna_would_have_suggested(study):
    together, alone = study.ask(), study.ask()
    bulk.write(study, together._trial_id, {}, {}, point=POINT)
    bulk.write(study, together._trial_id, {}, {}, point=POINT)  # the first time was not heard of
    bulk.one_by_one(study._storage, alone._trial_id, {}, {}, None, POINT)
    first, second = study.get_trials()
    assert first.params == second.params == POINT.values
    assert first.distributions == second.distributions == POINT.distributions


def test_a_trial_is_made_with_its_attributes_and_the_next_number(study):
    study.tell(study.ask(), 1.0)
    made = bulk.create(study, ATTRIBUTES)
    before, seen = study.get_trials()
    assert (made.number, made._trial_id, made.state) == (seen.number, seen._trial_id, TrialState.RUNNING)
    assert made.user_attrs == seen.user_attrs == ATTRIBUTES
    assert seen.number == 1
    assert seen.state == TrialState.RUNNING
    assert before.datetime_complete <= seen.datetime_start <= datetime.now()
    assert study.ask().number == 2
    bulk.write(study, made._trial_id, {}, REPORTS, bulk.End(TrialState.COMPLETE, 0.5))
    assert study.get_trials()[1].value == 0.5


def test_a_trial_that_cannot_be_made_whole_is_not_made(tmp_path):
    study = open_study(f"sqlite:///{tmp_path}/study.db", "s", create=True, identity=None)
    with study._storage._backend.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE trial_user_attributes")
    with pytest.raises(StorageInternalError):
        bulk.create(study, ATTRIBUTES)
    with study._storage._backend.engine.begin() as connection:
        assert not connection.exec_driver_sql("SELECT * FROM trials").all()


def test_trials_are_read_as_optuna_reads_them_whatever_changed_since_the_last_look(study):
    trials = bulk.Trials(study)
    assert trials.read() == []
    first, second, third = (bulk.create(study, ATTRIBUTES) for _ in range(3))
    study._storage.set_trial_system_attr(third._trial_id, "fixed", {"lr": 0.5})
    assert trials.read() == study.get_trials()
    bulk.write(study, third._trial_id, {"late": None}, REPORTS, bulk.End(TrialState.PRUNED, -1.5), POINT)
    bulk.write(study, first._trial_id, {}, REPORTS, point=POINT)
    assert trials.read() == study.get_trials()
    bulk.write(study, first._trial_id, {"outcome": "x"}, {}, bulk.End(TrialState.COMPLETE, float("inf")))
    study.enqueue_trial({"lr": 0.25})
    assert trials.read() == study.get_trials()
    study.tell(second._trial_id - first._trial_id, state=TrialState.FAIL)
    assert trials.read() == trials.read() == study.get_trials()
    assert [t.state.name for t in trials.read()] == ["COMPLETE", "FAIL", "PRUNED", "WAITING"]


def test_a_finished_trial_is_read_once_and_a_study_sees_its_own_trials_only(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    study, other = (open_study(url, name, create=True, identity=None) for name in "ab")
    for one in (other, study, other):
        one.tell(one.ask(), 1.0)
    trials = bulk.Trials(study)
    (known,) = trials.read()
    running = bulk.create(study, ATTRIBUTES)
    again, seen = trials.read()
    assert again is known
    assert seen.number == running.number
    assert len(bulk.Trials(other).read()) == 2


def test_a_finished_trial_stays_as_it_is(study):
    trial = study.ask()
    study.tell(trial, 1.0)
    with pytest.raises(UpdateFinishedTrialError):
        bulk.write(study, trial._trial_id, ATTRIBUTES, {})
    assert found(study, trial) == ({}, {})


def test_another_optuna_is_written_to_one_by_one(study, monkeypatch):
    trial = study.ask()
    ours, one_by_one = [], bulk.one_by_one
    monkeypatch.setattr(bulk, "one_by_one", lambda *given: (ours.append(1), one_by_one(*given)))
    monkeypatch.delattr(models.TrialIntermediateValueModel, "intermediate_value_to_stored_repr")
    bulk.write(study, trial._trial_id, ATTRIBUTES, {})
    assert ours
    monkeypatch.undo()
    assert found(study, trial)[0] == ATTRIBUTES
    monkeypatch.delattr(models.TrialUserAttributeModel, "__table__")
    kept: list[int] = []
    monkeypatch.setattr(
        study._storage, "create_new_trial", lambda *_, **given: kept.append(1) or trial._trial_id
    )
    assert bulk.create(study, ATTRIBUTES).number == trial.number
    assert kept
    monkeypatch.undo()
    monkeypatch.delattr(models, "TrialValueModel")
    bulk._selects.cache_clear()
    assert bulk.Trials(study).read() == study.get_trials()


def test_a_storage_that_fails_keeps_nothing_of_it(tmp_path):
    study = open_study(f"sqlite:///{tmp_path}/study.db", "s", create=True, identity=None)
    trial = study.ask()
    with study._storage._backend.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE trial_intermediate_values")
    with pytest.raises(StorageInternalError):
        bulk.write(study, trial._trial_id, ATTRIBUTES, REPORTS)
    with study._storage._backend.engine.begin() as connection:
        assert not connection.exec_driver_sql("SELECT * FROM trial_user_attributes").all()
