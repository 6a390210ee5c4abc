"""What pydantic refused in a recipe, said to a person: expected, found, and the nearest valid name.

What was expected is worded from the types' JSON schema, so an editor and the command line say the same.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .experiment import NAME
from .tree import Key, Node, Problem, nearest
from .types import COMMIT, VARIANT

Schema = dict[str, Any]

PATTERNS = {
    NAME: "small letters a to z, digits, - and _, a letter or a digit first, such as my-run",
    COMMIT: "the 40 hexadecimal digits of a commit",
    VARIANT: "small letters a to z, digits and _, such as fp16",
}


@dataclass(frozen=True)
class _Refused:
    """Where an error stands: the key, what the types say there and about the mapping around it, what the file holds."""

    key: Key
    schema: Schema
    around: Schema
    node: Node | None


def problems(errors: Iterable[Mapping[str, Any]], schema: Schema, tree: Node, file: str) -> list[Problem]:
    """One problem an error of `ValidationError.errors()`, placed in `tree`; `schema` is the model's JSON schema.

    A value that may be single or a list is refused by pydantic as both: only what fits the form written is kept.
    """
    root = _inline(schema, schema["$defs"])
    found = []
    for error in errors:
        refused = _follow(error["loc"], root, tree)
        if refused is not None:
            key, message, suggestion = _worded(error, refused)
            found.append(Problem(key, message, suggestion, file, tree.nearest_place(key)))
    return found


def _worded(error: Mapping[str, Any], refused: _Refused) -> tuple[Key, str, str]:
    """Key, message and nearest name of one error."""
    key, schema, node = refused.key, refused.schema, refused.node
    match error["type"]:
        case "extra_forbidden":
            known = list(refused.around["properties"])
            suggestion = nearest(str(key[-1]), known)
            return key, "unknown key" if suggestion else f"unknown key; known are {', '.join(known)}", suggestion
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
            return (*key, "kind"), *_expected_but_found(kinds, kind)
        case "value_error":  # of a validator of ours, whose message begins with the setting that it is about
            message = str(error["ctx"]["error"])
            name = message.split()[0].rstrip(":")
            return (*key, name) if node and node.child(name) else key, message, ""
        case _:
            return key, *_expected_but_found(schema, node)


def expected(schema: Schema) -> str:
    """What a value must be, in words: `a whole number above 0`, `one of no, fp16, bf16`."""
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
            return "a whole number" + _bounds(schema)
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


def _expected_but_found(schema: Schema, node: Node | None) -> tuple[str, str]:
    """The message for a value of the wrong type, size or name, and the nearest name where names are expected."""
    value = node.content if node else None
    suggestion = nearest(value, _names(schema)) if isinstance(value, str) else ""
    return f"expected {expected(schema)}, found {_found(value)}{_hint(schema, value)}", suggestion


def _found(value: object) -> str:
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
    """What to change, where the value is nearly right: a quoted number, an unquoted name, 1e3 for 1000."""
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
    """The literals that a schema allows, as they are written."""
    literals = [one for member in _members(schema) for one in member.get("enum", [member.get("const")])]
    return [str(one) for one in literals if one is not None]


def _kinds(schema: Schema) -> list[str]:
    """What `kind` may be in a union of models, in the order of the types."""
    return [model["properties"]["kind"]["const"] for model in schema["oneOf"]]


def _members(schema: Schema) -> list[Schema]:
    """The forms a value may take, null aside."""
    return [member for member in schema.get("anyOf", [schema]) if member.get("type") != "null"]


def _child(schema: Schema, part: str | int) -> Schema:
    if isinstance(part, int):
        return schema["prefixItems"][part] if "prefixItems" in schema else schema["items"]
    more = schema.get("additionalProperties")  # of a mapping whose names are free
    return schema.get("properties", {}).get(part, more if isinstance(more, dict) else {})


def _follow(loc: tuple[str | int, ...], root: Schema, tree: Node) -> _Refused | None:
    """Where pydantic's `loc` leads; None where it is about a form (single, list) that was not written.

    Between the file's own keys, `loc` names the kind chosen in a union of models and the form tried in a plain union.
    """
    key: Key = ()
    schema = form = root
    around: Schema = {}
    node: Node | None = tree
    for part in loc:
        members = _members(form)
        if len(members) > 1:
            forms = {_form_of(member): member for member in reversed(members)}
            written = _form_written(node) if _form_written(node) in forms else _form_of(members[0])
            if _form_tried(part, members) != written:
                return None
            form = forms[written]
        elif "discriminator" in members[0]:
            schema = form = members[0]["discriminator"]["mapping"][part]
        else:
            key, around = (*key, part), members[0]
            schema = form = _child(around, part)
            node = node.child(part) if node else None
    return _Refused(key, schema, around, node)


def _form_of(schema: Schema) -> str:
    """The form of value that a schema is for: array, object or single."""
    return schema["type"] if schema.get("type") in ("array", "object") else "single"


def _form_written(node: Node | None) -> str:
    """The form of what the file holds."""
    forms: dict[type, str] = {list: "array", dict: "object"}
    return forms.get(type(node.content), "single") if node else "single"


def _form_tried(part: str | int, members: list[Schema]) -> str:
    """The form that pydantic tried, by what it says of it in an error's `loc`: a list's type, a model's name."""
    if str(part).startswith("list["):
        return "array"
    return "object" if part in [member.get("title") for member in members if _form_of(member) == "object"] else "single"


def _inline(schema: Any, definitions: Schema) -> Any:
    """The schema with every reference replaced by what it refers to."""
    if isinstance(schema, list):
        return [_inline(one, definitions) for one in schema]
    if isinstance(schema, str) and schema.startswith("#/$defs/"):
        return _inline(definitions[schema.removeprefix("#/$defs/")], definitions)
    if isinstance(schema, dict):
        inlined = {name: _inline(one, definitions) for name, one in schema.items() if name != "$defs"}
        return {**inlined.pop("$ref", {}), **inlined}
    return schema
