"""Students with a picture, a mask, styles: as stock pipelines at the same times, and what must change nothing."""

import copy

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    LCMScheduler,
    TCDScheduler,
)
from safetensors.torch import save_file

import teacher_loras
import tiny
from composed import PROMPTS, call, draw, near, student_of
from mlcm_rl.equations.segments import remaining_times
from mlcm_rl.equations.solver import ddim_step
from mlcm_rl.models import students
from mlcm_rl.models import teachers as bases
from mlcm_rl.models.composition import Composition, Weighted, latent_mask
from mlcm_rl.models.grids import SamplingGrid
from mlcm_rl.recipe import Lora, Teacher


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    """A picture (1, 3, 16, 16) of noise."""
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def half() -> torch.Tensor:
    """A mask (1, 1, 16, 16) whose right half is drawn."""
    return torch.cat([torch.zeros(1, 1, 16, 8), torch.ones(1, 1, 16, 8)], dim=3)


@pytest.fixture(scope="module")
def student(sdxl):
    return student_of(sdxl)


def stock(base, denoiser, gamma, kind) -> DiffusionPipeline:
    """The stock pipeline of another kind over the student, with the scheduler of its gamma."""
    pipe = kind.from_pipe(DiffusionPipeline.from_pretrained(base.teacher.path))
    pipe.unet = denoiser
    pipe.scheduler = base.stock_scheduler(gamma)
    assert isinstance(pipe.scheduler, LCMScheduler if gamma == 1.0 else TCDScheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("num_steps", "strength"), [(4, 0.5), (2, 0.75), (3, 0.3)])
def test_image_to_image_is_the_stock_pipelines_at_the_same_times(sdxl, student, image, num_steps, strength):
    latents, composition = draw(sdxl, student, num_steps, image=image, strength=strength)
    times = remaining_times(num_steps, strength)
    assert len(times) == num_steps
    assert times[0] == int(strength * 999)
    pipe = stock(sdxl, student, 1.0, AutoPipelineForImage2Image)
    encoded = composition.latents.expand(len(PROMPTS), -1, -1, -1)
    near(latents, call(pipe, times, image=encoded, strength=1.0))


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_inpainting_is_the_stock_pipelines_at_the_same_times(sdxl, student, image, half, gamma):
    states = []
    hook = student.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    latents, composition = draw(sdxl, student, 3, gamma, image=image, strength=0.75, mask=half)
    hook.remove()
    times = remaining_times(3, 0.75)
    pipe = stock(sdxl, student, gamma, AutoPipelineForInpainting)
    # stock pipelines leave out the first quarter of the times by `strength`, and start from noise alone at 1
    encoded = composition.latents.expand(len(PROMPTS), -1, -1, -1)
    expected = call(pipe, [999, *times], image=encoded, mask_image=half, strength=0.75)
    if gamma == 0.0:  # TCD's last step ends at index 0, not at x0
        ends = (torch.full((len(PROMPTS),), t) for t in (times[-1], 0))
        moved = ddim_step(states[-1], latents, *ends, sdxl.schedule)
        latents = torch.where(latent_mask(half, 8), moved, latents)
    near(latents, expected)


def test_strength_1_is_the_prompt_alone(sdxl, student, image):
    alone, _ = draw(sdxl, student)
    over, _ = draw(sdxl, student, image=image, strength=1.0)
    assert torch.equal(alone, over)


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_a_mask_keeps_pixels_and_a_white_one_keeps_none(sdxl, student, image, half, strength):
    latents, composition = draw(sdxl, student, image=image, strength=strength, mask=half)
    pixels = composition.decode(latents)
    assert torch.equal(pixels[..., :8], image[..., :8].expand(2, -1, -1, -1))
    assert not torch.allclose(pixels[..., 8:], image[..., 8:], atol=0.05)
    white, _ = draw(sdxl, student, image=image, strength=strength, mask=torch.ones_like(half))
    without, _ = draw(sdxl, student, image=image, strength=strength)
    assert torch.equal(white, without)


