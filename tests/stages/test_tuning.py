"""What the three stages of preference learning share: roles over one set of weights, resumption, refusals."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from tuning_runs import VARIANTS, adapter_of, over_both, records, scored_by_length, student_of, tune

import runs
import tiny
from mlcm_rl import pipeline
from mlcm_rl.models import students, teachers
from mlcm_rl.models.client_files import KOHYA_FILE
from mlcm_rl.models.lora_files import LORA_FILE
from mlcm_rl.pipeline import finished_runs
from mlcm_rl.preference import tuning
from mlcm_rl.rewards import RewardError
from mlcm_rl.training.loop import Runtime
from mlcm_rl.training.seeding import generator

SOON = ("feedback", "feedback-surrogate", "dpo", "policy")  # forms that differ most in what a checkpoint holds


def test_a_fresh_preference_adapter_changes_nothing_and_the_reference_is_the_distilled_student(distilled):
    recipe, (_, folder) = distilled
    student = student_of(distilled)
    prompts = tuning.Prompts(runs.tuning("dpo", recipe.stages[0].prompts), student.base, 0)
    begun = tuning.start(student.base, prompts.draw(0, 2), [generator(0), generator(1)])
    base = teachers.load(recipe.teacher, "cpu")
    alone = students.load_student(base, folder / "student")
    t, s = student.jump(0, 2)
    with torch.no_grad():
        expected = base.x0(alone.denoiser, begun.noise, t, begun.conditioning)
        teacher = base.x0(base.denoiser, begun.noise, t, begun.conditioning)
        torch.testing.assert_close(student.x0(begun.noise, t, s, begun.conditioning), expected, rtol=0, atol=1e-4)
        tiny.perturb(list(student.parameters.values()))
        moved = student.x0(begun.noise, t, s, begun.conditioning)
        reference = student.reference_x0(begun.noise, t, s, begun.conditioning)
    torch.testing.assert_close(reference, expected, rtol=0, atol=1e-4)
    assert (moved - reference).abs().max() > 1e-3
    assert (teacher - reference).abs().max() > 1e-3  # the reference is not the bare teacher
    assert torch.equal(student.x0(begun.noise, t, s, begun.conditioning), moved)  # and the policy is back


def test_only_the_preference_adapter_asks_for_gradients_also_after_every_switch(distilled):
    student = student_of(distilled)
    for _ in range(2):
        asking = [name for name, value in student.denoiser.named_parameters() if value.requires_grad]
        assert asking
        assert all(".preference." in name for name in asking)
        with students.as_reference(student.denoiser):
            assert [name for name, value in student.denoiser.named_parameters() if value.requires_grad] == asking


def test_a_switch_has_the_bits_of_pefts_own_and_walks_no_parameters(distilled, monkeypatch):
    student = student_of(distilled)
    tiny.perturb(list(student.parameters.values()))
    prompts = tuning.Prompts(runs.tuning("dpo", distilled[0].stages[0].prompts), student.base, 0)
    begun = tuning.start(student.base, prompts.draw(0, 2), [generator(0), generator(1)])
    t, s = student.jump(0, 2)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "named_parameters", lambda *_: pytest.fail("a switch walked the parameters"))
        with students.as_reference(student.denoiser):
            pass
    reference = student.reference_x0(begun.noise, t, s, begun.conditioning)
    others = [name for name in student.denoiser.peft_config if name != "preference"]
    for layer in student.denoiser.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter(others, inference_mode=True) if others else layer.enable_adapters(False)
    with torch.no_grad():
        assert torch.equal(student.x0(begun.noise, t, s, begun.conditioning), reference)


@pytest.mark.parametrize(
    ("distilled", "variant"), over_both(["feedback", "dpo", "policy"], "dpo"), indirect=["distilled"]
)
def test_training_changes_nothing_of_the_distilled_student_and_the_teacher_has_left(
    distilled, tmp_path, monkeypatch, variant
):
    seen = {}
    original = tuning.load

    def load(*arguments):
        seen["student"] = student = original(*arguments)
        names = dict(student.denoiser.named_parameters())
        seen["before"] = {name: value.clone() for name, value in names.items() if ".preference." not in name}
        return student

    monkeypatch.setattr(tuning, "load", load)
    tune(distilled, tmp_path, variant, num_steps=5)
    after = dict(seen["student"].denoiser.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in seen["before"].items())
    assert not any(value.numel() for value in seen["student"].base.denoiser.parameters())  # nothing asks the teacher


def test_a_tuned_student_is_read_back_with_both_adapters(distilled, tmp_path):
    recipe, (_, folder) = distilled
    student = student_of(distilled)
    tiny.perturb(list(student.parameters.values()))
    students.save_tuned(student.denoiser, folder / "student", tmp_path / "tuned", 1)
    again = students.load_student(teachers.load(recipe.teacher, "cpu"), tmp_path / "tuned")
    assert again.tuned
    x_t, t = torch.randn(2, *student.base.latent_shape), torch.tensor([999, 499])
    conditioning = student.base.encode_prompts(["a cat", "熊猫"])
    with torch.no_grad():
        expected = student.base.x0(student.denoiser, x_t, t, conditioning)
        assert torch.equal(student.base.x0(again.denoiser, x_t, t, conditioning), expected)
        merged = students.merged(again, torch.float32)
        torch.testing.assert_close(student.base.x0(merged, x_t, t, conditioning), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("distilled", "variant"), over_both(VARIANTS, "dpo", soon=SOON), indirect=["distilled"])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(distilled, tmp_path, variant):
    whole = tune(distilled, tmp_path / "whole", variant, num_steps=3)
    per_step = VARIANTS[variant].get("num_iterations", 1) + 4 * ("surrogate" in variant)  # updates of its heads
    with runs.crashing_at(2 * per_step):
        tune(distilled, tmp_path / "cut", variant, num_steps=3)
    resumed = tune(distilled, tmp_path / "cut", variant, num_steps=3)
    assert records(whole) == records(resumed)
    assert (whole / "guard.json").read_text() == (resumed / "guard.json").read_text()
    expected, result = adapter_of(whole), adapter_of(resumed)
    assert all(torch.equal(expected[name], result[name]) for name in expected)


@pytest.mark.parametrize("variant", ["feedback-all-steps", "feedback-surrogate", "dpo", "policy"])
def test_gradient_checkpointing_changes_no_gradient(distilled, tmp_path, variant):
    plain = tune(distilled, tmp_path / "plain", variant)
    saved = tune(distilled, tmp_path / "saved", variant, gradient_checkpointing=True)
    norms = [[record["grad_norm"] for record in records(folder)] for folder in (plain, saved)]
    assert all(norm > 0 for norm in norms[0])
    assert norms[0] == norms[1]  # not hashed: the same bits


def test_a_recipe_goes_from_trajectories_to_a_tuned_student_that_is_sampled_evaluated_and_exported(tiny_sdxl, tmp_path):
    prompts = runs.write_prompts(tmp_path)
    recipe = runs.whole(tiny_sdxl, tmp_path, num_segments=[2])
    store, student, evaluate = recipe.stages
    evaluate = evaluate.model_copy(update={"rewards": ["brightness", "colourfulness"], "gammas": [0.0]})
    guard = {"rewards": [{"name": "colourfulness", "weight": -1.0}], "num_prompts": 4, "every": 1}  # grey is bright
    tuned = runs.tuning("feedback", prompts, num_steps=3, learning_rate=1e-2, guard=guard)
    recipe = recipe.model_copy(update={"stages": [store, student, tuned, evaluate]})
    *_, feedback_stage, report = pipeline.run(recipe)
    rows = {row["name"] for row in json.loads((report.folder / "report.json").read_text())["rows"]}
    assert rows == {"teacher", "student", "feedback"}
    assert sorted(path.name for path in (feedback_stage.folder / "samples").glob("*.png")) == ["step-000003.png"]

    run = Path(recipe.runs, recipe.name)
    before = finished_runs.sample(student_folder := run / "01-distill", ["a cat"], [2], 0, None, tmp_path / "before")
    after = finished_runs.sample(run, ["a cat"], [2], 0, None, tmp_path / "after")
    assert Image.open(before[0]).tobytes() != Image.open(after[0]).tobytes()  # a run's student is its last one
    assert finished_runs.find_stage(student_folder, ("distill",)).is_dir()
    again = json.loads((finished_runs.evaluate(run, num_prompts=2) / "report.json").read_text())
    assert {row["name"] for row in again["rows"]} == {"teacher", "student", "feedback"}

    exported = finished_runs.export(run, tmp_path / "exported")
    assert "tuned to preferences" in (exported / "README.md").read_text()
    stock = StableDiffusionXLPipeline.from_pretrained(exported)
    base = teachers.load(recipe.teacher, "cpu")
    student = students.load_student(base, feedback_stage.folder / "student")
    x_t, t = torch.randn(1, *base.latent_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([499])
    conditioning = base.encode_prompts(["a cat"])
    with torch.no_grad():
        expected = base.predict(student.denoiser, x_t, t, conditioning)
        torch.testing.assert_close(base.predict(stock.unet, x_t, t, conditioning), expected, rtol=0, atol=1e-4)
        for file in (LORA_FILE, KOHYA_FILE):  # both adapters as one, over the teacher
            stock = StableDiffusionXLPipeline.from_pretrained(recipe.teacher.path)
            stock.load_lora_weights(exported, weight_name=file)
            torch.testing.assert_close(base.predict(stock.unet, x_t, t, conditioning), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", ["feedback", "dpo", "policy"])
def test_frozen_weights_in_float16_are_tuned_over_in_bfloat16(distilled, tmp_path, variant):
    recipe, folders = distilled
    teacher = recipe.teacher.model_copy(update={"dtype": "float16"})
    half = recipe.model_copy(update={"teacher": teacher}), folders
    reward = {"name": "brightness", "dtype": "float16"}
    changes = {"precision": "bf16", "anchor": 0.5} if variant == "feedback" else {"precision": "bf16"}
    found = records(tune(half, tmp_path / "half", variant, rewards=[reward], **changes))
    expected = records(tune(distilled, tmp_path / "full", variant, **(changes | {"precision": "no"})))
    assert all(record["grad_norm"] > 0 for record in found)
    assert found[0]["guard/reward/brightness"] == pytest.approx(expected[0]["guard/reward/brightness"], rel=0.02)


@pytest.mark.parametrize("variant", ["feedback", "dpo", "policy"])
def test_a_prompt_that_a_reward_does_not_read_is_refused_before_the_first_step(
    distilled, tmp_path, monkeypatch, variant
):
    scored_by_length(monkeypatch, languages=("en",))
    monkeypatch.setattr(Runtime, "prepare", lambda *_: pytest.fail("the stage has begun"))
    with pytest.raises(RewardError, match="reward brightness reads prompts in en, not in zh"):
        tune(distilled, tmp_path, variant)
