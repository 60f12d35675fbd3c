"""Many values of one trial written at one stroke (no torch).

Optuna writes each attribute and each report in a transaction of its own, and each reads the trial first. On
SQLite and PostgreSQL one transaction with one statement per table takes all of them; it uses Optuna's own
tables, and where these are not what they were, or the storage is another, the values go one by one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import TrialState

DIALECTS = ("sqlite", "postgresql")  # those that can insert or update


class End(NamedTuple):
    """How a trial ended: its state, and its value if it has one."""

    state: TrialState
    value: float | None


def write(
    study: Study,
    trial_id: int,
    attributes: Mapping[str, Any],
    reports: Mapping[int, float],
    end: End | None = None,
) -> None:
    """Write attributes and intermediate values of a running trial, and its end.

    Args:
        study: Its study.
        trial_id: The storage's own number of the trial.
        attributes: User attributes, as JSON takes them.
        reports: Step → value; finite.
        end: None where it goes on; then all this may be done twice.

    Raises:
        UpdateFinishedTrialError: The trial is finished.
        StorageInternalError: The storage does not work.
    """
    if not attributes and not reports and end is None:
        return
    storage: Any = study._storage
    backend = getattr(storage, "_backend", storage)
    engine = getattr(backend, "engine", None)
    if (
        engine is None
        or engine.dialect.name not in DIALECTS
        or not _together(backend, trial_id, attributes, reports, end)
    ):
        one_by_one(storage, trial_id, attributes, reports, end)


def one_by_one(
    storage: Any, trial_id: int, attributes: Mapping[str, Any], reports: Mapping[int, float], end: End | None
) -> None:
    """Write through Optuna's interface."""
    for step, value in reports.items():
        storage.set_trial_intermediate_value(trial_id, step, value)
    for key, item in attributes.items():
        storage.set_trial_user_attr(trial_id, key, item)
    if end is not None:
        values = None if end.value is None else [end.value]
        storage.set_trial_state_values(trial_id, end.state, values)


def _together(
    backend: Any,
    trial_id: int,
    attributes: Mapping[str, Any],
    reports: Mapping[int, float],
    end: End | None,
) -> bool:
    try:
        from optuna.storages._rdb import models
        from optuna.storages._rdb.storage import _create_scoped_session

        session_of, check = backend.scoped_session, backend.check_trial_is_updatable
        set_value = backend._set_trial_value_without_commit
        find = models.TrialModel.find_or_raise_by_id
        as_stored = models.TrialIntermediateValueModel.intermediate_value_to_stored_repr
        tables = models.TrialUserAttributeModel.__table__, models.TrialIntermediateValueModel.__table__
    except (ImportError, AttributeError):
        return False
    stored = {step: as_stored(value) for step, value in reports.items()}
    rows: tuple[list[dict[str, Any]], ...] = (
        [{"key": key, "value_json": json.dumps(item)} for key, item in attributes.items()],
        [
            {"step": step, "intermediate_value": value, "intermediate_value_type": kind}
            for step, (value, kind) in stored.items()
        ],
    )
    with _create_scoped_session(session_of) as session:
        trial = find(trial_id, session, for_update=end is not None)
        check(trial_id, trial.state)
        for table, some in zip(tables, rows, strict=True):
            if some:
                statement = _upsert(backend.engine.dialect.name, table, *some[0])
                session.execute(statement, [{"trial_id": trial_id, **row} for row in some])
        if end is not None:
            if end.value is not None:
                set_value(session, trial, 0, end.value)
            trial.state, trial.datetime_complete = end.state, datetime.now()
    return True


def _upsert(dialect: str, table: Any, unique: str, *others: str) -> Any:
    from sqlalchemy.dialects import postgresql, sqlite

    insert: Any = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[dialect]
    statement = insert(table)
    changed = {name: statement.excluded[name] for name in others}
    return statement.on_conflict_do_update(index_elements=["trial_id", unique], set_=changed)
