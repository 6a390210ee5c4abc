"""What is wrong with a teacher's text adapter, or with a stage that makes one, before anything is loaded."""

import pytest

from mlcm_rl.recipe.file import load
from mlcm_rl.recipe.tree import key_text

ON_LINE = "source: online\n    target: consistency\n    prompts: data/prompts.txt\n    num_segments: [8, 4, 2, 1]"
STAGE = """  - kind: adapt_text
    prompts: data/prompts.txt
    encoder: encoder
    num_steps: 3
    batch_size: 4
  - kind: evaluate
"""
ADAPT = ("  - kind: evaluate\n", STAGE)


@pytest.fixture
def folders(root):
    """A folder with an encoder, and one with an adapter, beside the recipe."""
    for name, file in (("encoder", "config.json"), ("adapter", "text_adapter.json")):
        (root / name).mkdir()
        (root / name / file).write_text("{}")
    return root


@pytest.mark.parametrize(
    ("changes", "key", "text"),
    [
        (
            [("path: teacher", "path: teacher\n  text_adapter: adaptr")],
            "teacher.text_adapter",
            "no such folder: adaptr",
        ),
        ([("path: teacher", "path: teacher\n  text_adapter: data")], "teacher.text_adapter", "no text_adapter.json"),
        (
            [ADAPT, ("path: teacher", "path: teacher\n  text_adapter: adapter")],
            "teacher.text_adapter",
            "stages[2] (adapt_text) makes one itself: leave it out",
        ),
        (
            [("  - kind: evaluate\n", STAGE.replace("encoder: encoder", "encoder: data"))],
            "stages[2].encoder",
            "the folder data holds no config.json",
        ),
        (
            [("  - kind: evaluate\n", STAGE.replace("prompts.txt", "eval.jsonl"))],
            "stages[2].prompts",
            "expected data/prompts.txt, the prompts of the trajectories before it, found data/eval.jsonl",
        ),
        (
            [ADAPT, ("precision: no", "precision: bf16"), ("path: teacher", "path: teacher\n  dtype: float16")],
            "teacher.dtype",
            "write bfloat16",
        ),
    ],
)
def test_what_does_not_fit_is_told_with_its_key(broken, folders, changes, key, text):
    (problem,) = broken(*changes)
    assert key_text(problem.key) == key
    assert text in problem.text


def test_a_family_whose_prompts_become_more_is_refused_with_those_that_can(broken, folders):
    problems = broken(ADAPT, ("family: sdxl", "family: qwen_image"))
    (text,) = [one.text for one in problems if "text adapter" in one.text]
    assert "qwen_image takes more of a prompt than a text adapter makes: name a teacher of sdxl, sd, kolors" in text


def test_a_stage_needs_trajectories_and_a_loss(broken, folders):
    trajectories = "  - kind: trajectories\n    prompts: data/prompts.txt\n    num_trajectories: 64\n"
    (problem,) = broken(ADAPT, (trajectories, ""), ("precision: no", f"precision: no\n    {ON_LINE}"))
    assert problem.text == "adapt_text needs an earlier trajectories stage"
    (problem,) = broken(ADAPT, overrides=("stages.adapt_text.features=0", "stages.adapt_text.outputs=0"))
    assert "features and outputs are both 0" in problem.text


def test_a_good_stage_is_read_with_its_folder_as_this_process_sees_it(folders, tmp_path, monkeypatch):
    path = folders / "recipe.yaml"
    path.write_text((folders / "good.yaml").read_text("utf-8").replace(*ADAPT), "utf-8")
    monkeypatch.chdir(folders.parent)
    recipe = load(path, ["teacher.text_adapter=null"], folders.parent)
    assert recipe.stages[2].encoder == f"{folders.name}/encoder"
    assert recipe.stages[2].languages == ["zh"]
