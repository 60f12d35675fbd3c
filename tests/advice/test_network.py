"""A model as operations: counted by hand, without storage, whatever its inputs are."""

import pytest
import torch
from torch import nn

from mupx import patch_moments
from mupx.advice.costs import Shape
from mupx.advice.network import calls_of, network_of, outline, traced
from mupx.advice.rates import Op
from mupx.models.mlp import build

BATCH, WIDTH, PIXELS, CLASSES = 32, 48, 36, 10


def mlp(width):
    return build(width, input_shape=(1, 6, 6), classes=CLASSES)


def network(model=None, batch=BATCH, example=None, loss="cross_entropy", accumulate=1):
    model = outline(mlp, WIDTH) if model is None else model
    example = torch.zeros(2, 1, 6, 6) if example is None else example
    return network_of(model, {}, example, batch, loss, accumulate)


def operations(work):
    return sum(2 * op.sizes[0] * op.sizes[1] * op.sizes[2] * op.times for op in work if op.kind == "gemm")


def test_an_mlp_has_the_products_that_a_hand_counts():
    # Forward and weight gradient in every layer, the input's gradient in all but the first.
    first, hidden, last = PIXELS * WIDTH, WIDTH * WIDTH, WIDTH * CLASSES
    expected = 2 * BATCH * (2 * first + 3 * hidden + 3 * last)
    assert operations(network().passes) == expected
    assert operations(network(batch=2 * BATCH).passes) == 2 * expected


def test_memory_is_that_of_the_tensors():
    found = network()
    numbers = sum(p.numel() for p in mlp(WIDTH).parameters())
    assert found.parameters == found.gradients == 4 * numbers
    # The flattened input and two activations are kept, besides the log-probabilities and targets.
    least = 4 * BATCH * (PIXELS + 2 * WIDTH + CLASSES)
    assert least <= found.activations <= 1.2 * least + 8 * BATCH


def test_a_layer_knows_its_rows_and_accumulation_keeps_them():
    for accumulate in (1, 4):
        shapes = {shape.name: shape for shape in network(accumulate=accumulate).shapes}
        assert shapes["hidden1.weight"] == Shape("hidden1.weight", "tensor", WIDTH, WIDTH, BATCH, 1)
        assert shapes["hidden1.bias"].n == 0
    assert operations(network(accumulate=4).passes) == operations(network().passes)
    assert network(accumulate=4).activations < 0.3 * network().activations


def test_a_convolution_counts_positions(monkeypatch):
    monkeypatch.setattr(patch_moments, "LEAST", 0.0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 36, CLASSES)).to("meta")
    found = network(model)
    kernel = found.shapes[0]
    assert (kernel.d_out, kernel.d_in, kernel.n, kernel.positions) == (4, 9, BATCH * 36, 36)
    pixels = 13 * 8 * 8 + 4 * (6 + 5 + 4) + 4  # thirteen shifts of a padded image, less lines, and corners
    assert (kernel.channels, kernel.moment) == (1, 2 * BATCH * pixels)
    convolved = sum(op.sizes[0] for op in found.passes if op.kind == "conv")
    assert convolved == 2 * BATCH * 36 * 4 * 9 * 2  # forward and weight gradient; the first has no input's


def test_a_wide_model_takes_no_memory_and_no_time():
    found = network(outline(mlp, 50_000))
    assert found.parameters > 10e9


def test_tokens_and_tied_weights_are_counted_once():
    class Tied(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.largest = torch.zeros(1).max().item()  # real tensors are needed first
            self.embed, self.head = nn.Embedding(50, width), nn.Linear(width, 50, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x))

    found = network(outline(Tied, 16), example=torch.zeros(2, 7, dtype=torch.long))
    assert found.parameters == 4 * 50 * 16
    assert [shape.name for shape in found.shapes] == ["embed.weight"]


def test_a_constructor_that_reads_values_is_built_with_them_and_the_random_state_stays():
    class Reading(nn.Linear):
        def __init__(self, width):
            super().__init__(width, width)
            self.largest = self.weight.max().item()

    state = torch.get_rng_state()
    assert outline(Reading, 4).weight.is_meta
    assert torch.equal(torch.get_rng_state(), state)


def test_frozen_parameters_have_no_gradients():
    model = outline(mlp, WIDTH)
    model.input.weight.requires_grad_(False)
    found = network(model)
    assert found.parameters - found.gradients == 4 * WIDTH * PIXELS
    assert "input.weight" not in [shape.name for shape in found.shapes]


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error", "file.py:own"])
def test_every_loss_gives_a_backward_pass(loss):
    assert operations(network(loss=loss).passes) == operations(network().passes)


def test_calls_do_not_count_bytes():
    work = traced(nn.Linear(3, 2), torch.zeros(4, 3), "squared_error")[0]
    assert calls_of(work) == sum(op.times for op in work if op.kind in ("gemm", "call")) > 5
    assert calls_of((Op("stream", (4.0,)), Op("allocate", (4.0,)))) == 0
