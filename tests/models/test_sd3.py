"""Stable Diffusion 3: beside its stock pipeline, through every stage, and exported to be sampled by stock diffusers."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, SD3Transformer2DModel

import runs
import tiny
from mlcm_rl import pipeline
from mlcm_rl.equations.segments import sampling_times
from mlcm_rl.evaluation import undistilled
from mlcm_rl.models import sampler, students, teachers
from mlcm_rl.models.export import export
from mlcm_rl.models.families.sd3 import Family
from mlcm_rl.recipe import Evaluate, Full, Lora, Samples, Teacher
from mlcm_rl.storage.manifest import verify
from mlcm_rl.training.loop import Runtime

PROMPTS = ["a red apple, 3d", "x" * 600]  # the second is longer than any encoder reads
LORA = Lora(rank=8, alpha=8.0)
# A configuration as published, and its parameters (counted on the published checkpoints).
PUBLISHED = {
    "stable-diffusion-3-medium": (
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
        2_028_328_000,
    ),
    "stable-diffusion-3.5-medium": (
        {
            **{"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384},
            **{"qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
        },
        2_243_171_520,
    ),
    "stable-diffusion-3.5-large": (
        {
            **{"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192},
            "qk_norm": "rms_norm",
        },
        8_056_627_520,
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[bool, Path]:
    """A teacher with T5 and one without."""
    place = tmp_path_factory.mktemp("sd3")
    return {with_t5: tiny.sd3(place / f"t5-{with_t5}", with_t5) for with_t5 in (True, False)}


def load(folder: Path) -> Family:
    return teachers.load(Teacher(path=str(folder), family="sd3"), "cpu")


def absent(folder: Path) -> dict[str, None]:
    """What diffusers wants to be told of a folder without T5."""
    index = json.loads((folder / "model_index.json").read_text())
    return {name: None for name in ("text_encoder_3", "tokenizer_3") if index[name] == [None, None]}


def stock_of(folder: Path) -> DiffusionPipeline:
    stock = DiffusionPipeline.from_pretrained(folder, **absent(folder))
    stock.set_progress_bar_config(disable=True)
    return stock


@pytest.fixture(scope="module", params=[True, False], ids=["t5", "no-t5"])
def pair(request, folders) -> tuple[Family, DiffusionPipeline]:
    return load(folders[request.param]), stock_of(folders[request.param])


@pytest.fixture(scope="module")
def base(folders) -> Family:
    return load(folders[True])


# ---- beside the stock pipeline ----


def test_prompts_are_encoded_as_the_stock_pipeline_encodes_them(pair):
    base, stock = pair
    context, no_context, pooled, no_pooled = stock.encode_prompt(PROMPTS, None, None, device="cpu")
    conditioning, unconditional = base.encode_prompts(PROMPTS), base.unconditional(2)
    assert context.shape[1:] == (tiny.NUM_TOKENS + 256, 56)
    for name, expected, away in (("context", context, no_context), ("pooled", pooled, no_pooled)):
        torch.testing.assert_close(conditioning[name], expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(unconditional[name], away, atol=2e-5, rtol=1e-5)
    alone = base.encode_prompts(PROMPTS[:1])
    torch.testing.assert_close(alone["context"][0], conditioning["context"][0], atol=1e-5, rtol=1e-5)


def test_what_is_read_of_a_prompt_is_what_its_longest_reader_reads(pair):
    base, stock = pair
    assert base.num_tokens == (256 if stock.text_encoder_3 is not None else tiny.NUM_TOKENS)
    assert base.count_tokens(PROMPTS)[1] > base.num_tokens


@pytest.mark.parametrize("num_steps", [4, 3])
def test_a_guided_trajectory_is_the_stock_pipelines(pair, num_steps):
    """At the same times: a number of steps alone sends the stock scheduler elsewhere."""
    base, stock = pair
    noise, times = base.noise(torch.Generator().manual_seed(4), 2), sampling_times(num_steps)
    call = base.stock_call(times)
    assert call["sigmas"] == [(t + 1) / 1000 for t in times]
    expected = stock(PROMPTS, latents=noise, guidance_scale=5.0, output_type="latent", height=16, width=16, **call)
    x0 = sampler.sample_teacher(base, base.encode_prompts(PROMPTS), base.unconditional(2), noise, times, 5.0)
    torch.testing.assert_close(x0, expected.images, atol=1e-5, rtol=1e-5)


def test_pictures_are_decoded_and_encoded_with_the_shift_of_the_autoencoder(pair):
    base, stock = pair
    latents = base.noise(torch.Generator().manual_seed(4), 2)
    settings = stock.vae.config
    image = stock.vae.decode(latents / settings.scaling_factor + settings.shift_factor, return_dict=False)[0]
    expected = stock.image_processor.postprocess(image.detach(), output_type="pt")
    torch.testing.assert_close(base.autoencoder.decode(latents), expected, atol=1e-6, rtol=1e-6)
    mean = stock.vae.encode(expected * 2 - 1).latent_dist.mode()
    by_hand = (mean - settings.shift_factor) * settings.scaling_factor
    torch.testing.assert_close(base.autoencoder.encode(expected), by_hand, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("solver", ["dpmpp", "unipc"])
def test_stock_solvers_of_flows_come_to_the_teachers_own_end(base, solver):
    """At many steps they agree with Euler's at more; each is asked at our own times."""
    noise = base.noise(torch.Generator().manual_seed(4), 2)
    inputs = (base.encode_prompts(PROMPTS), base.unconditional(2), noise)
    finest = undistilled.sample(base, *inputs, "ddim", 400, 1.0)
    errors = [(undistilled.sample(base, *inputs, solver, n, 1.0) - finest).square().mean().sqrt() for n in (4, 25)]
    assert errors[1] < 0.5 * errors[0]
    assert errors[1] < 0.05 * finest.square().mean().sqrt()