def test_a_latent_is_drawn_where_any_of_its_pixels_is():
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 3, 5] = 1.0
    mask[..., 8:12, 0:2] = 0.4
    expected = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    expected[..., 1, 2] = True
    assert torch.equal(latent_mask(mask, 8), expected)


def test_styles_by_weight_are_those_that_the_stock_pipeline_sets(teachers, tmp_path):
    """Over a LoRA student, one style in diffusers' layout and one in kohya's, and in both text encoders."""
    base = bases.load(Teacher(path=str(teachers["sdxl"]), family="sdxl"), "cpu")
    student = students.student(base, Lora(rank=4, alpha=8.0), 0)
    tiny.perturb(students.trainable_parameters(student), seed=1)
    first = teacher_loras.write(teachers["sdxl"], tmp_path / "first")
    second = teacher_loras.write(teachers["sdxl"], tmp_path / "second", seed=3)
    second = teacher_loras.as_kohya(second, tmp_path / "kohya.safetensors", "sdxl")
    alone, _ = draw(base, student)
    pipe = stock(base, copy.deepcopy(student), 1.0, AutoPipelineForText2Image)
    styles = (Weighted(first, 0.7), Weighted(second, -0.4))
    latents, _ = draw(base, student, loras=styles)
    students._merge(pipe.unet, ["distilled"])
    for lora in styles:
        pipe.load_lora_weights(lora.path.parent, weight_name=lora.path.name, adapter_name=lora.path.stem)
    pipe.set_adapters([lora.path.stem for lora in styles], [lora.weight for lora in styles])
    near(latents, call(pipe, remaining_times(4, 1.0)))
    assert (latents - alone).norm() > 0.05 * alone.norm()
    save_file({"other": torch.zeros(2)}, tmp_path / "notes.safetensors")
    with pytest.raises(ValueError, match=r"--lora .*notes.safetensors: .* not those of a plain LoRA"):
        draw(base, student, loras=[Weighted(tmp_path / "notes.safetensors")])


def test_a_path_and_its_weight(tmp_path):
    (tmp_path / "a.safetensors").touch()
    (tmp_path / "b:2").touch()
    plain = str(tmp_path / "a.safetensors")
    assert Weighted.parse(plain) == Weighted(tmp_path / "a.safetensors", 1.0)
    assert Weighted.parse(f"{plain}:-0.5").weight == -0.5
    assert Weighted.parse(str(tmp_path / "b:2")) == Weighted(tmp_path / "b:2", 1.0)
    for wrong in (f"{plain}:strong", str(tmp_path / "c"), ":1"):
        with pytest.raises(FileNotFoundError, match="no such file"):
            Weighted.parse(wrong)


@pytest.mark.slow
def test_every_family_draws_over_a_picture_and_inside_a_mask(case, folder):
    base = case.load(folder)
    prompts, side = list(case.prompts), base.resolution
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    mask = torch.cat([torch.zeros(1, 1, side, side // 2), torch.ones(1, 1, side, side // 2)], dim=3)

    def drawn(**inputs):
        composition = Composition(base, base.denoiser, **inputs)
        noise, times = case.noise(base)[: len(prompts)], SamplingGrid().times(2, composition.strength)
        return composition, composition.sample(base.encode_prompts(prompts), noise, times, 0.0)

    _, alone = drawn()
    assert torch.equal(drawn(image=image)[1], alone)
    composition, over = drawn(image=image, strength=0.25)
    near_picture = [(latents - composition.latents).norm().item() for latents in (over, alone)]
    assert near_picture[0] < near_picture[1]
    composition, inside = drawn(image=image, mask=mask)
    kept = ~latent_mask(mask, inside.shape[-1]).expand_as(inside)
    assert torch.equal(inside[kept], composition.latents.expand_as(inside)[kept])
    assert torch.equal(composition.decode(inside)[..., : side // 2], image[..., : side // 2].expand(2, -1, -1, -1))
