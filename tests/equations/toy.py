"""A whole distillation in miniature: exact teacher, stored trajectories, a small network, and only our equations.

The student predicts eps, as the paper's does, starts as a copy of the teacher (here: regressed on its eps), and is
trained and sampled with the same functions as a real one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from equations.gaussian import Mixture
from mlcm_rl.equations.consistency import DISTANCES, LOSSES, transfer
from mlcm_rl.equations.prediction import x0_from_prediction
from mlcm_rl.equations.schedule import add_noise, scaled_linear_betas, vp_schedule
from mlcm_rl.equations.segments import milestones, sampling_times, segment_start, time_grid
from mlcm_rl.equations.solver import ddim_step, gamma_step, inverse_ddim_step, time_before_noise

SCHEDULE = vp_schedule(scaled_linear_betas())
GRID = torch.tensor(time_grid(48))
NUM_FREQUENCIES = 6

Sampler = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_t, t, s) to f (B, D): a network, or a perfect student


class Student(nn.Module):
    """eps (B, D) from (x_t, t), and from the target time s too where `conditioned` (a zero-initialised input)."""

    def __init__(self, dim: int, width: int, conditioned: bool, generator: torch.Generator):
        super().__init__()
        self.first = nn.Linear(dim + 2 * NUM_FREQUENCIES + 1, width)
        self.second = nn.Linear(width, width)
        self.third = nn.Linear(width, width)
        self.last = nn.Linear(width, dim)
        for layer in (self.first, self.second, self.third, self.last):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)
        self.target = nn.Linear(2 * NUM_FREQUENCIES + 1, width, bias=False) if conditioned else None
        if self.target is not None:
            nn.init.zeros_(self.target.weight)

    def forward(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        hidden = self.first(torch.cat([x_t, embed(t)], 1))
        if self.target is not None:
            hidden = hidden + self.target(embed(s))
        for layer in (self.second, self.third):
            hidden = layer(nn.functional.silu(hidden))
        return self.last(nn.functional.silu(hidden))

    def x0(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """f (B, D)."""
        return x0_from_prediction(self(x_t, t, s), x_t, t, SCHEDULE, "epsilon")


def embed(t: Tensor) -> Tensor:
    """Log-SNR and sinusoids of a time (B, 2 F + 1)."""
    log_snr = (SCHEDULE.alpha[t] / SCHEDULE.sigma[t]).log()[:, None]
    angle = math.pi / 2 * (t[:, None] / 999) * 2.0 ** torch.arange(NUM_FREQUENCIES)
    return torch.cat([log_snr, angle.cos(), angle.sin()], 1)


@dataclass(frozen=True)
class Phase:
    """One phase of training, in the words of the recipe.

    `num_segments` None is for a conditioned student: s is drawn from all milestones below t, not only the nearest.
    """

    num_segments: int | None
    num_steps: int
    target: str = "trajectory"  # trajectory | consistency
    pair: str = "next"  # next | random
    space: str = "z"
    distance: str = "l2"


def solve(teacher: Mixture, noise: Tensor, grid: Tensor) -> Tensor:
    """Every state of the exact teacher's DDIM trajectory from `noise` (N, D): (N, steps + 1, D) float32."""
    states = [noise.double()]
    for t, s in pairwise(grid):
        t, s = t.expand(len(noise)), s.expand(len(noise))
        states.append(ddim_step(states[-1], teacher.posterior_mean(states[-1], t, SCHEDULE), t, s, SCHEDULE))
    return torch.stack(states, 1).float()


def student_like(
    teacher: Mixture, *, width: int, num_steps: int, seed: int, conditioned: bool = False, batch_size: int = 192
) -> Student:
    """A student that starts as the teacher: regressed on its exact eps at noised data."""
    generator = torch.Generator().manual_seed(seed)
    student = Student(teacher.means.shape[1], width, conditioned, generator)
    for _ in optimised(student, num_steps, rate=3e-3):
        x0 = teacher.sample(batch_size, generator)
        t = GRID[torch.randint(len(GRID), (batch_size,), generator=generator)]
        x_t = add_noise(x0, torch.randn(x0.shape, generator=generator, dtype=torch.float64), t, SCHEDULE)
        eps = teacher.eps(x_t, t, SCHEDULE).float()
        (student(x_t.float(), t, torch.zeros_like(t)) - eps).square().mean().backward()
    return student


