"""Messages for pydantic's errors in a recipe: what was expected, what was found, and the nearest valid name.

The expectation comes from the types' JSON schema, so that an editor and the command line say the same.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .experiment import NAME
from .families import ENTRY_POINTS
from .tree import Key, Node, Problem, nearest
from .types import COMMIT, VARIANT

Schema = dict[str, Any]

PATTERNS = {
    NAME: "small letters a to z, digits, - and _, a letter or a digit first, such as my-run",
    COMMIT: "the 40 hexadecimal digits of a commit",
    VARIANT: "small letters a to z, digits and _, such as fp16",
}
# A setting's name in other trainers -> here.
ELSEWHERE = {
    "lr": "learning_rate",
    "steps": "num_steps",
    "max_train_steps": "num_steps",
    "train_batch_size": "batch_size",
    "bs": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "mixed_precision": "precision",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
}


@dataclass(frozen=True)
class _Location:
    """The place of an error: its key, the schema there and of the mapping around it, and the node of the file."""

    key: Key
    schema: Schema
    around: Schema
    node: Node | None


def problems(errors: Iterable[Mapping[str, Any]], schema: Schema, tree: Node, file: str) -> list[Problem]:
    """Return a problem for each of `ValidationError.errors()`, with its place in `tree`.

    `schema` is the JSON schema of the model. For a value that may be single or a list pydantic reports the errors of
    both forms: only those of the form in the file stay.
    """
    root = _inline(schema, schema["$defs"])
    result = []
    for error in errors:
        location = _follow(error["loc"], root, tree)
        if location is not None:
            key, message, suggestion = _describe(error, location)
            result.append(Problem(key, message, suggestion, file, tree.nearest_place(key)))
    return result


def _describe(error: Mapping[str, Any], location: _Location) -> tuple[Key, str, str]:
    """Return the key, the message and the nearest name of one error."""
    key, schema, node = location.key, location.schema, location.node
    match error["type"]:
        case "extra_forbidden":
            known_keys = list(location.around["properties"])
            ours = ELSEWHERE.get(str(key[-1]), "")
            suggestion = ours if ours in known_keys else nearest(str(key[-1]), known_keys)
            return key, "unknown key" if suggestion else f"unknown key; known are {', '.join(known_keys)}", suggestion
        case "missing":
            description = (
                f" ({schema['description']})" if schema.get("type") != "object" and "description" in schema else ""
            )
            return key, f"missing: expected {expected(schema)}{description}", ""
        case "union_tag_not_found" | "union_tag_invalid":
            kinds = {"enum": _kinds(_members(schema)[0])}
            kind = node.child("kind") if node else None
            if kind is None:
                return (*key, "kind"), f"missing: expected {expected(kinds)}", ""
            return (*key, "kind"), *_mismatch(kinds, kind)
        case "value_error":  # of our own validators, whose messages begin with the name of the setting
            message = str(error["ctx"]["error"])
            return (*key, *_in_file(message.split()[0].rstrip(":"), node)), message, ""
        case _:
            message, suggestion = _mismatch(schema, node)
            if key == ("teacher", "family") and node and not suggestion:
                message += f"; a family of another distribution has an entry point of {ENTRY_POINTS}, and is installed"
            return key, message, suggestion


def _in_file(name: str, node: Node | None) -> Iterator[str]:
    """Yield the keys of a setting's `name`, such as matching.weight, as far down from `node` as the file has them."""
    for key in name.split("."):
        node = node.child(key) if node else None
        if node is None:
            return
        yield key


