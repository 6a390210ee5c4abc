"""`start:` in a recipe: what stands for it, where its errors point, what it may be."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import runs
from mlcm_rl.recipe import Evaluate, Recipe, Start
from mlcm_rl.recipe.experiment import gamma_of, student_before
from mlcm_rl.recipe.file import check, load
from mlcm_rl.recipe.paths import Folders
from mlcm_rl.recipe.tree import RecipeError

TEXT = """\
name: tuned
teacher: {path: teacher, family: sdxl}
stages:
  - kind: feedback
    start: START
    prompts: prompts.txt
    rewards: [{name: brightness}]
    guard: {rewards: [{name: colourfulness}]}
    num_steps: 1
    batch_size: 2
  - kind: evaluate
    prompts: absent.txt
"""


@pytest.fixture
def problems(tiny_sdxl, tmp_path, monkeypatch):
    """Returns what is wrong with a `start`, by key and line; the prompts of the last stage are missing on purpose."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher").symlink_to(tiny_sdxl)
    runs.write_prompts(tmp_path)
    save_file({"lora_unet_conv_in.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")

    def of(start: str) -> list[str]:
        (tmp_path / "recipe.yaml").write_text(TEXT.replace("START", start))
        with pytest.raises(RecipeError) as error:
            load(tmp_path / "recipe.yaml", root=tmp_path)
        assert "recipe.yaml:12:5: stages[1].prompts: no such file: absent.txt" in str(error.value)
        found = str(error.value).replace(f"{tmp_path}/", "").splitlines()
        return [line.removeprefix("recipe.yaml:") for line in found if "stages[0]" in line]

    return of


def test_errors_are_on_the_line_of_the_file_whatever_stages_stand_for_a_start(problems, tmp_path):
    assert problems("{path: lora.safetensors, gamma: 1.0, grid: lcm}") == []
    (missing,) = problems("lora.safetensor")
    assert missing.startswith("5:5: stages[0].start: no such file or folder: lora.safetensor; did you mean lora")
    (unstated,) = problems("{path: lora.safetensors, gamma: 1.0}")
    assert unstated.startswith("5:13: stages[0].start.path: lora.safetensors does not state how it is sampled: write")
    assert "{path: lora.safetensors, grid: ...}, where grid: lcm, trailing, milestones, or the list" in unstated
    (steps,) = problems("{path: lora.safetensors, gamma: 1.0, grid: [999, 400]}")
    assert "stages[0].sampling_steps: expected 2, as many as the times of its start's grid [999, 400], found 4" in steps
    (previous,) = problems("previous")
    assert "stages[0].start: start: previous is the student of the stage before: it needs an earlier" in previous
    (tmp_path / "lora.bin").write_bytes(b"")
    (other,) = problems("lora.bin")
    assert "expected a .safetensors file" in other


def test_a_stage_is_placed_where_its_file_has_it(problems, tmp_path):
    problems("{path: lora.safetensors, gamma: 1.0, grid: [999, 749, 499, 249]}")
    text = (tmp_path / "recipe.yaml").read_text().replace("absent.txt", "prompts.txt")
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load(tmp_path / "recipe.yaml", ["stages.1.num_prompts=6"], root=tmp_path)
    assert [stage.kind for stage in recipe.stages] == ["start", "feedback", "evaluate"]
    assert [recipe.place(i) for i in range(3)] == ["stages[0].start", "stages[0]", "stages[1]"]
    seeded = recipe.model_copy(update={"seed": 5})
    assert seeded.place(1) == "stages[0]"
    assert Recipe.model_validate(recipe.model_dump()).place(1) == "stages[1]"


def test_a_name_of_the_hub_is_answered_with_how_to_fetch_it(problems):
    (line,) = problems("latent-consistency/lcm-lora-sdxl")
    assert (
        "stages[0].start: latent-consistency/lcm-lora-sdxl is not a folder here, and students are not fetched" in line
    )
    assert "`hf download latent-consistency/lcm-lora-sdxl --local-dir FOLDER`" in line


def test_a_run_that_is_not_there_is_no_name_of_the_hub(problems):
    (line,) = problems("runs/lcm")
    assert "there is no run runs/lcm: `mlcm run` its recipe first" in line
    assert "hf download" not in line


def test_a_missing_file_is_no_name_of_the_hub(problems):
    (line,) = problems("lcm-lora-sdxl/pytorch_lora_weights.safetensors")
    assert "no such file or folder: lcm-lora-sdxl/pytorch_lora_weights.safetensors" in line
    assert "hf download" not in line


def test_float16_is_refused_over_any_lora_whoever_distilled_it(problems, tmp_path):
    """As over one that the recipe distils; a denoiser's own weights are trained in float32."""
    path = tmp_path / "recipe.yaml"
    problems("{path: lora.safetensors, gamma: 1.0, grid: lcm}")
    text = path.read_text().replace("absent.txt", "prompts.txt\n    num_prompts: 6")
    path.write_text(text.replace("family: sdxl}", "family: sdxl, dtype: float16}"))
    with pytest.raises(RecipeError, match=r"stages\[0\]\.precision: no would train in the float16 of teacher\.dtype"):
        load(path, root=tmp_path)
    load(path, ["stages.0.precision=bf16"], root=tmp_path)
    save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    load(path, root=tmp_path)


def test_a_lora_that_needs_its_alpha_is_told_before_any_stage_runs(problems, tmp_path):
    save_file({"base_model.model.conv_in.lora_A.weight": torch.zeros(1)}, tmp_path / "peft.safetensors")
    (unstated,) = problems("{path: peft.safetensors, gamma: 1.0, grid: lcm}")
    assert "does not state its alpha: write {path: peft.safetensors, alpha: ...}" in unstated
    assert problems("{path: peft.safetensors, gamma: 1.0, grid: lcm, alpha: 8.0}") == []
    (alpha,) = problems("{path: teacher, gamma: 1.0, grid: lcm, alpha: 8.0}")
    assert "alpha has no effect, since teacher is no LoRA of a file: leave it out" in alpha


def test_a_recipe_does_not_start_from_its_own_run(problems, tmp_path):
    for name in ("tuned", "tuned-before"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        save_file({"lora_unet_x.lora_up.weight": torch.zeros(1)}, tmp_path / "runs" / name / "one.safetensors")
    for path in ("runs/tuned", "./runs/../runs/tuned/one.safetensors"):
        (own,) = problems(f"{{path: {path}, gamma: 1.0, grid: lcm}}")
        assert "is in the folder of this recipe's own run" in own
        assert "take another name than tuned" in own
    assert problems("{path: runs/tuned-before, gamma: 1.0, grid: lcm}") == []


def test_steps_are_those_of_the_grid_however_often_its_student_is_tuned(tiny_sdxl, tmp_path):
    prompts = runs.write_prompts(tmp_path)
    save_file({"lora_unet_conv_in.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    start = {"path": str(tmp_path / "lora.safetensors"), "gamma": 1.0, "grid": [999, 400]}
    first = runs.tuning("feedback", prompts, start=start)
    for steps in (2, 4):
        stages = [first, runs.tuning("dpo", prompts, start="previous", sampling_steps=steps)]
        found = check(runs.recipe(tiny_sdxl, tmp_path, stages), Folders(tmp_path, tmp_path))
        assert [one.key for one in found] == ([] if steps == 2 else [("stages", 2, "sampling_steps")])


def test_a_start_is_a_stage_and_read_again_it_is_the_same(tiny_sdxl, tmp_path):
    prompts = runs.write_prompts(tmp_path)
    stages = [
        runs.trajectories(prompts),
        runs.distill(),
        runs.tuning("feedback", prompts, gamma=0.5),
        runs.tuning("dpo", prompts, start="previous"),
        runs.tuning("policy", prompts, start={"path": "runs/x", "gamma": 0.25}),
        Evaluate(prompts=prompts, student="runs/y"),
    ]
    recipe = runs.recipe(tiny_sdxl, tmp_path, stages)
    kinds = ["trajectories", "distill", "feedback", "dpo", "start", "policy", "start", "evaluate"]
    assert [stage.kind for stage in recipe.stages] == kinds
    assert recipe.stages[4] == Start(path="runs/x", gamma=0.25)
    assert Recipe.model_validate(json.loads(recipe.model_dump_json())) == recipe
    assert [student_before(recipe.stages, i) for i in range(8)] == [None, None, 1, 2, None, 4, None, 6]
    assert [gamma_of(recipe.stages, i) for i in (1, 2, 3, 4, 5, 6)] == [1.0, 0.5, 0.5, 0.25, 1.0, None]


def test_a_run_is_found_from_the_working_directory_without_a_note(tiny_sdxl, tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "recipe.yaml").write_text(TEXT.replace("START", "runs/x").replace("teacher,", "../t,"))
    (tmp_path / "runs" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    notes: list[str] = []
    recipe = load(Path("recipes/recipe.yaml"), tell=notes.append)
    assert (recipe.stages[0].path, notes) == ("runs/x", [])
