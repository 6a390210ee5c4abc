"""All errors of a recipe are reported at once, each with line, key, expectation and nearest name."""

import pytest

from mlcm_rl.recipe import Distill, errors
from mlcm_rl.recipe.families import FAMILIES
from mlcm_rl.recipe.file import load
from mlcm_rl.recipe.schema import json_schema
from mlcm_rl.recipe.tree import RecipeError, key_text


def place_and_text(problem) -> tuple[int, str, str]:
    return problem.place.line, key_text(problem.key), problem.text


def test_a_good_recipe_means_what_a_person_reads_in_it(root):
    recipe = load(root / "good.yaml", root=root)
    distill = recipe.stages[1]
    assert isinstance(distill, Distill)
    assert distill.learning_rate == 0.00001  # `1e-5` has no point: YAML 1.1 would call it text
    assert distill.precision == "no"  # YAML 1.1 would call it false
    assert recipe.teacher.guidance_scale == 8.0
    assert distill.betas == (0.9, 0.99)
    assert recipe.samples.prompts == ["a red apple", "红苹果"]


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "text"),
    [
        ("  guidance_scale: 8", "  gidance: 8", 7, "teacher.gidance", "unknown key; did you mean guidance_scale?"),
        ("  family: sdxl", "  family: SDLX", 6, "teacher.family", "found the text 'SDLX'; did you mean sdxl?"),
        ("  family: sdxl", "  family:", 6, "teacher.family", f"expected one of {', '.join(FAMILIES)}, found nothing"),
        (
            "seed: 7",
            "seed: '7'",
            3,
            "seed",
            "expected a whole number of at least 0, found the text '7': remove the quotes",
        ),
        ("seed: 7", "seed: -7", 3, "seed", "expected a whole number of at least 0, found the number -7"),
        ("seed: 7", "seed: yes", 3, "seed", "expected a whole number of at least 0, found the text 'yes'"),
        ("seed: 7", "sed: 7", 3, "sed", "unknown key; did you mean seed?"),
        ("seed: 7", "colour_of_the_sky: 7", 3, "colour_of_the_sky", "unknown key; known are name, seed, teacher,"),
        ("seed: 7", "<<: {seed: 7}", 3, "<<", "unknown key"),
        ("name: good", "name: 2024", 2, "name", "found the number 2024: put it in quotes"),
        (
            "name: good",
            "name: Good One",
            2,
            "name",
            "expected small letters a to z, digits, - and _, a letter or a",
        ),
        ("name: good", "name: stages", 2, "name", "name stages is that of a folder under runs that all runs share"),
        ("name: good", "name: rows", 2, "name", "name rows is that of a folder under runs"),
        (
            "[colourfulness]",
            "[3]",
            25,
            "stages[2].rewards[0]",
            "expected text or a mapping with the keys name, weight,",
        ),
        (
            "[colourfulness]",
            "[{name: brightness, weigth: 1.0}]",
            25,
            "stages[2].rewards[0].weigth",
            "unknown key; did you mean weight?",
        ),
        ("[colourfulness]", "[{name: 3}]", 25, "stages[2].rewards[0].name", "expected text, found the number 3"),
        ("[colourfulness]", "[a, a]", 25, "stages[2].rewards", "rewards: a is named twice"),
        (
            "[colourfulness]",
            "[{name: a, weight: 2}]",
            25,
            "stages[2].rewards",
            "a has a weight, but a report sums none",
        ),
        ("name: good", "name: [good]", 2, "name", "found a list of 1"),
        ("name: good", "name: !secret good", 2, "name", "the YAML tag !secret means nothing in a recipe"),
        ("name: good", "name: !!int good", 2, "name", "'good' cannot be read as YAML's int"),
        (
            "[a red apple, 红苹果]",
            "&it [a red apple, *it]",
            27,
            "samples.prompts[1]",
            "an alias is inside the value that it",
        ),
        (
            "    num_trajectories: 64",
            "    num_trajectories: 1e3",
            11,
            "stages[0].num_trajectories",
            "1000.0: write 1000",
        ),
        (
            "    num_trajectories: 64",
            "    num_trajectories: 0",
            11,
            "stages[0].num_trajectories",
            "whole number above 0",
        ),
        ("    learning_rate: 1e-5", "    lr: 1e-5", 15, "stages[1].lr", "did you mean learning_rate?"),
        ("kind: distill", "kind: distil", 12, "stages[1].kind", "found the text 'distil'; did you mean distill?"),
        (
            "kind: distill",
            "kind: 3",
            12,
            "stages[1].kind",
            "train_teacher, adapt_text, train_control, train_perceptual, train_reward, trajectories, distill, start, "
            "feedback, dpo, policy, evaluate",
        ),
        (
            "kind: distill",
            "method: segments",
            12,
            "stages[1].kind",
            "missing: expected one of train_teacher, adapt_text, train_control, train_perceptual, train_reward, ",
        ),
        (
            "    precision: no",
            "    adversarial:\n      warmup_steps: 100\n      jumps: all",
            17,
            "stages[1].adversarial.warmup_steps",
            "adversarial.warmup_steps 100 of 100 steps leave none in which the term acts",
        ),
        (
            "    precision: no",
            "    adversarial:\n      jumps: all\n      real: images",
            18,
            "stages[1].adversarial.real",
            "adversarial.real: images needs images",
        ),
        ("precision: no", "precision: false", 16, "stages[1].precision", "16, found false"),
        (
            "precision: no",
            "condition_on_target: no",
            16,
            "stages[1].condition_on_target",
            "expected true or false, found",
        ),
        (
            "learning_rate: 1e-5",
            "learning_rate: fast",
            15,
            "stages[1].learning_rate",
            "a number above 0 or a list, each a",
        ),
        ("learning_rate: 1e-5", "learning_rate: [1, .inf]", 15, "stages[1].learning_rate[1]", "found the number inf"),
        (
            "[40, 30, 20, 10]",
            "[40, '30', 20, 10]",
            14,
            "stages[1].num_steps[1]",
            "found the text '30': remove the quotes",
        ),
        ("[40, 30, 20, 10]", "[40, 30]", 14, "stages[1].num_steps", "num_steps has 2 entries for 4 phases"),
        (
            "precision: no",
            "optimizer_state: [keep, reset]",
            16,
            "stages[1].optimizer_state",
            "optimizer_state has 2 entries for 4 phases",
        ),
        ("[40, 30, 20, 10]", "{a: 1}", 14, "stages[1].num_steps", "found a mapping"),
        (
            "betas: [0.9, 0.99]",
            "betas: [0.9]",
            17,
            "stages[1].betas[1]",
            "missing: expected a number from 0 to below 1",
        ),
        (
            "betas: [0.9, 0.99]",
            "betas: [0.5, 2]",
            17,
            "stages[1].betas[1]",
            "expected a number from 0 to below 1, found the number 2",
        ),
        (
            "betas: [0.9, 0.99]",
            "num_segments: []",
            17,
            "stages[1].num_segments",
            "expected a list of 1 or more, each one of 32, 16, 8, 4, 2, 1",
        ),
        (
            "betas: [0.9, 0.99]",
            "num_segments: [8, 3, 2, 1]",
            17,
            "stages[1].num_segments[1]",
            "expected one of 32, 16, 8, 4, 2, 1, found",
        ),
        ("betas: [0.9, 0.99]", "segments: [1, 2, 4, 8]", 17, "stages[1].num_segments", "must not increase"),
        ("      rank: 8", "      alfa: 8", 20, "stages[1].adapter.alfa", "unknown key; did you mean alpha?"),
        ("      kind: lora", "      kind: loro", 19, "stages[1].adapter.kind", "did you mean lora?"),
        ("      kind: lora", "      alpha: 8", 18, "stages[1].adapter.kind", "missing: expected one of lora, full"),
        (
            "    num_prompts: 8",
            "    num_prompt: 8",
            23,
            "stages[2].num_prompt",
            "unknown key; did you mean num_prompts?",
        ),
        (
            "[a red apple, 红苹果]",
            "[a red apple, 12]",
            27,
            "samples.prompts[1]",
            "expected text, found the number 12: put it",
        ),
    ],
)
def test_an_error_names_line_key_expectation_and_nearest_name(broken, old, new, line, key, text):
    (problem,) = broken((old, new))
    assert place_and_text(problem)[:2] == (line, key)
    assert text in problem.text


