"""What needs no second process; tests/survival and test_ranks.py have the rest."""

from __future__ import annotations

import pytest
import torch

from mupx.distributed.communicator import Communicator, Ranks, found, mirror, packed, unpacked, upper


@pytest.mark.parametrize("d", [1, 63, 64, 65, 200])
def test_the_upper_half_is_all_of_a_symmetric_matrix(d: int) -> None:
    matrix = torch.randn(d, d)
    matrix = matrix + matrix.mT
    other = torch.zeros(d, d)
    for into, part in zip(upper(other), upper(matrix), strict=True):
        into.copy_(part)
    assert d < 65 or not torch.equal(other, matrix)
    mirror(other)
    assert torch.equal(other, matrix)
    assert sum(part.numel() for part in upper(matrix)) <= d * (d + 64) / 2 + 64 * 64 / 2


def test_a_state_keeps_its_numbers_and_the_order_of_its_axes_in_memory() -> None:
    state = {"step": 3, "A": torch.randn(4, 5).mT, "root": torch.randn(2, 3, 4).permute(2, 0, 1)}
    described, tensors = packed(state)
    back, empty = unpacked(described, torch.device("cpu"))
    for into, tensor in zip(empty, tensors, strict=True):
        into.copy_(tensor)
    assert back["step"] == 3
    for key in ("A", "root"):
        assert torch.equal(back[key], state[key])
        assert back[key].stride() == state[key].stride()


def test_a_process_alone_talks_to_nobody() -> None:
    alone = found()
    assert type(alone) is Communicator
    assert (alone.rank, alone.size, alone.shares) == (0, 1, False)
    assert alone.gathered(5) == [5]
    assert alone.first(lambda: 7) == 7
    assert alone.summed(1.5, 2.0) == [1.5, 2.0]


def test_an_error_that_is_no_lost_connection_stays_what_it_is() -> None:
    ranks = object.__new__(Ranks)
    ranks.rank, ranks.size = 1, 2
    with pytest.raises(RuntimeError, match="mat1 and mat2"), ranks.guarding():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with (
        pytest.raises(Exception, match="rank 1 of 2 lost contact with another rank") as caught,
        ranks.guarding(),
    ):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5")
    assert caught.value.exit_code == 7  # type: ignore[attr-defined]
