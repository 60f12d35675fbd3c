"""Roles of every layer type, against what is derived by hand; declarations; what is refused and how."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mupx import config
from mupx.errors import MismatchError, UsageError
from mupx.layer_rows import factorable_layers
from mupx.layers import derive
from mupx.optim import KFAC
from mupx.parametrization import build_optimizer, experiment_from, initialise, parametrize
from mupx.roles import describe, initial_std
from mupx.roles.axes import factorable
from mupx.scaling import FACTORED, find_parametrization, find_rule
from tests.strategies import layer_stacks
from tests.zoo import BASE, REFUSED, ROWS, TOKENS, ZOO, Net, attention, between, read, table, tied

ACCEPTED = sorted(set(ZOO) - REFUSED)


@pytest.mark.parametrize("label", ACCEPTED)
def test_each_layer_is_read_as_derived_by_hand(label: str) -> None:
    parameters = read(ZOO[label])
    for name, said in ZOO[label].said.items():
        p = parameters[name]
        assert (p.role, *p.ratios(p.doubled)) == said, name
    assert all(p.why and p.owner for p in parameters.values())


@pytest.mark.parametrize("label", sorted(REFUSED))
def test_what_is_not_understood_is_refused_by_name(label: str) -> None:
    (name,) = ZOO[label].said
    with pytest.raises(MismatchError, match=re.escape(f"cannot tell the role of {name} [")):
        read(ZOO[label])


def test_the_readme_has_the_table_that_the_code_gives() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    section = re.search(r"<!-- layers -->\n(.*?)<!-- end -->", readme, re.S)
    assert section
    assert [line for line in section[1].splitlines() if line.startswith("|")][2:] == table()


@pytest.mark.parametrize("label", ACCEPTED)
def test_kinds_agree_with_what_kfac_captures(label: str) -> None:
    """K-FAC trains every model of the zoo, from the table: no kind promises what it cannot capture."""
    entry = ZOO[label]
    experiment = experiment_from(
        width=2 * BASE, base_width=BASE, optimizer="kfac", roles=entry.overrides, lr=0.01
    )
    parameters = describe(entry.build, BASE, overrides=experiment.roles, example=entry.example)
    layers = derive(parameters, experiment)
    torch.manual_seed(0)
    model = entry.build(2 * BASE)
    initialise(model, layers)
    optimizer = build_optimizer(model, layers, experiment)
    owners = factorable_layers(model)
    for p in parameters:
        if p.kind in FACTORED:
            assert p.name.rpartition(".")[0] in owners, p.name
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # oneDNN's remark on projections
        for _ in range(2):
            optimizer.zero_grad()
            with optimizer.curvature():
                outputs = model(entry.example if entry.example.dtype == torch.long else _noise(entry.example))
                outputs.square().mean().backward()
            optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} <= moved


def _noise(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(1))


def test_kfac_does_not_count_the_output_projection_of_attention_as_captured() -> None:
    model = attention()(8)
    assert not factorable(model.layer.out_proj)  # type: ignore[union-attr,arg-type]
    assert factorable(nn.Linear(2, 2))
    optimizer = KFAC(model.parameters(), model)
    assert {"layer.out_proj.weight", "layer.out_proj.bias"} <= set(optimizer.fallback)
    assert "head.weight" not in optimizer.fallback


# --- initial laws ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "name", "std"),
    [
        (nn.MultiheadAttention(16, 2), "in_proj_weight", math.sqrt(2 / (48 + 16))),
        (nn.MultiheadAttention(16, 2, kdim=8, vdim=8), "k_proj_weight", math.sqrt(2 / (16 + 8))),
        (nn.MultiheadAttention(16, 2), "out_proj.weight", 1 / math.sqrt(3 * 16)),
        (nn.MultiheadAttention(16, 2), "in_proj_bias", 0.0),
        (nn.MultiheadAttention(64, 2, add_bias_kv=True), "bias_k", 1 / math.sqrt(64)),
        (nn.LSTM(3, 12), "weight_ih_l0", 1 / math.sqrt(3 * 12)),
        (nn.GRUCell(3, 12), "bias_hh", 1 / math.sqrt(3 * 12)),
        (nn.Bilinear(6, 7, 8), "weight", 1 / math.sqrt(3 * 6)),
        (nn.PReLU(4), "weight", 0.0),
    ],
)
def test_torch_laws_of_the_other_layers_are_known_exactly(layer: nn.Module, name: str, std: float) -> None:
    assert initial_std(layer, name) == pytest.approx(std, rel=1e-12)
    if std:
        measured = float(layer.get_parameter(name).detach().square().mean().sqrt())
        assert measured == pytest.approx(std, rel=0.35)
        assert measured != std


def test_what_is_not_drawn_is_left_alone() -> None:
    """Slopes such as log(1 … d) depend on no random number: rescaling them would be a change of model."""

    def build(w: int) -> nn.Module:
        slopes = nn.Parameter(torch.arange(1.0, w + 1).log())
        return Net(
            lambda net, x: net.head(net.embed(x) * net.a),
            embed=nn.Linear(3, w),
            a=slopes,
            head=nn.Linear(w, 5),
        )

    model, _ = parametrize(build, width=64, base_width=8, optimizer="sgd")
    assert torch.equal(model.get_parameter("a"), torch.arange(1.0, 65).log())


def test_a_factory_that_seeds_itself_still_counts_as_drawn() -> None:
    def build(w: int) -> nn.Module:
        torch.manual_seed(5)
        model = between(lambda w: nn.Linear(w, w))(w)
        nn.init.normal_(model.layer.weight, std=0.3)  # type: ignore[union-attr,arg-type]
        return model

    assert {p.name: p.std for p in describe(build, 8)}["layer.weight"] == pytest.approx(0.3, rel=0.3)


def test_a_measured_law_of_unchanged_shape_brings_no_noise() -> None:
    def build(w: int) -> nn.Module:
        model = between(lambda w: nn.Linear(w, w))(w)
        nn.init.normal_(model.head.bias, std=0.5)  # type: ignore[union-attr,arg-type]
        return model

    experiment = experiment_from(width=64, base_width=8, optimizer="sgd")
    model = build(64)
    before = model.get_parameter("head.bias").detach().clone()
    initialise(model, derive(describe(build, 8), experiment))
    assert torch.equal(model.get_parameter("head.bias"), before)


# --- declarations ---------------------------------------------------------------------------------


class Einsum(nn.Module):
    """Three growing axes: y_o = Σ_{hd} w_{ohd} x_h x_d."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, width), nn.Linear(2 * width, 5)
        self.w = nn.Parameter(torch.randn(2 * width, width, 4 * width) / width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        result: Tensor = self.head(torch.einsum("ohd,nh,nd->no", self.w, h, h.repeat(1, 4)))
        return result


AXES = {"role": "hidden", "fan_in": [1, 2], "fan_out": [0]}


@pytest.mark.parametrize(
    ("optimizer", "lr"),
    # r = 4 in each axis: r_in = 16, r_out = 4.
    [("sgd", 4 / 16), ("adamw", 1 / 16), ("shampoo", math.sqrt(4 / 16))],
)
def test_one_declaration_of_axes_serves_every_optimizer(optimizer: str, lr: float) -> None:
    _, groups = parametrize(Einsum, width=16, base_width=4, optimizer=optimizer, lr=1.0, roles={"w": AXES})
    group = next(g for g in groups if g["params"][0][0] == "w")
    assert (group["r_in"], group["r_out"]) == (16.0, 4.0)
    assert group["lr"] == pytest.approx(lr)
    model, _ = parametrize(Einsum, width=16, base_width=4, optimizer=optimizer, roles={"w": AXES})
    assert float(model.get_parameter("w").detach().std()) == pytest.approx(0.25 / 4, rel=0.1)


def test_axes_that_do_not_flatten_to_a_matrix_go_to_the_fallback() -> None:
    kinds = {}
    for fan_in, fan_out in (((1, 2), (0,)), ((0,), (1, 2)), ((0, 2), (1,))):
        declared = {"w": {"fan_in": list(fan_in), "fan_out": list(fan_out)}}
        kinds[fan_in] = {p.name: p.kind for p in describe(Einsum, 4, overrides=declared)}["w"]
    assert kinds == {(1, 2): "matrix", (0,): "matrix", (0, 2): "tensor"}


def test_a_declaration_survives_the_file_and_the_recipe(tmp_path: Path) -> None:
    from mupx.recipe import Recipe
    from mupx.recipe import read as read_recipe

    path = tmp_path / "c.toml"
    path.write_text('[roles]\n"w" = {role = "hidden", fan_in = [1, 2], fan_out = [0]}\nb = "vector"\n')
    experiment = config.load(path)
    assert experiment.roles["b"] == "vector"
    parameters = describe(Einsum, 4, overrides={"w": experiment.roles["w"]})
    experiment = experiment_from(width=8, base_width=4, optimizer="sgd", roles={"w": AXES})
    recipe = Recipe(experiment, parameters)
    recipe.write(tmp_path / "r.toml")
    again = read_recipe(str(tmp_path / "r.toml"))
    assert again == recipe
    assert again.experiment.fingerprint(search=False) == experiment.fingerprint(search=False)


@pytest.mark.parametrize(
    ("declaration", "error", "message"),
    [
        ({"fan_in": [1]}, UsageError, "fan_in and fan_out go together"),
        ({"fan_in": [1], "fan_out": [1]}, UsageError, "fan-in or fan-out, not both"),
        ({"fan_in": [1, 3], "fan_out": [0]}, UsageError, r"axis 3 of w, whose shape is \[8, 4, 16\]"),
        ({"fan_in": [1], "fan_out": [0]}, MismatchError, "neither fan-in nor fan-out grows"),
        ({"fan_inn": [1]}, UsageError, "did you mean 'fan_in'"),
        ({}, UsageError, "say at least one of"),
        ("hiden", UsageError, "'hidden'"),
        ("hidden", MismatchError, r"several of its axes grow.*\{fan_in = \[1, 2\], fan_out = \[0\]\}"),
        ("tied", UsageError, "tied are one nn.Linear head"),
        (
            {"growing_head": True, "role": "vector", "fan_in": [0, 1, 2], "fan_out": []},
            UsageError,
            "does not grow",
        ),
    ],
)
def test_a_declaration_that_cannot_hold_is_refused(
    declaration: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        describe(Einsum, 4, overrides={"w": declaration})
    if error is UsageError and not isinstance(declaration, str):
        with pytest.raises(error, match=message):
            parametrize(Einsum, width=8, base_width=4, optimizer="sgd", roles={"w": declaration})


# --- attention with a growing head ----------------------------------------------------------------


class Attention(nn.Module):
    """One head of size width, logits divided by √d_head; ``alpha`` multiplies the queries (a ≠ 0)."""

    def __init__(self, width: int, alpha: float = 1.0, norm: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(3, width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, 4)
        self.alpha = alpha
        if norm:
            self.q_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        q, k, v = self.q(h) * self.alpha, self.k(h), self.v(h)
        logits = q @ k.mT / math.sqrt(q.shape[-1])
        result: Tensor = self.head((logits.softmax(-1) @ v).mean(1))
        return result


GROWING = {"q.*": {"growing_head": True}}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sgd", {"lr": 0.3}),
        ("sgd", {"lr": 0.3, "weight_decay": 0.1, "weight_decay_mode": "adamw"}),
        ("adamw", {"lr": 0.01, "eps": 1e-3}),
        ("kfac", {"lr": 0.1, "damping_rule": "absolute", "damping": 0.1}),
        ("kfac", {"lr": 0.1, "damping_rule": "trace", "damping": 0.1}),
        ("kfac", {"lr": 0.1, "damping_rule": "exact", "damping": 0.1}),
        ("shampoo", {"lr": 0.1, "damping_rule": "absolute", "damping": 1e-4}),
        ("shampoo", {"lr": 0.1, "damping_rule": "relative", "damping": 1e-2}),
    ],
)
def test_folding_alpha_is_training_with_alpha_in_the_forward_pass(name: str, options: dict[str, Any]) -> None:
    """The oracle is the same network with q multiplied by r_head^-½."""
    folded, oracle = _attention_losses(name, options, GROWING), _attention_losses(name, options, {}, 0.5)
    assert folded == pytest.approx(oracle, rel=1e-9)
    assert folded[0] != folded[-1]
    # Scaling the start alone is not enough, save where the rule's lr and ridge have no α.
    if "trace" not in options.values():
        start_only = _attention_losses(name, options, {}, 1.0, start=0.5)
        assert start_only[0] == pytest.approx(oracle[0], rel=1e-9)
        assert start_only != pytest.approx(oracle, rel=1e-7)


def _attention_losses(
    name: str, options: dict[str, Any], roles: dict[str, Any], alpha: float = 1.0, start: float = 1.0
) -> list[float]:
    experiment = experiment_from(width=16, base_width=4, optimizer=name, roles=roles, **options)
    layers = derive(describe(Attention, 4, overrides=experiment.roles), experiment)
    torch.manual_seed(2)
    model = Attention(16, alpha).double()
    initialise(model, layers)
    with torch.no_grad():
        model.q.weight.mul_(start)
        model.q.bias.mul_(start)
    return _train(model, build_optimizer(model, layers, experiment))


def _train(model: nn.Module, optimizer: Any, steps: int = 4) -> list[float]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(12, 5, 3, generator=generator, dtype=torch.double)
    y = torch.randint(0, 4, (12,), generator=generator)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with optimizer.curvature(y):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_every_rule_folds_alpha_by_its_degree_in_the_gradient() -> None:
    """r = 16, so α = ¼: lr × α^(1+h), h = 1, 0, −1, 0."""
    expected = {"sgd": 1 / 16, "adamw": 1 / 4, "kfac": 1.0, "shampoo": 1 / 4}
    for name, lr in expected.items():
        rows = []
        for roles in (GROWING, {}):
            options = {"damping_rule": "absolute"} if find_rule(name).damping else {}
            experiment = experiment_from(width=64, base_width=4, optimizer=name, roles=roles, **options)
            rows.append(
                {r.name: r for r in derive(describe(Attention, 4, overrides=experiment.roles), experiment)}
            )
        folded, plain = rows[0]["q.weight"], rows[1]["q.weight"]
        assert folded.lr / plain.lr == pytest.approx(lr)
        assert folded.init_std / plain.init_std == pytest.approx(1 / 4)
        assert rows[0]["q.bias"].init_std / rows[1]["q.bias"].init_std == pytest.approx(1 / 4)
        assert rows[0]["k.weight"] == rows[1]["k.weight"]
        if name == "kfac":
            assert folded.damping_A == plain.damping_A
            assert folded.damping_B == pytest.approx(16 * plain.damping_B)  # type: ignore[operator]
        if name == "adamw":
            assert folded.eps == pytest.approx(4 * plain.eps)  # type: ignore[operator]


def test_standard_parametrization_folds_nothing() -> None:
    experiment = experiment_from(width=64, base_width=4, optimizer="sgd", parametrization="sp", roles=GROWING)
    rows = {r.name: r for r in derive(describe(Attention, 4, overrides=GROWING), experiment)}
    assert rows["q.weight"].init_std == rows["k.weight"].init_std
    assert not find_parametrization("sp").forward


def test_growing_head_needs_a_growing_fan_out_and_no_query_norm() -> None:
    with pytest.raises(UsageError, match=r"growing_head of head\.weight, but its fan-out does not grow"):
        describe(Attention, 4, overrides={"head.*": {"growing_head": True}})
    with pytest.raises(MismatchError, match="q_norm normalises the queries"):
        describe(lambda w: Attention(w, norm=True), 4, overrides=GROWING)


def test_separate_projections_of_attention_fold_by_themselves() -> None:
    growing = attention(heads=2, kdim=6, vdim=6)
    described = {p.name: p for p in describe(growing, 8)}
    assert {name for name, p in described.items() if p.growing_head} == {
        "layer.q_proj_weight",
        "layer.in_proj_bias",
    }
    rows = {
        r.name: r
        for r in derive(
            tuple(described.values()), experiment_from(width=32, base_width=8, optimizer="adamw", lr=1.0)
        )
    }
    assert rows["layer.q_proj_weight"].lr == pytest.approx(1 / 4 / 2)  # 1/r_in times α
    assert rows["layer.k_proj_weight"].lr == 1.0
    fixed = describe(attention(kdim=6, vdim=6), 8)
    assert not any(p.growing_head for p in fixed)


@pytest.mark.parametrize("options", [{"heads": 2}, {"heads": 1}])
def test_packed_attention_with_a_growing_head_is_refused_with_advice(options: dict[str, Any]) -> None:
    with pytest.raises(
        MismatchError, match=r"head size grows with width.*grow num_heads with width"
    ) as caught:
        describe(attention(**options), 8)
    assert "[roles]" not in str(caught.value)
    explicit = describe(attention(**options), 8, overrides={"*in_proj_weight": "hidden"})
    assert explicit


# --- shared and frozen tensors --------------------------------------------------------------------


def test_layers_that_share_a_weight_keep_their_common_role_and_leave_kfac() -> None:
    def build(w: int) -> nn.Module:
        first, second = nn.Linear(w, w), nn.Linear(w, w)
        second.weight = first.weight
        return nn.Sequential(nn.Linear(3, w), first, first, second, nn.Linear(w, 2))

    described = {p.name: p for p in describe(build, 8, example=torch.randn(2, 3))}
    assert (described["1.weight"].role, described["1.weight"].kind) == ("hidden", "matrix")
    assert described["1.bias"].kind == described["3.bias"].kind == "vector"
    assert described["4.weight"].kind == "linear"
    assert "3.weight" not in described


def test_frozen_and_unused_parameters_have_roles_and_stay_where_they_are() -> None:
    def build(w: int) -> nn.Module:
        model = between(lambda w: nn.Linear(w, w))(w)
        model.spare = nn.Linear(w, w)
        model.layer.weight.requires_grad_(False)  # type: ignore[union-attr,operator]
        return model

    described = {p.name: p for p in describe(build, 8, example=ROWS)}
    assert described["layer.weight"].role == described["spare.weight"].role == "hidden"
    assert described["layer.bias"].kind == "vector"  # K-FAC keeps no curvature for it
    assert described["spare.weight"].kind == "matrix"
    model, groups = parametrize(build, width=16, base_width=8, optimizer="kfac", example=ROWS)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = KFAC(groups, model)
    with optimizer.curvature():
        model(_noise(ROWS)).square().mean().backward()
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"embed.weight", "embed.bias", "layer.bias", "head.weight", "head.bias"}


