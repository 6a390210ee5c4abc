"""The JSON schema that editors complete recipes from."""

import json
from pathlib import Path

import jsonschema
import pytest
from ruamel.yaml import YAML

from mlcm_rl.recipe import families
from mlcm_rl.recipe.schema import json_schema

RECIPES = Path(__file__).parents[2] / "recipes"
GOOD = Path(__file__).with_name("good.yaml")


def good() -> dict:
    return YAML(typ="safe", pure=True).load(GOOD.read_text("utf-8"))


def test_the_committed_schema_is_that_of_the_types():
    """`mlcm schema --out recipes/recipe.schema.json` writes it anew, with the families that are installed."""
    assert families.names() == list(families.FAMILIES), "families of other distributions are in the schema here"
    assert json.loads((RECIPES / "recipe.schema.json").read_text("utf-8")) == json_schema()


def test_every_shipped_recipe_names_the_schema_in_its_first_line():
    for path in RECIPES.glob("*.yaml"):
        assert path.read_text("utf-8").startswith("# yaml-language-server: $schema=recipe.schema.json\n"), path


def test_the_schema_is_valid_and_takes_the_good_recipe():
    jsonschema.Draft202012Validator.check_schema(json_schema())
    jsonschema.validate(good(), json_schema())


@pytest.mark.parametrize(
    ("stage", "change"),
    [(1, {"lerning_rate": 1}), (1, {"precision": "half"}), (1, {"kind": "distil"}), (2, {"num_prompts": 0})],
)
def test_an_editor_refuses_what_the_loader_refuses(stage, change):
    recipe = good()
    recipe["stages"][stage] |= change
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(recipe, json_schema())


def test_an_editor_misses_the_kind_of_a_stage():
    recipe = good()
    del recipe["stages"][0]["kind"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(recipe, json_schema())


def test_descriptions_and_defaults_come_with_the_schema():
    distill = json_schema()["$defs"]["Distill"]["properties"]
    assert distill["learning_rate"]["default"] == 1e-4
    assert "peak" in distill["learning_rate"]["description"]
    assert distill["precision"]["enum"] == ["no", "bf16"]


def test_every_key_says_what_it_means():
    schema = json_schema()
    named = {"Recipe": schema, **schema["$defs"]}
    missing = [
        f"{name}.{key}"
        for name, one in named.items()
        for key, value in one["properties"].items()
        if len(value.get("description", "")) < 8
    ]
    assert not missing, f"write a description of {', '.join(missing)}"
