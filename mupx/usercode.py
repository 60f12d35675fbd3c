"""Code of your own by name: ``path/to/file.py:attribute`` or ``package.module:attribute`` (no torch).

A name with a colon is a reference, any other is looked up in a registry. A file is a module of its own,
``mupx.usercode.<stem>_<path in hex>``: the name says where the file lies, so that another process (a
worker that unpickles) finds it, and two files of one name are two modules. While it is imported its
folder is on ``sys.path``, as it is for ``python file.py``. Nothing of it is cached on disk.

``python:<name>`` stands for an object that was handed over in Python: it can be used in that process
only.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from inspect import unwrap
from pathlib import Path
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

from mupx.blame import calling
from mupx.errors import NotFoundError, UsageError

__path__: list[str] = []  # makes this module the parent package of the files; nothing is searched here
HERE = "python"
DEPTH = 8  # levels of nesting that a digest looks into
HOW = "code of your own is written file.py:attribute or package.module:attribute"

_given: dict[str, Any] = {}  # python:<name> → object
_used: set[tuple[str, str]] = set()  # module and attribute of what was asked for in this process
_digests: dict[str, str] = {}  # module → digest of the source it was made from


@dataclass(frozen=True)
class Reference:
    """A place and an attribute in it.

    Attributes:
        text: As it was written.
        place: A file (ends in ``.py``), a module, or ``python``.
        attribute: May be dotted.
    """

    text: str
    place: str
    attribute: str

    @property
    def is_file(self) -> bool:
        """Whether the place is a file."""
        return self.place.endswith(".py")

    @property
    def path(self) -> Path:
        """The file, in full."""
        return Path(self.place).expanduser().resolve()

    @property
    def label(self) -> str:
        """The reference as part of a file name."""
        place = Path(self.place).stem if self.is_file else self.place
        return f"{place}.{self.attribute}".replace("<", "").replace(">", "")


def is_reference(name: str) -> bool:
    """Whether a name stands for code of the user's own."""
    return ":" in name


def parse(name: str) -> Reference:
    """Split a reference.

    Raises:
        UsageError: A part is missing.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not all(part.isidentifier() for part in _parts(place, attribute)):
        raise UsageError(f"{name!r} names no object; {HOW}")
    return Reference(name, place, attribute)


def label(name: str) -> str:
    """Return a name as part of a file name: ``nets/own.py:build`` gives ``own.build``."""
    return parse(name).label if is_reference(name) else name


def load(name: str, what: str) -> Any:
    """Import and return the object behind a reference.

    Args:
        name: The reference.
        what: What it is for ("model.name"), for error messages.

    Raises:
        NotFoundError: There is no such file or module; the message says where it was looked for.
        UserCodeError: Importing it raised; the traceback is the user's.
        UsageError: It has no such attribute; the nearest names are given.
    """
    reference = parse(name)
    if reference.place == HERE:
        return _handed_over(reference, what)
    target: Any = _module(reference, what)
    for attribute in reference.attribute.split("."):
        with calling(name, f"when {attribute} was looked up"):
            if not hasattr(target, attribute):
                raise _no_attribute(reference, attribute, target, what)
            target = getattr(target, attribute)
    _used.add(_key(reference))
    return target


def load_callable(name: str, what: str, example: str) -> Callable[..., Any]:
    """Return the object behind a reference, which must be callable.

    Args:
        name: The reference.
        what: What it is for.
        example: What it should look like.
    """
    target = load(name, what)
    if not callable(target):
        raise UsageError(
            f"{what} = {name} is {type(target).__name__}, which cannot be called; give {example}"
        )
    function: Callable[..., Any] = target
    return function


def digest(name: str, what: str) -> str:
    """Return 16 hex digits of the source behind a reference, as it was when it was imported.

    Of a file or module it is the file's content (not that of the files it imports); of an object handed
    over in Python its compiled code, with the defaults, bound arguments and enclosed values that are plain.
    """
    reference = parse(name)
    if reference.place == HERE:
        # What is not code (data) carries its own digest in its name.
        return _digest(_code(_given.get(name, name)))
    module = _module(reference, what)
    if module.__name__ not in _digests:
        path = getattr(module, "__file__", None)
        _digests[module.__name__] = _digest(Path(path).read_bytes() if path else b"")
    return _digests[module.__name__]


def hand_over(thing: Any) -> str:
    """Keep an object of this process under a name and return it: ``python:module.qualname``."""
    kind = thing.func if isinstance(thing, partial) else thing
    kind = kind if hasattr(kind, "__qualname__") else type(kind)
    qualname = kind.__qualname__.replace("<locals>.", "")
    name = f"{HERE}:{kind.__module__}.{qualname}".replace("<", "").replace(">", "")
    _given[name] = thing
    return name


def is_loaded(name: str) -> bool:
    """Whether this process was asked for the object behind a reference before.

    That its module is imported does not count: ``os`` always is.
    """
    return name in _given or _key(parse(name)) in _used


def source_of(name: str) -> str:
    """Return what :func:`digest` is taken of: a file or module as it was written, or the object's name."""
    reference = parse(name)
    return name if reference.place == HERE else reference.place