@pytest.mark.parametrize("said", ["vector", {"role": "hidden", "fan_in": [0], "fan_out": [1]}])
def test_a_bias_leaves_kfac_with_its_weight(said: Any) -> None:
    described = {p.name: p.kind for p in describe(ZOO["Linear"].build, 8, overrides={"layer.weight": said})}
    assert described["layer.weight"] in ("vector", "matrix")
    assert described["layer.bias"] == "vector"
    assert described["head.bias"] == "linear.bias"


# --- the factory and the trace --------------------------------------------------------------------


def failing(w: int) -> nn.Module:
    if w % 3:
        raise AssertionError(f"{w} is no multiple of 3 heads")
    return nn.Linear(3, w)


def random_depth(w: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(w, w) for _ in range(int(torch.randint(1, 9, ())))))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            failing,
            UsageError,
            r"at width 8 .*AssertionError: 8 is no multiple of 3 heads; it works at 9",
        ),
        (lambda w: nn.Linear(3, w if w < 10 else 1 // 0), UsageError, "at width 16 .*ZeroDivisionError"),
        (lambda w: None, UsageError, "returned NoneType at width 8, not a torch.nn.Module"),
        (lambda w: [nn.Linear(3, w)], UsageError, "returned list"),
        (lambda w: nn.LazyLinear(w), UsageError, "weight has no shape before the first forward pass"),
        (lambda w: nn.Linear(3, 4), MismatchError, "nothing grows between width 8 and 16"),
        (lambda w: nn.ReLU(), MismatchError, "nothing grows"),
        (random_depth, MismatchError, "two builds at width 8 have different parameters"),
        (
            lambda w: nn.Sequential(*(nn.Linear(w, w) for _ in range(w // 4))),
            MismatchError,
            r"width changes which parameters exist \(2\.bias, .*argument of its own \(a depth\)",
        ),
    ],
)
def test_a_factory_that_does_not_do_gets_one_friendly_sentence(
    build: Callable[[int], nn.Module], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        describe(build, 8)


class Moody(nn.Module):
    """Runs in one mode only; its read-out depends on nothing."""

    def __init__(self, width: int, mode: bool | None) -> None:
        super().__init__()
        self.head, self.body, self.k = nn.Linear(width, 5), nn.Linear(3, width), nn.Linear(width, 2)
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        if self.mode is None or self.training != self.mode:
            raise RuntimeError("not in this mode")
        h = self.body(x)
        result: Tensor = self.head(h + self.k(h).sum())
        return result


@pytest.mark.parametrize("mode", [True, False])
def test_a_model_may_run_in_one_mode_only(mode: bool) -> None:
    roles = {p.name: p.role for p in describe(lambda w: Moody(w, mode), 8, example=torch.ones(2, 3))}
    assert roles["head.weight"] == "output"
    assert roles["k.weight"] == "hidden"


def test_a_model_that_runs_in_neither_mode_is_reported_with_its_own_words() -> None:
    with pytest.raises(UsageError, match=r"does not run on an input of shape \(2, 3\).*not in this mode"):
        describe(lambda w: Moody(w, None), 8, example=torch.ones(2, 3))


def test_random_models_are_read_the_same_every_time() -> None:
    class Dropping(nn.Module):
        """Skips its middle layer at random while training."""

        def __init__(self, w: int) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, w), nn.Linear(w, w), nn.Linear(w, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            result: Tensor = self.c(self.b(h) if not self.training or torch.rand(()) < 0.5 else h)
            return result

    kinds = []
    for seed in range(6):
        torch.manual_seed(seed)
        kinds.append({p.name: (p.role, p.kind) for p in describe(Dropping, 8, example=torch.ones(2, 3))})
    assert all(k == kinds[0] for k in kinds)
    assert kinds[0]["b.weight"] == ("hidden", "linear")


def test_two_heads_have_one_output_a_note_and_an_override() -> None:
    def build(w: int) -> nn.Module:
        def forward(net: Any, x: Tensor) -> Tensor:
            h = net.embed(x)
            return torch.cat([net.policy(h), net.value(h)], -1)

        return Net(forward, value=nn.Linear(w, 1), embed=nn.Linear(3, w), policy=nn.Linear(w, 4))

    read_once = {p.name: p for p in describe(build, 8, example=torch.ones(2, 3))}
    assert read_once["value.weight"].role == "output"
    assert read_once["policy.weight"].role == "hidden"
    assert "the last such in the traced forward pass is value.weight" in read_once["policy.weight"].why
    both = {"policy.weight": "output", "value.weight": "output"}
    assert {p.name: p.role for p in describe(build, 8, overrides=both)}["policy.weight"] == "output"
    # A named read-out is the only one.
    one = {p.name: p.role for p in describe(build, 8, overrides={"policy.weight": "output"})}
    assert one["value.weight"] == "hidden"


def test_a_weight_used_without_its_module_is_traced_but_not_given_to_kfac() -> None:
    def build(w: int) -> nn.Module:
        def forward(net: Any, x: Tensor) -> Tensor:
            return F.linear(net.k(net.embed(x)).sum(-1, keepdim=True) + net.embed(x), net.head.weight)

        return Net(forward, head=nn.Linear(w, 4), embed=nn.Linear(3, w), k=nn.Linear(w, 2))

    described = {p.name: p for p in describe(build, 8, example=torch.ones(2, 3))}
    assert (described["head.weight"].role, described["head.weight"].kind) == ("output", "matrix")
    assert described["k.weight"].role == "hidden"


def test_an_embedding_used_as_a_head_without_a_module_is_found() -> None:
    def build(w: int) -> nn.Module:
        return Net(
            lambda net, x: F.linear(net.body(net.embed(x)), net.embed.weight),
            embed=nn.Embedding(7, w),
            body=nn.Linear(w, w),
        )

    with pytest.raises(
        MismatchError, match=r"embed\.weight is looked up as an embedding and is also the matrix"
    ):
        describe(build, 8, example=TOKENS)
    accepted = {
        p.name: p.role for p in describe(build, 8, example=TOKENS, overrides={"embed.weight": "input"})
    }
    assert accepted["embed.weight"] == "input"


def test_tied_weights_name_the_line_to_add() -> None:
    with pytest.raises(MismatchError, match=r'\[roles\] "head.weight" = "tied"'):
        describe(tied, 8, example=TOKENS)


# --- properties -----------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(layer_stacks(), st.sampled_from(["sgd", "adamw", "kfac", "shampoo"]))
def test_random_stacks_have_multipliers_of_exactly_one_at_base_and_transfer_composes(
    stack: Callable[[int], nn.Module], optimizer: str
) -> None:
    from mupx.recipe import Recipe

    parameters = describe(stack, 8)
    experiment = experiment_from(width=8, base_width=8, optimizer=optimizer, lr=0.5, damping=0.1)
    recipe = Recipe(experiment, parameters)
    for layer, p in zip(recipe.layers, parameters, strict=True):
        assert (layer.r_in, layer.r_out) == (1.0, 1.0)
        assert layer.init_std == p.std
        assert layer.lr == (0.5 if layer.optimizer == optimizer else experiment.optimizer.fallback_lr)
    assert recipe.transfer(16).transfer(64).layers == recipe.transfer(64).layers
    shapes = {name: tuple(p.shape) for name, p in stack(16).named_parameters()}
    assert {layer.name: layer.shape for layer in recipe.transfer(16).layers} == shapes