# ---- students ----


@pytest.mark.parametrize("adapter", [LORA, Full()], ids=["lora", "full"])
@pytest.mark.parametrize("condition", [False, True], ids=["plain", "conditioned"])
def test_a_student_starts_as_its_teacher_and_is_loaded_as_it_was_saved(base, adapter, condition, tmp_path):
    denoiser = students.student(base, adapter, 0, condition)
    x_t, t = base.noise(torch.Generator().manual_seed(0), 2), torch.tensor([999, 374])
    conditioning, s = base.encode_prompts(PROMPTS), torch.tensor([749, 0]) if condition else None
    assert torch.equal(
        base.predict(denoiser, x_t, t, conditioning, s), base.predict(base.denoiser, x_t, t, conditioning)
    )
    tiny.perturb(students.trainable_parameters(denoiser), seed=1)
    prediction = base.predict(denoiser, x_t, t, conditioning, s)
    if condition:
        assert not torch.equal(prediction, base.predict(denoiser, x_t, t, conditioning, s - s))
    description = {"num_segments": 1, "family": base.family, "prediction_type": base.prediction_type}
    students.save_student(denoiser, tmp_path / "student", description)
    loaded = students.load_student(base, tmp_path / "student")
    assert loaded.conditioned is condition
    assert torch.equal(base.predict(loaded.denoiser, x_t, t, conditioning, s), prediction)
    if adapter == Full():  # the folder is a stock denoiser's, whatever stands beside it
        SD3Transformer2DModel.from_pretrained(tmp_path / "student" / "transformer")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_have_their_counts_and_the_adapters_names(name):
    settings, count = PUBLISHED[name]
    with torch.device("meta"):
        denoiser = SD3Transformer2DModel(
            sample_size=128,
            joint_attention_dim=4096,
            attention_head_dim=64,
            pooled_projection_dim=2048,
            in_channels=16,
            out_channels=16,
            **settings,
        )
    assert sum(value.numel() for value in denoiser.parameters()) == count
    modules = dict(denoiser.named_modules())
    for target in Family.lora_targets:
        assert any(module.endswith(f".{target}") for module in modules), target
    assert (
        sum(type(module).__name__ == "JointTransformerBlock" for module in modules.values()) == settings["num_layers"]
    )
    shapes = Family.conditioning_shapes(denoiser.config, num_tokens=77)
    assert shapes == {"context": (333, 4096), "pooled": (2048,)}


# ---- every stage ----


def recipe_of(folder: Path, place: Path, **distill):
    prompts = runs.write_prompts(place)
    tuned = [runs.tuning(kind, prompts) for kind in ("feedback", "dpo", "policy")]
    evaluate = Evaluate(prompts=prompts, num_prompts=4, sampling_steps=[1, 2], teacher_steps=[3, 4], batch_size=4)
    stages = [runs.trajectories(prompts), runs.distill(**distill), *tuned, evaluate]
    samples = Samples(prompts=["a cat"], sampling_steps=[1, 2])
    return runs.recipe(folder, place, stages, "sd3", samples=samples)


