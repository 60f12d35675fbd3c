import os
import sqlite3
import threading
from contextlib import closing
from importlib.util import find_spec
from urllib.parse import quote

import optuna
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mupx import storage
from mupx import study as store
from mupx.errors import MismatchError, NotFoundError, StorageError, UsageError

IDENTITY = {"search": {"space": {"lr": {"low": 0.001, "high": 1.0}}}, "model": {"name": "mlp"}}


def make(path, name="s", identity=IDENTITY):
    return store.open_study(store.file_url(path), name, create=True, identity=identity)


def pragma(study, name):
    with study._storage._backend.engine.connect() as connection:
        return connection.exec_driver_sql(f"PRAGMA {name}").scalar()


def test_a_new_study_is_a_wal_file_that_waits_and_syncs_at_checkpoints(tmp_path):
    study = make(tmp_path / "run" / "study.db")
    assert pragma(study, "journal_mode") == "wal"
    assert pragma(study, "synchronous") == 1  # NORMAL
    assert pragma(study, "busy_timeout") == 60_000
    plain = optuna.create_study(storage=f"sqlite:///{tmp_path}/plain.db")  # Optuna's own default differs
    assert pragma(plain, "journal_mode") == "delete"
    plain._storage._backend.engine.dispose()


def test_who_looks_while_it_is_made_finds_nothing_or_all(tmp_path):
    path, failed = tmp_path / "a.db", []

    def look():
        try:
            store.open_study(store.file_url(path), "s", create=False, identity=None)
        except NotFoundError:
            pass
        except Exception as error:
            failed.append(error)

    lookers = [threading.Thread(target=lambda: [look() for _ in range(5)]) for _ in range(3)]
    for thread in lookers:
        thread.start()
    make(path)
    for thread in lookers:
        thread.join()
    assert failed == []


def test_reopening_finds_the_trials_and_the_identity(tmp_path):
    study = make(tmp_path / "a.db")
    trial = study.ask()
    study.tell(trial, 0.5)
    again = make(tmp_path / "a.db")
    assert [t.value for t in store.finished(again)] == [0.5]
    assert again.user_attrs["identity"] == IDENTITY
    assert len(again.user_attrs["space_hash"]) == 16


def test_another_identity_is_refused_with_the_differing_keys(tmp_path):
    make(tmp_path / "a.db")
    other = {"search": {"space": {"lr": {"low": 0.001, "high": 10.0}}}, "model": {"name": "mlp"}}
    with pytest.raises(MismatchError, match=r"search\.space\.lr\.high: 1\.0 → 10\.0") as caught:
        make(tmp_path / "a.db", identity=other)
    assert "model" not in str(caught.value)
    make(tmp_path / "a.db", identity=None)  # no check wanted


def test_a_study_mupx_did_not_make_is_refused(tmp_path):
    foreign = optuna.create_study(storage=store.file_url(tmp_path / "a.db"), study_name="s")
    foreign.tell(foreign.ask(), 1.0)
    foreign._storage._backend.engine.dispose()
    with pytest.raises(MismatchError, match="did not make"):
        make(tmp_path / "a.db")


def test_a_missing_storage_is_not_made_by_looking(tmp_path):
    url = store.default_url(tmp_path)
    with pytest.raises(NotFoundError, match=r"no study file at .*study\.db"):
        store.open_study(url, "s", create=False, identity=None)
    assert not (tmp_path / "study.db").exists()


def test_a_missing_study_lists_those_that_exist(tmp_path):
    make(tmp_path / "a.db", "kfac")
    with pytest.raises(NotFoundError, match=r"no study 'sgd'.*it holds: kfac"):
        store.open_study(store.file_url(tmp_path / "a.db"), "sgd", create=False, identity=None)


def test_a_file_that_is_no_database_is_a_storage_error_and_stays_as_it_is(tmp_path):
    path = tmp_path / "a.db"
    path.write_bytes(b"not a database, but long enough to be read as one" * 40)
    before = path.read_bytes()
    with pytest.raises(StorageError, match="not a database"):
        make(path)
    assert path.read_bytes() == before


