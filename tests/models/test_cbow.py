from __future__ import annotations

import torch

from .cases import CASES


def test_logits_are_a_linear_map_of_the_mean_vector() -> None:
    model, words = CASES["cbow"].build(), CASES["cbow"].inputs()
    embedding, output = model.get_parameter("embedding.weight"), model.get_parameter("output.weight")
    expected = torch.stack([embedding[row].mean(0) @ output.T for row in words])
    torch.testing.assert_close(model(words), expected)
    torch.testing.assert_close(model(words.flip(1)), expected)  # a bag has no order


def test_no_bias_by_default() -> None:
    assert [name for name, _ in CASES["cbow"].build().named_parameters()] == [
        "embedding.weight", "output.weight",
    ]  # fmt: skip
