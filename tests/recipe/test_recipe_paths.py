"""The meaning of paths in a recipe, for every working directory."""

import os
from pathlib import Path

import pytest

from mlcm_rl.pipeline.fingerprint import locate
from mlcm_rl.recipe import paths
from mlcm_rl.recipe.file import load
from mlcm_rl.recipe.tree import RecipeError

SHIPPED = Path(__file__).parents[2] / "recipes"
RECORDED = ["trajectories-e09327c42d0ddccb", "distill-4ca666c98aacc2da"]  # of emoji_demo, in users' folders
TRAINED = """
  - kind: feedback
    prompts: data/prompts.txt
    batch_size: 2
    num_steps: 1
    rewards: [{name: trained, settings: {folder: taste}}]
    guard: {rewards: [{name: colourfulness}]}
"""


@pytest.fixture
def notes():
    return []


@pytest.fixture
def load_beside(root, notes):
    """A function that loads the good recipe, moved to a folder beside the one that all it names is in."""

    def loaded(*overrides: str, text: str | None = None, working: Path = root):
        (root / "mine").mkdir(exist_ok=True)
        file = root / "mine" / "good.yaml"
        file.write_text(text or (root / "good.yaml").read_text("utf-8"), "utf-8")
        return load(file, overrides, working, tell=notes.append)

    return loaded


@pytest.mark.parametrize("working", [SHIPPED.parent, SHIPPED, SHIPPED / "launch", Path("/")])
def test_a_shipped_recipe_is_the_same_run_from_any_folder(working, monkeypatch):
    monkeypatch.chdir(working)
    as_recorded = ["stages.trajectories.solver_steps=48", "stages.trajectories.keep=all"]  # once the defaults
    recipe, stages = load(SHIPPED / "emoji_demo.yaml", as_recorded, working, tell=pytest.fail), []
    for stage in recipe.stages[:2]:
        stages.append(locate(stage, recipe, stages))
    assert [one.folder for one in stages] == [Path("runs/stages") / name for name in RECORDED]


def test_paths_are_relative_to_the_recipes_file(root, load_beside, notes):
    text = (root / "good.yaml").read_text("utf-8").replace("path: teacher", "path: ../teacher")
    for name in ("data/prompts.txt", "data/eval.jsonl"):
        text = text.replace(name, f"../{name}")
    recipe = load_beside(text=text.replace("judge: judge", "judge: ../judge"))
    assert (recipe.teacher.path, recipe.stages[0].prompts, recipe.stages[2].judge) == (
        "teacher",
        "data/prompts.txt",
        "judge",
    )
    assert (recipe.runs, notes) == ("runs", [])
    elsewhere = load_beside(text=text.replace("judge: judge", "judge: ../judge"), working=root / "data")
    assert elsewhere.teacher.path == str(root / "teacher")


def test_a_path_of_the_working_directory_is_still_read_and_the_new_form_told(root, load_beside, notes):
    recipe = load_beside()
    assert (recipe.teacher.path, recipe.stages[0].prompts) == ("teacher", "data/prompts.txt")
    assert len(notes) == 4
    assert "teacher.path: teacher is read in the working directory" in notes[0]
    assert notes[0].endswith("write ../teacher")


def test_of_two_meanings_the_recipes_folder_wins_and_that_is_said(root, load_beside, notes):
    (root / "mine" / "data").mkdir(parents=True)
    (root / "mine" / "data" / "prompts.txt").write_text("a dog")
    assert load_beside().stages[0].prompts == "mine/data/prompts.txt"
    (line,) = [line for line in notes if "stages[0].prompts" in line]
    assert f"data/prompts.txt is beside the recipe and in the working directory; {root / 'mine'}" in line


def test_an_override_is_relative_to_the_working_directory(root, load_beside, notes):
    (root / "mine").mkdir()
    (root / "mine" / "other.txt").write_text("a dog")
    (root / "other.txt").write_text("a dog")
    assert load_beside("stages.0.prompts=other.txt").stages[0].prompts == "other.txt"
    assert not any("other.txt" in line for line in notes)
    (root / "other.txt").unlink()
    with pytest.raises(RecipeError, match=r"no such file: other\.txt") as raised:
        load_beside("stages.0.prompts=other.txt")
    assert raised.value.note == f"paths on the command line are relative to the working directory, here {root}"


def test_a_path_that_is_nowhere_is_told_as_written_with_both_folders(root, load_beside):
    (root / "data" / "prompts.txt").unlink()
    with pytest.raises(RecipeError, match=r"no such file: data/prompts\.txt") as raised:
        load_beside()
    assert str(root / "mine") in raised.value.note
    assert f"looked for from the working directory too, {root})" in raised.value.note