def test_a_damaged_study_is_a_storage_error(tmp_path):
    study = make(tmp_path / "a.db")
    for _ in range(5):
        study.tell(study.ask(), 1.0)
    storage.close(study._storage._backend)
    content = bytearray((tmp_path / "a.db").read_bytes())
    content[100:] = b"\xff" * (len(content) - 100)  # the header survives, every page is gone
    (tmp_path / "a.db").write_bytes(content)
    with pytest.raises(StorageError, match="malformed"):
        make(tmp_path / "a.db")


def test_a_study_file_whose_maker_was_killed_half_way_is_completed(tmp_path):
    path = tmp_path / "a.db"
    whole = make(tmp_path / "whole.db")
    del whole
    with closing(sqlite3.connect(tmp_path / "whole.db")) as made, closing(sqlite3.connect(path)) as half:
        query = "SELECT sql FROM sqlite_master WHERE type='table' AND name LIKE 'stud%'"
        tables = made.execute(query).fetchall()
        assert tables
        for (statement,) in tables:
            half.execute(statement)
        half.commit()
    study = make(path)
    study.tell(study.ask(), 1.0)
    assert len(study.trials) == 1


def test_a_sqlite_file_of_another_program_is_refused_untouched(tmp_path):
    path = tmp_path / "photos.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE photos (id INTEGER)")
        connection.commit()
    before = path.read_bytes()
    with pytest.raises(StorageError, match=r"another program \(tables: photos\)"):
        make(path)
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("in the way")  # also stops root, whom permissions do not
    with pytest.raises(StorageError, match="cannot make folder"):
        make(tmp_path / "file" / "study.db")
    with pytest.raises(StorageError, match="cannot write"):
        store.note(tmp_path / "file" / "run", "sqlite:///x.db", "s")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a file system without files to write")
def test_a_folder_nobody_can_write_in_is_a_storage_error():
    with pytest.raises(StorageError, match=r"unable to open database file|proc/study"):
        store.open_study("sqlite:////proc/study.db", "s", create=True, identity=IDENTITY)


@pytest.mark.parametrize("url", ["not a url", "nosuchdb://u:hunter2@h/d", "oracle://u:hunter2@h/d"])
def test_a_bad_url_says_what_to_give_and_not_the_password(url):
    with pytest.raises(UsageError, match="cannot use storage") as caught:
        store.open_study(url, "s", create=True, identity=IDENTITY)
    assert "hunter2" not in str(caught.value)


def test_postgresql_uses_the_driver_the_extra_installs():
    url, options = storage._options("postgresql://ann:p%40ss@db/x", create=True)
    assert url == "postgresql+psycopg://ann:p%40ss@db/x"
    assert options["pool_pre_ping"]
    assert options["connect_args"]["connect_timeout"] == 10
    stated = storage._options("postgresql://ann@db/x?connect_timeout=3", create=True)[1]["connect_args"]
    assert "connect_timeout" not in stated  # what the URL says stands
    url, _ = storage._options("postgresql+psycopg2://ann@db/x", create=True)  # an explicit choice stands
    assert url == "postgresql+psycopg2://ann@db/x"


@pytest.mark.skipif(find_spec("psycopg") is not None, reason="the postgres extra is installed")
def test_a_missing_driver_names_the_extra():
    with pytest.raises(UsageError, match=r"pip install mupx\[postgres\]") as caught:
        store.open_study("postgresql://ann:hunter2@db/x", "s", create=True, identity=IDENTITY)
    assert "hunter2" not in str(caught.value)


def test_an_in_memory_storage_is_accepted():
    assert store.open_study("sqlite://", "s", create=True, identity=IDENTITY).study_name == "s"


def test_opening_leaves_optuna_s_verbosity_alone(tmp_path, capsys):
    level = optuna.logging.get_verbosity()
    make(tmp_path / "a.db")
    assert optuna.logging.get_verbosity() == level
    assert "study created" not in capsys.readouterr().err


