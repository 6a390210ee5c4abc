"""A YAML file as a tree with the place of every value, and the errors that point at those places.

Nothing here knows the types of a recipe. `read` reads YAML 1.2 through ruamel.yaml's nodes, which have lines, columns
and duplicate keys; `override` sets a value from the command line; `Problem` is one error of a recipe, and `RecipeError`
all of them together.
"""

import difflib
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.nodes import Node as YamlNode
from ruamel.yaml.reader import ReaderError

from ..storage.untrusted import brief, read_bytes
from . import shipped

Key = tuple[str | int, ...]

MAX_DEPTH = 40
MAX_NODES = 10_000  # the longest recipe here has two hundred
MAX_BYTES = 2**20
_TAG = "tag:yaml.org,2002:"
_TEXT_TAGS = (_TAG + "str", _TAG + "timestamp", _TAG + "merge")
_SCALAR_TAGS = (_TAG + "int", _TAG + "float", _TAG + "bool", _TAG + "null")


@dataclass(frozen=True)
class Place:
    """A line and column of a file, both counted from 1, or the override of the command line that set a value."""

    line: int = 0
    column: int = 0
    override: str = ""


@dataclass(frozen=True)
class Problem:
    """One error of a recipe: its key and place, what was expected and found, and the nearest valid name if any."""

    key: Key
    message: str
    nearest: str = ""
    file: str = ""
    place: Place | None = None
    looked_in: str = ""  # a sentence on where a missing path was looked for
    absent: Path | None = None  # that path

    @property
    def where(self) -> str:
        """The file with line and column (`recipes/x.yaml:12:5`), or with the override."""
        if self.place is None:
            return self.file
        if self.place.override:
            return f"{self.file} with {self.place.override}"
        return f"{self.file}:{self.place.line}:{self.place.column}"

    @property
    def text(self) -> str:
        """The message with the suggestion."""
        return f"{self.message}; did you mean {self.nearest}?" if self.nearest else self.message

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, key_text(self.key), self.text) if part)


class RecipeError(Exception):
    """A recipe cannot be used; `problems` has all its errors in the order of the file, overrides last.

    `note` says where missing paths were looked for.
    """

    def __init__(self, problems: Iterable[Problem]):
        self.problems = sorted(dict.fromkeys(problems), key=_order)
        self.note = "\n".join(sorted({problem.looked_in for problem in self.problems} - {""}))
        super().__init__("\n".join(filter(None, (*map(str, self.problems), self.note))))


@dataclass(frozen=True)
class Node:
    """A value of the file. `place` is that of its key if it has one, so that errors point at the key's line."""

    content: "dict[str, Node] | list[Node] | str | int | float | bool | None"
    place: Place

    def plain(self) -> object:
        """Return the value as dicts, lists and scalars."""
        if isinstance(self.content, dict):
            return {key: child.plain() for key, child in self.content.items()}
        if isinstance(self.content, list):
            return [child.plain() for child in self.content]
        return self.content

    def child(self, part: str | int) -> "Node | None":
        """Return the value at a key or index; None without one."""
        if isinstance(self.content, dict) and isinstance(part, str):
            return self.content.get(part)
        if isinstance(self.content, list) and isinstance(part, int) and part < len(self.content):
            return self.content[part]
        return None

    def nearest_place(self, key: Key) -> Place:
        """Return the place of `key`, or of the innermost value around it that the file has."""
        node = self
        for part in key:
            child = node.child(part)
            if child is None:
                break
            node = child
        return node.place


def key_text(key: Key) -> str:
    """Return a key as text: `stages[1].learning_rate`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return the candidate that is most like `name`, ignoring case; empty if none is."""
    by_lower_case = {one.lower(): one for one in candidates}
    matches = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
    return by_lower_case[matches[0]] if matches else ""


def nearest_file(path: Path, pattern: str) -> str:
    """Return the path beside `path` whose name, without suffix, is most like its name; empty if none is."""
    beside = path.parent.glob(pattern) if os.path.isdir(path.parent) else []
    by_stem = {other.stem: str(other) for other in beside}
    return by_stem.get(nearest(path.stem, by_stem), "")


def read(path: Path) -> tuple[Node, list[Problem]]:
    """Return the file's tree, and the errors in spite of which there is one (duplicate keys, unknown tags).

    Raise RecipeError if there is none: no file, not UTF-8, not YAML, empty.
    """
    tree, problems = parse(_text(path), str(path))
    if tree.content is None and not problems:
        raise RecipeError([Problem((), "the file is empty", file=str(path))])
    return tree, problems


