"""One trial made, many of its values written, and all trials read, at one stroke (no torch).

Optuna writes each attribute, parameter and report in a transaction of its own, and each reads the trial
first; what it reads goes through an object per value. On SQLite and PostgreSQL one transaction with one
statement per table takes all of them; it uses Optuna's own tables, and where these are not what they were,
or the storage is another, the values go one by one and are read as Optuna does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial, TrialState

DIALECTS = ("sqlite", "postgresql")  # those that can insert or update


class End(NamedTuple):
    """How a trial ended: its state, and its value if it has one."""

    state: TrialState
    value: float | None


class Point(NamedTuple):
    """Parameters of a trial and what they were drawn from."""

    values: Mapping[str, float]
    distributions: Mapping[str, BaseDistribution]


NO_POINT = Point({}, {})


def create(study: Study, attributes: Mapping[str, Any]) -> FrozenTrial:
    """Make a running trial that has its attributes from the start.

    Args:
        study: Its study.
        attributes: User attributes, as JSON takes them; one at least.

    Returns:
        The trial, without what others see of it later.

    Raises:
        StorageInternalError: The storage does not work; the trial may have been made.
    """
    from optuna.trial import TrialState, create_trial

    template = create_trial(state=TrialState.RUNNING, user_attrs=dict(attributes))
    backend = _backend(study)
    made = None if backend is None else _made(backend, study._study_id, attributes)
    if made is None:
        storage = study._storage
        trial_id = storage.create_new_trial(study._study_id, template_trial=template)
        made = trial_id, storage.get_trial_number_from_id(trial_id)
    template._trial_id, template.number = made
    return template


def write(
    study: Study,
    trial_id: int,
    attributes: Mapping[str, Any],
    reports: Mapping[int, float],
    end: End | None = None,
    point: Point = NO_POINT,
) -> None:
    """Write attributes, intermediate values and parameters of a running trial, and its end.

    Args:
        study: Its study.
        trial_id: The storage's own number of the trial.
        attributes: User attributes, as JSON takes them.
        reports: Step → value; finite.
        end: None where it goes on; then all this may be done twice.
        point: Its parameters, where they are to be written.

    Raises:
        UpdateFinishedTrialError: The trial is finished.
        StorageInternalError: The storage does not work.
    """
    if not attributes and not reports and not point.values and end is None:
        return
    backend = _backend(study)
    if backend is None or not _together(backend, trial_id, attributes, reports, end, point):
        one_by_one(study._storage, trial_id, attributes, reports, end, point)


class Trials:
    """All trials of a study; a finished one, which never changes, is read once.

    Args:
        study: The study.
    """

    def __init__(self, study: Study) -> None:
        self._study = study
        self._trials: dict[int, FrozenTrial] = {}  # by the storage's own number
        self._unfinished: set[int] = set()
        self._last_finished = -1

    def read(self) -> list[FrozenTrial]:
        """Return them as they are now, in the order of their numbers; not to be changed.

        Raises:
            StorageInternalError: The storage does not work.
        """
        backend = _backend(self._study)
        found = None if backend is None else self._changed(backend)
        if found is None:
            return self._study.get_trials(deepcopy=False)
        for trial in found:
            self._trials[trial._trial_id] = trial
            if trial.state.is_finished():
                self._last_finished = max(self._last_finished, trial._trial_id)
                self._unfinished.discard(trial._trial_id)
            else:
                self._unfinished.add(trial._trial_id)
        return sorted(self._trials.values(), key=lambda trial: trial.number)

    def _changed(self, backend: Any) -> list[FrozenTrial] | None:
        """Return the trials that were unfinished at the last look, and later ones."""
        try:
            from optuna.storages._rdb.storage import _create_scoped_session

            session_of, (trials, *others) = backend.scoped_session, _selects()
        except (ImportError, AttributeError):
            return None
        last = self._last_finished
        which = {
            "study": self._study._study_id,
            "last": last,
            "unfinished": [number for number in self._unfinished if number <= last],
        }
        with _create_scoped_session(session_of) as session:
            rows = session.execute(trials, which).scalars().all()
            # Later than the trials themselves: what a finished one has was there before its state.
            execute = session.connection().execute  # they are rows, and need not become objects
            values = [_by_trial(execute(select, which).all()) for select in others] if rows else []
            return [_frozen(row, *(found.get(row.trial_id, []) for found in values)) for row in rows]


def _by_trial(rows: Sequence[Any]) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    for row in rows:
        found.setdefault(row[0], []).append(row[1:])
    return found


def _frozen(
    trial: Any, params: list[Any], values: list[Any], user: list[Any], system: list[Any], reports: list[Any]
) -> FrozenTrial:
    from optuna.storages._rdb import models
    from optuna.trial import FrozenTrial

    value_of = models.TrialValueModel.stored_repr_to_value
    report_of = models.TrialIntermediateValueModel.stored_repr_to_intermediate_value
    kinds = {name: _distribution(kind) for name, _, kind in params}
    return FrozenTrial(
        number=trial.number,
        state=trial.state,
        value=None,
        values=[value_of(value, kind) for value, kind in values] or None,
        datetime_start=trial.datetime_start,
        datetime_complete=trial.datetime_complete,
        params={name: kinds[name].to_external_repr(value) for name, value, _ in params},
        distributions=kinds,
        user_attrs={key: json.loads(item) for key, item in user},
        system_attrs={key: json.loads(item) for key, item in system},
        intermediate_values={step: report_of(value, kind) for step, value, kind in reports},
        trial_id=trial.trial_id,
    )


@lru_cache(256)
def _distribution(document: str) -> BaseDistribution:
    from optuna.distributions import json_to_distribution

    return json_to_distribution(document)


@cache  # a statement that is the same object is compiled once
def _selects() -> list[Any]:
    """Return what reads trials, and their parameters, values, attributes and reports."""
    import sqlalchemy as sql
    from optuna.storages._rdb import models

    trial = models.TrialModel
    changed = sql.or_(
        trial.trial_id > sql.bindparam("last"),
        trial.trial_id.in_(sql.bindparam("unfinished", expanding=True)),
    )
    these = sql.and_(trial.study_id == sql.bindparam("study"), changed)

    def select(model: Any, order: str, *names: str) -> Any:
        columns = model.__table__.c
        found = sql.select(columns.trial_id, *(columns[name] for name in names))
        return found.join(trial, trial.trial_id == columns.trial_id).where(these).order_by(columns[order])

    reported = ("step", "intermediate_value", "intermediate_value_type")
    return [
        sql.select(trial).where(these).order_by(trial.trial_id),  # as objects: they know their time zone
        select(models.TrialParamModel, "param_id", "param_name", "param_value", "distribution_json"),
        select(models.TrialValueModel, "objective", "value", "value_type"),
        select(models.TrialUserAttributeModel, "trial_user_attribute_id", "key", "value_json"),
        select(models.TrialSystemAttributeModel, "trial_system_attribute_id", "key", "value_json"),
        select(models.TrialIntermediateValueModel, "trial_intermediate_value_id", *reported),
    ]


def _backend(study: Study) -> Any:
    """Return the storage behind Optuna's cache; None where it is none of the databases known here."""
    storage: Any = study._storage
    backend = getattr(storage, "_backend", storage)
    engine = getattr(backend, "engine", None)
    return None if engine is None or engine.dialect.name not in DIALECTS else backend


