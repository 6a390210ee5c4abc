"""Settings of a recipe's rewards, compared with the files that define them. No torch.

A file is parsed and not imported: reading a recipe runs nobody's code, and takes no second for torch and weights. What
a file does not say by itself, such as the parameters of a base class in another file, is left to `mlcm run`.
"""

import ast
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import GenericAlias
from typing import Any, Literal, Union

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ..storage.untrusted import brief, read_bytes
from . import reward_package
from .tree import Key, Problem, nearest
from .types import Reward

PLAIN = {"bool": bool, "int": int, "float": float, "str": str, "list": list, "dict": dict}
WORDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"}
WORDS |= {"list": "a list", "dict": "a mapping"}
UNKNOWN = object()  # a type that a file gives by another name


@dataclass(frozen=True)
class Setting:
    """A parameter of a reward model's constructor: its annotation and whether it has a default."""

    annotation: ast.expr | None
    has_default: bool


def problems(key: Key, reward: Reward) -> Iterator[Problem]:
    """Yield what is wrong with the settings of `reward`, whose own key is `key`: unknown, missing, of another type."""
    file = _file_of(reward)
    if file is None:
        return
    try:
        settings = settings_in(read_bytes(file))
    except (RecursionError, MemoryError):  # of Python's parser, which cannot import such a file either
        yield Problem((*key, "name"), f"the file of {reward.name} cannot be read: it is nested too deeply ({file})")
        return
    except (OSError, ValueError, SyntaxError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        yield Problem((*key, "name"), f"the file of {reward.name} cannot be read: {reason} ({file}{line})")
        return
    if settings is not None:
        for name, message, suggestion in _wrong(settings, reward.from_folder("").settings):
            yield Problem((*key, "settings", name), f"{reward.name}: {message}", suggestion)


def settings_in(code: bytes) -> dict[str, Setting] | None:
    """Return the settings of the one reward model that a file's `code` defines, by name: see docs/add_a_reward.md.

    None where the code does not say them plainly. Raise SyntaxError if it is not Python.
    """
    classes = _classes_in(code)
    if len(classes) != 1 or classes[0].decorator_list or classes[0].keywords:
        return None
    functions = [one.name for one in classes[0].body if isinstance(one, ast.FunctionDef)]
    if "__new__" in functions:
        return None
    constructors = [one for one in classes[0].body if isinstance(one, ast.FunctionDef) and one.name == "__init__"]
    if len(constructors) != 1 or constructors[0].decorator_list:
        return None
    parameters = constructors[0].args
    positional = [*parameters.posonlyargs, *parameters.args]
    if parameters.vararg or parameters.kwarg or len(positional) < 3:  # self, device, dtype
        return None
    num_required = len(positional) - len(parameters.defaults)
    settings = {one.arg: Setting(one.annotation, i >= num_required) for i, one in enumerate(positional) if i >= 3}
    for one, default in zip(parameters.kwonlyargs, parameters.kw_defaults, strict=True):
        settings[one.arg] = Setting(one.annotation, default is not None)
    return settings


def attributes_of(reward: Reward) -> dict[str, Any]:
    """Return what the file of `reward` says plainly of its class; nothing where no one file does."""
    file = _file_of(reward)
    try:
        return {} if file is None else attributes_in(read_bytes(file))
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):  # reported with the reward's settings
        return {}


def attributes_in(code: bytes) -> dict[str, Any]:
    """Return the literal attributes of the one reward model that a file's `code` defines, by name.

    Raise SyntaxError if it is not Python.
    """
    classes = _classes_in(code)
    found: dict[str, Any] = {}
    for one in classes[0].body if len(classes) == 1 else []:
        if isinstance(one, ast.Assign):
            names = [target.id for target in one.targets if isinstance(target, ast.Name)]
            with suppress(ValueError):
                found |= dict.fromkeys(names, ast.literal_eval(one.value))
    return found


