"""Transfer over depth: what is multiplied by which power of L, that one step moves the residual stream
equally at every depth, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mupx
from mupx import parts
from mupx.config import Experiment, parse
from mupx.datasets.base import Dataset
from mupx.datasets.given import dataset_from
from mupx.depth import Source, completed, deepened
from mupx.errors import MismatchError, MupxError, UsageError
from mupx.recipe import Recipe, read
from mupx.roles import describe
from mupx.run import Run
from mupx.sections import DepthConfig
from tests.optim.training import build

CLASSES, D_IN = 5, 12


class Residual(nn.Module):
    """h ← h + s · tanh(W h), ``layers`` times, in float64."""

    residual_blocks = "blocks.*"

    def __init__(self, width: int, layers: int, branch_scale: float) -> None:
        super().__init__()
        self.branch_scale = branch_scale
        self.input = nn.Linear(D_IN, width, bias=False)
        self.blocks = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
        self.output = nn.Linear(width, CLASSES, bias=False)
        self.double()

    def stream(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.input(x))
        for block in self.blocks:
            h = h + self.branch_scale * torch.tanh(block(h))
        return h

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.output(self.stream(x))
        return logits


def residual(width: int, layers: int = 2, branch_scale: float = 1.0) -> Residual:
    return Residual(width, layers, branch_scale)


def tokens() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, CLASSES, (size, 7), generator=generator) for size in (16, 8)]
    return dataset_from("tokens", tuple((t[:, :-1], t[:, 1:]) for t in ids))


TOKENS = tokens()


def gpt(**changes: Any) -> Experiment:
    keys = {
        "model.name": "gpt",
        "model.args": {"head_dim": 4},
        "scaling.base_width": 8,
        "scaling.width": 8,
        "train.batch_size": 8,
        "train.steps": 1,
        "train.threads": 1,
        "hyperparameters.lr": 0.5,
        "hyperparameters.damping": 0.03,
        "hyperparameters.eps": 1e-6,
    }
    return parse({}).updated({**keys, **{key.replace("__", "."): value for key, value in changes.items()}})


def recipe(**changes: Any) -> Recipe:
    experiment = gpt(**changes)
    return Recipe(experiment, parts.describe(experiment, TOKENS))


# Hand-written, for L = 4 (2 blocks → 8) at the base width: what is inside a branch is multiplied by these.
L = 4
INSIDE: Mapping[str, tuple[dict[str, Any], dict[str, float]]] = {
    "sgd": ({}, {"lr": L}),
    "adamw": ({}, {"lr": 1, "eps": 1 / L}),
    "kfac, trace": ({"damping_rule": "trace"}, {"lr": 1 / L, "damping_A": 1, "damping_B": 1}),
    "kfac, absolute": ({"damping_rule": "absolute"}, {"lr": 1 / L, "damping_A": 1, "damping_B": 1 / L**2}),
    "kfac, exact": ({"damping_rule": "exact"}, {"lr": 1 / L, "damping_B": 1 / L**2}),
    "kfac, pi": ({"damping_rule": "pi"}, {"lr": 1 / L, "damping_A": 1, "damping_B": 1}),
    "shampoo, relative": ({"damping_rule": "relative"}, {"lr": 1, "damping_A": 1, "damping_B": 1}),
    "shampoo, absolute": (
        {"damping_rule": "absolute"},
        {"lr": 1, "damping_A": 1 / L**2, "damping_B": 1 / L**2},
    ),
}


@pytest.mark.parametrize("case", INSIDE)
def test_what_is_inside_the_branches_follows_the_depth_rule_and_nothing_else_does(case: str) -> None:
    settings, multipliers = INSIDE[case]
    chosen = {f"optimizer.{key}": value for key, value in settings.items()}
    base = recipe(**{"optimizer.name": case.partition(",")[0], **chosen})
    deep = parts.at_depth(base, 8, TOKENS)
    at_base = {layer.name: layer for layer in base.layers}
    inside = "blocks.7.perceptron.up.weight"
    assert {p.name.split(".")[1] for p in deep.parameters if p.depth == L} == set("01234567")
    assert all((p.depth == L) == p.name.startswith("blocks.") for p in deep.parameters)
    for layer in deep.layers:
        twin = at_base[
            layer.name.replace("blocks.7.", "blocks.1.") if layer.name == inside else "output.weight"
        ]
        expected = multipliers if layer.name == inside else dict.fromkeys(multipliers, 1)
        if layer.name in (inside, "output.weight"):
            assert layer.init_std == twin.init_std
            for key, multiplier in expected.items():
                assert getattr(layer, key) == pytest.approx(multiplier * getattr(twin, key)), (
                    layer.name,
                    key,
                )
    gain = next(layer for layer in deep.layers if layer.name == "blocks.5.attention_norm.weight")
    if gain.optimizer == "adamw":  # also what AdamW takes over from the others
        assert gain.eps == pytest.approx(1e-6 / L)


def test_the_factory_builds_the_depth_with_scaled_branches() -> None:
    for args, scale in (({"head_dim": 4}, 1 / L), ({"head_dim": 4, "branch_scale": 0.5}, 0.5 / L)):
        deep = parts.at_depth(recipe(model__args=args), 8, TOKENS)
        model = parts.factory(deep.experiment, TOKENS)(8)
        assert [block.branch_scale for block in model.blocks] == [scale] * 8
        assert deep.experiment.depth.base == 2
    standard = parts.at_depth(recipe(scaling__parametrization="sp", optimizer__name="sgd"), 8, TOKENS)
    model = parts.factory(standard.experiment, TOKENS)(8)
    assert [block.branch_scale for block in model.blocks] == [1.0] * 8
    assert {layer.lr for layer in standard.layers} == {0.5}


def test_at_the_base_depth_nothing_changes_to_the_last_bit() -> None:
    plain = recipe()
    same = parts.at_depth(plain, 2, TOKENS)
    assert same.parameters == plain.parameters
    assert same.layers == plain.layers
    runs = [Run(r.experiment, TOKENS, r.parameters) for r in (plain, same)]
    assert runs[0].advance() == runs[1].advance()
    states = [run.model.state_dict() for run in runs]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    deep = parts.at_depth(plain, 4, TOKENS)
    assert Run(deep.experiment, TOKENS, deep.parameters).advance() != runs[0].losses[0]


def test_depth_and_width_compose_in_any_order_and_survive_the_file(tmp_path: Path) -> None:
    base = recipe(optimizer__damping_rule="absolute")
    both = parts.at_depth(base, 8, TOKENS).transfer(32)
    assert both.layers == parts.at_depth(base.transfer(32), 8, TOKENS).layers
    assert (
        both.layers
        == parts.at_depth(parts.at_depth(base.transfer(16), 4, TOKENS), 8, TOKENS).transfer(32).layers
    )
    assert parts.at_depth(both, 2, TOKENS).transfer(8).layers == base.layers
    both.write(tmp_path / "r.toml")
    again = read(tmp_path / "r.toml")
    assert again == both
    run = Run(again.experiment, TOKENS, again.parameters)  # no parameter is missing, none too many
    assert math.isfinite(run.advance())
    text = (tmp_path / "r.toml").read_text()
    (tmp_path / "r.toml").write_text(text.replace("depth = 4.0", "depth = 2.0", 1))
    with pytest.raises(MismatchError, match="edited by hand"):
        read(tmp_path / "r.toml")


def test_an_init_that_depends_on_depth_keeps_the_law_of_the_base() -> None:
    def build(width: int, layers: int = 2, branch_scale: float = 1.0) -> nn.Module:
        model = Residual(width, layers, branch_scale)
        for i, block in enumerate(model.blocks):
            nn.init.normal_(block.weight, std=(1.0 if i < layers // 2 else 3.0) / math.sqrt(layers * width))
        return model

    for width in (64, 128):
        torch.manual_seed(0)
        values: dict[str, Any] = {"base_width": 64, "depth": 8, "optimizer": "sgd", "lr": 0.1}
        model, _ = mupx.parametrize(build, width=width, **values)
        stds = [block.weight.std().item() * math.sqrt(2 * width) for block in model.blocks]
        # Built by itself it would have half of these at depth 8.
        assert stds == pytest.approx([1] * 4 + [3] * 4, rel=0.05)


def test_sequential_models_renumber_what_follows_the_blocks() -> None:
    class Chain(nn.Sequential):
        residual_blocks = "*.branch.*"

    class Step(nn.Module):
        def __init__(self, width: int, scale: float) -> None:
            super().__init__()
            self.branch, self.scale = nn.Sequential(nn.Linear(width, width), nn.Tanh()), scale

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = x + self.scale * self.branch(x)
            return result

    def build(width: int, layers: int = 1, branch_scale: float = 1.0) -> nn.Module:
        steps = (Step(width, branch_scale) for _ in range(layers))
        return Chain(nn.Linear(3, width), *steps, nn.Linear(width, 4))

    _, groups = mupx.parametrize(build, width=8, base_width=8, depth=3, optimizer="sgd", lr=0.1)
    rates = {group["params"][0][0]: group["lr"] for group in groups}
    assert rates["4.weight"] == rates["0.weight"] == 0.1
    assert rates["1.branch.0.weight"] == rates["3.branch.0.bias"] == pytest.approx(0.3)


Spoiler = Callable[[dict[str, Any], float], None]


def moved(name: str, layers: int, seed: int, spoil: Spoiler, **values: Any) -> float:
    """Return mean|Δh| of the residual stream after one step of what is inside the branches."""
    torch.manual_seed(seed)
    x, y = torch.randn(64, D_IN, dtype=torch.double), torch.randint(0, CLASSES, (64,))
    model, groups = mupx.parametrize(
        residual, width=32, base_width=16, optimizer=name, depth=layers, base_depth=2, **values
    )
    for group in groups:
        if group["params"][0][0].startswith("blocks"):
            spoil(group, layers / 2)
    options = {"damping_rule": values["damping_rule"]} if "damping_rule" in values else {}
    optimizer = build(name, groups, model, **options)
    before, first = model.stream(x).detach(), model.input.weight.detach().clone()
    with optimizer.curvature(y):
        nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    with torch.no_grad():
        model.input.weight.copy_(first)
        return float((model.stream(x) - before).abs().mean())


def slope(name: str, spoil: Spoiler, **values: Any) -> float:
    """Return the slope of log2 mean|Δh| against log2 L over L = 1, 2, 4, 8."""
    sums = [sum(moved(name, 2 * L, seed, spoil, **values) for seed in (0, 1)) for L in (1, 2, 4, 8)]
    y = [math.log2(value) for value in sums]
    return sum((i - 1.5) * value for i, value in enumerate(y)) / 5


def times(key: str, power: float) -> Spoiler:
    """Return a spoiler that puts one more factor L^power on a value of the groups inside the branches."""

    def spoil(group: dict[str, Any], ratio: float) -> None:
        group[key] *= ratio**power

    return spoil


def kept(group: dict[str, Any], ratio: float) -> None:
    """Leave the group as the rule has it."""


TRACE = {"lr": 0.01, "damping": 0.1, "damping_rule": "trace"}
# Ridges of the order of the factors' largest eigenvalues: where they decide the size of the update.
ABSOLUTE = {"lr": 0.05, "damping": 0.3, "damping_ratio": 50.0, "damping_rule": "absolute"}
HEAVY = {"lr": 0.1, "damping": 10.0, "damping_rule": "absolute"}
EXACT = {"lr": 1e-3, "damping": 0.01, "damping_rule": "exact"}


@pytest.mark.parametrize(
    ("name", "values", "wrong", "at_least"),
    [
        ("sgd", {"lr": 0.1}, ("lr", -1), 0.7),  # without the rule
        ("adamw", {"lr": 1e-3}, ("lr", 1), 0.7),  # with SGD's
        ("adamw", {"lr": 1e-3, "eps": 1e-2}, ("eps", 1), 0.6),  # eps left unscaled
        ("kfac", TRACE, ("lr", 1), 0.7),
        ("kfac", ABSOLUTE, ("damping_B", 2), 1.2),
        ("kfac", EXACT, ("damping_B", 2), 1.2),
        ("foof", TRACE, ("lr", -1), 0.7),
        ("ekfac", TRACE, ("lr", 1), 0.7),
        ("ekfac", EXACT | {"damping_rule": "absolute"}, ("damping_B", 2), 1.2),
        ("gauss-newton", TRACE, ("lr", 1), 0.7),
        ("gauss-newton", EXACT | {"damping_rule": "absolute"}, ("damping_B", 2), 1.2),
        ("gauss-newton-full", TRACE, ("lr", -1), 0.7),  # the layer-wise rule
        ("gauss-newton-full", HEAVY, ("damping_B", -1), 0.7),
        ("shampoo", {"lr": 0.01, "damping": 1e-3, "damping_rule": "relative"}, ("lr", 1), 0.7),
        ("shampoo", {"lr": 0.01, "damping": 1e-3, "damping_rule": "absolute"}, ("damping_B", 2), 0.3),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else None,
)
def test_one_step_moves_the_stream_equally_at_every_depth(
    name: str, values: Mapping[str, Any], wrong: tuple[str, float], at_least: float
) -> None:
    assert abs(slope(name, kept, **values)) < 0.15
    assert abs(slope(name, times(*wrong), **values)) > at_least


def test_pi_damping_does_not_transfer_over_depth() -> None:
    """π splits one ρ by the factors' traces: ρ_B falls as 1/L, λ(B) as 1/L², so damping takes over."""
    values = {"lr": 0.01, "damping": 1e-3, "damping_rule": "pi"}
    assert slope("kfac", kept, **values) < -0.5


