"""The starter files: every key of the configuration is there, at its default, and the model works."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
import torch
from pydantic import BaseModel

import mupx
from mupx import starter
from mupx.config import Experiment, parse
from mupx.dotted import merge
from mupx.starter import CHOSEN, EXAMPLES, MEANINGS, MODEL, config_text

KEY = re.compile(r"^#(?=[\w\"])", re.M)  # "#key = value", not "# words"


def keys() -> set[str]:
    found = set()
    for name, field in Experiment.model_fields.items():
        inner = field.annotation
        section = isinstance(inner, type) and issubclass(inner, BaseModel)
        found |= {f"{name}.{key}" for key in inner.model_fields} if section else {name}  # type: ignore[union-attr]
    return found


def at(document: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        document = document[key]
    return document


def uncommented() -> dict[str, Any]:
    return tomllib.loads(KEY.sub("", config_text()))


def test_every_key_has_a_meaning_and_no_meaning_is_stale() -> None:
    assert keys() == MEANINGS.keys(), "starter.MEANINGS needs one sentence per key of mupx.config"


def test_every_key_without_a_default_has_an_example() -> None:
    wanted = Experiment().model_dump()
    assert {dotted for dotted in keys() if at(wanted, dotted) in (None, {})} == EXAMPLES.keys()


def test_the_file_as_written_sets_what_is_chosen_and_nothing_else() -> None:
    document = tomllib.loads(config_text())
    assert parse(document) == parse(merge({}, CHOSEN))


def test_every_key_is_shown_at_its_default_or_at_a_legal_example() -> None:
    experiment = parse(uncommented()).model_dump()
    wanted = Experiment().model_dump()
    for dotted in keys():
        expected = CHOSEN.get(dotted, EXAMPLES.get(dotted, at(wanted, dotted)))
        shown = at(experiment, dotted)
        if dotted == "search.space":
            shown = {name: {k: v for k, v in r.items() if k in expected[name]} for name, r in shown.items()}
        assert shown == expected, dotted


def test_a_default_that_is_not_shown_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter, "EXAMPLES", {**EXAMPLES, "train.batch_size": 65, "train.steps": 201})
    assert uncommented()["train"]["batch_size"] == 64
    assert uncommented()["train"]["steps"] == 201 != EXAMPLES["train.steps"]


def test_a_key_without_a_meaning_or_an_example_is_shown_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter, "MEANINGS", {})
    monkeypatch.setattr(starter, "EXAMPLES", {})
    assert uncommented()["train"]["batch_size"] == 64
    assert "\n# grad_clip\n" in config_text()


def test_lines_fit_on_a_page_and_prose_is_no_key() -> None:
    lines = config_text().splitlines()
    assert max(map(len, lines)) <= 100
    assert all(line == "" or line.startswith(("# ", "#", "[")) or " = " in line for line in lines)


def test_the_model_file_grows_with_width_and_its_data_can_be_learned() -> None:
    space: dict[str, Any] = {}
    exec(MODEL, space)
    splits = space["load"]()
    inputs, targets = splits["train"]
    shape, classes = tuple(inputs.shape[1:]), int(targets.max()) + 1
    assert list(splits) == ["train", "validation", "test"]
    assert all(len(x) == len(y) for x, y in splits.values())
    model, groups = mupx.parametrize(
        lambda width: space["build"](width, input_shape=shape, classes=classes),
        width=64,
        base_width=16,
        optimizer="adamw",
        lr=0.01,
    )
    assert {group["role"] for group in groups} == {"input", "hidden", "output", "vector"}
    optimizer = mupx.optim.AdamW(groups)
    losses = []
    for x, y in zip(inputs.split(64), targets.split(64), strict=True):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert len(MODEL.splitlines()) <= 32
