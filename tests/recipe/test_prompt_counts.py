"""Prompt files with fewer prompts than a stage is to use are reported when a recipe is read."""

import pytest

from mlcm_rl.recipe.file import load
from mlcm_rl.recipe.tree import RecipeError

TUNE = """  - kind: dpo
    prompts: data/prompts.txt
    num_steps: 1
    batch_size: 1
    rewards: [brightness]
    guard: {rewards: [colourfulness]}
"""


@pytest.fixture
def read(root):
    """What is reported of the good recipe with these prompts, `stage` before its last, and changes of its text."""

    def read(prompts: str, stage: str = "", *changes: tuple[str, str]) -> list[str]:
        (root / "data" / "prompts.txt").write_text(prompts, encoding="utf-8")
        text = (root / "good.yaml").read_text("utf-8").replace("  - kind: evaluate\n", stage + "  - kind: evaluate\n")
        for old, new in changes:
            text = text.replace(old, new)
        (root / "recipe.yaml").write_text(text, encoding="utf-8")
        lines: list[str] = []
        load(root / "recipe.yaml", root=root, tell=lines.append)
        return lines

    return read


def problem_of(read, *arguments):
    with pytest.raises(RecipeError) as raised:
        read(*arguments)
    (problem,) = raised.value.problems
    return problem


def test_an_evaluation_of_more_prompts_than_there_are_is_refused_at_its_line(read):
    of_text_file = ("data/eval.jsonl", "data/prompts.txt")
    problem = problem_of(read, "a cat\n\na dog\na hen\n", "", of_text_file)
    assert problem.key == ("stages", 2, "num_prompts")
    assert problem.place.line == 23
    assert "data/prompts.txt holds 3 prompts, num_prompts is 8: write num_prompts: 3" in problem.text
    default = problem_of(read, "a cat\n", "", of_text_file, ("    num_prompts: 8\n", ""))
    assert default.place.line == 21  # the stage, which has no such key
    assert "holds 1 prompt, num_prompts is 64" in default.text
    assert read("a cat\n" * 8, "", of_text_file) == []


def test_a_guard_without_two_prompts_to_watch_is_refused(read):
    assert "holds 1 prompt for the guard" in problem_of(read, "a cat\n", TUNE).text
    problem = problem_of(read, "a cat\n一只猫\n", TUNE + "    languages: {en: 1}\n")
    assert problem.key == ("stages", 2, "prompts")  # of one language there is one
    assert problem.place.line == 22
    assert read("a cat\na dog\n", TUNE) == []


def test_a_guard_that_is_to_watch_more_than_there_are_is_a_note(read):
    (note,) = read("a cat\na dog\n", TUNE, ("[colourfulness]}", "[colourfulness], num_prompts: 9}"))
    assert "stages[2].guard.num_prompts: is 9, and data/prompts.txt holds 2 prompts: the guard watches these" in note
    assert read("a cat\na dog\n", TUNE, ("[colourfulness]}", "[colourfulness], num_prompts: 2}")) == []
