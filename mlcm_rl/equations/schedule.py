"""Noise schedules: alpha and sigma of a time, for variance-preserving diffusion and for rectified flow."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .axis import NUM_SEGMENTS, NUM_TIMES


@dataclass(frozen=True)
class Schedule:
    """Three tables over the integer times 0 .. T-1: `x_t = alpha[t] x0 + sigma[t] eps`, and the network's own time.

    The scales are float32 whatever the network's precision: in bfloat16 the exact anchor of the consistency loss is off
    by up to 8e-3. `network_time` is the time in the unit that the network was trained with: the index itself for
    Stable Diffusion, a float for rectified flow.
    """

    alpha: Tensor  # (T,) float32
    sigma: Tensor  # (T,) float32
    network_time: Tensor  # (T,) int64 or float32

    def __post_init__(self):
        if self.alpha.dtype != torch.float32 or self.sigma.dtype != torch.float32:
            raise TypeError(f"schedules are float32, got alpha {self.alpha.dtype} and sigma {self.sigma.dtype}")
        if self.network_time.dtype not in (torch.int64, torch.float32):
            raise TypeError(f"network_time is {self.network_time.dtype}; it is int64 indices or float32 times")
        shapes = {name: tuple(getattr(self, name).shape) for name in ("alpha", "sigma", "network_time")}
        if len(set(shapes.values())) > 1 or self.alpha.ndim != 1:
            raise ValueError(f"{', '.join(f'{name} {shape}' for name, shape in shapes.items())} must be one (T,)")

    @property
    def num_times(self) -> int:
        return len(self.alpha)

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of `t` (B,), shaped (B, 1, ..., 1) to multiply `like` (B, ...)."""
        return expand(self.alpha[t], like), expand(self.sigma[t], like)

    def to(self, device: torch.device | str) -> "Schedule":
        return Schedule(self.alpha.to(device), self.sigma.to(device), self.network_time.to(device))


def expand(value: Tensor, like: Tensor) -> Tensor:
    """`value` (B,) shaped (B, 1, ..., 1) to broadcast against `like` (B, ...)."""
    return value.reshape(-1, *[1] * (like.ndim - 1))


