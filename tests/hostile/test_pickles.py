"""No pickle is ever read: not in a checkpoint, not in a study, and nothing in mupx could."""

from __future__ import annotations

import ast
import pickle
import shutil
from pathlib import Path

import optuna
import pytest
import torch

from mupx import checkpoint
from mupx.errors import MismatchError
from mupx.study import default_url

from ..cli.conftest import TUNE
from .conftest import Payload, invoke

PACKAGE = Path(__file__).parents[2] / "mupx"
# What runs code that it reads, or hands a line to a shell.
FORBIDDEN = {
    "eval",
    "exec",
    "os.system",
    "os.popen",
    "pickle.load",
    "pickle.loads",
    "yaml.load",
    "marshal.loads",
}
FORBIDDEN |= {
    "dill.load",
    "joblib.load",
    "shelve.open",
    "pandas.read_pickle",
    "tar.extractall",
}


@pytest.mark.parametrize("kind", ["pickle", "torch", "torch, old format"])
def test_a_pickle_in_place_of_a_checkpoint_is_not_read(tmp_path: Path, mark: Path, kind: str) -> None:
    path = tmp_path / "step-000000003.safetensors"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Payload(mark)))
    else:
        torch.save({"model": Payload(mark)}, path, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(MismatchError, match="damaged"):
        checkpoint.latest(tmp_path)


def test_the_payload_would_work(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "made")))
    assert (tmp_path / "made").is_dir()


@pytest.mark.parametrize(
    "verb",
    [["status", "run"], ["report", "run"], ["transfer", "run", "--width", "16"], [*TUNE, "--run-dir", "run"]],
)
def test_a_pickle_in_a_study_s_attributes_is_not_read(
    run: object, tuned: Path, tmp_path: Path, mark: Path, verb: list[str]
) -> None:
    """Optuna's CMA-ES keeps its state there and would unpickle it."""
    shutil.copytree(tuned, tmp_path / "run")
    study = optuna.load_study(storage=default_url(tmp_path / "run"), study_name="run")
    payload = pickle.dumps(Payload(mark)).hex()
    for trial in study.get_trials(deepcopy=False):
        for key in ("cma:optimizer:0", "cma:optimizer", "sepcma:optimizer:0", "cmawm:optimizer:0"):
            study._storage._backend.engine  # noqa: B018 - the cache forwards to the database
            connection = study._storage._backend.engine.raw_connection()
            connection.execute(
                "INSERT INTO trial_system_attributes (trial_id, key, value_json) VALUES (?, ?, ?)",
                (trial._trial_id, key, f'"{payload}"'),
            )
            connection.commit()
            connection.close()
    study.set_user_attr("verdicts", payload)
    ended = invoke(*verb)
    assert "Traceback" not in ended.err


def test_cma_es_cannot_be_asked_for(run: object) -> None:
    for name in ("cmaes", "cma-es", "CmaEsSampler"):
        ended = invoke(*TUNE, "--sampler", name)
        assert ended.code == 2
        assert "sampler" in ended.message


def calls(source: str) -> set[str]:
    tree = ast.parse(source)
    found = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    shells = {
        "shell=True"
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "shell" and ast.unparse(node.value) != "False"
    }
    shells |= {
        "allow_pickle"
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False"
    }
    loads = {
        "torch.load"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "torch.load"
        and not any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
    }
    return (found & FORBIDDEN) | shells | loads


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_nothing_in_mupx_runs_what_it_reads_or_calls_a_shell(path: Path) -> None:
    assert calls(path.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize(
    "source",
    [
        "eval(x)",
        "pickle.loads(b)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "run(c, shell=True)",
    ],
)
def test_the_search_for_dangerous_calls_finds_them(source: str) -> None:
    assert calls(source)
    assert not calls("torch.load(f, weights_only=True)")
