"""Ranks under torchrun, over gloo, against one process with the same batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mupx.distributed.communicator import Communicator
from tests.distributed import worker
from tests.distributed.launch import torchrun

pytestmark = pytest.mark.dist
Results = dict[str, Any]


@pytest.fixture(scope="module")
def single() -> Results:
    return worker.optimizers(Communicator())


def worst(found: Results, wanted: Results) -> float:
    """Largest difference of a loss or measurement, over the size of the largest loss."""
    pairs = zip(found["losses"] + found["measured"], wanted["losses"] + wanted["measured"], strict=True)
    return max(abs(a - b) for a, b in pairs) / max(wanted["losses"])


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("task", ["optimizers", "sharded_optimizers"])
def test_every_optimizer_has_the_curve_of_one_process(
    tmp_path: Path, single: Results, ranks: int, task: str
) -> None:
    ended = torchrun(ranks, tmp_path, task)
    assert all(each == ended[0] for each in ended)
    for name in single:
        assert worst(ended[0][name], single[name]) < 1e-10, name


def test_the_curves_of_two_optimizers_are_not_equal(single: Results) -> None:
    assert worst(single["kfac"], single["foof"]) > 1e-4


@pytest.mark.parametrize("ranks", [2, 3])
def test_means_are_over_all_samples_however_they_lie(tmp_path: Path, ranks: int) -> None:
    wanted = worker.situations(Communicator())
    found = torchrun(ranks, tmp_path, "situations")[0]
    for name in wanted:
        assert worst(found[name], wanted[name]) < (1e-5 if "32" in name else 1e-10), name


CHAINS = [[(2, ""), (1, ""), (4, "")], [(2, "fsdp"), (3, "fsdp"), (2, "")]]


@pytest.mark.parametrize("chain", CHAINS)
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path, chain: list[tuple[int, str]]) -> None:
    whole = worker.part(Communicator(), str(tmp_path / "whole"), "0")
    for (ranks, kind), stop in zip(chain, ("2", "5", "0"), strict=True):
        found = torchrun(ranks, tmp_path, "part", str(tmp_path / "run"), stop, kind)[0]
    for name, wanted in whole.items():
        before = len(wanted["losses"]) - len(found[name]["losses"])
        assert before >= 4
        assert worst(found[name], {**wanted, "losses": wanted["losses"][before:]}) < 1e-10, name


def test_dropout_differs_by_rank_and_not_by_restart(tmp_path: Path) -> None:
    first, second = torchrun(2, tmp_path, "dropped")
    assert first == second
    whole, rest = first["whole"], first["rest"]
    assert whole["losses"][-len(rest["losses"]) :] == rest["losses"]
    assert whole["measured"] == rest["measured"]
    assert whole["losses"] != worker.run(Communicator(), **worker.DROPPING)["losses"]


def test_batch_norm_on_a_cpu_gives_another_curve_and_says_so(tmp_path: Path) -> None:
    alone, ended = worker.batch_norm(Communicator()), torchrun(2, tmp_path, "batch_norm")
    assert not alone["told"]
    assert any("1 normalise each rank's part of a batch by itself" in line for line in ended[0]["told"])
    assert not ended[1]["told"]
    assert ended[0]["measured"] == ended[1]["measured"]
    assert worst(ended[0], alone) > 1e-6


def test_every_rank_says_what_cannot_be_done(tmp_path: Path) -> None:
    ended = torchrun(2, tmp_path, "refused")
    assert ended[0] == ended[1]
    found = ended[0]
    assert found["seed"].startswith("4 rank 1 has another experiment than rank 0: train.seed: 0 → 1;")
    assert found["batch"].startswith(
        "2 train.batch_size 1 leaves some of 2 ranks without an example; start fewer, at most 1"
    )
    assert found["micro"].startswith("2 train.batch_size 2 in 2 micro-batches leaves some of 2 ranks")
    assert found["curvature"].startswith("2 train.curvature_every measures in one process")
    assert found["own"].startswith("2 Rprop is not of mupx")
    assert found["disk"].startswith("7 ")


def test_a_signal_to_one_rank_ends_all_after_the_same_saved_step(tmp_path: Path) -> None:
    ended = torchrun(2, tmp_path, "signalled", str(tmp_path / "run"))
    assert ended == [{"code": 143}, {"code": 143}]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000000004.safetensors"]
