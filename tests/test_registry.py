"""Registries: names to objects, resolved on use."""

from __future__ import annotations

import math
import sys

import pytest

from mupx.datasets import DATASETS
from mupx.errors import UsageError
from mupx.models import MODELS
from mupx.optim import OPTIMIZERS
from mupx.registry import Registry

NUMBERS = Registry("number", {"pi": "math:pi", "e": "math:e"})


def test_is_a_read_only_mapping() -> None:
    assert dict(NUMBERS) == {"pi": "math:pi", "e": "math:e"}
    assert len(NUMBERS) == 2
    assert "pi" in NUMBERS
    assert "tau" not in NUMBERS
    assert not hasattr(NUMBERS, "__setitem__")
    assert NUMBERS.load("pi") == math.pi


def test_the_literal_it_was_made_from_can_change() -> None:
    table = {"pi": "math:pi"}
    numbers = Registry("number", table)
    table["e"] = "math:e"
    assert list(numbers) == ["pi"]


def test_an_unknown_name_lists_the_known_and_the_nearest() -> None:
    with pytest.raises(
        UsageError, match=r"unknown number 'pie'; did you mean 'pi'\? \(known: e, pi; code of your own"
    ):
        NUMBERS.load("pie")
    with pytest.raises(UsageError, match=r"unknown number 'zzz' \(known: e, pi; code of your own"):
        NUMBERS["zzz"]


def test_nothing_is_imported_before_it_is_used() -> None:
    sys.modules.pop("this_module_does_not_exist", None)
    lazy = Registry("thing", {"a": "this_module_does_not_exist:b"})
    assert "a" in lazy
    with pytest.raises(ModuleNotFoundError):
        lazy.load("a")


@pytest.mark.parametrize("registry", [OPTIMIZERS, MODELS, DATASETS], ids=lambda r: r.kind)
def test_every_entry_resolves(registry: Registry) -> None:
    assert len(registry) > 0
    for name in registry:
        assert callable(registry.load(name))
