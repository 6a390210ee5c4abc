"""The JSON schema of a recipe: editors complete and check recipes with it, and error messages are built from it."""

from typing import Any

from .experiment import Recipe


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe; descriptions, defaults and names come from the types."""
    schema = Recipe.model_json_schema()
    for definition in schema["$defs"].values():
        if "kind" in definition["properties"]:  # has a default in Python, but a file must have it
            definition["properties"]["kind"].setdefault("description", "the kind of this entry")
            definition["required"] = ["kind", *definition.get("required", [])]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
