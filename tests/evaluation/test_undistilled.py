"""The undistilled teacher's solvers on Gaussian data, whose probability-flow ODE is known."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler

from mlcm_rl.equations.schedule import scaled_linear_betas, vp_schedule
from mlcm_rl.evaluation import undistilled
from mlcm_rl.recipe import teacher_files
from mlcm_rl.recipe.schedule_types import Scheduler

# diffusers hands numpy a tensor in a way that numpy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

MEAN, STD = 0.7, 0.4
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class GaussianBase:
    """A perfect teacher of N(MEAN, STD^2) in the place of a network; it counts its calls."""

    def __init__(self, scheduler=DDIMScheduler):
        self.schedule = vp_schedule(scaled_linear_betas())
        self.pipeline = SimpleNamespace(scheduler=scheduler(**BETAS, steps_offset=1))
        self.num_calls, self.prediction_type, self.denoiser = 0, "epsilon", None

    def same_prompts(self, denoiser):
        return nullcontext()

    def guided_x0(self, x_t, t, conditional, unconditional, guidance_scale):
        self.num_calls += 1
        assert t.shape == (len(x_t),)
        alpha, sigma = self.schedule.at(t, x_t)
        return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x_t - alpha * MEAN)

    def end(self, noise):
        """Where the exact ODE takes `noise` from t = 999: the same quantile of the data."""
        alpha, sigma = self.schedule.alpha[-1], self.schedule.sigma[-1]
        return MEAN + STD * (noise - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2).sqrt()


def error(solver, num_steps, scheduler=DDIMScheduler):
    base = GaussianBase(scheduler)
    noise = torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    x0 = undistilled.sample(base, {}, {}, noise, solver, num_steps, 1.0)
    assert base.num_calls == num_steps
    return (x0 - base.end(noise)).square().mean().sqrt().item()


@pytest.mark.parametrize("solver", ["ddim", "dpmpp", "unipc"])
def test_every_solver_converges_to_the_exact_ode(solver):
    assert error(solver, 8) < error(solver, 2) / 2
    assert error(solver, 200) < 0.01
    assert error(solver, 999) < 0.0035


@pytest.mark.parametrize("solver", ["dpmpp", "unipc"])
def test_second_order_solvers_are_better_than_ddim_at_equal_steps(solver):
    assert error(solver, 8) < 0.95 * error("ddim", 8)
    assert error(solver, 25) < 0.75 * error("ddim", 25)


@pytest.mark.parametrize("solver", ["dpmpp", "unipc"])
def test_one_step_of_any_solver_is_the_teachers_x0(solver):
    assert error(solver, 1) == pytest.approx(error("ddim", 1), rel=1e-4)


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, PNDMScheduler])
@pytest.mark.parametrize("solver", ["dpmpp", "unipc"])
def test_the_solver_does_not_depend_on_the_scheduler_that_the_teacher_came_with(solver, scheduler):
    assert error(solver, 6, scheduler) == error(solver, 6)


@pytest.mark.parametrize("key", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_another_spacing_in_the_teachers_file_counts_for_nothing_and_null_is_refused(key, tmp_path):
    base = GaussianBase()
    base.pipeline.scheduler = EulerDiscreteScheduler(**BETAS, steps_offset=1, **{key: key == "use_karras_sigmas"})
    base.pipeline.scheduler.register_to_config(**{key: True})
    for solver in ("dpmpp", "unipc"):
        own = undistilled._scheduler(base, solver, 6, torch.device("cpu")).sigmas
        assert torch.equal(own, undistilled._scheduler(GaussianBase(), solver, 6, torch.device("cpu")).sigmas)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"_class_name": "DDIMScheduler", **BETAS, key: None}), encoding="utf-8")
    with pytest.raises(ValueError, match=f"{key}: expected a valid boolean, found None"):
        teacher_files.read(path, Scheduler)
