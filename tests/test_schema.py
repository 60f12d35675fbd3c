"""What was written once can be read for good: a golden file of each schema, and the list of migrations."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mupx import checkpoint, config, dotted, parts, recipe, schema, training
from mupx.checkpoint import Checkpoint
from mupx.errors import MismatchError
from mupx.study import file_url, finished, open_study

GOLDEN = Path(__file__).parent / "golden" / "schemas"
NUMBERS = range(1, len(schema.MIGRATIONS) + 2)


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mupx of a later schema, which renamed a key of every document."""

    def renamed(kind: str, document: dict[str, Any]) -> dict[str, Any]:
        return {**{k: v for k, v in document.items() if k != "old"}, "new": [kind, document.get("old")]}

    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, renamed))
    monkeypatch.setattr(schema, "SCHEMA", f"mupx/{len(schema.MIGRATIONS) + 1}")


@pytest.mark.parametrize("number", NUMBERS)
def test_a_recipe_of_every_schema_is_read(number: int) -> None:
    found = recipe.read(GOLDEN / f"recipe-{number}.toml")
    assert found.experiment.optimizer.name == "sgd"
    assert found.transfer(8).layers[0].shape == (8, 196)
    assert found.to_dict()["schema"] == schema.SCHEMA


@pytest.mark.parametrize("number", NUMBERS)
def test_a_study_of_every_schema_is_read(number: int, tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    path.write_bytes(gzip.decompress((GOLDEN / f"study-{number}.db.gz").read_bytes()))
    study = open_study(file_url(path), "tuned", create=False, identity=None)
    assert len(finished(study)) == 3
    assert study.user_attrs["schema"] == schema.SCHEMA
    assert config.parse(study.user_attrs["experiment"]).scaling.width == 4


@pytest.mark.parametrize("number", NUMBERS)
def test_a_run_of_every_schema_is_continued(number: int, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / f"run-{number}", tmp_path / "run")
    tuned = recipe.read(GOLDEN / f"recipe-{number}.toml")
    result = training.train(tuned.experiment, recipe=tuned, run_dir=tmp_path / "run", evaluate_test=True)
    whole = training.train(tuned.experiment, recipe=tuned)
    assert result.validation is not None
    assert whole.validation is not None
    assert result.steps == 4
    # Written on another machine perhaps, whose sums round differently.
    assert result.validation.loss == pytest.approx(whole.validation.loss, abs=1e-4)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 5


def test_a_newer_file_is_refused_with_who_wrote_it(tmp_path: Path) -> None:
    document = {"schema": "mupx/99", "provenance": {"mupx": "7.0"}}
    with pytest.raises(
        MismatchError, match=r"it.toml has schema 'mupx/99', written by mupx 7.0; .*newer mupx"
    ):
        recipe.from_dict(document, "it.toml")
    assert MismatchError.exit_code == 4


@pytest.mark.parametrize(
    "stated", [None, 1, "", "mupx/0", "mupx/-1", "mupx/1.0", "other/1", "mupx/1\n", ["mupx/1"]]
)
def test_what_states_no_schema_of_ours_is_refused(stated: object) -> None:
    with pytest.raises(MismatchError, match="a file without a schema is no run"):
        schema.migrated("run", {"schema": stated}, "it")


def test_an_older_document_goes_through_every_migration_since(newer: None) -> None:
    old = {"schema": "mupx/1", "old": 3}
    assert schema.migrated("run", old, "it") == {"schema": schema.SCHEMA, "new": ["run", 3]}
    assert schema.migrated("run", {"schema": schema.SCHEMA, "new": 4}, "it")["new"] == 4


def test_a_study_is_migrated_where_it_lies(tmp_path: Path, newer: None) -> None:
    path = tmp_path / "study.db"
    path.write_bytes(gzip.decompress((GOLDEN / "study-1.db.gz").read_bytes()))
    for _ in range(2):
        study = open_study(file_url(path), "tuned", create=False, identity=None)
        assert study.user_attrs["schema"] == schema.SCHEMA
        assert study.user_attrs["new"] == ["study", None]


def test_everything_written_says_which_libraries_made_it(tmp_path: Path) -> None:
    made = schema.versions()
    assert made["torch"] == torch.__version__
    run = json.loads((GOLDEN / "run-1" / "run.json").read_text())
    assert run.keys() >= {"schema", "versions"}
    path = checkpoint.write(tmp_path, Checkpoint(1, {}, {}))
    assert json.dumps(made).encode().replace(b'"', b'\\"') in path.read_bytes()
    assert schema.version("no-such-package") == "unknown"


def test_a_study_made_now_carries_its_schema(tmp_path: Path) -> None:
    study = open_study(file_url(tmp_path / "s.db"), "s", create=True, identity={"a": 1})
    assert study.user_attrs["schema"] == schema.SCHEMA


def test_the_golden_run_is_that_of_the_golden_recipe() -> None:
    tuned = recipe.read(GOLDEN / "recipe-1.toml").experiment
    stored = json.loads((GOLDEN / "run-1" / "run.json").read_text())["identity"]
    now = {**tuned.identity(search=False), "data_checksum": parts.load_data(tuned).checksum}
    assert dotted.differences(stored, json.loads(json.dumps(now))) == []
