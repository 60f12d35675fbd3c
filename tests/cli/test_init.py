"""`mupx init`: what it writes runs, and it never writes over anything."""

import os
import subprocess
import sys

import pytest

FILES = ("mupx.toml", "model.py")


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_it_writes_two_files_and_prints_the_next_commands(run, tmp_path):
    ended = run("init", "my folder")
    assert ended.code == 0
    assert set(content(tmp_path / "my folder")) == set(FILES)
    assert "next   cd 'my folder'\nnext   mupx tune mupx.toml\n" in ended.out


def test_json_names_files_and_next_commands(run):
    document = run("init", "--json").json
    assert document["files"] == list(FILES)
    assert document["next"] == ["mupx tune mupx.toml"]
    assert document["moved"] == {}


def test_the_written_configuration_is_legal_with_a_built_in_model_and_data(run):
    assert run("init").code == 0
    flags = ["--model", "mlp", "--data", "synthetic", "--width", 8, "--steps", 3, "--trials", 2]
    ended = run("tune", "mupx.toml", *flags, "--threads", 1, "--json")
    assert ended.code == 0, ended.err
    assert ended.json["counts"]["total"] == 2


def test_tune_runs_what_was_written_as_it_is(run):
    assert run("init").code == 0
    ended = run("tune", "mupx.toml", "--json")
    assert ended.code == 0, ended.err
    assert ended.json["counts"]["total"] == 16
    assert ended.json["counts"]["diverged"] < 8


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("link", [False, True])
def test_an_existing_file_is_exit_4_and_nothing_is_written(run, tmp_path, name, link):
    if link:
        os.symlink("nowhere", tmp_path / name)
    else:
        (tmp_path / name).write_text("mine")
    ended = run("init")
    assert ended.code == 4
    assert f"{name} exists and is left as it is" in ended.message
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert not (tmp_path / "nowhere").exists()


def test_force_moves_aside_and_says_so(run, tmp_path):
    (tmp_path / "mupx.toml").write_text("mine")
    (tmp_path / "mupx.toml.old-1").write_text("older")
    ended = run("init", "--force", "--json")
    assert ended.json["moved"] == {"mupx.toml": "mupx.toml.old-2"}
    assert "moved mupx.toml to mupx.toml.old-2" in ended.err
    assert (tmp_path / "mupx.toml.old-2").read_text() == "mine"
    assert (tmp_path / "mupx.toml.old-1").read_text() == "older"
    assert (tmp_path / "mupx.toml").read_text() != "mine"


def test_a_file_that_appears_meanwhile_is_not_written_over(run, tmp_path, monkeypatch):
    (tmp_path / "mupx.toml").write_text("mine")
    monkeypatch.setattr("mupx.cli.init.os.path.lexists", lambda path: False)
    ended = run("init")
    assert ended.code == 7
    assert (tmp_path / "mupx.toml").read_text() == "mine"


def test_a_place_that_is_no_folder_is_exit_7(run, tmp_path):
    (tmp_path / "file").write_text("")
    ended = run("init", "file")
    assert ended.code == 7
    assert "cannot write" in ended.message


def test_it_never_loads_torch(tmp_path):
    code = "import sys; from mupx.cli import app; app(['init'], standalone_mode=False)"
    code += "; print('torch' in sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert ended.stdout.splitlines()[-1] == "False"
