"""Losses: the mean they take and the Fisher matrix they imply."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mupx.losses import IGNORED, LOSSES, VECTOR

CE, SE = LOSSES["cross_entropy"], LOSSES["squared_error"]


def outer_sum(directions: Tensor) -> Tensor:
    return torch.einsum("k...c,k...d->...cd", directions, directions)


@pytest.mark.parametrize("classes", [5, VECTOR, 20])  # few are treated across examples
def test_cross_entropy_is_the_mean_over_targets_that_count(classes: int) -> None:
    f, y = torch.randn(4, 3, classes, dtype=torch.double), torch.randint(0, classes, (4, 3))
    y[1, 2] = IGNORED
    expected = -sum(f[i, j].log_softmax(-1)[y[i, j]] for i in range(4) for j in range(3) if y[i, j] >= 0)
    torch.testing.assert_close(CE(f, y), expected / 11)
    assert int(CE.normaliser(y)) == 11
    mask = CE.mask(y)
    assert mask is not None
    assert int(mask.sum()) == 11


def test_squared_error_sums_outputs_and_averages_samples() -> None:
    f, y = torch.randn(4, 3, dtype=torch.double), torch.randn(4, 3, dtype=torch.double)
    torch.testing.assert_close(SE(f, y), sum(0.5 * ((f[i] - y[i]) ** 2).sum() for i in range(4)) / 4)
    assert SE.normaliser(y) == 4
    assert SE.mask(y) is None
    labels = torch.tensor([0, 2, 1, 1])
    torch.testing.assert_close(SE(f, labels), SE(f, F.one_hot(labels, 3).double()))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_exact_gradients_give_the_hessian_in_output_space(name: str) -> None:
    loss = LOSSES[name]
    f = torch.randn(1, 4, dtype=torch.double)
    y = torch.tensor([2]) if name == "cross_entropy" else torch.randn(1, 4, dtype=torch.double)
    hessian = torch.autograd.functional.hessian(lambda v: loss(v, y), f).view(4, 4)
    torch.testing.assert_close(outer_sum(loss.exact_gradients(f))[0], hessian)
    assert not torch.allclose(outer_sum(loss.exact_gradients(2 * f) * 2)[0], hessian)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_sampled_gradients_are_unbiased(name: str) -> None:
    loss, generator = LOSSES[name], torch.Generator().manual_seed(1)
    f = torch.randn(3, dtype=torch.double)
    drawn = loss.sampled_gradients(f.expand(40_000, 3), generator)
    torch.testing.assert_close(
        drawn.T @ drawn / len(drawn), outer_sum(loss.exact_gradients(f[None]))[0], atol=0.02, rtol=0
    )
    again = loss.sampled_gradients(f.expand(40_000, 3), torch.Generator().manual_seed(1))
    assert torch.equal(drawn, again)


def test_given_labels_are_used() -> None:
    f, labels = torch.randn(3, 4, dtype=torch.double, requires_grad=True), torch.tensor([0, 3, 1])
    (gradient,) = torch.autograd.grad(3 * CE(f, labels), f)
    torch.testing.assert_close(CE.sampled_gradients(f, None, labels), gradient)
    assert not CE.sampled_gradients(f, None, labels).requires_grad