def languages_read(reward: Reward) -> tuple[str, ...]:
    """Return the languages of prompts that `reward` reads; () where it reads no prompts, or its file does not say."""
    said = attributes_of(reward)
    languages = said.get("languages") if said.get("needs_prompt") is True else ()
    return languages if isinstance(languages, tuple) else ()


def without_gradient(names: Iterable[str]) -> str:
    """Return why `feedback` cannot be trained on the rewards `names`, and what can."""
    return (
        f"feedback needs rewards with a gradient, which {', '.join(names)} has not; dpo and policy take any, and so "
        "does feedback with surrogate: {}"
    )


def _file_of(reward: Reward) -> Path | None:
    """Return the file that defines `reward`; None for one of another distribution or defined twice, told by `run`."""
    paths = [Path(folder) / f"{reward.name}.py" for folder in reward_package.package().__path__]
    files = [path for path in paths if path.is_file()]
    return files[0] if len(files) == 1 else None


def _classes_in(code: bytes) -> list[ast.ClassDef]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # \d in a text: Python warns of it at the import
        body = ast.parse(code).body
    return [one for one in body if isinstance(one, ast.ClassDef) and not one.name.startswith("_")]


def _wrong(settings: Mapping[str, Setting], values: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield the name, what is wrong, and the nearest name, of each of a recipe's `values` that does not fit."""
    takes = f"its settings are {', '.join(settings)}" if settings else "it takes no settings"
    for name, value in values.items():
        if name not in settings:
            yield name, f"unknown setting; {takes}", nearest(name, list(settings))
        elif (annotation := settings[name].annotation) is not None and (message := misfit(value, annotation)):
            yield name, message, ""
    for name, setting in settings.items():
        if not setting.has_default and name not in values:
            yield name, f"missing; {takes}", ""


def misfit(value: Any, annotation: ast.expr) -> str:
    """Return what is wrong with a recipe's `value` for a parameter of this annotation; "" where it fits."""
    return "" if _fits(value, annotation) else f"expected {in_words(annotation)}, found {brief(value)}"


def in_words(annotation: ast.expr) -> str:
    """Return the values of a plain type in words: "text or null" for str | None."""
    match annotation:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            comma = "," if isinstance(left, ast.Subscript) else ""
            return f"{in_words(left)}{comma} or {in_words(right)}"
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inside):
            return f"one of {ast.unparse(inside).strip('()')}"
        case ast.Subscript(value=ast.Name(id="list"), slice=inside):
            return f"a list, each {in_words(inside)}"
        case ast.Constant(value=None):
            return "null"
    return WORDS.get(ast.unparse(annotation), ast.unparse(annotation))


def _fits(value: Any, annotation: ast.expr) -> bool:
    """Return whether a value of a recipe is of the type of an annotation; True for a type that is not plain."""
    kind = _type_of(annotation)
    if kind is UNKNOWN:
        return True
    try:
        TypeAdapter(kind, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError:
        return False
    return True


def _type_of(annotation: ast.expr) -> Any:
    """Return the type that an annotation writes with built-in types, Literal and |; UNKNOWN for any other."""
    match annotation:
        case ast.Constant(value=None):
            return None
        case ast.Name(id=name) if name in PLAIN:
            return PLAIN[name]
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            kinds = [_type_of(one) for one in (left, right)]
            return UNKNOWN if UNKNOWN in kinds else Union[tuple(kinds)]  # noqa: UP007, made of values
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inside):
            entries = inside.elts if isinstance(inside, ast.Tuple) else [inside]
            values = [one.value for one in entries if isinstance(one, ast.Constant)]
            return Literal[tuple(values)] if values and len(values) == len(entries) else UNKNOWN
        case ast.Subscript(value=ast.Name(id="list"), slice=inside):
            kind = _type_of(inside)
            return UNKNOWN if kind is UNKNOWN else GenericAlias(list, (kind,))
    return UNKNOWN