def train(student: Student, states: Tensor, phase: Phase, *, seed: int, batch_size: int = 192) -> None:
    """One phase of multistep consistency distillation on stored `states` (N, 49, D), in place."""
    generator = torch.Generator().manual_seed(seed)
    for _ in optimised(student, phase.num_steps, rate=1e-3):
        row = torch.randint(len(states), (batch_size,), generator=generator)
        here = torch.randint(len(GRID) - 1, (batch_size,), generator=generator)
        x_t, t = states[row, here], GRID[here]
        s = starts(t, phase.num_segments, generator)
        end = grid_index(s)
        if phase.target == "trajectory":
            target = states[row, end]
        else:
            there = second_points(here, end, phase.pair, generator)
            x_r, r = states[row, there], GRID[there]
            with torch.no_grad():
                target = transfer(x_r, student.x0(x_r, r, s), r, s, SCHEDULE)
        loss = LOSSES[phase.space](student.x0(x_t, t, s), x_t, t, target, s, SCHEDULE, DISTANCES[phase.distance])
        loss.mean().backward()


def optimised(student: Student, num_steps: int, rate: float):
    """Yields `num_steps` times, each followed by one Adam step whose rate falls to 0 along a cosine."""
    optimizer = torch.optim.Adam(student.parameters(), lr=rate, fused=True)
    for step in range(num_steps):
        optimizer.zero_grad()
        yield step
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * step / num_steps)) / 2
        optimizer.step()


def starts(t: Tensor, num_segments: int | None, generator: torch.Generator) -> Tensor:
    """The time (B,) that the jump from t ends at."""
    if num_segments is not None:
        return segment_start(t, num_segments)
    ends = milestones(8)
    num_below = torch.searchsorted(ends, t)
    return ends[(torch.rand(len(t), generator=generator) * num_below).long()]


def second_points(here: Tensor, end: Tensor, pair: str, generator: torch.Generator) -> Tensor:
    """Grid indices (B,) of a pair's second point: the next one, or any down to the segment's start."""
    if pair == "next":
        return here + 1
    return here + 1 + (torch.rand(len(here), generator=generator) * (end - here)).long()


def grid_index(t: Tensor) -> Tensor:
    """Where on the descending grid the time t (B,) stands."""
    return len(GRID) - 1 - torch.searchsorted(GRID.flip(0), t)


@torch.no_grad()
def sample(f: Sampler, noise: Tensor, times: list[int], gamma: float, generator: torch.Generator) -> Tensor:
    """The state at index 0 (N, D) from `noise` at `times`, then 0: deterministic for gamma 0, re-noised for 1."""
    x_t = noise
    for time, after in zip(times, [*times[1:], 0], strict=True):
        t, s = torch.full((len(noise),), time), torch.full((len(noise),), after)
        x0 = f(x_t, t, time_before_noise(s, gamma))
        if after == 0:
            return transfer(x_t, x0, t, s, SCHEDULE)
        fresh = torch.randn(noise.shape, generator=generator, dtype=noise.dtype)
        x_t = gamma_step(x_t, x0, t, s, fresh, gamma, SCHEDULE)
    raise ValueError("no times to sample at")


@torch.no_grad()
def jump_errors(f: Sampler, states: Tensor, num_segments: int) -> list[float]:
    """Mean distance between a jump from each milestone's stored state and the next stored milestone, top first."""
    ends = milestones(num_segments).flip(0)
    errors = []
    for t, s in pairwise(ends):
        x_t, goal = states[:, int(grid_index(t[None]))], states[:, int(grid_index(s[None]))]
        t, s = t.expand(len(x_t)), s.expand(len(x_t))
        errors.append(distance(transfer(x_t, f(x_t, t, s), t, s, SCHEDULE), goal))
    return errors


def chain_error(f: Sampler, states: Tensor, num_steps: int, num_segments: int) -> float:
    """Mean distance of the deterministic sampler's end to the stored end from the same noise."""
    times = sampling_times(num_steps, num_segments)
    return distance(sample(f, states[:, 0], times, 0.0, torch.Generator().manual_seed(0)), states[:, -1])


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).norm(dim=1).mean().item()


def perfect(teacher: Mixture, num_segments: int) -> Sampler:
    """f of a student that makes no error: the x0 whose one jump lands where the teacher's grid steps do."""

    def f(x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        end = segment_start(t[:1], num_segments)
        grid = GRID[(end <= GRID) & (t[0] >= GRID)]
        return inverse_ddim_step(x_t, solve(teacher, x_t, grid)[:, -1], t, end.expand(len(t)), SCHEDULE)

    return f


def sliced_wasserstein(a: Tensor, b: Tensor, num_directions: int = 64) -> float:
    """Mean over directions of the Wasserstein-1 distance between two equally large samples (N, D)."""
    angle = torch.arange(num_directions) * math.pi / num_directions
    directions = torch.stack([angle.cos(), angle.sin()]) if a.shape[1] == 2 else torch.ones(1, 1)
    sorted_a, sorted_b = ((x.float() @ directions).sort(0).values for x in (a, b))
    return (sorted_a - sorted_b).abs().mean().item()
