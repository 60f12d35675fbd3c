"""Every model family through the training loop: it learns, continues to the last bit, and counts tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mupx import config, dotted, evaluation, training
from mupx.datasets.base import Dataset, Split
from mupx.losses import IGNORED, LOSSES
from mupx.models import MODELS
from mupx.run import Run
from mupx.training import train

VOCABULARY, CONTEXT, CLASSES = 7, 6, 4


def tokens(count: int, seed: int) -> Split:
    """Sequences in which each token follows from the one before: t → 3 t + 1 or 3 t + 2 (mod 7)."""
    generator = torch.Generator().manual_seed(seed)
    sequence = torch.randint(0, VOCABULARY, (count, 1), generator=generator)
    for _ in range(CONTEXT):
        step = torch.randint(1, 3, (count, 1), generator=generator)
        sequence = torch.cat([sequence, (3 * sequence[:, -1:] + step) % VOCABULARY], 1)
    return Split(sequence[:, :-1], sequence[:, 1:])


def windows(count: int, seed: int) -> Split:
    """Four neighbours that are all near the word in the middle."""
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randint(0, VOCABULARY, (count,), generator=generator)
    offsets = torch.randint(0, 2, (count, 4), generator=generator)
    return Split((middle[:, None] + offsets) % VOCABULARY, middle)


def images(side: int) -> Any:
    def make(count: int, seed: int) -> Split:
        """Noise plus one of four patterns on one of four colours."""
        generator, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
        patterns = torch.randn(CLASSES, 2, side, side, generator=fixed)
        patterns += torch.randn(CLASSES, 2, 1, 1, generator=fixed)
        labels = torch.randint(0, CLASSES, (count,), generator=generator)
        return Split(patterns[labels] + torch.randn(count, 2, side, side, generator=generator), labels)

    return make


def dataset(make: Any, classes: int) -> Dataset:
    return Dataset("toy", make(256, 0), make(64, 1), make(64, 2), classes, checksum="toy")


TOKENS, WINDOWS = dataset(tokens, VOCABULARY), dataset(windows, VOCABULARY)
SMALL_IMAGES, LARGE_IMAGES = dataset(images(8), CLASSES), dataset(images(32), CLASSES)
# Model → data, base width, arguments, lr of AdamW.
FAMILIES: dict[str, tuple[Dataset, int, dict[str, Any], float]] = {
    "mlp": (SMALL_IMAGES, 8, {}, 0.01),
    "myrtle5": (SMALL_IMAGES, 8, {}, 0.01),
    "resnet": (SMALL_IMAGES, 4, {}, 0.01),
    "vgg19": (LARGE_IMAGES, 2, {}, 0.01),
    "cbow": (WINDOWS, 8, {}, 0.1),
    "gpt": (TOKENS, 8, {"head_dim": 4}, 0.01),
    "vit": (SMALL_IMAGES, 8, {"head_dim": 4}, 0.01),
}


def experiment(name: str, optimizer: str = "adamw", **changes: Any) -> config.Experiment:
    _, width, args, lr = FAMILIES[name]
    settings = {
        "model.name": name,
        "model.args": args,
        "optimizer.name": optimizer,
        "hyperparameters.lr": lr if optimizer == "adamw" else 0.02,
        "hyperparameters.damping": 0.1,
        "optimizer.refresh": 5,
        "optimizer.staleness": 0.5,
        "scaling.base_width": width,
        "scaling.width": 2 * width,
        "train.batch_size": 32,
        "train.steps": 24,
        "train.threads": 1,
        "train.device": "cpu",
    }
    return config.parse(
        dotted.merge({}, {**settings, **{key.replace("__", "."): value for key, value in changes.items()}})
    )


def test_every_family_is_here() -> None:
    assert sorted(FAMILIES) == sorted(MODELS)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_learns(name: str) -> None:
    result = train(experiment(name), data=FAMILIES[name][0])
    assert result.outcome == "finished"
    assert result.train_loss < 0.9 * result.untrained["train"]
    assert result.validation is not None
    if name != "vgg19":  # its running statistics lag behind in so short a run
        assert result.validation.loss < result.untrained["validation"]


@pytest.mark.parametrize("name", ["cbow", "gpt", "resnet", "vit"])
def test_kfac_learns(name: str) -> None:
    result = train(experiment(name, "kfac"), data=FAMILIES[name][0])
    assert result.outcome == "finished"
    assert result.train_loss < 0.95 * result.untrained["train"]


class KilledError(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["adamw", "kfac"])
@pytest.mark.parametrize("name", ["resnet", "gpt", "cbow"])
def test_a_killed_run_continues_to_the_last_bit(name: str, optimizer: str, tmp_path: Path) -> None:
    data = FAMILIES[name][0]
    chosen = experiment(name, optimizer, train__steps=10, train__checkpoint_every=4, train__eval_every=5)
    whole = train(chosen, data=data, run_dir=tmp_path / "whole")

    def kill(step: int, steps: int, loss: float) -> None:
        if step == 7:
            raise KilledError

    with pytest.raises(KilledError):
        train(chosen, data=data, run_dir=tmp_path / "cut", progress=kill)
    torch.manual_seed(999)
    continued = train(chosen, data=data, run_dir=tmp_path / "cut")
    assert continued.validation == whole.validation
    metrics = [(tmp_path / folder / "metrics.jsonl").read_text() for folder in ("whole", "cut")]
    assert metrics[0] == metrics[1]


def test_buffers_are_restored_to_the_last_bit_and_left_alone_by_evaluation() -> None:
    data = FAMILIES["resnet"][0]
    chosen = experiment("resnet")
    parameters = training.describe(chosen, data)
    run, other = (Run(chosen, data, parameters) for _ in range(2))
    for _ in range(3):
        run.advance()
    buffers = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
    assert int(buffers["stem.norm.num_batches_tracked"]) == 3
    before = run.evaluate(data.validation)
    other.restore(run.snapshot())
    assert other.evaluate(data.validation) == before
    for name, buffer in other.model.named_buffers():
        assert torch.equal(buffer, buffers[name])
    # The loss of one example does not depend on the others: running statistics, not the batch's.
    one, two = (run.evaluate(Split(*(t[:n] for t in pair(data.validation)))).loss for n in (1, 2))
    second = run.evaluate(Split(*(t[1:2] for t in pair(data.validation)))).loss
    assert two == pytest.approx((one + second) / 2, rel=1e-5)


def pair(split: Split) -> tuple[Tensor, Tensor]:
    return split.inputs, split.targets


def gpt_run(**changes: Any) -> Run:
    chosen = experiment("gpt", train__dtype="float64", **changes)
    return Run(chosen, TOKENS, training.describe(chosen, TOKENS))


def ignoring(split: Split, share: float = 0.5) -> Split:
    """Ignore a random half of the targets, and all of the first example's."""
    targets = split.targets.clone()
    ignored = torch.rand(targets.shape, generator=torch.Generator().manual_seed(3)) < share
    ignored[0] = True
    targets[ignored] = IGNORED
    return Split(split.inputs, targets)


