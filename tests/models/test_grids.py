"""Grids beside the milestones: the times, and that stock schedulers visit them."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler, TCDScheduler

import tiny
from mlcm_rl.equations.segments import sampling_times, spaced_times
from mlcm_rl.models import sampler, student_files, students
from mlcm_rl.models.export import export
from mlcm_rl.models.grids import SamplingGrid, grid_named
from mlcm_rl.recipe import Lora, StudentSource
from mlcm_rl.recipe.start import ORIGINAL_STEPS
from teacher_loras import relative


def test_named_grids_are_those_of_stock_schedulers():
    assert spaced_times(4, 50) == [999, 759, 499, 259]
    assert spaced_times(8, 50) == [999, 879, 759, 639, 499, 379, 259, 139]
    assert all(spaced_times(n, 8) == sampling_times(n) for n in range(1, 9))
    for kind in (LCMScheduler, TCDScheduler):
        stock = kind()  # diffusers' defaults: LCM's 50 times
        for n in range(1, 9):
            stock.set_timesteps(n)
            assert stock.timesteps.tolist() == SamplingGrid("lcm").times(n)
    trailing = DDIMScheduler(timestep_spacing="trailing")
    for n in range(1, 9):
        trailing.set_timesteps(n)
        furthest = max(
            abs(a - b) for a, b in zip(trailing.timesteps.tolist(), SamplingGrid("trailing").times(n), strict=True)
        )
        assert furthest == (n in (3, 6, 7))
    with pytest.raises(ValueError, match="must divide 1000"):
        spaced_times(4, 7)


@pytest.mark.parametrize("value", ["karras", [], [5, 5], [4, 8], [1000], [3, 0], [True], list(range(9, 0, -1))])
def test_what_is_no_grid_is_refused(value):
    with pytest.raises(ValueError, match="grid must be milestones, lcm, trailing, or up to 8 times"):
        grid_named(value)


def test_a_list_is_for_its_own_number_of_steps():
    grid = grid_named([999, 400, 20])
    assert (grid.times(3), grid.steps, grid.has(2)) == ([999, 400, 20], [3], False)
    with pytest.raises(ValueError, match="sampled at 999, 400, 20: in 3 steps, and not in 2"):
        grid.times(2)


@pytest.mark.parametrize(
    ("gamma", "grid"),
    [
        (1.0, "lcm"),
        (0.0, [999, 640, 310]),
        pytest.param(0.0, "trailing", marks=pytest.mark.slow),
        pytest.param(0.0, "lcm", marks=pytest.mark.slow),
        pytest.param(1.0, [999, 640, 310], marks=pytest.mark.slow),
    ],
)
def test_an_export_visits_the_students_own_grid_in_stock_diffusers(sdxl, tmp_path, gamma, grid):
    denoiser = students.student(sdxl, Lora(rank=2, alpha=2), 0)
    tiny.perturb(students.trainable_parameters(denoiser))
    expected = {"num_segments": 1, "family": sdxl.family, "prediction_type": sdxl.prediction_type}
    students.save_student(denoiser, tmp_path / "plain" / "student", expected)
    source = StudentSource(path=str(tmp_path / "plain" / "student"), gamma=gamma, grid=grid)
    student_files.take_in(sdxl, source, tmp_path / "student")
    student = students.load_student(sdxl, tmp_path / "student")
    stock = DiffusionPipeline.from_pretrained(export(tmp_path / "student", sdxl, tmp_path / "out"))
    assert isinstance(stock.scheduler, LCMScheduler if gamma == 1.0 else TCDScheduler)
    for num_steps in student.grid.steps if isinstance(grid, list) else (3, 4):
        times = student.grid.times(num_steps)
        visited = []
        arguments = sdxl.stock_arguments(student.grid, num_steps)
        assert arguments == ({"timesteps": grid} if isinstance(grid, list) else {"num_inference_steps": num_steps})
        noise = sdxl.noise(torch.Generator().manual_seed(0), 1)
        latents = stock(
            "a cat",
            **arguments,
            guidance_scale=0.0,
            latents=noise,
            output_type="latent",
            generator=torch.Generator().manual_seed(1),
            callback_on_step_end=lambda pipe, i, t, kept, visited=visited: visited.append(int(t)) or kept,
        ).images
        assert visited == times
        with torch.no_grad():
            generators = torch.Generator().manual_seed(1)
            own = sampler.sample(
                sdxl, student.denoiser, sdxl.encode_prompts(["a cat"]), noise, times, gamma, generators
            )
        assert relative(latents, own) < 1e-2
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "which did not distil it" in card
    call = "timesteps=[999, 640, 310]" if isinstance(grid, list) else "num_inference_steps=4"
    assert call in card
    assert json.loads((tmp_path / "out" / "student.json").read_text())["gamma"] == gamma


def test_every_named_grid_divides_the_time_axis():
    assert ORIGINAL_STEPS == {"milestones": 8, "lcm": 50, "trailing": 1000}
