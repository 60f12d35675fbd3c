"""References to the user's own code: what is imported, and what is said where it cannot be."""

import multiprocessing
import pickle
import sys
from functools import partial

import pytest

from mupx import usercode
from mupx.blame import calling
from mupx.errors import MismatchError, NotFoundError, UsageError, UserCodeError

OWN = """\
from dataclasses import dataclass
import beside

@dataclass
class Net:
    width: int
    class Inner:
        depth = 3

def build(width):
    return beside.double(width)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    (tmp_path / "beside.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def test_a_file_is_imported_once_with_the_modules_beside_it(folder):
    assert usercode.load("own.py:build", "model.name")(3) == 6
    assert usercode.load("./own.py:build", "x") is usercode.load(f"{folder}/own.py:build", "x")
    assert usercode.load("own.py:Net.Inner.depth", "x") == 3
    assert str(folder) not in sys.path
    assert not (folder / "__pycache__" / "own.cpython-311.pyc").exists()


def test_a_module_is_found_in_the_working_directory(folder):
    (folder / "own_package").mkdir()
    (folder / "own_package" / "net.py").write_text("def build(width):\n    return -width\n")
    assert usercode.load("own_package.net:build", "x")(3) == -3


def test_files_of_one_name_are_two_modules(folder):
    (folder / "other").mkdir()
    (folder / "other" / "own.py").write_text("build = abs\n")
    assert usercode.load("other/own.py:build", "x") is abs
    assert usercode.load("own.py:build", "x") is not abs


def unpickled(content):
    return pickle.loads(content).width


def test_what_a_file_defines_is_unpickled_in_another_process(folder):
    net = usercode.load("own.py:Net", "x")(7)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(unpickled, (pickle.dumps(net),)) == 7


def test_the_digest_follows_the_content_that_was_imported(folder):
    before = usercode.digest("own.py:build", "x")
    assert usercode.digest("own.py:Net", "y") == before
    (folder / "own.py").write_text(OWN + "# edited\n")
    assert usercode.digest("own.py:build", "x") == before  # what runs is what was imported
    forget(folder / "own.py")
    assert usercode.digest("own.py:build", "x") != before


def forget(path):
    for name in [n for n in sys.modules if n.endswith(str(path).encode().hex())]:
        del sys.modules[name]


def test_an_object_of_this_process_has_a_name_and_a_digest():
    name = usercode.hand_over(lambda width: 2 * width)
    assert name.startswith("python:")
    first = usercode.digest(name, "x")
    assert usercode.load(name, "x")(4) == 8
    assert usercode.hand_over(lambda width: 3 * width) == name
    assert usercode.digest(name, "x") != first
    with pytest.raises(UsageError, match=r"move it into a file and name it file.py:gone"):
        usercode.load("python:here.gone", "model.name")


def digest_of(thing):
    return usercode.digest(usercode.hand_over(thing), "x")


def test_the_digest_of_an_object_sees_what_is_bound_to_it():
    def enclosing(depth, what=None):
        return lambda width, bias=True: (width, depth, bias, what)

    assert digest_of(enclosing(2)) == digest_of(enclosing(2))
    assert digest_of(enclosing(2)) != digest_of(enclosing(3))
    assert digest_of(partial(enclosing, 2)) == digest_of(partial(enclosing, 2))
    assert digest_of(partial(enclosing, 2)) != digest_of(partial(enclosing, 3))
    assert digest_of(enclosing(2, object())) == digest_of(enclosing(2, object()))  # no address in it
    assert digest_of(enclosing(2, {"a", "b"})) != digest_of(enclosing(2, {"a", "c"}))


def test_only_what_was_asked_for_counts_as_loaded(folder):
    assert not usercode.is_loaded("os:system")  # though os is imported
    assert not usercode.is_loaded("own.py:build")
    usercode.load("own.py:build", "x")
    assert usercode.is_loaded("./own.py:build")
    assert not usercode.is_loaded("own.py:Net")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "nowhere.py:build",
            NotFoundError,
            r"model.name = nowhere.py:build: no file nowhere.py \(looked",
        ),
        ("no_such.module:build", NotFoundError, "no module no_such in the working directory"),
        ("own.py:biuld", UsageError, "own.py has no 'biuld'; nearest: build"),
        ("own.py:Net.Iner", UsageError, "has no 'Iner'; nearest: Inner"),
        ("own.py:", UsageError, "code of your own is written file.py:attribute"),
        (":build", UsageError, "code of your own is written file.py:attribute"),
        ("a b:build", UsageError, "code of your own is written file.py:attribute"),
    ],
)
def test_what_cannot_be_found_says_where_it_was_looked_for(folder, name, error, message):
    with pytest.raises(error, match=message) as caught:
        usercode.load(name, "model.name")
    assert type(caught.value) is error


def test_a_callable_is_asked_for(folder):
    with pytest.raises(UsageError, match=r"own.py:Net.Inner.depth is int, which cannot be called"):
        usercode.load_callable("own.py:Net.Inner.depth", "model.name", "f(x)")


@pytest.mark.parametrize(
    ("source", "last"),
    [
        ("def build(:\n    pass\n", "SyntaxError: invalid syntax"),
        ("import no_such_package\n", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("def f():\n    return 1 / 0\nf()\n", "ZeroDivisionError: division by zero"),
    ],
)
def test_an_exception_at_import_shows_the_users_frames_only(folder, source, last):
    (folder / "broken.py").write_text(source)
    for name in ("broken.py:build", "broken:build"):
        with pytest.raises(UserCodeError, match=r"broken(.py)? raised .*, while it was imported") as caught:
            usercode.load(name, "model.name")
        assert caught.value.details.endswith(last)
        assert "broken.py" in caught.value.details or "no_such" in last
        assert "importlib" not in caught.value.details
        assert "usercode.py" not in caught.value.details


def test_a_file_that_exits_is_told_about_the_guard(folder):
    (folder / "script.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(UsageError, match="__main__"):
        usercode.load("script.py:build", "x")


def test_causes_are_shown_and_our_own_errors_pass(folder):
    (folder / "chain.py").write_text(
        "def f():\n    try:\n        1 / 0\n"
        "    except ZeroDivisionError as error:\n        raise ValueError('deep') from error\n"
    )
    f = usercode.load("chain.py:f", "x")
    with (
        pytest.raises(UserCodeError, match=r"chain.py:f raised ValueError: deep, called as") as caught,
        calling("chain.py:f", lambda: "called as f()"),
    ):
        f()
    assert caught.value.details.count("chain.py") == 2
    assert "test_usercode" in caught.value.details  # what calls it from outside mupx is not ours to hide
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(MismatchError), calling("own"):
        raise MismatchError("ours")
    with pytest.raises(MemoryError), calling("own"):
        raise MemoryError