def test_a_locked_file_is_a_storage_error(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "TIMEOUT", 0.05)
    study = make(tmp_path / "a.db")
    with closing(sqlite3.connect(tmp_path / "a.db")) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match="locked"), store.storage_errors("sqlite:///a.db"):
            study.set_user_attr("x", 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgresql://ann:secret@db/x#kfac", ("postgresql://ann:secret@db/x", "kfac")),
        ("sqlite:////tmp/a.db#k", ("sqlite:////tmp/a.db", "k")),
        ("/tmp/a.db#k", ("sqlite:////tmp/a.db", "k")),
        ("sqlite:////tmp/a#1.db#k", ("sqlite:////tmp/a#1.db", "k")),
    ],
)
def test_a_reference_is_split_at_its_last_hash(text, expected):
    assert store.parse_reference(text) == expected


@pytest.mark.parametrize("text", ["", "#", "a.db", "a.db#", "#k", "postgresql://u:hunter2@h/d"])
def test_half_a_reference_is_refused(text):
    with pytest.raises(UsageError, match="STORAGE#STUDY") as caught:
        store.parse_reference(text)
    assert "hunter2" not in str(caught.value)


@given(st.text(st.characters(exclude_categories=["Cs", "Z", "C"]), min_size=1), st.booleans())
@example("p@ss/word:#?", False)
def test_no_password_survives_redaction(secret, quoted):
    marked = f"<{secret}>"
    password = quote(marked, safe="") if quoted else marked
    url = f"postgresql+psycopg://ann:{password}@db.example:5432/studies"
    assert password not in store.redact(f"cannot connect to {url}: refused")
    assert store.redact(url) == "postgresql+psycopg://ann:***@db.example:5432/studies"


@pytest.mark.parametrize("url", ["sqlite:////tmp/a:b.db", "postgresql://ann@db/x", "sqlite:///C:/a.db", ""])
def test_redaction_leaves_urls_without_password_alone(url):
    assert store.redact(url) == url


def test_a_password_in_the_query_is_hidden():
    shown = store.redact("postgresql://db/x?user=ann&password=hunter2&sslmode=require")
    assert shown == "postgresql://db/x?user=ann&password=***&sslmode=require"


def test_the_note_of_a_run_folder_never_holds_a_password(tmp_path):
    store.note(tmp_path, "postgresql://ann:hunter2@db/x", "kfac")
    assert "hunter2" not in (tmp_path / "study.json").read_text()
    assert store.noted_name(tmp_path) == "kfac"
    with pytest.raises(UsageError, match="--storage"):
        store.locate(tmp_path)
    url = "postgresql://ann:hunter2@db/x"
    assert store.locate(tmp_path, url) == (url, "kfac")


def test_a_moved_run_folder_still_knows_its_study(tmp_path):
    make(tmp_path / "a" / "study.db")
    store.note(tmp_path / "a", store.default_url(tmp_path / "a"), "s")
    (tmp_path / "a").rename(tmp_path / "b")
    assert store.locate(tmp_path / "b") == (store.default_url(tmp_path / "b"), "s")


def test_a_folder_without_a_note_belongs_to_no_study(tmp_path):
    assert store.noted_name(tmp_path) is None
    with pytest.raises(NotFoundError, match="no study in"):
        store.locate(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"study": "s"}'])
def test_a_damaged_note_is_a_storage_error(tmp_path, text):
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(StorageError, match=r"study\.json is damaged"):
        store.noted_name(tmp_path)


def test_an_unused_name_is_counted_up(tmp_path):
    url = store.file_url(tmp_path / "a.db")
    assert store.unused_name(url, "s") == "s"
    make(tmp_path / "a.db", "s")
    assert store.unused_name(url, "s") == "s-2"
    make(tmp_path / "a.db", "s-2")
    assert store.unused_name(url, "s") == "s-3"