class Twice(nn.Module):
    residual_blocks = "blocks.*"

    def __init__(self, width: int, sizes: tuple[int, ...], extra: int = 0) -> None:
        super().__init__()
        self.input = nn.Linear(3, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, s), nn.Linear(s, width)) for s in sizes)
        self.extra = nn.ModuleList(nn.Linear(width, width) for _ in range(extra))
        self.output = nn.Linear(width, 2)


def no_branches(width: int, layers: int = 2, branch_scale: float = 1.0) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2))


def stuck(width: int, layers: int = 2, branch_scale: float = 1.0) -> nn.Module:
    return Twice(width, (width, width))


def counting_ends(width: int, layers: int = 4, branch_scale: float = 1.0) -> nn.Module:
    return Twice(width, (width,) * (layers - 2))


def widening(width: int, layers: int = 2, branch_scale: float = 1.0) -> nn.Module:
    return Twice(width, tuple(width * (i + 1) for i in range(layers)))


def growing_outside(width: int, layers: int = 2, branch_scale: float = 1.0) -> nn.Module:
    return Twice(width, (width,) * layers, extra=layers)


def without_multiplier(width: int, layers: int = 2) -> nn.Module:
    return Twice(width, (width,) * layers)


def no_default(width: int, layers: int, branch_scale: float = 1.0) -> nn.Module:
    return Twice(width, (width,) * layers)