def place(name: str) -> str:
    """Say in full what would be imported."""
    reference = parse(name)
    return str(reference.path) if reference.is_file else f"module {reference.place}"


def _parts(place: str, attribute: str) -> list[str]:
    modules = [] if place.endswith(".py") else place.split(".")
    return [*modules, *attribute.split(".")]


def _handed_over(reference: Reference, what: str) -> Any:
    if reference.text not in _given:
        raise UsageError(
            f"{what} = {reference.text} was handed over in Python and is not known to this process; move it "
            f"into a file and name it file.py:{reference.attribute.rpartition('.')[2]}, or use the Python "
            "interface"
        )
    return _given[reference.text]


def _module(reference: Reference, what: str) -> ModuleType:
    return _file(reference, what) if reference.is_file else _named(reference, what)


def _file(reference: Reference, what: str) -> ModuleType:
    path = reference.path
    module = sys.modules.get(_file_module(path))
    if module is not None:
        return module
    if not path.is_file():
        raise NotFoundError(
            f"{what} = {reference.text}: no file {reference.place} (looked for {path}; a relative path "
            f"starts at the working directory, {Path.cwd()})"
        )
    with calling(reference.place, "while it was imported"):
        return import_module(_file_module(path))


def _named(reference: Reference, what: str) -> ModuleType:
    with calling(reference.place, "while it was imported"), _importing(reference.place, Path.cwd()):
        try:
            return import_module(reference.place)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{reference.place}.".startswith(f"{error.name}."):
                raise  # a package that their own code wants
            raise NotFoundError(
                f"{what} = {reference.text}: no module {error.name} in the working directory {Path.cwd()} "
                f"nor in {', '.join(place for place in sys.path[1:] if place)}"
            ) from None


@contextmanager
def _importing(place: str, folder: Path) -> Iterator[None]:
    """Put a folder first on the module search path, and take an exit for the mistake it is."""
    sys.path.insert(0, str(folder))
    try:
        yield
    except SystemExit as error:
        raise UsageError(
            f"{place} ends Python while it is imported (exit {error.code}); put what runs under "
            '`if __name__ == "__main__":`'
        ) from None
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _no_attribute(reference: Reference, attribute: str, target: Any, what: str) -> UsageError:
    names = [name for name in dir(target) if not name.startswith("_")]
    near = get_close_matches(attribute, names, n=3, cutoff=0.4)
    guess = f"; nearest: {', '.join(near)}" if near else ""
    return UsageError(f"{what} = {reference.text}: {reference.place} has no {attribute!r}{guess}")


def _key(reference: Reference) -> tuple[str, str]:
    place = _file_module(reference.path) if reference.is_file else reference.place
    return place, reference.attribute


def _file_module(path: Path) -> str:
    stem = re.sub(r"\W", "_", path.stem)
    return f"{__name__}.{stem}_{str(path).encode().hex()}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _code(thing: Any) -> bytes:
    """Return what an object does, without line numbers and addresses."""
    return repr(_plain(thing)).encode()


def _plain(thing: Any, depth: int = 0) -> Any:
    if isinstance(thing, (str, bytes, int, float, complex, type(None))) or depth > DEPTH:
        return thing if depth <= DEPTH else None
    if isinstance(thing, (tuple, list, set, frozenset)):
        items = [_plain(item, depth + 1) for item in thing]
        return items if isinstance(thing, (tuple, list)) else sorted(map(repr, items))
    if isinstance(thing, dict):
        return sorted((repr(key), _plain(item, depth + 1)) for key, item in thing.items())
    if isinstance(thing, CodeType):
        return (thing.co_code, thing.co_names, _plain(thing.co_consts, depth))
    if isinstance(thing, partial):
        return _plain([thing.func, thing.args, thing.keywords], depth)
    if isinstance(thing, FunctionType):
        # torch wraps an optimizer's step when the first one is made: what it wraps is what was written.
        function = unwrap(thing)
        cells = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
        parts = [function.__code__, function.__defaults__, function.__kwdefaults__, cells]
        return [_plain(part, depth + 1) for part in parts]
    kind = thing if isinstance(thing, type) else type(thing)
    functions = {name: member for name, member in vars(kind).items() if isinstance(member, FunctionType)}
    own = {} if thing is kind else getattr(thing, "__dict__", {})
    return [kind.__qualname__, _plain(functions, depth + 1), _plain(own, depth + 1)]


class _Loader(SourceFileLoader):
    """Compiles the file as it is now: a cached compilation may be older than an edit."""

    def get_code(self, fullname: str) -> CodeType:
        content = self.get_data(self.path)
        _digests[fullname] = _digest(content)
        return self.source_to_code(content, self.path)

    def exec_module(self, module: ModuleType) -> None:
        with _importing(self.path, Path(self.path).parent):
            super().exec_module(module)


class _Finder(MetaPathFinder):
    """Finds the file whose path a module's name spells."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{__name__}."):
            return None
        file = bytes.fromhex(fullname.rpartition("_")[2]).decode()
        return spec_from_file_location(fullname, file, loader=_Loader(fullname, file))


sys.meta_path.append(_Finder())