def test_a_missing_key_is_told_where_it_should_stand_with_its_description(broken):
    (problem,) = broken(("  path: teacher\n", ""))
    assert place_and_text(problem)[:2] == (4, "teacher.path")
    assert problem.text.startswith("missing: expected text (folder in diffusers format")


def test_all_errors_are_told_at_once_in_the_order_of_the_file(broken):
    problems = broken(("seed: 7", "seed: x"), ("kind: distill", "kind: distil"), ("  judge: judge", "  jugde: judge"))
    assert [place_and_text(problem)[:2] for problem in problems] == [
        (3, "seed"),
        (12, "stages[1].kind"),
        (24, "stages[2].jugde"),
    ]


def test_a_stage_of_unknown_kind_is_told_nothing_about_other_kinds(broken):
    (problem,) = broken(("kind: trajectories", "kind: dance"))
    assert place_and_text(problem)[:2] == (9, "stages[0].kind")


def test_a_duplicated_key_names_both_lines_and_hides_no_other_error(broken):
    twice, other = broken(("seed: 7", "seed: 7\nseed: 8"), ("    num_prompts: 8", "    num_prompts: none"))
    assert place_and_text(twice) == (4, "seed", "the key is given twice, on lines 3 and 4")
    assert place_and_text(other)[:2] == (24, "stages[2].num_prompts")