@pytest.mark.parametrize(
    "form",
    [
        {"num_segments": [2, 1], "adapter": {"kind": "lora", "rank": 2, "alpha": 2.0}},
        {"num_segments": [1], "condition_on_target": True, "budgets": [2, 4], "adapter": {"kind": "full"}},
    ],
    ids=["lora", "conditioned-full"],
)
def test_every_stage_runs_and_its_plan_knows_what_it_takes(folders, tmp_path, form):
    recipe = recipe_of(folders[True], tmp_path, **form)
    planned = pipeline.plan(recipe, True)
    assert [stage.kind for stage in planned] == [stage.kind for stage in recipe.stages]
    assert all(stage.memory is not None and stage.memory.total > 0 and stage.unknown is None for stage in planned)
    stages = pipeline.run(recipe)
    for stage in stages:
        verify(stage.folder)
    losses = [
        json.loads(line)["loss"] for line in (stages[1].folder / "log.jsonl").read_text().splitlines() if "loss" in line
    ]
    assert losses
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    report = json.loads((stages[-1].folder / "report.json").read_text())
    assert {row["name"] for row in report["rows"]} >= {"teacher", "student", "feedback", "dpo", "policy"}


def test_an_interrupted_distillation_ends_with_the_same_bits(folders, tmp_path):
    ends = []
    for name, stops in (("whole", []), ("cut", [1])):
        place = tmp_path / name
        place.mkdir()
        stages = [runs.trajectories(runs.write_prompts(place)), runs.distill(num_segments=[1], num_steps=3)]
        recipe = runs.recipe(folders[True], place, stages, "sd3")
        for _ in stops:
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(Runtime, "due", stop_after_saving(1))
                with pytest.raises(KeyboardInterrupt):
                    pipeline.run(recipe)
        (student,) = pipeline.run(recipe)[-1].folder.glob("student/*.safetensors")
        ends.append(student.read_bytes())
    assert ends[0] == ends[1]


def stop_after_saving(step: int):
    """A `due` that gives up at the log after `step` steps were saved."""
    original = Runtime.due

    def due(self, at, every, total=None):
        if at > step:
            raise KeyboardInterrupt
        return original(self, at, every, total)

    return due


def test_one_step_of_a_flow_has_no_signal_for_errors_of_the_noise(folders, tmp_path):
    prompts = runs.write_prompts(tmp_path)
    tuned = runs.tuning("dpo", prompts, sampling_steps=1, form="diffusion_dpo")
    stages = [runs.trajectories(prompts), runs.distill(num_segments=[1]), tuned]
    with pytest.raises(pipeline.RunError, match=r"space: eps weighs errors by the signal.*set space: x0"):
        pipeline.run(runs.recipe(folders[True], tmp_path, stages, "sd3"))
    stages[-1] = tuned.model_copy(update={"space": "x0"})
    pipeline.run(runs.recipe(folders[True], tmp_path, stages, "sd3"))


def test_a_store_says_its_flows_shift(folders, tmp_path):
    recipe = runs.recipe(folders[True], tmp_path, [runs.trajectories(runs.write_prompts(tmp_path))], "sd3")
    (stage_run,) = pipeline.run(recipe)
    stored = json.loads((stage_run.folder / "store.json").read_text())
    assert stored["provenance"]["scheduler"] == {"num_train_timesteps": 1000, "shift": 3.0}


# ---- exported ----


def exported(base: Family, place: Path, adapter: Lora | Full, condition: bool, gamma: float | None = None) -> Path:
    denoiser = students.student(base, adapter, 0, condition)
    tiny.perturb(students.trainable_parameters(denoiser), seed=1, scale=0.02)
    description = {"num_segments": 1, "family": base.family, "prediction_type": base.prediction_type}
    students.save_student(denoiser, place / "student", description)
    return export(place / "student", base, place / "out", gamma=gamma)


def sampled(base: Family, place: Path, num_steps: int, gamma: float, generators) -> torch.Tensor:
    student = students.load_student(base, place / "student")
    noise, conditioning = base.noise(torch.Generator().manual_seed(4), 2), base.encode_prompts(PROMPTS)
    times = sampling_times(num_steps)
    with torch.no_grad():
        return sampler.sample(
            base, student.denoiser, conditioning, noise, times, gamma, generators, student.conditioned
        )


