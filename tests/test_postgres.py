"""Studies in a real PostgreSQL that the test starts and stops: down, away, a wrong password, and silence."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mupx import storage
from mupx.errors import NotFoundError, StorageError
from mupx.leases import Leases
from mupx.search import loop, make, opened, worker
from mupx.study import open_study
from mupx.turns import turn
from tests import servers
from tests.cli.conftest import TUNE, invoke
from tests.search import synthetic
from tests.search.conftest import training  # noqa: F401
from tests.servers import PASSWORD, Postgres

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.postgres,
    pytest.mark.skipif(servers.missing() is not None, reason=str(servers.missing())),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with Postgres() as found:
        yield found


def searched(server: Postgres, **changes: Any) -> Any:
    return synthetic.experiment(**{"search.storage": server.url, **changes})


def reopen(server: Postgres, name: str) -> Any:
    return open_study(server.url, name, create=False, identity=None)


@pytest.mark.usefixtures("training")
def test_a_server_that_comes_back_costs_nothing_but_time(server, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(storage, "PAUSES", (0.1,))
    timers = []

    def restart(done: int, *_: Any) -> None:
        if done == 3:
            server.stop()
            timers.append(threading.Timer(1.0, server.start))
            timers[0].start()

    loop.tune(searched(server), run_dir=tmp_path / "restarted", progress=restart)
    timers[0].join()
    loop.tune(synthetic.experiment(), run_dir=tmp_path / "b")
    undisturbed = open_study(f"sqlite:///{tmp_path}/b/study.db", "b", create=False, identity=None)
    assert synthetic.record(reopen(server, "restarted")) == synthetic.record(undisturbed)
    assert "trying again for 300 s" in caplog.text
    assert PASSWORD not in caplog.text


@pytest.mark.usefixtures("training")
def test_a_server_that_stays_away_is_exit_7_and_what_is_finished_is_kept(server, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "PAUSES", (0.1,))

    def stop(done: int, *_: Any) -> None:
        if done == 3:
            server.stop()

    try:
        with pytest.raises(StorageError, match="check that the server runs") as caught:
            loop.tune(searched(server, **{"search.patience": 0.5}), run_dir=tmp_path / "away", progress=stop)
        ended = invoke("status", tmp_path / "away", "--storage", server.url)
    finally:
        server.start()
    assert (caught.value.exit_code, ended.code) == (7, 7)
    assert PASSWORD not in str(caught.value) + ended.message
    assert len(loop.finished(reopen(server, "away"))) == 3
    assert loop.tune(searched(server), run_dir=tmp_path / "away").counts["total"] == 14


def test_a_wrong_password_is_exit_7_at_once_and_not_shown(server, tmp_path):
    wrong = server.url.replace(PASSWORD, "hunter3")
    ended = invoke(*TUNE, "--run-dir", tmp_path / "a", "--storage", wrong)
    assert ended.code == 7
    assert "user and password" in ended.message
    assert "hunter3" not in ended.err


def test_an_empty_database_stays_empty(server):
    from sqlalchemy import create_engine, text

    admin = create_engine(server.url.replace("postgresql", "postgresql+psycopg"))
    with admin.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("CREATE DATABASE empty"))
    admin.dispose()
    url = server.url.replace("/postgres", "/empty")
    for _ in range(2):  # looking has made nothing
        with pytest.raises(NotFoundError, match="it is empty"):
            opened(url, "a")


def test_makers_that_start_at_once_make_one_study(server):
    from sqlalchemy import create_engine, text

    admin = create_engine(server.url.replace("postgresql", "postgresql+psycopg"))
    with admin.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("CREATE DATABASE race"))
    admin.dispose()
    url, made, failed = server.url.replace("/postgres", "/race"), [], []

    def create() -> None:
        try:
            made.append(open_study(url, "a", create=True, identity={"a": 1}))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=create) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len({study._study_id for study in made}) == 1


@pytest.mark.usefixtures("training")
def test_a_turn_that_the_server_took_back_leaves_no_trial_held(server, tmp_path, monkeypatch):
    """A process that stood still in its turn for a minute: what it made then is nobody's."""
    made = make(searched(server), run_dir=tmp_path / "stopped")
    study, experiment = opened(made.url, made.study)
    monkeypatch.setattr(storage, "PAUSES", (0.01,))
    right, ends = worker.turn, []

    class Taken:
        def __init__(self, study: Any) -> None:
            self.turn = right(study)

        def __enter__(self) -> None:
            self.turn.__enter__()

        def __exit__(self, *error: Any) -> None:
            if not ends:
                ends.append(1)
                end_turns(server)
            self.turn.__exit__(*error)

    monkeypatch.setattr(worker, "turn", Taken)
    search = worker.Search(study, experiment, None, made.url, Leases(study, 60))  # type: ignore[arg-type]
    trial = search.ask()
    assert trial is not None
    now = study.get_trials(deepcopy=False)
    assert [(t.state.name, t.user_attrs["slot"]) for t in now] == [("FAIL", 0), ("RUNNING", 0)]
    with turn(study):
        pass


def end_turns(server: Postgres) -> None:
    """End the sessions that hold a turn, as the server itself does after a minute."""
    from sqlalchemy import create_engine, text

    engine = create_engine(server.url.replace("postgresql", "postgresql+psycopg"))
    with engine.connect() as connection:
        query = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted"
        assert connection.execute(text(query)).scalars().all() == [True]
    engine.dispose()


def test_no_password_is_written_or_said_anywhere(server, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MUPX_SEARCH__STORAGE": server.url}

    def run(*words: str) -> str:
        command = [sys.executable, "-m", "mupx", *words]
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout + ended.stderr

    tune = [*TUNE, "--run-dir", "secret", "--sampler", "random"]
    said = run(*tune, "--workers", "2", "--emit", "sbatch")
    assert "MUPX_SEARCH__STORAGE" in said
    said += run(*tune, "--workers", "2", "--json") + run("status", "secret", "--json")
    said += run("transfer", "secret", "--width", "16", "-o", "wide.toml")
    assert PASSWORD not in said
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"study.json", "recipe.toml", "workers.sbatch", "0.log", "1.log"} <= {path.name for path in files}
    for path in files:
        assert PASSWORD.encode() not in path.read_bytes(), path