def scaled_linear_betas(num_times: int = NUM_TIMES, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """Stable Diffusion's betas (T,) float64: linear in their square root."""
    return torch.linspace(start**0.5, end**0.5, num_times, dtype=torch.float64) ** 2


def vp_schedule(betas: Tensor) -> Schedule:
    """Variance-preserving schedule of `betas` (T,): alpha_t^2 = prod(1 - beta), sigma_t^2 = 1 - alpha_t^2.

    The product is taken in float64, so that sigma near t = 0 keeps its digits (DDPM, arXiv 2006.11239, eq. 4). Networks
    are given the index t itself.
    """
    alpha_squared = torch.cumprod(1.0 - betas.double(), dim=0)
    indices = torch.arange(len(betas), device=betas.device)
    return Schedule(alpha_squared.sqrt().float(), (1.0 - alpha_squared).sqrt().float(), indices)


def betas_of(schedule: Schedule) -> Tensor:
    """The betas (T,) float64 of a variance-preserving schedule: 1 - (alpha_t / alpha_(t-1))^2, with alpha_(-1) = 1."""
    alpha_squared = schedule.alpha.double() ** 2
    return 1.0 - alpha_squared / torch.cat([alpha_squared.new_ones(1), alpha_squared[:-1]])


def at_indices(schedule: Schedule) -> Schedule:
    """The T rows of a `schedule` of T' times that our indices stand for: time round(S (t + 1) / T) - 1 for the index t.

    S = K floor(T' / K) with K = NUM_SEGMENTS, so that the milestones are k floor(T' / K) - 1: those that diffusers'
    LCMScheduler and TCDScheduler visit with `original_inference_steps` K. The identity for T' = T.
    """
    last = NUM_SEGMENTS * (schedule.num_times // NUM_SEGMENTS)
    t = torch.arange(1, NUM_TIMES + 1, device=schedule.network_time.device)
    rows = (2 * last * t + NUM_TIMES) // (2 * NUM_TIMES) - 1  # rounded exactly
    return Schedule(schedule.alpha[rows], schedule.sigma[rows], schedule.network_time[rows])


def in_thousandths(sigma: Tensor) -> Tensor:
    """1000 sigma (T,): the time that diffusers' FlowMatchEulerDiscreteScheduler gives to Stable Diffusion 3."""
    return NUM_TIMES * sigma


def flow_schedule(shift: float = 1.0, network_time: Callable[[Tensor], Tensor] = in_thousandths) -> Schedule:
    """Rectified flow: alpha = 1 - sigma with sigma = shift u / (1 + (shift - 1) u), u = (t + 1) / T.

    The shift is that of Stable Diffusion 3 (arXiv 2403.03206, eq. 23); the last time is pure noise, and the milestones
    of K segments are u = 1, (K - 1) / K, ... but for the last, 1 / T. `network_time` turns sigma (T,) into the time
    that the network was trained with: 1000 sigma, sigma, 1 - sigma or another.
    """
    u = torch.arange(1, NUM_TIMES + 1, dtype=torch.float64) / NUM_TIMES
    sigma = shift * u / (1.0 + (shift - 1.0) * u)
    return Schedule((1.0 - sigma).float(), sigma.float(), network_time(sigma).float())


def flow_shift(
    num_tokens: int,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_seq_len: int = 256,
    max_seq_len: int = 4096,
) -> float:
    """The shift exp(mu) for a picture of `num_tokens` tokens, mu linear in them: more tokens, more time near noise.

    mu is `base_shift` at `base_seq_len` tokens and `max_shift` at `max_seq_len`. The numbers are FLUX.1's, 1.88 at 1024
    tokens and 3.16 at 4096; Qwen-Image has max_shift 0.9 and max_seq_len 8192.
    """
    slope = (max_shift - base_shift) / (max_seq_len - base_seq_len)
    return math.exp(base_shift + slope * (num_tokens - base_seq_len))


def logit_normal_times(normal: Tensor, num_times: int = NUM_TIMES) -> Tensor:
    """Return integer times (B,) whose u = (t + 1) / T is logit-normal, from standard normals (B,).

    Stable Diffusion 3 is trained at such times (arXiv 2403.03206, section 3.1, mean 0 and scale 1). A shift of the
    schedule then moves their noise, as it moves that of even steps.
    """
    return (normal.sigmoid() * num_times).long().clamp(max=num_times - 1)


def add_noise(x0: Tensor, eps: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """x_t = alpha_t x0 + sigma_t eps (B, ...), for `t` (B,)."""
    alpha, sigma = schedule.at(t, x0)
    return alpha * x0 + sigma * eps


def noise_up(x_s: Tensor, eps: Tensor, s: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """(alpha_t / alpha_s) x_s + sqrt(sigma_t^2 - (alpha_t sigma_s / alpha_s)^2) eps (B, ...): a state of t >= s.

    Where x_s has the distribution of time `s` (B,), the result has that of `t` (B,): the forward process from the one
    to the other, by which phased consistency models compare states that have noise (arXiv 2405.18407, section 3.3).
    Needs s < T - 1, where alpha may be 0. It is x_s at t = s.
    """
    alpha_s, sigma_s = schedule.at(s, x_s)
    alpha_t, sigma_t = schedule.at(t, x_s)
    ratio = alpha_t / alpha_s
    # Exactly sigma_t >= ratio sigma_s; rounding in float32 may put it below, and a square root of that is NaN.
    return ratio * x_s + (sigma_t**2 - (ratio * sigma_s) ** 2).clamp(min=0).sqrt() * eps


def snr(t: Tensor, schedule: Schedule) -> Tensor:
    """Signal-to-noise ratio alpha_t^2 / sigma_t^2 (B,)."""
    return (schedule.alpha[t] / schedule.sigma[t]) ** 2
