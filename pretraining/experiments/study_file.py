"""A study file as a tree that knows the line of each key, with included files and the settings of a scale."""

import copy
import dataclasses
import difflib
import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pcfg.common.files import InputError

Keys = tuple[str | int, ...]  # from the top of a file; numbers count the tables of an array
KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "a table"}
REQUIRED = object()
OF_ONE_STUDY = ("title", "question", "paper")


def _walk(value: Any, keys: Keys = ()) -> Iterator[Keys]:
    """The keys of a value and of all that is in it."""
    yield keys
    items: Iterable = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from _walk(part, (*keys, key))


def key_lines(text: str) -> dict[Keys, int]:
    """The line of each key, from 1, which tomllib does not tell.

    The shortest beginning of the file that is TOML and has the key ends with the key's lines.

    >>> lines = key_lines('title = "x"\\n[a.b]\\nc = [\\n  1,\\n]\\nd.e = 2')
    >>> lines["title",], lines["a",], lines["a", "b", "c"], lines["a", "b", "d", "e"]
    (1, 2, 3, 6)
    """
    rows = text.splitlines(keepends=True)
    lines: dict[Keys, int] = {}
    first = 1  # after the last beginning that is TOML
    for number in range(1, len(rows) + 1):
        try:
            values = tomllib.loads("".join(rows[:number]))
        except tomllib.TOMLDecodeError:  # inside a value of several lines
            continue
        for keys in _walk(values):
            lines.setdefault(keys, first)
        first = number + 1
    return lines


@dataclasses.dataclass
class Tree:
    """The values of a study file and the file and line of each key."""

    values: dict[str, Any]
    places: dict[Keys, tuple[Path, int]]

    def place(self, keys: Keys) -> tuple[Path, int]:
        """File and line of a key, or of the nearest table around it."""
        return next(self.places[keys[:length]] for length in range(len(keys), -1, -1) if keys[:length] in self.places)

    def error(self, keys: Keys, message: str) -> InputError:
        path, line = self.place(keys)
        return InputError(f"{path}:{line}: {message}")

    def overlay(self, other: "Tree") -> None:
        """Lay another tree over this one: its values count, tables are merged."""

        def lay(below: dict, above: dict) -> None:
            for name, value in above.items():
                if isinstance(value, dict) and isinstance(below.get(name), dict):
                    lay(below[name], value)
                else:
                    below[name] = copy.deepcopy(value)

        lay(self.values, other.values)
        self.places |= other.places

    def include(self, other: "Tree") -> None:
        """Lay an included file over this tree, without what it says of itself; comparisons of several files are joined."""
        for name in OF_ONE_STUDY:
            other.values.pop(name, None)
        rows = self.values.get("comparisons", [])
        if rows and "comparisons" in other.values:
            # Behind those that are here already.
            shift = len(rows)
            moved = [keys for keys in other.places if keys[:1] == ("comparisons",) and len(keys) > 1]
            places = {(keys[0], int(keys[1]) + shift, *keys[2:]): other.places.pop(keys) for keys in moved}
            other.places |= places
            other.values["comparisons"] = rows + other.values["comparisons"]
        self.overlay(other)


def read_tree(path: Path, scale: str | None = None) -> Tree:
    """The tree of a study file, laid over those of the files that it includes, with the settings of a scale.

    A file's settings of the scale lie over its own keys, and under those of files that include it.
    """
    names = {"mini"}
    tree = _read(path, scale, (), names)
    if scale is not None and scale not in names:
        raise InputError(f"--scale {scale}: {path} has no [scales.{scale}]; it has {', '.join(sorted(names))}")
    return tree


def _read(path: Path, scale: str | None, including: tuple[Path, ...], scales: set[str]) -> Tree:
    """The tree of a file for `read_tree`; adds the names of its scales to `scales`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read ({error}); give a study file, such as scripts/studies/steps.toml") from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"line (\d+)", str(error))
        raise InputError(f"{path}:{line[1] if line else len(text.splitlines())}: no TOML: {error}") from None
    own = Tree(values, {keys: (path, line) for keys, line in key_lines(text).items()} | {(): (path, 1)})
    names = values.pop("include", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise own.error(("include",), f"include: is {names!r}, must be the name of a study file, or a list of names")
    tree = Tree({}, {})
    for name in names:
        other = path.parent / name
        if not other.is_file():
            raise own.error(("include",), f"include: {other}: no such file; names are relative to this file")
        if other.resolve() in (path.resolve(), *including):
            raise own.error(("include",), f"include: {name} includes this file; leave one of them out")
        tree.include(_read(other, scale, (*including, path.resolve()), scales))
    settings = Table(own, (), {"scales": values.pop("scales", {})}).table("scales").tables()
    scales.update(settings)
    tree.overlay(own)
    if scale in settings:
        below = {keys[2:]: place for keys, place in own.places.items() if keys[:2] == ("scales", scale) and len(keys) > 2}
        tree.overlay(Tree(settings[scale].values, below))
    return tree


def suggestion(name: str, names: Iterable[str]) -> str:
    """What the user may have meant by a name, as the end of a message."""
    close = difflib.get_close_matches(name, list(names), 1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(sorted(names)) or 'none'}"


def _is_of(value: object, kind: type) -> bool:
    """Whether a value is of a kind; a whole number is a number as well."""
    return isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)


@dataclasses.dataclass
class Table:
    """A table of a study file whose keys are taken out one by one; what is left at the end is an error."""

    tree: Tree
    keys: Keys
    values: dict[str, Any]  # that are not taken yet
    known: set[str] = dataclasses.field(default_factory=set)

    def error(self, message: str, *keys: str | int) -> InputError:
        """An error at a key of this table, or at the table."""
        return self.tree.error((*self.keys, *keys), message)

    def take(self, name: str, kind: type, default: Any = REQUIRED) -> Any:
        """The value of a key, of type `kind`."""
        self.known.add(name)
        if name not in self.values:
            if default is REQUIRED:
                raise self.error(f"{'.'.join(map(str, (*self.keys, name)))}: is missing; it is {KINDS[kind]}")
            return default
        value = self.values.pop(name)
        if not _is_of(value, kind):
            raise self.error(f"{name}: is {value!r}, must be {KINDS[kind]}", name)
        return kind(value)

    def take_one(self, name: str, names: Iterable[str], default: Any = REQUIRED) -> Any:
        """The value of a key, one of `names`."""
        value = self.take(name, str, default)
        if value is not default and value not in names:
            raise self.error(f"{name}: {value!r} is unknown{suggestion(value, names)}", name)
        return value

    def take_list(self, name: str, kind: type, default: Any = REQUIRED) -> Any:
        """The values of a key, a tuple of type `kind`."""
        values = self.take(name, list, default)
        if values is default:
            return default
        for value in values:
            if not _is_of(value, kind):
                raise self.error(f"{name}: has {value!r}, must be a list of {KINDS[kind].removeprefix('a ')}s", name)
        if not values or len(set(values)) < len(values):
            raise self.error(f"{name}: is empty or has an entry twice", name)
        return tuple(map(kind, values))

    def table(self, name: str) -> "Table":
        """A table in this one; an empty one if it is missing."""
        return Table(self.tree, (*self.keys, name), dict(self.take(name, dict, {})))

    def tables(self) -> dict[str, "Table"]:
        """The tables that are left in this one, by name."""
        return {name: self.table(name) for name in list(self.values)}

    def finish(self) -> None:
        """Refuse a key that nobody has taken."""
        for name in self.values:
            raise self.error(f"{name}: unknown key{suggestion(name, self.known)}", name)
