"""The recipes of other methods run whole on a tiny checkpoint in SDXL's layout, as shipped but for what size forces."""

import json
from pathlib import Path

import pytest

import runs
import tiny
from mlcm_rl import pipeline
from mlcm_rl.models import students
from mlcm_rl.recipe import Distill, Feedback, Trajectories
from mlcm_rl.recipe.file import load

# recipe -> K of its student, what the log of its last distill stage has
EXPECTED = {
    "sdxl_pcm": (4, {"adversarial", "heads_loss"}),
    "sdxl_lightning": (1, {"adversarial", "heads_loss"}),
    "sdxl_hyper_sd": (1, {"adversarial", "heads_loss"}),
    "sdxl_dmd2": (1, {"matching", "fake_loss", "adversarial", "heads_loss"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_a_rivals_recipe_runs_end_to_end(tmp_path, name):
    """Without Hyper-SD's feedback, whose rewards have weights; that stage is recipes/sdxl_feedback.yaml's."""
    overrides = [f"teacher.path={tiny.sdxl(tmp_path / 'teacher')}", f"runs={tmp_path / 'runs'}", "device=cpu"]
    if name == "sdxl_dmd2":
        overrides.append(f"stages.0.images={runs.write_images(tmp_path)}")
    recipe = load(Path("recipes") / f"{name}.yaml", [*overrides, "samples.prompts=[]"])
    small = {
        Trajectories: {"num_trajectories": 4, "num_held_out": 2, "solver_steps": 32 if "lightning" in name else 8},
        Distill: {"num_steps": 1, "log_every": 1, "batch_size": 4, "gradient_accumulation": 2},
    }

    def shortened(stage):
        changes = small.get(type(stage), {"num_prompts": 2, "sampling_steps": [2], "rewards": []})
        if isinstance(stage, Distill) and stage.adversarial:
            changes = changes | {"adversarial": stage.adversarial.model_copy(update={"warmup_steps": 0})}
        return stage.model_copy(update=changes)

    stages = [shortened(stage) for stage in recipe.stages if not isinstance(stage, Feedback)]
    finished = pipeline.run(recipe.model_copy(update={"stages": stages}))
    student = next(one.folder for one in reversed(finished) if one.kind == "distill")
    num_segments, logged = EXPECTED[name]
    assert students.describe(student / "student")["num_segments"] == num_segments
    records = [json.loads(line) for line in (student / "log.jsonl").read_text().splitlines()]
    assert all(logged < record.keys() for record in records if "loss" in record)
    assert (finished[-1].folder / "report.html").is_file()
