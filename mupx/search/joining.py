"""A worker for a study that exists: everything it needs to know is in the study."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from mupx import config, dotted
from mupx.config import Experiment
from mupx.dotted import refuse_difference
from mupx.errors import MismatchError, UsageError
from mupx.leases import Leases
from mupx.schema import versions
from mupx.search import preparing, slots
from mupx.search.worker import Progress, Search, Stepped
from mupx.storage import redact, require_shared, storage_errors
from mupx.study import open_study

if TYPE_CHECKING:
    from optuna import Study

    from mupx.search.trials import TrialInfo

ADVICE = "workers of one study must agree; install the same, or start a study of its own with --fresh"


def opened(url: str, name: str) -> tuple[Study, Experiment]:
    """Open a study for a worker, and return what it was made with.

    Raises:
        NotFoundError: There is no such study.
        MismatchError: Another mupx made it, or its code has changed, or it is none of mupx's.
        UsageError: It searches with an objective that is not mupx's own training.
        StorageError: The storage does not work.
    """
    require_shared(url)
    study = open_study(url, name, create=False, identity=None)
    with storage_errors(url):
        stored = study.user_attrs
    if not {"experiment", "identity", "versions"} <= stored.keys():
        raise MismatchError(
            f"study {name!r} in {redact(url)} does not say what it searches: `mupx tune` has not made it, or "
            "has not made it to the end"
        )
    _require_same_mupx(study, stored["versions"])
    if "objective" in stored["identity"]:
        raise UsageError(f"study {name!r} searches with an objective of its maker's own, which is not here")
    experiment = config.parse(stored["experiment"])
    return study, experiment


def join(
    study: Study,
    experiment: Experiment,
    url: str,
    *,
    changes: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    stepped: Stepped | None = None,
    remark: Callable[[str], None] | None = None,
) -> list[TrialInfo]:
    """Work on a study until all of its trials have finished.

    Args:
        study: What :func:`opened` returned, as is the experiment.
        experiment: What it was made with.
        url: Its storage, with the password.
        changes: What may differ between workers: ``data.dir``, ``train.device``, ``train.threads``,
            ``search.population``.
        progress: Called after each trial of this worker.
        stepped: Called when the trials that are running here have come to another report.
        remark: Called with a sentence about what is worth knowing.

    Returns:
        What this worker ran.

    Raises:
        MismatchError: Code or data differ from those of the study.
        UsageError: The user's code raised the same three times in a row.
        StorageError: The storage is away for too long.
    """
    with storage_errors(url):
        stored = study.user_attrs
        identity = experiment.identity(search=True)
        refuse_difference(f"study {study.study_name!r}", stored["identity"], identity, ADVICE)
        experiment = experiment.updated(changes or {})
        if slots.Ledger(experiment.search.trials, study.get_trials(deepcopy=False)).complete:
            return []
        _remark_versions(stored["versions"], remark)
        evaluation, facts, study.pruner = preparing.proxy(experiment, None)
        preparing.require_same_data(study, facts)
        batch = preparing.side_by_side(experiment, evaluation, remark)
        leases = Leases(study, experiment.search.grace, "worker")
        search = Search(study, experiment, evaluation, url, leases, batch, progress, stepped)
        search.run()
    return search.told


def _require_same_mupx(study: Study, stored: Mapping[str, str]) -> None:
    here = {"mupx": versions()["mupx"]}
    refuse_difference(f"study {study.study_name!r}", {"mupx": stored.get("mupx")}, here, ADVICE)


def _remark_versions(stored: Mapping[str, str], remark: Callable[[str], None] | None) -> None:
    others = dotted.differences(stored, versions())
    if others and remark is not None:
        remark(f"this worker differs from the study's maker ({'; '.join(others)}): its numbers may, too")