def test_an_error_is_printed_with_file_line_and_column(broken, root):
    (problem,) = broken(("  guidance_scale: 8", "  guidance: 8"))
    assert str(problem) == f"{root / 'recipe.yaml'}:7:3: teacher.guidance: unknown key; did you mean guidance_scale?"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "recipe.yaml: the file is empty"),
        (b"# only a comment\n", "recipe.yaml: the file is empty"),
        (b"- a\n- b\n", "recipe.yaml:1:1: expected a mapping with the keys name, seed, teacher, stages"),
        (b"just words", "recipe.yaml:1:1: expected a mapping with the keys name, seed, teacher, stages"),
        (b"name: x\nteacher:\n\tpath: y\n", "recipe.yaml:3:1: a tab on line 3: YAML takes no tabs, use spaces"),
        (b"name: x\nteacher:\n  path: y\n\tfamily: sd\n", "recipe.yaml:4:1: a tab on line 4"),
        (b"name:\tx\n", "recipe.yaml:1:6: a tab on line 1"),
        (
            b"name: x\nteacher:\n  path: y\n   family: sd\n",
            "recipe.yaml:4:10: a key is not expected here: check the indent",
        ),
        (b"name: x\nteacher:\n    path: y\n  family: sd\n", "recipe.yaml:4:3: the indentation does not fit the block"),
        (b"name: what: that\n", "recipe.yaml:1:11: a key is not expected here"),
        (b"name: x\nstages: [\n", "recipe.yaml:3:1: the file ends inside a bracket or quotes"),
        (b"name: 'x\n", "the file ends inside a bracket or quotes (it began on line 1)"),
        (b"name: *x\n", "recipe.yaml:1:7: no anchor was given for the alias 'x'"),
        (b"name: x\n---\nname: y\n", "recipe.yaml:2:1: not valid YAML: but found another document"),
        (b"name: x\nruns: caf\xe9\n", "recipe.yaml:2:10: not UTF-8 (byte 0xe9): save the file as UTF-8"),
        (b"name: x\nruns: a\x00b\n", "recipe.yaml:2:8: the character U+0000 is not allowed in YAML"),
        (b"[" * 600, "recipe.yaml:1:1: nested too deeply to be a recipe"),
    ],
)
def test_what_is_no_recipe_at_all_is_one_clear_line(root, content, text):
    (root / "recipe.yaml").write_bytes(content)
    with pytest.raises(RecipeError) as raised:
        load(root / "recipe.yaml")
    (problem,) = raised.value.problems
    assert str(problem).startswith(str(root / text) if text.startswith("recipe.yaml") else str(root))
    assert text in str(problem)
    assert "\n" not in str(problem)


def test_a_byte_order_mark_is_not_part_of_the_first_key(root):
    (root / "recipe.yaml").write_bytes(b"\xef\xbb\xbf" + (root / "good.yaml").read_bytes())
    assert load(root / "recipe.yaml") == load(root / "good.yaml")


def test_a_missing_file_names_the_nearest_recipe_beside_it(root):
    with pytest.raises(RecipeError, match=r"god\.yaml: no such file; did you mean .*/good\.yaml\?$"):
        load(root / "god.yaml")


def test_a_folder_is_not_read_as_a_recipe(root):
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        load(root)


def test_what_every_setting_must_be_can_be_said():
    """Of each form that a value may have, down to the entries of lists and of mappings whose names are free."""
    schema = json_schema()
    waiting, num_described = [errors._inline(schema, schema["$defs"])], 0
    while waiting:
        one = waiting.pop()
        waiting += one.get("properties", {}).values()
        waiting += [*one.get("anyOf", []), *one.get("oneOf", []), *one.get("prefixItems", [])]
        waiting += [part for name in ("items", "additionalProperties") if isinstance(part := one.get(name), dict)]
        if {"type", "anyOf", "enum", "const", "discriminator"} & one.keys():  # else anything may stand there
            assert errors.expected(one)
            num_described += 1
    assert num_described > 300


@pytest.mark.parametrize("value", ["FP16", "a-b", "7", "[fp16]"])
def test_a_variant_that_no_file_has_is_an_error_in_words(broken, value):
    (problem,) = broken(("  family: sdxl", f"  family: sdxl\n  variant: {value}"))
    assert "expected small letters a to z, digits and _, such as fp16 or null, found" in problem.text


def test_a_number_of_groups_is_said():
    schema = {"type": "integer", "exclusiveMinimum": 0, "maximum": 65_536, "multipleOf": 4}
    assert errors.expected(schema) == "a multiple of 4 above 0 and at most 65,536"
