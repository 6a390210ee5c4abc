"""Sana: what the suite of all families does not ask."""

import json
import re

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, SanaTransformer2DModel

import runs
from mlcm_rl.models import sampler, students
from mlcm_rl.models.families.sana import INSTRUCTION, Family
from mlcm_rl.models.published_teachers import FOLDER
from mlcm_rl.recipe import Full, teacher_check
from mlcm_rl.recipe.file import check
from mlcm_rl.recipe.paths import Folders
from tiny_families.sana import CASE, SHIFT, write

PUBLISHED = FOLDER / "sana-1600m-1024"
COUNTS = {  # by the published size
    "1600M": ({}, 1_604_462_752),
    "600M": (
        {
            **{"num_layers": 28, "num_attention_heads": 36, "num_cross_attention_heads": 16},
            **{"cross_attention_head_dim": 72, "cross_attention_dim": 1152},
        },
        591_747_872,
    ),
    "SANA1.5 4.8B": ({"num_layers": 60, "qk_norm": "rms_norm_across_heads"}, 4_721_825_952),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("sana") / "teacher")


@pytest.fixture(scope="module")
def base(folder) -> Family:
    return CASE.load(folder)


@pytest.mark.parametrize("size", COUNTS)
def test_published_configurations_have_their_counts_the_adapters_names_and_their_blocks(size):
    settings, count = COUNTS[size]
    config = SanaTransformer2DModel.load_config(PUBLISHED / "transformer") | settings
    with torch.device("meta"):
        denoiser = SanaTransformer2DModel.from_config(config)
    assert sum(value.numel() for value in denoiser.parameters()) == count
    modules = dict(denoiser.named_modules())
    for target in Family.lora_targets:
        assert any(name.endswith(f".{target}") for name in modules), target
    blocks = [module for module in modules.values() if type(module).__name__ == "SanaTransformerBlock"]
    assert len(blocks) == config["num_layers"]
    assert Family.conditioning_shapes(denoiser.config, num_tokens=77) == {"context": (300, 2304), "lengths": ()}
    assert teacher_check.problems(PUBLISHED, "sana") == []


def test_a_trajectory_of_the_published_solver_is_ours_but_for_times_that_are_rounded_down(base):
    """At its own times for nine steps, at first order. Told whole times too, the teacher draws the very same."""
    stock = CASE.stock(base.teacher.path)
    stock.scheduler = DPMSolverMultistepScheduler.from_config(stock.scheduler.config, solver_order=1)
    noise, num_steps = base.noise(torch.Generator().manual_seed(4), 2), 9
    expected = CASE.draw(base, stock, noise, {"num_inference_steps": num_steps} | CASE.guidance)
    times = [111 * k - 1 for k in range(num_steps, 0, -1)]  # u = 0.999 k / 9
    inputs = base.encode_prompts(list(CASE.prompts)), base.unconditional(2), noise, times
    exact = sampler.sample_teacher(base, *inputs, CASE.guidance_scale)
    largest = expected.abs().max()
    assert 1e-4 < (exact - expected).abs().max() / largest < 2e-2  # of random weights, for which near times are not
    rounded = CASE.load(base.teacher.path)
    rounded.schedule.network_time.copy_(whole_times())
    x0 = sampler.sample_teacher(rounded, *inputs, CASE.guidance_scale)
    torch.testing.assert_close(x0 / largest, expected / largest, atol=1e-5, rtol=0.0)


def whole_times() -> torch.Tensor:
    """1000 sigma rounded down, as computed in double precision."""
    u = torch.arange(1, 1001, dtype=torch.float64) / 1000
    return (1000 * SHIFT * u / (1 + (SHIFT - 1) * u)).floor().float()


def test_a_prompt_stands_after_the_instruction_and_the_empty_one_does_not(base):
    lengths = base.encode_prompts(list(CASE.prompts))["lengths"].tolist()
    assert lengths == [17, 300]  # start, end of the instruction, 15 characters
    assert base.unconditional(1)["lengths"].tolist() == [1]  # start
    assert "User Prompt: " in INSTRUCTION[-1]


def test_checkpoints_give_the_same_gradients_through_the_autoencoder_too(folder):
    gradients = []
    for has_checkpoints in (False, True):
        base = CASE.load(folder)
        denoiser = students.student(base, Full(), 0)
        if has_checkpoints:
            denoiser.enable_gradient_checkpointing()
            base.autoencoder.checkpoint_blocks()
        x_t, t = base.noise(torch.Generator().manual_seed(4), 2), torch.tensor([999, 374])
        base.autoencoder.decode(base.x0(denoiser, x_t, t, base.encode_prompts(list(CASE.prompts)))).mean().backward()
        gradients.append([value.grad for value in denoiser.parameters()])
    assert any(value.abs().max() > 0 for value in gradients[0])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_tiles_cover_the_picture(folder):
    whole, tiled = CASE.load(folder), CASE.load(folder)
    latents = torch.randn(1, *whole.latent_shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    tiled.autoencoder.use_tiles(16)
    pictures = [base.autoencoder.decode(latents) for base in (whole, tiled)]
    assert pictures[0].shape == pictures[1].shape
    assert not torch.equal(*pictures)
    torch.testing.assert_close(pictures[1][..., :4, :4], pictures[0][..., :4, :4], atol=0.2, rtol=0.0)
    pictures[1].mean().backward()
    assert latents.grad is not None
    with pytest.raises(ValueError, match="12 is not a multiple of 8"):
        tiled.autoencoder.use_tiles(12)


# ---- refused ----


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("transformer/config.json", {"guidance_embeds": True}, "distilled to a few steps.*name.*Sana or SANA1.5"),
        ("transformer/config.json", {"in_channels": 9}, "takes latents of 9 channels and the autoencoder has 8"),
        ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "expected flow_prediction"),
        ("scheduler/scheduler_config.json", {"use_flow_sigmas": False}, "use_flow_sigmas: expected True"),
        ("model_index.json", {"_class_name": "SanaSprintPipeline"}, "does not load the SanaSprintPipeline"),
    ],
)
def test_another_model_is_refused_when_the_recipe_is_read(tmp_path, file, changes, message):
    folder = write(tmp_path / "teacher")
    edit(folder / file, **changes)
    recipe = runs.recipe(folder, tmp_path, [runs.trajectories(runs.write_prompts(tmp_path))], "sana")
    problems = check(recipe, Folders(tmp_path, tmp_path))
    assert any(re.search(message, problem.text) for problem in problems), problems
