"""What comes before the first trial: how trials are judged, and what a study keeps of its experiment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from optuna.pruners import BasePruner

from mupx.config import Experiment
from mupx.dotted import refuse_difference
from mupx.schema import versions
from mupx.search import sampling
from mupx.search.batch import BatchEvaluation
from mupx.search.objective import Evaluation, Proxy, without_test
from mupx.storage import redact

if TYPE_CHECKING:
    from optuna import Study

    from mupx.datasets.base import Dataset


def proxy(experiment: Experiment, data: Dataset | None) -> tuple[Proxy, dict[str, Any], BasePruner]:
    """Return the evaluation by training, what the study must remember about it, and the pruner."""
    from mupx import parts
    from mupx.run import total_steps

    data = parts.load_data(experiment) if data is None else data
    parameters = parts.describe(experiment, data)
    total = total_steps(experiment, len(data.train))
    facts = {"parameters": [asdict(p) for p in parameters], "data_checksum": data.checksum}
    evaluation = Proxy(experiment, without_test(data), parameters, min(sampling.REPORTS, total))
    return evaluation, facts, sampling.pruner(experiment.search.pruner, total)


def side_by_side(
    experiment: Experiment, evaluation: Evaluation, remark: Callable[[str], None] | None
) -> BatchEvaluation | None:
    """Return what judges a population, or None and say why it cannot be one."""
    if experiment.search.population == 1:
        return None
    reason = "an objective of your own takes one trial at a time"
    if isinstance(evaluation, Proxy):
        found = evaluation.obstacle()
        if found is None:
            return evaluation
        reason = found
    if remark is not None:
        remark(f"trials run one at a time, not {experiment.search.population} in lock-step: {reason}")
    return None


def describe(study: Study, experiment: Experiment, facts: Mapping[str, Any]) -> None:
    """Keep in the study what a recipe or a worker needs, so that neither needs the configuration."""
    stored = study.user_attrs
    require_same_data(study, facts)
    document = experiment.model_dump(mode="json")
    if experiment.search.storage is not None:
        document["search"]["storage"] = redact(experiment.search.storage)
    made = versions()
    defaults = {**facts, "versions": made, "mupx": made["mupx"]}
    for key, value in {
        **{k: v for k, v in defaults.items() if k not in stored},
        "experiment": document,
    }.items():
        if stored.get(key) != value:
            study.set_user_attr(key, value)


def require_same_data(study: Study, facts: Mapping[str, Any]) -> None:
    """Refuse data other than the study's.

    Raises:
        MismatchError: With both checksums.
    """
    stored = study.user_attrs
    if "data_checksum" in stored and "data_checksum" in facts:
        refuse_difference(
            f"study {study.study_name!r}",
            {"data.checksum": stored["data_checksum"]},
            {"data.checksum": facts["data_checksum"]},
            "restore the data, or give --fresh to start anew",
        )
