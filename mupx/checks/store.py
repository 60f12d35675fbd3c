"""What a verification has measured so far: one Optuna trial per run, so that it can be continued.

Each finished measurement is a complete trial with two attributes, ``cell`` (what was run) and
``reading`` (what it showed). A killed verification loses at most the run it was in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mupx.config import Experiment
from mupx.study import file_url, open_study, redact, storage_errors

FILE, STUDY = "verify.db", "verify"
Cell = Mapping[str, Any]


class Store:
    """Measurements by cell, in memory or in the study of a run folder.

    Args:
        run_dir: Folder of the study; None keeps nothing.
        identity: What the measurements depend on; another one in the folder is refused.
        experiment: Kept with the study for readers.
    """

    def __init__(self, run_dir: Path | None, identity: Mapping[str, Any], experiment: Experiment) -> None:
        self._known: dict[str, Any] = {}
        self._study: Any = None
        self.url = None if run_dir is None else file_url(run_dir / FILE)
        if self.url is not None:
            self._open(self.url, identity, experiment)

    def _open(self, url: str, identity: Mapping[str, Any], experiment: Experiment) -> None:
        self._study = open_study(url, STUDY, create=True, identity=identity)
        with storage_errors(url):
            self._study.set_user_attr("verifies", experiment.model_dump(mode="json"))
            self._study.set_user_attr("result", None)  # an earlier verdict may be about fewer widths
            for trial in self._study.get_trials(deepcopy=False):
                if "cell" in trial.user_attrs:
                    self._known[_key(trial.user_attrs["cell"])] = trial.user_attrs["reading"]

    @property
    def storage(self) -> str | None:
        """The study's URL without passwords."""
        return None if self.url is None else redact(self.url)

    def known(self, cell: Cell) -> bool:
        """Whether a cell has been measured."""
        return _key(cell) in self._known

    def get(self, cell: Cell, measure: Callable[[], Any]) -> Any:
        """Return the reading of a cell, measuring it if need be; readings are JSON values."""
        key = _key(cell)
        if key not in self._known:
            # Through JSON also in memory: a continued verification sees the same types.
            reading = json.loads(json.dumps(measure()))
            self._save(cell, reading)
            self._known[key] = reading
        return self._known[key]

    def finish(self, verdict: str, causes: list[str]) -> None:
        """Keep the verdict with the measurements, for :func:`state`."""
        if self._study is not None and self.url is not None:
            with storage_errors(self.url):
                self._study.set_user_attr("result", {"verdict": verdict, "causes": causes})

    def _save(self, cell: Cell, reading: Any) -> None:
        if self._study is None or self.url is None:
            return
        from optuna.trial import create_trial

        with storage_errors(self.url):
            self._study.add_trial(
                create_trial(value=0.0, user_attrs={"cell": dict(cell), "reading": reading})
            )


def _key(cell: Cell) -> str:
    return json.dumps(dict(cell), sort_keys=True)


def state(run_dir: Path) -> dict[str, Any]:
    """Return how far the verification in a folder is: runs measured, and the last verdict.

    Raises:
        StorageError: Its file does not work.
    """
    url = file_url(run_dir / FILE)
    study = open_study(url, STUDY, create=False, identity=None)
    with storage_errors(url):
        measured = sum("cell" in trial.user_attrs for trial in study.get_trials(deepcopy=False))
        result = study.user_attrs.get("result")
    return {
        "kind": "verification",
        "run_dir": run_dir,
        "storage": redact(url),
        "state": "unfinished" if result is None else "finished",
        "measured": measured,
        "verdict": None if result is None else result["verdict"],
        "causes": [] if result is None else result["causes"],
    }