def test_a_link_before_dots_is_followed_as_the_system_does(root, load_beside, notes):
    (root / "far" / "deep").mkdir(parents=True)
    (root / "far" / "other.txt").write_text("a dog")
    (root / "mine").mkdir()
    (root / "mine" / "link").symlink_to(root / "far" / "deep")
    text = (root / "good.yaml").read_text("utf-8").replace("data/prompts.txt", "link/../other.txt")
    assert os.path.samefile(load_beside(text=text).stages[0].prompts, root / "far" / "other.txt")


@pytest.fixture
def with_taste(root):
    """The good recipe with a reward that reads a folder, which its fingerprint names as the file does."""
    (root / "taste").mkdir()
    (root / "taste" / "reward.json").write_text("{}")
    text = (root / "good.yaml").read_text("utf-8")
    head, tail = text.split("  - kind: evaluate")
    (root / "good.yaml").write_text(head + TRAINED.lstrip("\n") + "  - kind: evaluate" + tail)
    return root / "good.yaml"


def fingerprint(recipe) -> str:
    return locate(recipe.stages[2], recipe, []).fingerprint


def test_a_rewards_path_is_found_and_hashed_alike_from_anywhere(root, with_taste, monkeypatch):
    monkeypatch.chdir(root)
    here = load(with_taste, root=root)
    before = fingerprint(here)
    assert here.stages[2].rewards[0].settings == {"folder": "taste"}
    monkeypatch.chdir(root / "data")
    there = load(with_taste, root=root / "data")
    assert there.stages[2].rewards[0].settings == {"folder": str(root / "taste")}
    assert fingerprint(there) == before
    (root / "taste" / "reward.json").write_text('{"other": 1}')
    assert fingerprint(load(with_taste, root=root / "data")) != before


def test_a_recorded_recipe_finds_its_paths_from_anywhere_and_after_a_move(root, with_taste, monkeypatch):
    monkeypatch.chdir(root)
    folder = root / "runs" / "stages" / "feedback-0"
    folder.mkdir(parents=True)
    recipe = load(with_taste, root=root)
    described = {"recipe": recipe.model_dump(mode="json"), **paths.record(recipe, folder)}
    assert described["working_directory"] == "../../.."
    assert paths.recorded(described, folder) == recipe
    before = fingerprint(recipe)
    monkeypatch.chdir("/")
    there = paths.recorded(described, folder)
    assert there.teacher.path == str(root / "teacher")
    assert there.stages[2].rewards[0].settings == {"folder": str(root / "taste")}
    assert there.runs == str(root / "runs")
    assert fingerprint(there) == before
    older = paths.recorded({"recipe": described["recipe"]}, folder)  # which did not say where it was made
    assert older == there
    new_root = root.with_name(root.name + "-moved")
    root.rename(new_root)
    assert paths.recorded(described, new_root / folder.relative_to(root)).teacher.path == str(new_root / "teacher")


def test_a_recipe_read_from_afar_keeps_what_its_rewards_said(root, with_taste, monkeypatch):
    monkeypatch.chdir(root / "data")
    recipe, folder = load(with_taste, root=root / "data"), root / "data" / "runs" / "stages" / "feedback-0"
    described = {"recipe": recipe.model_dump(mode="json"), **paths.record(recipe, folder)}
    assert described["written"] == {str(root / "taste"): "taste"}
    assert fingerprint(paths.recorded(described, folder)) == fingerprint(recipe)


MADE = """# A recipe of made data.
#   python build/make.py --all      (writes ../data/made)
#   mlcm run recipe.yaml
"""


def test_a_folder_that_the_recipes_own_command_makes_is_missed_once(root):
    text = (root / "good.yaml").read_text("utf-8")
    for file in ("data/prompts.txt", "data/eval.jsonl"):
        text = text.replace(file, f"../data/made/{Path(file).name}")
    place = root / "recipes" / "recipe.yaml"
    place.parent.mkdir()
    for folder in ("teacher", "judge"):
        text = text.replace(f": {folder}", f": ../{folder}")
    messages = []
    for header in (MADE, ""):
        place.write_text(header + text, "utf-8")
        with pytest.raises(RecipeError) as raised:
            load(place, root=root)
        (problem,) = raised.value.problems
        messages.append(problem.text)
    without = "no such folder: ../data/made, with what 2 settings name"
    assert messages == [f"{without}; the recipe's first lines say what makes it: python build/make.py --all", without]