def listed(width: int, layers: Any = (2, 2), branch_scale: float = 1.0) -> nn.Module:
    return Twice(width, (width,) * (sum(layers) if isinstance(layers, tuple) else layers))


def worded(width: int, layers: int = 2, branch_scale: Any = "auto") -> nn.Module:
    return Twice(width, (width,) * layers)


@pytest.mark.parametrize(
    ("build", "depth", "error", "message"),
    [
        (no_branches, 4, MismatchError, "declares no residual branches, and without them depth does not tr"),
        (stuck, 4, MismatchError, r"leaves as many parameters inside .* \('blocks\.\*'\) as there were, 8"),
        (
            counting_ends,
            6,
            MismatchError,
            "inside residual branches 16, 2 and not 1.5 times as many",
        ),
        (widening, 4, MismatchError, r"blocks\.1\.0\.weight .* no block at the base depth has"),
        (growing_outside, 4, MismatchError, r"outside the residual branches \(extra\.2\.bias"),
        (without_multiplier, 4, MismatchError, "takes no argument 'branch_scale', so its residual branches"),
        (lambda width: Twice(width, (8,)), 4, MismatchError, r"no argument 'layers'.*\(it takes: width\)"),
        (no_default, 4, UsageError, "no default for layers, so the depth the values were tuned at is not kn"),
        (listed, 4, MismatchError, r"layers of the model factory is \(2, 2\), which is no number of blocks"),
        (worded, 4, MismatchError, "branch_scale of the model factory is 'auto' at the base depth"),
        (residual, 0, UsageError, r"depth\.depth: should be greater than or equal to 1, got 0"),
        (residual, 2.5, UsageError, r"depth\.depth: should be a valid integer, got 2\.5"),
        (residual, True, UsageError, r"depth\.depth: should be a valid integer"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_does_not_transfer_over_depth_is_refused_with_the_reason(
    build: Callable[..., nn.Module], depth: Any, error: type[MupxError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        mupx.parametrize(build, width=16, base_width=8, depth=depth, optimizer="sgd", lr=0.1)
    assert type(caught.value) is error


def test_patterns_and_bases_of_the_users_own() -> None:
    base, target = (describe(lambda w, n=n: residual(w, n), 8) for n in (2, 4))  # type: ignore[misc]
    section = DepthConfig(base=2, depth=4)
    with pytest.raises(MismatchError, match=r"'layers\.\*' matches no parameter \(input\.weight, blocks\.0"):
        deepened(base, target, section, "layers.*")
    with pytest.raises(MismatchError, match="leaves as many"):
        deepened(base, target, section, "[io]*")
    assert [p.depth for p in deepened(base, target, section, "blocks.*")] == [1, 2, 2, 2, 2, 1]
    source = Source({}, {"layers": 4})
    with pytest.raises(MismatchError, match="takes no argument 'layers'"):
        completed(DepthConfig(), source)
    experiment = gpt(model__args={"layers": 4}, depth__base=2)
    with pytest.raises(UsageError, match=r"depth\.base is 2, but model\.args\.layers is 4"):
        parts.factory(experiment, TOKENS)
    assert len(parts.factory(gpt(depth__base=3), TOKENS)(8).blocks) == 3  # type: ignore[arg-type]


def test_the_python_verbs_take_a_depth() -> None:
    build = "tests.test_depth:own_gpt"
    settings: dict[str, Any] = {
        "base_width": 8,
        "optimizer": "adamw",
        "lr": 0.01,
        "batch_size": 8,
        "steps": 2,
        "threads": 1,
    }
    data = tuple((s.inputs, s.targets) for s in (TOKENS.train, TOKENS.validation))
    both = mupx.transfer(build, 16, depth=6, data=data, **settings)
    assert (both.experiment.depth.base, both.experiment.depth.ratio) == (2, 3.0)
    assert len(both.layers) == len(mupx.transfer(both, depth=6, data=data).layers)
    assert len(mupx.transfer(both, depth=2, data=data).layers) < len(both.layers)
    assert mupx.train(both, data=data).outcome == "finished"
    assert mupx.train(build, data=data, width=8, depth=4, base_depth=2, **settings).outcome == "finished"
    with pytest.raises(UsageError, match="give the target's width, its depth, or both"):
        mupx.transfer(both)


def own_gpt(
    width: int, *, input_shape: tuple[int, ...], classes: int, layers: int = 2, branch_scale: float = 1.0
) -> nn.Module:
    from mupx.models.gpt import build

    return build(
        width, input_shape=input_shape, classes=classes, layers=layers, branch_scale=branch_scale, head_dim=4
    )


def test_a_run_that_leaves_depth_alone_keeps_its_identity() -> None:
    assert "depth" not in parse({}).identity(search=False)
    assert gpt(depth__depth=8).fingerprint(search=False) != gpt().fingerprint(search=False)
    assert gpt().run_name == "gpt-fashion-mnist-14-kfac-w8"
    assert gpt(depth__depth=8, depth__base=2).run_name == "gpt-fashion-mnist-14-kfac-w8-d8"
