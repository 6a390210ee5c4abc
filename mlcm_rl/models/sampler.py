"""Sampling: a student in a few steps, with or without gradient; the guided teacher for reference."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..equations.solver import ddim_step, gamma_step, time_before_noise
from .base import Base, Conditioning


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
    """The student's x0 (B, C, H, W) from `noise` (B, C, H, W) at times[0], in len(times) evaluations, no guidance.

    Every step but the last goes on to the next of `times` (descending) by a gamma step: 0 is DDIM, 1 re-noises with
    noise drawn from `generators` (one a sample, or one for the batch; none needed at gamma 0). The last step's x0 is
    the answer. A `conditioned` student is told where each jump ends: the next time at gamma 0,
    lower where noise brings the state up again, 0 at gamma 1 and in the last step. The last `grad_steps`
    steps carry gradient.
    """
    for _, x0 in walk(base, denoiser, conditioning, noise, times, gamma, generators, conditioned, grad_steps):  # noqa: B007  (the last one is the answer)
        pass  # a state is let go before the next step
    return x0


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
    """The states (N, B, C, H, W) that `sample` visits, the first of them `noise`, and its answer x0 (B, C, H, W)."""
    visited = list(walk(base, denoiser, conditioning, noise, times, gamma, generators, conditioned))
    return torch.stack([x_t for x_t, _ in visited]), visited[-1][1]


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
    """Step by step, the state x_t that `sample` stands at and the x0 that it sees from there, (B, C, H, W) each."""
    x_t, last = noise, len(times) - 1
    for i, (t, s) in enumerate(jumps(times, noise)):
        with torch.set_grad_enabled(last - i < grad_steps):
            x0 = step_x0(base, denoiser, conditioning, x_t, t, s, gamma, conditioned)
        yield x_t, x0
        if i < last:
            with torch.set_grad_enabled(last - i < grad_steps):
                fresh = x0  # DDIM draws and uses none
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
    """The x0 (B, C, H, W) that a sampler's step from `t` to `s` (B,) asks its student for."""
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
    """The teacher's x0 (B, C, H, W) by guided DDIM over `times` (descending): the last step's, as in `sample`."""
    x_t = noise
    for t, s in jumps(times, noise):
        x0 = base.guided_x0(x_t, t, conditional, unconditional, guidance_scale)
        x_t = ddim_step(x_t, x0, t, s, base.schedule)
    return x0


def jumps(times: Sequence[int], like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Start and end (B,) of each step; the last one ends at 0. Raises ValueError unless `times` descends to above 0."""
    ends = [*times[1:], 0]
    if not times or any(t <= s for t, s in zip(times, ends, strict=True)):
        raise ValueError(f"times {list(times)} must be one or more, descending, above 0")
    for t, s in zip(times, ends, strict=True):
        yield torch.full((len(like),), t, device=like.device), torch.full((len(like),), s, device=like.device)
