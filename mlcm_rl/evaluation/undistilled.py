"""The teacher without distillation, sampled in a few network evaluations: the alternative to a student."""

from typing import Any

import diffusers
import torch
from torch import Tensor

from ..equations.schedule import betas_of
from ..equations.segments import time_grid
from ..models import sampler
from ..models.base import Base
from ..models.conditioning import Conditioning

# Stock schedulers of diffusers by the recipe's names, on the same even spacing of times as everything else.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpmpp": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "unipc": ("UniPCMultistepScheduler", {"solver_type": "bh2", "solver_order": 2}),
}
LABELS = {"ddim": "DDIM", "dpmpp": "DPM-Solver++", "unipc": "UniPC"}


def label_of(solver: str, is_flow: bool) -> str:
    """Return a solver's name in reports; on a rectified flow DDIM's step is Euler's."""
    return "Euler" if is_flow and solver == "ddim" else LABELS[solver]


def sample(
    base: Base,
    conditional: Conditioning,
    unconditional: Conditioning,
    noise: Tensor,
    solver: str,
    num_steps: int,
    guidance_scale: float,
) -> Tensor:
    """Return the teacher's x0 (B, C, H, W) from `noise` at T - 1 in `num_steps` steps of `solver` (ddim, dpmpp, unipc).

    A guided step costs two evaluations, one at guidance_scale 1 costs one. Every solver ends on its last step's x0.
    """
    if solver == "ddim":
        times = time_grid(num_steps)[:-1]
        return sampler.sample_teacher(base, conditional, unconditional, noise, times, guidance_scale)
    scheduler = _scheduler(base, solver, num_steps, noise.device)
    x_t = noise
    with base.same_prompts(base.denoiser):
        for t in scheduler.timesteps:
            x0 = base.guided_x0(x_t, t.expand(len(x_t)), conditional, unconditional, guidance_scale)
            x_t = scheduler.step(x0, t, x_t, return_dict=False)[0]
    return x_t


def _scheduler(base: Base, solver: str, num_steps: int, device: torch.device) -> Any:
    """Return diffusers' solver on the teacher's schedule. It takes x0, since `Base` converts prediction types."""
    name, settings = SCHEDULERS[solver]
    if base.prediction_type == "flow":
        return _flow_scheduler(base, name, settings, num_steps, device)
    scheduler = _vp_scheduler(base, name, settings)
    scheduler.set_timesteps(num_steps, device=device)
    return scheduler


def _flow_scheduler(base: Base, name: str, settings: dict[str, Any], num_steps: int, device: torch.device) -> Any:
    """Return the solver on rectified flow at this package's times: its own are not indices, and end elsewhere."""
    scheduler = getattr(diffusers, name)(prediction_type="sample", use_flow_sigmas=True, **settings)
    scheduler.set_timesteps(num_steps)
    times = torch.tensor(time_grid(num_steps)[:-1], device=device)
    sigmas = base.schedule.sigma[times]
    scheduler.timesteps, scheduler.sigmas = times, torch.cat([sigmas, sigmas.new_zeros(1)]).cpu()
    return scheduler


def _vp_scheduler(base: Base, name: str, settings: dict[str, Any]) -> Any:
    """Return the solver on the teacher's betas; on those of our indices where its schedule has other times."""
    stock = base.pipeline.scheduler
    if stock.config.num_train_timesteps != base.schedule.num_times:
        betas = betas_of(base.schedule).tolist()
        settings = {**settings, "num_train_timesteps": base.schedule.num_times, "trained_betas": betas}
    scheduler_class = {kind.__name__: kind for kind in stock.compatibles}[name]
    return scheduler_class.from_config(
        stock.config,
        prediction_type="sample",
        timestep_spacing="linspace",
        final_sigmas_type="zero",
        **dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), False),
        **settings,
    )
