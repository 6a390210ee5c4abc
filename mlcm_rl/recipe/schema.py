"""The JSON schema of a recipe, from which editors complete and check it, and from which errors are worded."""

from typing import Any

from .experiment import Recipe


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors: descriptions, defaults and names come from the types."""
    schema = Recipe.model_json_schema()
    for definition in schema["$defs"].values():
        if "kind" in definition["properties"]:  # has a default for Python, but a file must say it
            definition["required"] = ["kind", *definition.get("required", [])]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