def parse(text: str, file: str, override: str = "") -> tuple[Node, list[Problem]]:
    """Return what `read` returns, for a text, which may be empty. With `override`, every place is that override."""
    yaml = _Yaml(typ="safe", pure=True)
    yaml.composer.warn_double_anchors = False  # double anchors are legal; the last one before an alias counts
    try:
        root = yaml.compose(text)
    except MarkedYAMLError as error:
        raise RecipeError([_syntax_problem(error, text, file, override)]) from error
    except ReaderError as error:
        before = text[: error.position]
        place = _place(before.count("\n"), len(before) - before.rfind("\n") - 1, override)
        message = f"the character U+{error.character:04X} is not allowed in YAML"
        raise RecipeError([Problem((), message, file=file, place=place)]) from error
    except (RecursionError, _TooLong) as error:
        place = _place(0, 0, override)
        message = str(error) if isinstance(error, _TooLong) else "nested too deeply to be a recipe"
        raise RecipeError([Problem((), message, file=file, place=place)]) from error
    if root is None:
        return Node(None, _place(0, 0, override)), []
    converter = _Converter(yaml, file, override)
    return converter.convert(root, (), ()), converter.problems


def override(
    tree: Node, text: str, file: str, renewed: Callable[[Node, list[str]], list[str]] = lambda _, parts: parts
) -> Node:
    """Return the tree with one value set by `stages.1.learning_rate=1e-4` or `stages[distill].num_steps=[100, 50]`.

    An entry of a list is named by its number, from 0, or by its `kind` if no other entry has that kind. `renewed` gives
    the parts of the key that are read in place of those that are written. Raise RecipeError if the key does not exist
    or the value is not YAML.
    """
    place = Place(override=text)
    path, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[^.\[\]]+(\.[^.\[\]]+|\[[^\[\]]+\])*", path):
        message = "an override is written key.path=value, for example stages[1].learning_rate=1e-4"
        raise RecipeError([Problem((), message, file=file, place=place)])
    node, problems = parse(value, file, override=text)
    if problems:
        raise RecipeError(problems)
    return _with(tree, renewed(tree, re.findall(r"[^.\[\]]+", path)), node, (), file)


class _TooLong(ValueError):
    """A file has more values than any recipe."""


class _ShortComposer(Composer):
    """ruamel's composer, stopped after MAX_NODES: it takes a millisecond for ten values."""

    def __init__(self, loader: YAML) -> None:
        super().__init__(loader)
        self.num_nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.num_nodes += 1
        if self.num_nodes > 2 * MAX_NODES:  # a value and its key
            raise _TooLong(f"more than {MAX_NODES:,} values: no recipe is so long")
        return super().compose_node(parent, index)


class _Yaml(YAML):
    """ruamel's reader with a _ShortComposer."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.Composer: type[Composer] = _ShortComposer


class _Converter:
    """Converts ruamel's nodes to ours and collects `problems`."""

    def __init__(self, yaml: YAML, file: str, override: str):
        self.yaml, self.file, self.override = yaml, file, override
        self.problems: list[Problem] = []
        self.num_nodes = 0

    def convert(self, node: YamlNode, key: Key, parents: tuple[YamlNode, ...]) -> Node:
        place = self._place_of(node)
        if any(node is parent for parent in parents):
            self._complain(key, place, "an alias is inside the value that it refers to")
            return Node(None, place)
        if len(parents) > MAX_DEPTH:
            self._complain(key, place, "nested too deeply to be a recipe")
            return Node(None, place)
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:  # aliases of aliases grow a few lines to more than any memory holds
            if self.num_nodes == MAX_NODES + 1:
                self._complain(key, place, f"more than {MAX_NODES:,} values, aliases written out: no recipe is so long")
            return Node(None, place)
        if isinstance(node, MappingNode) and node.tag == _TAG + "map":
            return Node(self._mapping(node, key, (*parents, node)), place)
        if isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
            children = enumerate(node.value)
            return Node([self.convert(child, (*key, i), (*parents, node)) for i, child in children], place)
        if isinstance(node, ScalarNode) and node.tag in _TEXT_TAGS + _SCALAR_TAGS:
            return Node(self._scalar(node, key), place)
        self._complain(key, place, f"the YAML tag {_tag_name(node)} means nothing in a recipe")
        return Node(None, place)

    def _mapping(self, node: MappingNode, key: Key, parents: tuple[YamlNode, ...]) -> dict[str, Node]:
        children: dict[str, Node] = {}
        for name_node, value_node in node.value:
            place = self._place_of(name_node)
            name = name_node.value
            if not isinstance(name_node, ScalarNode):
                self._complain(key, place, "a key is a name, not a list or a mapping")
            elif name in children:
                lines = f"on lines {children[name].place.line} and {place.line}"
                self._complain((*key, name), place, f"the key is given twice{'' if self.override else ', ' + lines}")
            else:
                children[name] = replace(self.convert(value_node, (*key, name), parents), place=place)
        return children

    def _scalar(self, node: ScalarNode, key: Key) -> str | int | float | bool | None:
        """Return text as it is (dates too), and numbers and words as in YAML 1.2."""
        try:
            node.value.encode()
            value = node.value if node.tag in _TEXT_TAGS else self.yaml.constructor.construct_object(node)
            str(value)
        except (ValueError, LookupError):  # half a surrogate pair, `!!int x`, `!!bool x`, digits by the thousand
            self._complain(key, self._place_of(node), f"{node.value[:40]!r} cannot be read as YAML's {_tag_name(node)}")
            return None
        return value

    def _place_of(self, node: YamlNode) -> Place:
        return _place(node.start_mark.line, node.start_mark.column, self.override)

    def _complain(self, key: Key, place: Place, message: str) -> None:
        self.problems.append(Problem(key, message, file=self.file, place=place))


