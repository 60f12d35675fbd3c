"""Base-shape files of microsoft/mup: what they say, which width that is, and what is refused.

``golden/mup_mlp_48*.bsh`` were written by ``mup.make_base_shapes`` 1.0.0 for mupx's own ``mlp`` at base 48
and delta 96, bare and inside a wrapper module that puts ``module.`` before every name, as DataParallel does.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mupx.errors import MismatchError, NotFoundError, UsageError
from mupx.interop import BaseShape, base_width_of, likely_width, plain_names, read_base_shapes
from mupx.layers import Parameter
from mupx.models.mlp import build
from mupx.roles import describe
from tests.factories import cnn, mlp_uneven

GOLDEN = Path(__file__).parent / "golden"
# Forty lines that stand for 2^39 entries.
BOMB = "a0: &a0 [x, x]\n" + "\n".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))
MLP = partial(build, input_shape=(196,), classes=10)


def shapes_of(parameters: tuple[Parameter, ...], prefix: str = "") -> dict[str, BaseShape]:
    """What mup would save for a model described at its base width."""
    return {
        prefix + p.name: tuple(a if a != b else None for a, b in zip(p.shape, p.doubled, strict=True))
        for p in parameters
    }


def written(folder: Path, content: object) -> Path:
    path = folder / "base.bsh"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("file", ["mup_mlp_48.bsh", "mup_mlp_48_data_parallel.bsh"])
def test_a_file_of_mup_is_read_and_gives_the_base_width_from_any_description(file: str) -> None:
    shapes = read_base_shapes(GOLDEN / file)
    assert shapes["input.weight"] == (48, None)
    assert shapes["output.bias"] == (None,)
    assert shapes == shapes_of(describe(MLP, 48))
    for width in (16, 48, 100):
        assert base_width_of(shapes, describe(MLP, width), width) == 48


def test_the_prefix_of_a_wrapper_is_removed_as_a_whole() -> None:
    # mup itself strips the *characters* of "module.": "module.module_list" becomes "_list".
    names = {"_orig_mod.module.embed.weight": 1, "_orig_mod.module.module.decoder.bias": 2}
    assert list(plain_names(names)) == ["embed.weight", "module.decoder.bias"]
    assert [name.strip("module.") for name in ("module.embed.weight",)] == ["bed.weight"]


def test_a_wrapped_model_has_the_shapes_of_the_bare_one() -> None:
    bare = describe(MLP, 16)
    wrapped = shapes_of(describe(MLP, 32), prefix="module.")
    assert base_width_of(plain_names(wrapped), bare, 16) == 32


def test_the_flow_style_of_older_yaml_is_read_too(tmp_path: Path) -> None:
    path = written(tmp_path, "# a comment\nfc.weight: [64, null]\nfc.bias: [64]\nscale: []\n")
    assert read_base_shapes(path) == {"fc.weight": (64, None), "fc.bias": (64,), "scale": ()}


@given(st.integers(1, 40), st.integers(1, 40))
def test_the_width_is_found_whatever_the_width_of_the_description(base: int, described_at: int) -> None:
    shapes = shapes_of(describe(cnn, base))
    assert base_width_of(shapes, describe(cnn, described_at), described_at) == base


def test_the_commonest_size_is_the_likely_width() -> None:
    assert likely_width(shapes_of(describe(MLP, 24))) == 24


@pytest.mark.parametrize(
    "content",
    [
        "",
        "just text",
        "- 1\n- 2\n",
        "fc.weight: 64\n",
        "fc.weight: [64, sixty]\n",
        "fc.weight: [64, 0]\n",
        "fc.weight: [64, -8]\n",
        "fc.weight: [true]\n",
        "fc.weight: [64.0]\n",
        "fc.weight: [[64, 64]]\n",
        "1: [64]\n",
        "fc.weight: [64\n",
        "fc.weight: 2020-99-99\n",
        "a: !!python/object/apply:os.system ['true']\n",
        "a: " + "[" * 5000,
        BOMB,
    ],
)
def test_what_is_no_base_shape_file_is_refused_in_one_sentence(tmp_path: Path, content: str) -> None:
    with pytest.raises(UsageError, match="is not a base-shape file") as caught:
        read_base_shapes(written(tmp_path, content))
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "b.bsh").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UsageError, match="is not a base-shape file"):
        read_base_shapes(tmp_path / "b.bsh")
    with pytest.raises(NotFoundError, match="cannot read base shapes"):
        read_base_shapes(tmp_path / "nowhere.bsh")


def test_a_file_without_width_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="every entry is null"):
        read_base_shapes(written(tmp_path, {"fc.weight": [None, None]}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden9.weight": (48, 48)}, "the model lacks hidden9.weight"),
        ({"hidden1.weight": (48, 48, 3)}, "has 3 axes in the base shapes but 2"),
        ({"input.weight": (48, 196)}, "axis 1 of input.weight grows from 196 .* but stays at 196"),
        ({"hidden1.bias": (None,)}, "axis 0 of hidden1.bias does not grow .* but grows"),
        ({"hidden1.weight": (96, 48)}, "no one width gives the base shapes"),
    ],
)
def test_a_file_of_another_model_is_refused(change: dict[str, BaseShape], message: str) -> None:
    shapes = shapes_of(describe(MLP, 48))
    assert base_width_of(shapes, describe(MLP, 16), 16) == 48
    with pytest.raises(MismatchError, match=message):
        base_width_of({**shapes, **change}, describe(MLP, 16), 16)


def test_a_file_that_lacks_parameters_is_refused() -> None:
    shapes = shapes_of(describe(MLP, 48))
    del shapes["hidden1.bias"]
    with pytest.raises(MismatchError, match=r"the file lacks hidden1\.bias"):
        base_width_of(shapes, describe(MLP, 48), 48)


def test_a_size_between_two_widths_is_refused() -> None:
    bias = Parameter("c2.bias", "conv2d.bias", "vector", (32,), (64,), (), (0,), 0.1)
    with pytest.raises(MismatchError, match=r"no width gives c2\.bias"):
        base_width_of({"c2.bias": (33,)}, [bias], 16)


def test_a_model_that_is_not_affine_in_width_needs_its_own_width() -> None:
    shapes = shapes_of(describe(mlp_uneven, 32))
    assert base_width_of(shapes, describe(mlp_uneven, 32), 32) == 32
    with pytest.raises(MismatchError):
        base_width_of(shapes, describe(mlp_uneven, 64), 64)
