"""Sampling: a student in a few steps, with or without gradient, and the guided teacher."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from ..equations.solver import ddim_step, gamma_step, time_before_noise
from .base import Base
from .conditioning import Conditioning


def sample(
    base: Base,
    denoiser: torch.nn.Module,
    conditioning: Conditioning,
    noise: Tensor,
    times: Sequence[int],
    gamma: float,
    generators: torch.Generator | Sequence[torch.Generator] | None = None,
    conditioned: bool = False,
    grad_steps: int = 0,
) -> Tensor:
    """Return the student's x0 (B, C, H, W) from `noise` (B, C, H, W) at times[0]: len(times) evaluations, no guidance.

    Every step but the last goes to the next of `times` (descending) by a gamma step: gamma 0 is DDIM, gamma 1 draws all
    noise again from `generators` (one per sample, or one for the batch; not needed at gamma 0). The x0 of the last step
    is the result. A `conditioned` student takes the target time of each jump: at gamma 0 the next time, at a gamma
    between a lower one, since noise brings the state up again, and 0 at gamma 1 and in the last step. The last
    `grad_steps` steps carry gradient.
    """
    with nullcontext() if grad_steps else base.same_prompts(denoiser):
        for _, x0 in walk(base, denoiser, conditioning, noise, times, gamma, generators, conditioned, grad_steps):  # noqa: B007  (x0 of the last step is the result)
            pass  # each state is freed before the next step
    return x0


def sample_of_seeds(
    base: Base,
    denoiser: torch.nn.Module,
    conditioning: Conditioning,
    seeds: Tensor,
    times: Sequence[int],
    gamma: float,
    conditioned: bool,
) -> Tensor:
    """Return `sample` (B, C, H, W) of `seeds` (B,): each sample's noise, first and later, is drawn by its own."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
    noise = base.noise(generators, len(generators))
    return sample(base, denoiser, conditioning, noise, times, gamma, generators, conditioned)


@torch.no_grad()
def rollout(
    base: Base,
    denoiser: torch.nn.Module,
    conditioning: Conditioning,
    noise: Tensor,
    times: Sequence[int],
    gamma: float,
    generators: torch.Generator | Sequence[torch.Generator] | None = None,
    conditioned: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the states that `sample` visits, the first being `noise`, and the x0 of each, (N, B, C, H, W) both.

    The last x0 is the sample.
    """
    with base.same_prompts(denoiser):
        steps = list(walk(base, denoiser, conditioning, noise, times, gamma, generators, conditioned))
    return torch.stack([x_t for x_t, _ in steps]), torch.stack([x0 for _, x0 in steps])


def walk(
    base: Base,
    denoiser: torch.nn.Module,
    conditioning: Conditioning,
    noise: Tensor,
    times: Sequence[int],
    gamma: float,
    generators: torch.Generator | Sequence[torch.Generator] | None = None,
    conditioned: bool = False,
    grad_steps: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for each step of `sample` the state x_t and the x0 predicted from it, (B, C, H, W) each."""
    x_t, last = noise, len(times) - 1
    for i, (t, s) in enumerate(jumps(times, noise)):
        with torch.set_grad_enabled(last - i < grad_steps):
            x0 = step_x0(base, denoiser, conditioning, x_t, t, s, gamma, conditioned)
        yield x_t, x0
        if i < last:
            with torch.set_grad_enabled(last - i < grad_steps):
                fresh = x0  # a placeholder: at gamma 0 `gamma_step` uses no noise, and none is drawn
                if gamma != 0.0:
                    assert generators is not None
                    fresh = base.noise(generators, len(noise))
                x_t = gamma_step(x_t, x0, t, s, fresh, gamma, base.schedule)


def step_x0(
    base: Base,
    denoiser: torch.nn.Module,
    conditioning: Conditioning,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    gamma: float,
    conditioned: bool,
) -> Tensor:
    """Return the student's x0 (B, C, H, W) in a sampler's step from `t` to `s` (B,)."""
    return base.x0(denoiser, x_t, t, conditioning, time_before_noise(s, gamma) if conditioned else None)


@torch.no_grad()
def sample_teacher(
    base: Base,
    conditional: Conditioning,
    unconditional: Conditioning,
    noise: Tensor,
    times: Sequence[int],
    guidance_scale: float,
) -> Tensor:
    """Return the teacher's x0 (B, C, H, W) in the last step of guided DDIM over `times` (descending)."""
    x_t = noise
    with base.same_prompts(base.denoiser):
        for t, s in jumps(times, noise):
            x0 = base.guided_x0(x_t, t, conditional, unconditional, guidance_scale)
            x_t = ddim_step(x_t, x0, t, s, base.schedule)
    return x0


def jumps(times: Sequence[int], like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield start and end (B,) of each step; the last one ends at 0.

    Raise ValueError unless `times` is descending and positive.
    """
    ends = [*times[1:], 0]
    if not times or any(t <= s for t, s in zip(times, ends, strict=True)):
        raise ValueError(f"times {list(times)} must be one or more, descending, above 0")
    for t, s in zip(times, ends, strict=True):
        yield torch.full((len(like),), t, device=like.device), torch.full((len(like),), s, device=like.device)
