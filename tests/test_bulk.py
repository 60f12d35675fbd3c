"""What a trial found, written at one stroke: the same as one by one, whole or not at all."""

from __future__ import annotations

from typing import Any

import pytest
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


def test_a_storage_that_fails_keeps_nothing_of_it(tmp_path):
    study = open_study(f"sqlite:///{tmp_path}/study.db", "s", create=True, identity=None)
    trial = study.ask()
    with study._storage._backend.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE trial_intermediate_values")
    with pytest.raises(StorageInternalError):
        bulk.write(study, trial._trial_id, ATTRIBUTES, REPORTS)
    with study._storage._backend.engine.begin() as connection:
        assert not connection.exec_driver_sql("SELECT * FROM trial_user_attributes").all()
