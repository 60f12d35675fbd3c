"""What a verification keeps: everything it has measured, also when it is killed."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest

from mupx.checks.store import FILE, STUDY, Store, state
from mupx.config import Experiment
from mupx.errors import MismatchError, StorageError
from mupx.study import file_url

IDENTITY = {"model": "mlp", "scaling": {"base_width": 64, "width": None}}
NARROW = {"kind": "run", "width": 64, "log2_lr": -4.5, "seed": 0}
WIDE = {**NARROW, "width": 128}


def store(run_dir: Path | None, **changes: Any) -> Store:
    return Store(run_dir, {**IDENTITY, **changes}, Experiment())


class Counting:
    """A measurement that counts how often it was made."""

    def __init__(self, reading: Any) -> None:
        self.reading, self.made = reading, 0

    def __call__(self) -> Any:
        self.made += 1
        return self.reading


def refuse() -> Any:
    raise AssertionError("measured again")


@pytest.fixture(params=["in memory", "on disk"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "run" if request.param == "on disk" else None


def test_a_cell_is_measured_once(place: Path | None) -> None:
    kept, measure = store(place), Counting({"loss": 0.5})
    assert not kept.known(NARROW)
    assert [kept.get(NARROW, measure) for _ in range(3)] == [{"loss": 0.5}] * 3
    assert measure.made == 1
    assert kept.known(NARROW)
    assert not kept.known(WIDE)


def test_a_cell_is_what_is_in_it_and_not_the_order_of_its_fields(place: Path | None) -> None:
    kept = store(place)
    kept.get(NARROW, lambda: 1)
    assert kept.get(dict(reversed(NARROW.items())), refuse) == 1
    assert kept.get({**NARROW, "log2_lr": -4.5 + 2**-40}, lambda: 2) == 2
    assert kept.get(WIDE, lambda: 3) == 3


def test_a_reading_has_the_types_of_json_from_the_start(place: Path | None) -> None:
    reading = store(place).get(NARROW, lambda: {"moved": {1: (0.1, None)}})
    assert reading == {"moved": {"1": [0.1, None]}}


def test_a_measurement_that_fails_is_not_kept(place: Path | None) -> None:
    kept = store(place)
    with pytest.raises(ZeroDivisionError):
        kept.get(NARROW, lambda: 1 / 0)
    assert not kept.known(NARROW)
    assert kept.get(NARROW, lambda: 1) == 1


def test_a_second_store_on_the_folder_knows_what_the_first_has_measured(tmp_path: Path) -> None:
    reading = {"train_loss": 0.1 + 0.2, "moved": {1: (0.5, None)}, "outcome": "finished"}
    first = store(tmp_path).get(NARROW, lambda: reading)
    again = store(tmp_path)
    assert again.known(NARROW)
    assert again.get(NARROW, refuse) == first  # to the last bit
    assert not again.known(WIDE)


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kept = store(None)
    kept.get(NARROW, lambda: 1)
    assert (kept.url, kept.storage) == (None, None)
    assert not store(None).known(NARROW)
    assert not list(tmp_path.iterdir())


def test_the_study_can_be_read_by_others(tmp_path: Path) -> None:
    kept = store(tmp_path / "new" / "run")
    kept.get(NARROW, lambda: {"loss": 0.5})
    assert kept.storage == file_url(tmp_path / "new" / "run" / FILE)
    study = optuna.load_study(storage=kept.storage, study_name=STUDY)
    (trial,) = study.get_trials()
    assert trial.user_attrs == {"cell": NARROW, "reading": {"loss": 0.5}}
    assert trial.state.is_finished()
    assert Experiment.model_validate(study.user_attrs["verifies"]) == Experiment()


def test_another_identity_is_refused_and_named(tmp_path: Path) -> None:
    store(tmp_path).get(NARROW, lambda: 1)
    with pytest.raises(MismatchError, match=r"verify.*model") as caught:
        store(tmp_path, model="myrtle5")
    assert caught.value.exit_code == 4
    assert store(tmp_path).get(NARROW, refuse) == 1  # and what was there is still there


def test_trials_that_are_not_of_a_verification_are_refused(tmp_path: Path) -> None:
    optuna.create_study(storage=file_url(tmp_path / FILE), study_name=STUDY).add_trial(
        optuna.create_trial(value=1.0)
    )
    with pytest.raises(MismatchError, match="did not make"):
        store(tmp_path)


def garbage(path: Path) -> None:
    path.write_bytes(b"not a database" * 100)


def truncated(path: Path) -> None:
    store(path.parent).get(NARROW, lambda: "x" * 10_000)
    path.with_name(path.name + "-wal").unlink(missing_ok=True)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def foreign(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE bookmarks (url TEXT)")


@pytest.mark.parametrize("spoil", [garbage, truncated, foreign])
def test_a_file_that_is_no_study_is_a_storage_error(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / FILE
    spoil(path)
    before = path.read_bytes()
    with pytest.raises(StorageError) as caught:
        store(tmp_path)
    assert caught.value.exit_code == 7
    if spoil is foreign:
        assert path.read_bytes() == before  # nothing was added to it


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file"):
        store(tmp_path / "file" / "run")


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.checks.test_store import NARROW, WIDE, store

kept = store(Path(sys.argv[1]))
kept.get(NARROW, lambda: {"loss": 0.5})
kept.get(WIDE, lambda: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_a_killed_verification_loses_only_the_measurement_it_was_in(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=Path(__file__).parents[2], check=False
    )
    assert ended.returncode == -signal.SIGKILL
    continued = store(tmp_path)
    assert continued.get(NARROW, refuse) == {"loss": 0.5}
    assert not continued.known(WIDE)
    measure = Counting({"loss": 0.25})
    assert continued.get(WIDE, measure) == {"loss": 0.25}
    assert measure.made == 1
    assert store(tmp_path).get(WIDE, refuse) == {"loss": 0.25}


def test_an_earlier_verdict_does_not_outlive_a_new_start(tmp_path: Path) -> None:
    first = Store(tmp_path, IDENTITY, Experiment())
    first.finish("pass", [])
    assert (state(tmp_path)["state"], state(tmp_path)["verdict"]) == ("finished", "pass")
    Store(tmp_path, IDENTITY, Experiment())
    assert (state(tmp_path)["state"], state(tmp_path)["verdict"]) == ("unfinished", None)