def one_by_one(
    storage: Any,
    trial_id: int,
    attributes: Mapping[str, Any],
    reports: Mapping[int, float],
    end: End | None,
    point: Point = NO_POINT,
) -> None:
    """Write through Optuna's interface."""
    for name, value in point.values.items():
        kind = point.distributions[name]
        storage.set_trial_param(trial_id, name, kind.to_internal_repr(value), kind)
    for step, value in reports.items():
        storage.set_trial_intermediate_value(trial_id, step, value)
    for key, item in attributes.items():
        storage.set_trial_user_attr(trial_id, key, item)
    if end is not None:
        values = None if end.value is None else [end.value]
        storage.set_trial_state_values(trial_id, end.state, values)


def _made(backend: Any, study_id: int, attributes: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the storage's number of a new trial and its number in the study."""
    try:
        from optuna.storages._rdb import models
        from optuna.storages._rdb.storage import _create_scoped_session
        from optuna.trial import TrialState

        session_of, trial = backend.scoped_session, models.TrialModel
        this_study, number = _row(models.StudyModel, "study_id", locked=True), _next_number(study_id)
        table = models.TrialUserAttributeModel.__table__
    except (ImportError, AttributeError):
        return None
    rows = [{"key": key, "value_json": json.dumps(item)} for key, item in attributes.items()]
    with _create_scoped_session(session_of) as session:
        _found(session, this_study, study_id)  # numbers are counted: nobody else may count now
        now = datetime.now()
        new = trial(study_id=study_id, state=TrialState.RUNNING, datetime_start=now, number=number)
        session.add(new)
        session.flush()
        made: Any = new  # its columns are numbers by now
        _insert(backend, session, table, made.trial_id, rows)
        return made.trial_id, made.number


@cache  # a statement that is the same object is compiled once
def _row(model: Any, key: str, locked: bool) -> Any:
    """Return what reads one row by its number; locked until the transaction ends where rows can be."""
    import sqlalchemy as sql

    statement = sql.select(model).where(getattr(model, key) == sql.bindparam("number"))
    return statement.with_for_update() if locked else statement


def _found(session: Any, statement: Any, number: int) -> Any:
    row = session.execute(statement, {"number": number}).scalar_one_or_none()
    if row is None:
        raise KeyError(f"no {statement.column_descriptions[0]['name']} {number} in the storage")
    return row


@lru_cache(16)
def _next_number(study_id: int) -> Any:
    """Return how many trials a study has, as an expression for the next one's row."""
    import sqlalchemy as sql
    from optuna.storages._rdb import models

    columns = models.TrialModel.__table__.c
    return sql.select(sql.func.count()).where(columns.study_id == study_id).scalar_subquery()


def _together(
    backend: Any,
    trial_id: int,
    attributes: Mapping[str, Any],
    reports: Mapping[int, float],
    end: End | None,
    point: Point,
) -> bool:
    try:
        from optuna.distributions import distribution_to_json
        from optuna.storages._rdb import models
        from optuna.storages._rdb.storage import _create_scoped_session

        session_of, check = backend.scoped_session, backend.check_trial_is_updatable
        value_as_stored = models.TrialValueModel.value_to_stored_repr
        this_trial = _row(models.TrialModel, "trial_id", locked=end is not None)
        as_stored = models.TrialIntermediateValueModel.intermediate_value_to_stored_repr
        tables = (
            models.TrialUserAttributeModel.__table__,
            models.TrialIntermediateValueModel.__table__,
            models.TrialParamModel.__table__,
            models.TrialValueModel.__table__,
        )
    except (ImportError, AttributeError):
        return False
    stored = {step: as_stored(value) for step, value in reports.items()}
    rows: tuple[list[dict[str, Any]], ...] = (
        [{"key": key, "value_json": json.dumps(item)} for key, item in attributes.items()],
        [
            {"step": step, "intermediate_value": value, "intermediate_value_type": kind}
            for step, (value, kind) in stored.items()
        ],
        [
            {
                "param_name": name,
                "param_value": point.distributions[name].to_internal_repr(value),
                "distribution_json": distribution_to_json(point.distributions[name]),
            }
            for name, value in point.values.items()
        ],
        [
            {"objective": 0, "value": value, "value_type": kind}
            for value, kind in ([] if end is None or end.value is None else [value_as_stored(end.value)])
        ],
    )
    with _create_scoped_session(session_of) as session:
        trial = _found(session, this_trial, trial_id)
        check(trial_id, trial.state)
        for table, some in zip(tables, rows, strict=True):
            _insert(backend, session, table, trial_id, some)
        if end is not None:
            trial.state, trial.datetime_complete = end.state, datetime.now()
    return True


def _insert(backend: Any, session: Any, table: Any, trial_id: int, rows: list[dict[str, Any]]) -> None:
    if rows:
        statement = _upsert(backend.engine.dialect.name, table, *rows[0])
        session.connection().execute(statement, [{"trial_id": trial_id, **row} for row in rows])


@cache  # a statement that is the same object is compiled once
def _upsert(dialect: str, table: Any, unique: str, *others: str) -> Any:
    from sqlalchemy.dialects import postgresql, sqlite

    insert: Any = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[dialect]
    statement = insert(table)
    changed = {name: statement.excluded[name] for name in others}
    return statement.on_conflict_do_update(index_elements=["trial_id", unique], set_=changed)