def _tag_name(node: YamlNode) -> str:
    return str(node.tag).removeprefix(_TAG)


def _text(path: Path) -> str:
    try:
        data = read_bytes(path, MAX_BYTES)
    except ValueError as error:  # too long, or a NUL in the name
        raise RecipeError([Problem((), str(error), file=str(path))]) from error
    except FileNotFoundError as error:
        names = [] if path.suffix else [file.stem for file in shipped.recipes()]
        near = nearest_file(path, "*.y*ml") or nearest(str(path), names)
        problem = Problem((), "no such file", near, file=str(path))
        raise RecipeError([problem]) from error
    except OSError as error:  # a folder, no permission, a name too long for the file system
        raise RecipeError([Problem((), f"cannot be read: {error.strerror}", file=str(path))]) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        place = _place(before.count(b"\n"), len(before) - before.rfind(b"\n") - 1, "")
        message = f"not UTF-8 (byte 0x{error.object[error.start]:02x}): save the file as UTF-8"
        raise RecipeError([Problem((), message, file=str(path), place=place)]) from error
    return text


def _syntax_problem(error: MarkedYAMLError, text: str, file: str, override: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    place = _place(mark.line, mark.column, override)
    problem = error.problem or ""
    began = f" (it began on line {error.context_mark.line + 1})" if error.context_mark else ""
    if text.splitlines()[mark.line : mark.line + 1] and text.splitlines()[mark.line][mark.column :].startswith("\t"):
        message = f"a tab on line {mark.line + 1}: YAML takes no tabs, use spaces"
    elif problem.startswith("mapping values"):
        message = "a key is not expected here: check the indentation, and put text that holds ': ' in quotes"
    elif problem.startswith("expected <block end>"):
        message = f"the indentation does not fit the block of this line{began}"
    elif "<stream end>" in problem or "end of stream" in problem:
        message = f"the file ends inside a bracket or quotes{began}"
    elif problem.startswith("found undefined alias"):
        message = problem.replace("found undefined alias", "no anchor was given for the alias")
    else:
        message = f"not valid YAML: {problem}"
    return Problem((), message, file=file, place=place)


def _with(node: Node, parts: list[str], value: Node, key: Key, file: str) -> Node:
    """Return `node` with `value` at `parts`. Missing mappings on the way are created, missing entries of lists not."""
    if not parts:
        return value
    first, *rest = parts
    if isinstance(node.content, list):
        i = _entry(node.content, first, key, file, value.place)
        child = _with(node.content[i], rest, value, (*key, i), file)
        return replace(node, content=[*node.content[:i], child, *node.content[i + 1 :]])
    if isinstance(node.content, dict | None):
        children = node.content or {}
        child = _with(children.get(first, Node({}, value.place)), rest, value, (*key, first), file)
        return replace(node, content=children | {first: child})
    message = f"holds the single value {brief(node.content)}, which has no key {first}"
    raise RecipeError([Problem(key, message, file=file, place=value.place)])


def _entry(entries: list[Node], name: str, key: Key, file: str, place: Place) -> int:
    """Return the index of the entry that an override names by number or by kind."""
    kinds = [str(kind.content) if (kind := entry.child("kind")) else "" for entry in entries]
    matching = [i for i, kind in enumerate(kinds) if name in (str(i), kind)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        numbers = " or ".join(map(str, matching))
        message = f"{len(matching)} entries are of kind {name}: name one by its number, {numbers}"
        raise RecipeError([Problem(key, message, file=file, place=place)])
    there_are = ", ".join(f"{i} {kind}".strip() for i, kind in enumerate(kinds)) or "none"
    raise RecipeError([Problem(key, f"no entry {name}; there are {there_are}", nearest(name, kinds), file, place)])


def _place(line: int, column: int, override: str) -> Place:
    return Place(override=override) if override else Place(line + 1, column + 1)


def _order(problem: Problem) -> tuple[bool, int, int]:
    place = problem.place or Place()
    return bool(place.override), place.line, place.column