def expected(schema: Schema) -> str:
    """Return what a value must be, in words: `a whole number above 0`, `one of no, fp16, bf16`."""
    if "anyOf" in schema:
        return " or ".join(expected(member) for member in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        values = _names(schema)
        return f"one of {', '.join(values)}" if len(values) > 1 else values[0]
    if "discriminator" in schema:
        return f"a mapping with kind: {' or '.join(_kinds(schema))}"
    match schema["type"]:
        case "boolean":
            return "true or false"
        case "integer":
            factor = schema.get("multipleOf")
            return (f"a multiple of {factor}" if factor else "a whole number") + _bounds(schema)
        case "number":
            return "a number" + _bounds(schema)
        case "string":
            return PATTERNS[schema["pattern"]] if "pattern" in schema else "text"
        case "array":
            least, most = schema.get("minItems", 0), schema.get("maxItems")
            size = f" of {least}" if least == most else f" of {least} or more" if least else ""
            return f"a list{size}, each {expected(_child(schema, 0))}"
        case "object":
            keys = ", ".join(schema.get("properties", {}))
            return f"a mapping with the keys {keys}" if keys else "a mapping"
        case other:
            return other


def _mismatch(schema: Schema, node: Node | None) -> tuple[str, str]:
    """Return the message for a value of the wrong type, size or name, and the nearest name if names are expected."""
    value = node.content if node else None
    suggestion = nearest(value, _names(schema)) if isinstance(value, str) else ""
    return f"expected {expected(schema)}, found {_describe_value(value)}{_hint(schema, value)}", suggestion


def _describe_value(value: object) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return "true" if value else "false"
        case str():
            return f"the text {value!r}" if len(value) < 50 else f"the text {value[:40]!r}..."
        case int() | float():
            return f"the number {value}"
        case list():
            return f"a list of {len(value)}" if value else "an empty list"
        case _:
            return "a mapping"


def _hint(schema: Schema, value: object) -> str:
    """Return what to change if the value is nearly right: a quoted number, an unquoted name, 1e3 for 1000."""
    types = {member.get("type") for member in _members(schema)}
    if isinstance(value, str) and types & {"integer", "number"} and _is_number(value):
        return ": remove the quotes"
    if isinstance(value, int | float) and "string" in types and not _names(schema):
        return ": put it in quotes"
    if isinstance(value, float) and "integer" in types and value.is_integer():
        return f": write {int(value)}" if abs(value) < 1e15 else ""
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _bounds(schema: Schema) -> str:
    low, high, above = schema.get("minimum"), schema.get("maximum"), schema.get("exclusiveMinimum")
    if low is not None and high is not None:
        return f" from {low} to {high:,}"
    if low is not None and "exclusiveMaximum" in schema:
        return f" from {low} to below {schema['exclusiveMaximum']}"
    least = f" above {above}" if above is not None else f" of at least {low}" if low is not None else ""
    return f"{least} and at most {high:,}" if least and high is not None else least


def _names(schema: Schema) -> list[str]:
    """Return the literals that a schema allows, as text."""
    literals = [one for member in _members(schema) for one in member.get("enum", [member.get("const")])]
    return [str(one) for one in literals if one is not None]


def _kinds(schema: Schema) -> list[str]:
    """Return the values of `kind` in a union of models, in the order of the types."""
    return [model["properties"]["kind"]["const"] for model in schema["oneOf"]]


def _members(schema: Schema) -> list[Schema]:
    """Return the schemas of the forms that a value may have, without null."""
    return [member for member in schema.get("anyOf", [schema]) if member.get("type") != "null"]


def _child(schema: Schema, part: str | int) -> Schema:
    if isinstance(part, int):
        return schema["prefixItems"][part] if "prefixItems" in schema else schema["items"]
    more = schema.get("additionalProperties")  # of a mapping with free names
    return schema.get("properties", {}).get(part, more if isinstance(more, dict) else {})


def _follow(loc: tuple[str | int, ...], root: Schema, tree: Node) -> _Location | None:
    """Return the location of pydantic's `loc`; None if it is about a form (single, list) that the file does not have.

    Between the file's own keys, `loc` has the chosen kind in a union of models and the attempted form in a plain union.
    """
    key: Key = ()
    schema = form = root
    around: Schema = {}
    node: Node | None = tree
    for part in loc:
        members = _members(form)
        if len(members) > 1:
            forms = {_form_of(member): member for member in reversed(members)}
            form_in_file = _form_in_file(node) if _form_in_file(node) in forms else _form_of(members[0])
            if _form_in_loc(part, members) != form_in_file:
                return None
            form = forms[form_in_file]
        elif "discriminator" in members[0]:
            schema = form = members[0]["discriminator"]["mapping"][part]
        else:
            key, around = (*key, part), members[0]
            schema = form = _child(around, part)
            node = node.child(part) if node else None
    return _Location(key, schema, around, node)


def _form_of(schema: Schema) -> str:
    """Return the form of a schema's values: array, object or single."""
    return schema["type"] if schema.get("type") in ("array", "object") else "single"


def _form_in_file(node: Node | None) -> str:
    """Return the form of the value in the file."""
    forms: dict[type, str] = {list: "array", dict: "object"}
    return forms.get(type(node.content), "single") if node else "single"


def _form_in_loc(part: str | int, members: list[Schema]) -> str:
    """Return the form that pydantic attempted, by the part of an error's `loc`: a list's type, or a model's name."""
    if str(part).startswith("list["):
        return "array"
    model = re.findall(r"\w+", str(part))[-1]  # of one with a check of its own: function-after[check(), Model]
    return "object" if model in [one.get("title") for one in members if _form_of(one) == "object"] else "single"


def _inline(schema: Any, definitions: Schema) -> Any:
    """Return the schema with every reference replaced by its definition."""
    if isinstance(schema, list):
        return [_inline(one, definitions) for one in schema]
    if isinstance(schema, str) and schema.startswith("#/$defs/"):
        return _inline(definitions[schema.removeprefix("#/$defs/")], definitions)
    if isinstance(schema, dict):
        inlined = {name: _inline(one, definitions) for name, one in schema.items() if name != "$defs"}
        return {**inlined.pop("$ref", {}), **inlined}
    return schema