def test_loss_and_accuracy_are_means_over_the_tokens_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    run, split = gpt_run(), ignoring(TOKENS.validation)
    with torch.no_grad():
        logits = run.model.eval()(split.inputs)
    counted = split.targets != IGNORED
    log_p = logits.log_softmax(-1).gather(-1, split.targets.clamp(0)[..., None])[..., 0]
    right = (logits.argmax(-1) == split.targets)[counted]
    found = run.evaluate(split)
    assert found.loss == pytest.approx(-log_p[counted].mean().item(), rel=1e-12)
    assert found.accuracy == pytest.approx(right.double().mean().item(), rel=1e-12)
    # One example at a time, of which the first counts for nothing, gives the same means.
    monkeypatch.setattr(evaluation, "MOST_EXAMPLES", 1)
    single = run.evaluate(split)
    assert (single.loss, single.accuracy) == pytest.approx((found.loss, found.accuracy), rel=1e-12)
    # A mean over examples instead of tokens is another number.
    per_example = [-(log_p[i][counted[i]].mean().item()) for i in range(len(split)) if counted[i].any()]
    assert sum(per_example) / len(per_example) != pytest.approx(found.loss, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["sgd", "kfac"])
def test_accumulation_weights_micro_batches_by_the_tokens_that_count(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Dataset("toy", ignoring(TOKENS.train), TOKENS.validation, TOKENS.test, VOCABULARY, "toy")

    def loss(parts: int) -> float:
        settings = {"train__dtype": "float64", "train__accumulate": parts, "train__steps": 6}
        return train(experiment("gpt", optimizer, **settings), data=data).train_loss

    whole = loss(1)
    # 32 parts: single examples, one of which counts for nothing.
    assert [loss(8), loss(32)] == pytest.approx([whole, whole], rel=1e-6)
    monkeypatch.setattr(Run, "_share", lambda run, part, batch: 1 / 8)
    assert loss(8) != pytest.approx(whole, rel=1e-5)


def test_regression_targets_have_no_accuracy() -> None:
    split = Split(SMALL_IMAGES.validation.inputs, torch.randn(64, CLASSES))
    chosen = experiment("mlp", train__loss="squared_error")
    run = Run(chosen, SMALL_IMAGES, training.describe(chosen, SMALL_IMAGES))
    assert run.evaluate(split).accuracy is None
    assert run.evaluate(SMALL_IMAGES.validation).accuracy is not None


def test_token_ids_stay_whole_numbers() -> None:
    assert gpt_run().inputs.dtype == torch.int64
    assert gpt_run().model.get_parameter("output.weight").dtype == torch.float64


def test_evaluation_batches_shrink_with_the_largest_output(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS.load("gpt")(8, input_shape=(CONTEXT,), classes=1000, head_dim=4)
    inputs = TOKENS.validation.inputs
    logits = CONTEXT * 1000  # larger than any other output
    for numbers, expected in ((2**28, 2000), (50 * logits, 50), (logits - 1, 1), (7 * logits + 5, 7)):
        monkeypatch.setattr(evaluation, "MOST_NUMBERS", numbers)
        assert evaluation.examples_at_once(model, model, inputs[:2]) == expected
    assert not any(module._forward_hooks for module in model.modules())


def factors(name: str, x: Tensor, y: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    """A and B of one layer, by autograd on each term of the loss by itself."""
    _, width, args, _ = FAMILIES[name]
    torch.manual_seed(0)
    model = MODELS.load(name)(width, input_shape=x.shape[1:], classes=VOCABULARY, **args).double()
    seen: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(
        lambda module, inputs, output: seen.extend((inputs[0], output))
    )
    logits = model(x)
    handle.remove()
    h, output = seen
    total = LOSSES["cross_entropy"](logits, y) * int((y != IGNORED).sum())
    (delta,) = torch.autograd.grad(total, output)
    rows, signals = h.detach().flatten(0, -2), delta.flatten(0, -2)
    if y.dim() == 2:
        rows = rows[(y != IGNORED).flatten()]
    terms = int((y != IGNORED).sum())
    return rows.T @ rows / len(rows), signals.T @ signals / terms


@pytest.mark.parametrize("layer", ["output", "blocks.0.attention.query", "blocks.1.perceptron.up"])
def test_kronecker_factors_of_per_token_targets(layer: str) -> None:
    """Both are means over tokens that count: A of h hᵀ, B of δ δᵀ."""
    from mupx.curvature import EagerCapture
    from mupx.factor_sums import FactorSums

    split = ignoring(TOKENS.train)
    x, y = split.inputs[:16], split.targets[:16]
    torch.manual_seed(0)
    model = MODELS.load("gpt")(8, input_shape=(CONTEXT,), classes=VOCABULARY, head_dim=4).double()
    loss, sums = LOSSES["cross_entropy"], {layer: FactorSums()}
    with EagerCapture({layer: model.get_submodule(layer)}, sums, loss, y):  # type: ignore[dict-item]
        loss(model(x), y).backward()
    A, B = sums[layer].factors()
    expected = factors("gpt", x, y, layer)
    torch.testing.assert_close(A, expected[0])
    torch.testing.assert_close(B, expected[1])
    # Ignored tokens at the end change neither, however many there are.
    padded = FactorSums()
    longer = torch.cat([x, x]), torch.cat([y, torch.full_like(y, IGNORED)])
    with EagerCapture({layer: model.get_submodule(layer)}, {layer: padded}, loss, longer[1]):  # type: ignore[dict-item]
        loss(model(longer[0]), longer[1]).backward()
    torch.testing.assert_close(padded.factors()[0], A)
    torch.testing.assert_close(padded.factors()[1], B)


def test_embeddings_and_norms_fall_back_to_adamw_under_kfac() -> None:
    run = gpt_run(optimizer__name="kfac")
    fallback = {layer.name for layer in run.layers if layer.optimizer == "adamw"}
    assert {"embedding.weight", "positions.weight", "norm.weight", "blocks.0.attention_norm.bias"} <= fallback
    assert not any(".weight" in name and "norm" not in name and "blocks" in name for name in fallback)
    assert "output.weight" not in fallback
