"""A recipe or a study from elsewhere imports nothing that the command line has not allowed by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mupx import recipe, usercode
from mupx.recipe import Recipe

from ..cli.conftest import invoke

EVIL = "import os\nos.mkdir({mark!r})\n\ndef build(width, **_): ...\n"


@pytest.fixture
def evil(tuned: Path, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe that names a file beside it, whose import leaves a mark."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text(EVIL.format(mark=str(mark)))
    return tmp_path / "recipe.toml"


@pytest.mark.parametrize(
    ("key", "reference"),
    [
        ("model.name", "evil.py:build"),
        ("data.name", "evil.py:build"),
        ("train.loss", "evil.py:build"),
        ("optimizer.name", "evil.py:build"),
        ("model.name", "subprocess:run"),
        ("data.name", "shutil:rmtree"),
        ("model.name", "os:system"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "verify", "advise", "export", "transfer", "transfer --depth"])
def test_a_recipe_s_code_is_named_and_not_imported(
    evil: Path, tuned: Path, monkeypatch: pytest.MonkeyPatch, key: str, reference: str, verb: str
) -> None:
    source = recipe.read(tuned / "recipe.toml")
    changes = {key: reference} | ({"optimizer.rule": "kfac"} if key.startswith("optimizer") else {})
    Recipe(source.experiment.updated(changes), source.parameters).write(evil)
    imported: list[str] = []
    monkeypatch.setattr(usercode, "_module", lambda reference, what: imported.append(reference.text))
    more = {"transfer": ["--width", "32"], "transfer --depth": ["--depth", "4"]}.get(verb, [])
    more += ["--format", "json"] if verb == "export" else []
    ended = invoke(verb.split()[0], evil, *more)
    assert imported == []
    if verb in ("train", "verify", "advise", "transfer --depth"):
        assert ended.code == 2
        assert reference in ended.message
        assert "--allow-code" in ended.message


def test_a_study_s_code_is_not_imported(evil: Path, tuned: Path, tmp_path: Path) -> None:
    import json

    import optuna

    from mupx.study import default_url

    shutil.copytree(tuned, tmp_path / "run")
    study = optuna.load_study(storage=default_url(tmp_path / "run"), study_name="run")
    document = json.loads(json.dumps(study.user_attrs["experiment"]))
    document["model"]["name"] = "evil.py:build"
    study.set_user_attr("experiment", document)
    for verb in (["status", "run"], ["report", "run", "--png", "f"], ["transfer", "run", "--width", "16"]):
        assert invoke(*verb).code == 0
