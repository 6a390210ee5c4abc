"""Stable Diffusion 3 alone: with T5 and without, its published shapes, a flow's schedule (see test_families)."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, SD3Transformer2DModel
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch.nn import functional as F

import runs
import tiny
from mlcm_rl import pipeline
from mlcm_rl.equations.segments import sampling_times
from mlcm_rl.evaluation import undistilled
from mlcm_rl.models import sampler, students, teachers
from mlcm_rl.models.export import export
from mlcm_rl.models.families.sd3 import Family
from mlcm_rl.models.lora_files import LORA_FILE
from mlcm_rl.recipe import Lora, Teacher
from mlcm_rl.training.loop import Runtime

PROMPTS = ["a red apple, 3d", "x" * 600]  # the second is longer than any encoder reads
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


@pytest.mark.parametrize("solver", ["dpmpp", pytest.param("unipc", marks=pytest.mark.slow)])
def test_stock_solvers_of_flows_come_to_the_teachers_own_end(base, solver):
    """At many steps they agree with Euler's at more; each is asked at our own times."""
    noise = base.noise(torch.Generator().manual_seed(4), 2)
    inputs = (base.encode_prompts(PROMPTS), base.unconditional(2), noise)
    finest = undistilled.sample(base, *inputs, "ddim", 400, 1.0)
    errors = [(undistilled.sample(base, *inputs, solver, n, 1.0) - finest).square().mean().sqrt() for n in (4, 25)]
    assert errors[1] < 0.5 * errors[0]
    assert errors[1] < 0.05 * finest.square().mean().sqrt()


def test_zeros_in_t5s_place_are_computed_as_one_token_with_the_same_outputs_and_gradients(folders):
    base, stock = load(folders[False]), stock_of(folders[False]).transformer
    shapes = (2, *base.latent_shape), (2, tiny.NUM_TOKENS, 56), (2, 32)
    generator = torch.Generator().manual_seed(0)
    x_t, context, pooled = (torch.randn(shape, generator=generator) for shape in shapes)
    context, passes, results = F.pad(context, (0, 0, 0, 256)), [], []
    for denoiser in (base.empty_denoiser(stock.config, condition=False), stock):
        denoiser.load_state_dict(stock.state_dict())
        counted = denoiser.transformer_blocks[0].ff_context.register_forward_hook(
            lambda module, inputs, output: passes.append(output.shape[1])
        )
        t = torch.tensor([300.0, 900.0])
        out = denoiser(x_t, context, pooled, t, return_dict=False)[0]
        out.square().mean().backward()
        counted.remove()
        results.append([out, denoiser.context_embedder.bias.grad, denoiser.proj_out.weight.grad])
    assert passes == [tiny.NUM_TOKENS + 1, tiny.NUM_TOKENS + 256]
    for ours, expected in zip(*results, strict=True):
        assert expected.std() > 1e-5
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


def test_what_the_one_token_cannot_stand_for_is_refused(folders):
    base = load(folders[False])
    denoiser, short = base.denoiser, torch.zeros(1, 255, 56)
    arguments = torch.zeros(1, *base.latent_shape), short, torch.zeros(1, 32), torch.tensor([300.0])
    assert base.simplify(denoiser) is denoiser  # a second time changes nothing
    with pytest.raises(ValueError, match="a context of 255 tokens, where the last 256"):
        denoiser(*arguments)
    copied = deepcopy(denoiser)
    copied.set_attn_processor(JointAttnProcessor2_0())
    with pytest.raises(ValueError, match="its attention has another processor now"):
        copied(*arguments)


def test_a_teacher_with_t5_is_the_stock_network(folders):
    blocks = load(folders[True]).denoiser.transformer_blocks
    assert {type(block.attn.processor).__name__ for block in blocks} == {"JointAttnProcessor2_0"}


# ---- students ----


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


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_a_student_without_t5_is_sampled_by_the_stock_pipeline_which_has_all_tokens(folders, tmp_path, gamma):
    """Ours computes the zeros in T5's place as one token. Noise of the steps is the global generator's in both."""
    base, times, prompts = load(folders[False]), sampling_times(4), PROMPTS[:1]
    denoiser = students.student(base, Lora(rank=4, alpha=8.0), 0)
    tiny.perturb(students.trainable_parameters(denoiser), seed=1, scale=0.05)
    students.save_student(denoiser, tmp_path / "student", {"num_segments": 1, **students.expected_of(base)})
    out = export(tmp_path / "student", base, tmp_path / "out", gamma=gamma)
    assert "text_encoder_3=None, tokenizer_3=None" in (out / "README.md").read_text(encoding="utf-8")
    noise = base.noise(torch.Generator().manual_seed(4), 1)
    inputs = base, denoiser, base.encode_prompts(prompts), noise, times
    expected = sampler.sample(*inputs, gamma, torch.Generator().manual_seed(7))
    merged, adapted = stock_of(out), stock_of(folders[False])
    adapted.load_lora_weights(out, weight_name=LORA_FILE)
    adapted.scheduler = merged.scheduler
    for stock in (merged, adapted):
        passes = []
        stock.transformer.context_embedder.register_forward_hook(
            lambda module, inputs, output, sink=passes: sink.append(output.shape[1])
        )
        torch.manual_seed(7)
        call = base.stock_call(times) | base.stock_guidance | {"height": 16, "width": 16}
        latents = stock(prompts, latents=noise, output_type="latent", **call).images
        torch.testing.assert_close(latents, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-5)
        assert passes == [tiny.NUM_TOKENS + 256] * 4
    teacher = sampler.sample(base, base.denoiser, *inputs[2:], gamma, torch.Generator().manual_seed(7))
    assert (expected - teacher).norm() > 0.01 * teacher.norm()


def test_gamma_0_is_eulers_scheduler_and_gamma_1_lcms(base):
    assert type(base.stock_scheduler(0.0)) is FlowMatchEulerDiscreteScheduler
    assert type(base.stock_scheduler(1.0)) is FlowMatchLCMScheduler


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
