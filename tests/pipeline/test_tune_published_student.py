"""recipes/tune_published_student.yaml as it stands but for sizes, on random weights in each published layout."""

import json
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

import runs
import tiny
from mlcm_rl import pipeline
from mlcm_rl.models import students, teachers
from mlcm_rl.models.unet import LORA_TARGETS
from mlcm_rl.recipe import Teacher
from mlcm_rl.recipe.file import load
from teacher_loras import as_kohya, write

RECIPE = Path(__file__).parents[2] / "recipes" / "tune_published_student.yaml"
TIMES = {"lcm": [999, 499], "trailing": [999, 499], "milestones": [999, 499]}
# Layout of the file, and what its publisher's sampler is, as docs/start_from.md has them.
PUBLISHED = {
    "lcm_lora": ("kohya", {"gamma": 1.0, "grid": "lcm"}),
    "hyper_sd_4_steps": ("kohya", {"gamma": 0.0, "grid": "trailing"}),
    "hyper_sd_unified": ("diffusers", {"gamma": 0.3, "grid": "lcm"}),
    "lightning": ("diffusers", {"gamma": 0.0, "grid": "trailing"}),
    "tcd": ("kohya", {"gamma": 0.3, "grid": "lcm"}),
    "pcm": ("peft", {"gamma": 0.0, "grid": "trailing", "num_segments": 2, "alpha": 8.0}),
    "tlcm": ("peft", {"gamma": 1.0, "grid": "milestones", "alpha": 8.0}),
}


def published(layout: str, teacher: Path, folder: Path) -> Path:
    """Write random weights of a LoRA over `teacher` in a published layout."""
    if layout == "peft":
        base = teachers.load(Teacher(path=str(teacher), family="sdxl", guidance_scale=1.0), "cpu")
        theirs = get_peft_model(base.denoiser, LoraConfig(r=4, target_modules=LORA_TARGETS))
        tiny.perturb([parameter for parameter in theirs.parameters() if parameter.requires_grad])
        save_file(get_peft_model_state_dict(theirs), folder / "adapter.safetensors")
        return folder / "adapter.safetensors"
    file = write(teacher, folder / "lora", texts=())
    return as_kohya(file, folder / "kohya.safetensors", "sdxl") if layout == "kohya" else file


@pytest.mark.parametrize(
    "name",
    [name if name == "tlcm" else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED],
)
def test_a_published_student_is_tuned_by_the_recipe(tiny_sdxl, tmp_path, monkeypatch, name):
    layout, sampler = PUBLISHED[name]
    file, prompts = published(layout, tiny_sdxl, tmp_path), runs.write_prompts(tmp_path)
    small = [
        *(f"runs={tmp_path / 'runs'}", "device=cpu", "trackers=[]", "samples.sampling_steps=[2]"),
        *(f"teacher.path={tiny_sdxl}", "teacher.revision=null", "teacher.dtype=float32"),
        *(f"stages.start.{key}={value}" for key, value in {"path": file, **sampler}.items()),
        *(f"stages.feedback.prompts={prompts}", "stages.feedback.languages={}", "stages.feedback.num_steps=2"),
        *("stages.feedback.batch_size=2", "stages.feedback.gradient_accumulation=1", "stages.feedback.precision=no"),
        *("stages.feedback.sampling_steps=2", "stages.feedback.rewards=[brightness]", "stages.feedback.log_every=1"),
        "stages.feedback.guard={rewards: [colourfulness], num_prompts: 2, every: 1}",
        *(f"stages.evaluate.prompts={prompts}", "stages.evaluate.num_prompts=2", "stages.evaluate.teacher_steps=[2]"),
        *("stages.evaluate.sampling_steps=[2]", "stages.evaluate.rewards=[brightness, colourfulness]"),
    ]
    start, feedback, evaluate = pipeline.run(load(RECIPE, small))
    described = json.loads((start.folder / "student" / "student.json").read_text())
    assert (described["gamma"], described["num_segments"]) == (sampler["gamma"], sampler.get("num_segments", 1))
    log = [json.loads(line) for line in (feedback.folder / "log.jsonl").read_text().splitlines()]
    assert [one["grad_norm"] > 0 for one in log] == [True, True]
    base = teachers.load(Teacher(path=str(tiny_sdxl), family="sdxl", guidance_scale=1.0), "cpu")
    tuned = students.load_student(base, feedback.folder / "student")
    assert tuned.tuned
    assert tuned.default_gamma == sampler["gamma"]
    assert tuned.grid.times(2) == TIMES[sampler["grid"]]
    rows = json.loads((evaluate.folder / "report.json").read_text())["rows"]
    assert {row["name"] for row in rows} == {"teacher", "start", "feedback"}
