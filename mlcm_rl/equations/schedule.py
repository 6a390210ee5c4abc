"""Noise schedules: alpha and sigma of a time, for variance-preserving diffusion and for rectified flow."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """Signal and noise scales at the integer times 0 .. T-1: `x_t = alpha[t] x0 + sigma[t] eps`.

    Both are float32 whatever the network's precision: in bfloat16 the exact anchor of the consistency loss is off by
    up to 8e-3.
    """

    alpha: Tensor  # (T,) float32
    sigma: Tensor  # (T,) float32

    def __post_init__(self):
        if self.alpha.dtype != torch.float32 or self.sigma.dtype != torch.float32:
            raise TypeError(f"schedules are float32, got alpha {self.alpha.dtype} and sigma {self.sigma.dtype}")
        if self.alpha.shape != self.sigma.shape or self.alpha.ndim != 1:
            raise ValueError(f"alpha {tuple(self.alpha.shape)} and sigma {tuple(self.sigma.shape)} must be one (T,)")

    @property
    def num_times(self) -> int:
        return len(self.alpha)

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of `t` (B,), shaped (B, 1, ..., 1) to multiply `like` (B, ...)."""
        return expand(self.alpha[t], like), expand(self.sigma[t], like)

    def to(self, device: torch.device | str) -> "Schedule":
        return Schedule(self.alpha.to(device), self.sigma.to(device))


def expand(value: Tensor, like: Tensor) -> Tensor:
    """`value` (B,) shaped (B, 1, ..., 1) to broadcast against `like` (B, ...)."""
    return value.reshape(-1, *[1] * (like.ndim - 1))


def scaled_linear_betas(num_times: int = 1000, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """Stable Diffusion's betas (T,) float64: linear in their square root."""
    return torch.linspace(start**0.5, end**0.5, num_times, dtype=torch.float64) ** 2


def vp_schedule(betas: Tensor) -> Schedule:
    """Variance-preserving schedule of `betas` (T,): alpha_t^2 = prod(1 - beta), sigma_t^2 = 1 - alpha_t^2.

    The product is taken in float64, so that sigma near t = 0 keeps its digits (DDPM, arXiv 2006.11239, eq. 4).
    """
    alpha_squared = torch.cumprod(1.0 - betas.double(), dim=0)
    return Schedule(alpha_squared.sqrt().float(), (1.0 - alpha_squared).sqrt().float())


def flow_schedule(num_times: int = 1000, shift: float = 1.0) -> Schedule:
    """Rectified flow: alpha = 1 - sigma with sigma = shift u / (1 + (shift - 1) u), u = (t + 1) / T.

    The shift is that of Stable Diffusion 3 (arXiv 2403.03206, eq. 23); the last time is pure noise.
    """
    u = torch.arange(1, num_times + 1, dtype=torch.float64) / num_times
    sigma = shift * u / (1.0 + (shift - 1.0) * u)
    return Schedule((1.0 - sigma).float(), sigma.float())


def add_noise(x0: Tensor, eps: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """x_t = alpha_t x0 + sigma_t eps (B, ...), for `t` (B,)."""
    alpha, sigma = schedule.at(t, x0)
    return alpha * x0 + sigma * eps


def snr(t: Tensor, schedule: Schedule) -> Tensor:
    """Signal-to-noise ratio alpha_t^2 / sigma_t^2 (B,)."""
    return (schedule.alpha[t] / schedule.sigma[t]) ** 2
