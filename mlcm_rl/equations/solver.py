"""Steps along the trajectory: classifier-free guidance, DDIM, its inverse, and the gamma step of few-step samplers."""

import torch
from torch import Tensor

from .schedule import Schedule, expand


def guided(conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
    """unconditional + w (conditional - unconditional) (B, ...): classifier-free guidance, w = `guidance_scale`.

    w = 1 is the conditional prediction (TLCM v6, section 4.1; the convention of diffusers, not LCM's 1 + w).
    """
    return unconditional + guidance_scale * (conditional - unconditional)


def ddim_step(x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor, schedule: Schedule) -> Tensor:
    """alpha_s x0 + (sigma_s / sigma_t)(x_t - alpha_t x0) (B, ...): one deterministic step from `t` to `s`.

    The identity at s = t, exactly (a select, not arithmetic). In alpha and sigma it is also Euler's step of rectified
    flow (TLCM v6, section 3.2; Multistep Consistency Models, arXiv 2403.06807, eq. 4).
    """
    alpha_t, sigma_t = schedule.at(t, x_t)
    alpha_s, sigma_s = schedule.at(s, x_t)
    x_s = alpha_s * x0 + (sigma_s / sigma_t) * (x_t - alpha_t * x0)
    return torch.where(expand(t == s, x_t), x_t, x_s)


def inverse_ddim_step(x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor, schedule: Schedule) -> Tensor:
    """The x0 (B, ...) whose DDIM step from (x_t, t) ends at x_s; needs s < t.

    (x_s - (sigma_s / sigma_t) x_t) / (alpha_s - alpha_t sigma_s / sigma_t)   (Multistep Consistency Models, eq. 6).
    """
    alpha_t, sigma_t = schedule.at(t, x_t)
    alpha_s, sigma_s = schedule.at(s, x_t)
    ratio = sigma_s / sigma_t
    return (x_s - ratio * x_t) / (alpha_s - alpha_t * ratio)


def time_before_noise(s: Tensor, gamma: float) -> Tensor:
    """s' = floor((1 - gamma) s) (B,): the time that a gamma step to `s` goes down to before noise brings it back up.

    This, not `s`, is where the network's own jump ends, and what a student conditioned on its target time is given.
    """
    return ((1.0 - gamma) * s).long()


def gamma_step(
    x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor, noise: Tensor, gamma: float, schedule: Schedule
) -> Tensor:
    """A step from `t` to `s` that goes down to s' = floor((1 - gamma) s) by DDIM and back up to `s` by noise.

    gamma 0 is DDIM, gamma 1 is alpha_s x0 + sigma_s noise (the consistency sampler: s' is then clean data); between
    them x_s = a x_s' + sqrt(sigma_s^2 - a^2 sigma_s'^2) noise with a = alpha_s / alpha_s', which for a
    variance-preserving schedule is trajectory consistency distillation's step (arXiv 2402.19159, section 4.2). Under
    every schedule x_s has the distribution of time s where x_s' has that of s'. Needs s < T - 1, where alpha may be 0.
    """
    if gamma == 0.0:
        return ddim_step(x_t, x0, t, s, schedule)
    alpha_s, sigma_s = schedule.at(s, x_t)
    if gamma == 1.0:
        return alpha_s * x0 + sigma_s * noise
    below = time_before_noise(s, gamma)
    alpha, sigma = schedule.at(below, x_t)
    up = alpha_s / alpha
    # Exactly sigma_s^2 >= (up sigma)^2; rounding in float32 may put it below, and a square root of that is NaN.
    return up * ddim_step(x_t, x0, t, below, schedule) + (sigma_s**2 - (up * sigma) ** 2).clamp(min=0).sqrt() * noise
