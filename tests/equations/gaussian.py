"""Data whose diffusion is known in closed form: the ground truth that the equations are tested against.

A mixture of isotropic Gaussians stays one under x_t = alpha_t x0 + sigma_t eps, so its score, its eps and its posterior
mean are exact at every time. For one Gaussian the probability-flow ODE is solved too: x_t keeps its place in units of
the marginal's standard deviation sqrt(alpha_t^2 c^2 + sigma_t^2). In one dimension that holds for any mixture, place
being the quantile. Everything is float64; only the schedule carries the rounding of float32.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mlcm_rl.equations.schedule import Schedule


@dataclass(frozen=True)
class Mixture:
    """sum_k weights_k N(means_k, std^2 I): `weights` (M,), `means` (M, D), float64."""

    weights: Tensor
    means: Tensor
    std: float

    def sample(self, num_samples: int, generator: torch.Generator) -> Tensor:
        """Fresh data x0 (num_samples, D)."""
        mode = torch.multinomial(self.weights, num_samples, replacement=True, generator=generator)
        spread = torch.randn(num_samples, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[mode] + self.std * spread

    def log_density(self, x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
        """log p_t(x_t) (B,)."""
        return self._log_joint(x_t, t, schedule).logsumexp(1)

    def posterior_mean(self, x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
        """E[x0 | x_t] (B, D): what a perfect teacher predicts."""
        alpha, variance = self._marginal(t, schedule)
        share = self._log_joint(x_t, t, schedule).softmax(1)  # (B, M)
        gain = alpha * self.std**2 / variance  # (B, 1)
        return share @ self.means + gain * (x_t - alpha * (share @ self.means))

    def score(self, x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
        """grad log p_t(x_t) (B, D) = -eps / sigma_t (Tweedie)."""
        return -self.eps(x_t, t, schedule) / schedule.sigma[t].double()[:, None]

    def eps(self, x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
        """E[eps | x_t] (B, D)."""
        alpha, sigma = schedule.alpha[t].double()[:, None], schedule.sigma[t].double()[:, None]
        return (x_t - alpha * self.posterior_mean(x_t, t, schedule)) / sigma

    def _marginal(self, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        alpha, sigma = schedule.alpha[t].double()[:, None], schedule.sigma[t].double()[:, None]
        return alpha, alpha**2 * self.std**2 + sigma**2

    def _log_joint(self, x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
        alpha, variance = self._marginal(t, schedule)
        distance = (x_t[:, None] - alpha[..., None] * self.means).square().sum(2)  # (B, M)
        normaliser = 0.5 * self.means.shape[1] * (2 * math.pi * variance).log()
        return self.weights.log() - distance / (2 * variance) - normaliser


@dataclass(frozen=True)
class LineMixture(Mixture):
    """A mixture on the line, where the probability flow is known: it keeps every point's quantile."""

    def flow(self, x_t: Tensor, t: Tensor, s: Tensor, schedule: Schedule) -> Tensor:
        """x_s (B, 1) = F_s^-1(F_t(x_t)), by bisection to float64's limit."""
        quantile = self._quantile(x_t, t, schedule)
        low, high = torch.full_like(x_t, -20.0), torch.full_like(x_t, 20.0)
        for _ in range(60):
            middle = (low + high) / 2
            above = self._quantile(middle, s, schedule) > quantile
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (low + high) / 2

    def _quantile(self, x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
        alpha, variance = self._marginal(t, schedule)
        z = (x_t - alpha * self.means.T) / variance.sqrt()  # (B, M)
        return (self.weights * torch.special.ndtr(z)).sum(1, keepdim=True)


@dataclass(frozen=True)
class Gaussian:
    """N(mean, std^2 I), `mean` (D,) float64: every map of multistep consistency distillation in closed form."""

    mean: Tensor
    std: float

    def mixture(self) -> Mixture:
        """The same data as a mixture of one, for its score, eps and posterior mean."""
        return Mixture(torch.ones(1, dtype=torch.float64), self.mean[None], self.std)

    def marginal_std(self, t: Tensor, schedule: Schedule) -> Tensor:
        """sqrt(alpha_t^2 c^2 + sigma_t^2) (B, 1)."""
        return (schedule.alpha[t].double() ** 2 * self.std**2 + schedule.sigma[t].double() ** 2).sqrt()[:, None]

    def flow(self, x_t: Tensor, t: Tensor, s: Tensor, schedule: Schedule) -> Tensor:
        """The probability-flow ODE from `t` to `s` (B, D)."""
        scale = self.marginal_std(s, schedule) / self.marginal_std(t, schedule)
        return schedule.alpha[s].double()[:, None] * self.mean + scale * self._centred(x_t, t, schedule)

    def consistency(self, x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
        """The consistency function (B, D): the flow all the way to clean data, alpha = 1 and sigma = 0."""
        return self.mean + self.std / self.marginal_std(t, schedule) * self._centred(x_t, t, schedule)

    def f(self, x_t: Tensor, t: Tensor, s: Tensor, schedule: Schedule) -> Tensor:
        """The x0 of a perfect student at (x_t, t) (B, D): the x0 whose DDIM step to `s` is exactly the flow to `s`."""
        ratio = (schedule.sigma[s].double() / schedule.sigma[t].double())[:, None]
        gain = schedule.alpha[s].double()[:, None] - schedule.alpha[t].double()[:, None] * ratio
        scale = self.marginal_std(s, schedule) / self.marginal_std(t, schedule)
        return self.mean + (scale - ratio) / gain * self._centred(x_t, t, schedule)

    def _centred(self, x_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
        return x_t - schedule.alpha[t].double()[:, None] * self.mean


def gaussian_1d() -> Gaussian:
    return Gaussian(torch.tensor([0.7], dtype=torch.float64), 0.4)


def gaussian_2d() -> Gaussian:
    return Gaussian(torch.tensor([-0.5, 1.2], dtype=torch.float64), 0.3)


def mixture_1d() -> LineMixture:
    """Three unequal modes, unit variance, mean 0."""
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    return LineMixture(weights, _unit_variance(weights, torch.tensor([[-1.2], [0.4], [1.6]]), 0.3), 0.3)


def mixture_2d() -> Mixture:
    """Eight unequal modes on a bent ring, unit variance per axis on average, mean 0."""
    weights = torch.arange(4, 12, dtype=torch.float64)
    weights = weights / weights.sum()
    angle = torch.arange(8, dtype=torch.float64) * (2 * math.pi / 8)
    radius = torch.tensor([1.0, 1.5, 0.7, 1.3, 1.1, 0.6, 1.4, 0.9], dtype=torch.float64)
    means = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    return Mixture(weights, _unit_variance(weights, means, 0.06), 0.06)


def _unit_variance(weights: Tensor, means: Tensor, std: float) -> Tensor:
    """`means` (M, D) shifted and scaled so that the mixture has mean 0 and mean variance 1 an axis."""
    centred = means.double() - weights @ means.double()
    variance = (weights @ centred.square()).mean()
    return centred * ((1 - std**2) / variance).sqrt()