def stock_sampled(base: Family, stock: DiffusionPipeline, num_steps: int) -> torch.Tensor:
    noise = base.noise(torch.Generator().manual_seed(4), 2)
    stock.set_progress_bar_config(disable=True)
    call = base.stock_call(sampling_times(num_steps)) | {"height": 16, "width": 16}
    return stock(PROMPTS, latents=noise, guidance_scale=0.0, output_type="latent", **call).images


def near(pictures: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((pictures - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1.0) * 2)


@pytest.mark.parametrize("adapter", [LORA, Full()], ids=["lora", "full"])
def test_a_deterministic_student_is_sampled_by_the_stock_pipeline(base, adapter, tmp_path):
    out = exported(base, tmp_path, adapter, condition=False, gamma=0.0)
    stock = stock_of(out)
    assert type(stock.scheduler) is FlowMatchEulerDiscreteScheduler
    for num_steps in (1, 2, 3, 4, 8):
        assert near(stock_sampled(base, stock, num_steps), sampled(base, tmp_path, num_steps, 0.0, None)), num_steps
    if adapter != Full():
        over = stock_of(Path(base.teacher.path))
        over.load_lora_weights(out, weight_name="pytorch_lora_weights.safetensors")
        over.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(out / "scheduler")
        assert near(stock_sampled(base, over, 4), sampled(base, tmp_path, 4, 0.0, None))


def test_a_renoising_student_is_sampled_by_the_stock_pipeline_with_the_global_generator(base, tmp_path):
    out = exported(base, tmp_path, LORA, condition=False)
    stock = stock_of(out)
    assert type(stock.scheduler) is FlowMatchLCMScheduler
    torch.manual_seed(7)
    pictures = stock_sampled(base, stock, 4)
    ours = torch.Generator().manual_seed(7)
    assert near(pictures, sampled(base, tmp_path, 4, 1.0, ours))


@pytest.mark.parametrize("adapter", [LORA, Full()], ids=["lora", "full"])
def test_a_conditioned_student_is_folded_for_each_number_of_steps(base, adapter, tmp_path):
    out = exported(base, tmp_path, adapter, condition=True)
    assert not (out / "pipeline.py").exists()
    assert near(stock_sampled(base, stock_of(out), 4), sampled(base, tmp_path, 4, 0.0, None))
    for num_steps in (2, 3, 8):
        part, stock = out / f"steps-{num_steps}", stock_of(Path(base.teacher.path))
        if adapter == Full():
            stock.transformer = SD3Transformer2DModel.from_pretrained(part / "transformer")
        else:
            stock.load_lora_weights(part, weight_name="pytorch_lora_weights.safetensors")
        stock.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(part / "scheduler")
        assert near(stock_sampled(base, stock, num_steps), sampled(base, tmp_path, num_steps, 0.0, None)), num_steps


def test_every_block_of_code_of_the_card_runs_and_leaves_a_picture(base, tmp_path):
    out = exported(base, tmp_path, LORA, condition=True)
    card = (out / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 2
    for number, code in enumerate(blocks):
        code = code.replace(f'"{Path(base.teacher.path).name}"', json.dumps(base.teacher.path))
        process = subprocess.run([sys.executable, "-c", code], cwd=out.parent, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        assert len(list(out.parent.glob("*.png"))) == number + 1
    assert "stable-diffusion-3" in card


def test_a_gamma_between_cannot_be_exported_and_says_so(base, tmp_path):
    with pytest.raises(ValueError, match=r"gamma 0\.3: diffusers' schedulers of rectified flow are deterministic"):
        exported(base, tmp_path, LORA, condition=False, gamma=0.3)
    assert not (tmp_path / "out").exists()


# ---- refused ----


def test_a_resolution_without_positions_is_refused(folders):
    with pytest.raises(ValueError, match=r"teacher\.resolution 32 is above 24, up to which"):
        teachers.load(Teacher(path=str(folders[True]), family="sd3", resolution=32), "cpu")


def test_a_teacher_of_another_schedule_is_told_by_file_and_key(tmp_path):
    folder = tiny.sd3(tmp_path / "sd3")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_train_timesteps": 500}))
    with pytest.raises(
        ValueError, match=r"scheduler/scheduler_config\.json: num_train_timesteps: expected 1000, found 500"
    ):
        load(folder)
