"""A whole distillation in miniature: our own stages, store and sampler, an exact teacher, a small network.

A latent (D, 1, 1) is a point of a mixture of Gaussians. `Network` stands in for diffusers' UNet and `base_of` for the
pipeline that one is loaded in; everything done with them is the product's. The schedule is an argument, by name: under
"vp" the student predicts eps, as the paper's does, under "flow" the velocity eps - x0, as Stable Diffusion 3 does. A
student starts as a copy of the teacher (here: regressed on the exact prediction).
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from diffusers import ConfigMixin, ModelMixin, StableDiffusionPipeline
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from equations.gaussian import Mixture
from mlcm_rl.data.trajectory_store import Store
from mlcm_rl.equations.consistency import transfer
from mlcm_rl.equations.prediction import prediction_from_x0
from mlcm_rl.equations.schedule import Schedule, add_noise, flow_schedule, scaled_linear_betas, vp_schedule
from mlcm_rl.equations.segments import milestones, sampling_times, segment_start, time_grid
from mlcm_rl.equations.solver import ddim_step, inverse_ddim_step
from mlcm_rl.models import students, teachers
from mlcm_rl.models.base import Conditioning
from mlcm_rl.models.sampler import rollout
from mlcm_rl.models.students import Student
from mlcm_rl.models.unet import UNetBase
from mlcm_rl.recipe import Distill, Recipe, Teacher, Trajectories
from mlcm_rl.stages import distill, trajectories
from mlcm_rl.training.loop import rate_factor, set_rate
from tiny import BETAS

SCHEDULES = {"vp": vp_schedule(scaled_linear_betas()), "flow": flow_schedule()}
PREDICTIONS = {"vp": "epsilon", "flow": "flow"}  # at its last time a flow has no signal, where eps leaves x0 open
LEAST_LOG_SNR = -7.0  # given to a network for a flow's last time, whose own is minus infinity
GRID = torch.tensor(time_grid(48))
NUM_FREQUENCIES = 6
TEACHER = Teacher(path="mixture", revision="0" * 40, family="sd", guidance_scale=1.0)

Denoiser = nn.Module  # a Network or an Exact; its config names the schedule


class Network(ModelMixin, ConfigMixin):
    """A prediction (B, D, 1, 1); called, configured and saved as diffusers' UNet2DConditionModel is."""

    @register_to_config
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        block_out_channels: tuple[int, ...],
        sample_size: int = 1,
        time_cond_proj_dim: int | None = None,
        schedule: str = "vp",
    ):
        super().__init__()
        width = block_out_channels[0]
        self.first = nn.Linear(in_channels, width)
        self.time_embedding = TimestepEmbedding(2 * NUM_FREQUENCIES + 1, width, cond_proj_dim=time_cond_proj_dim)
        self.second = nn.Linear(width, width)
        self.third = nn.Linear(width, width)
        self.last = nn.Linear(width, out_channels)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        hidden = self.first(sample.flatten(1)) + self.time_embedding(
            embed(timestep, self.config.schedule), timestep_cond
        )
        for layer in (self.second, self.third):
            hidden = layer(nn.functional.silu(hidden))
        return (self.last(nn.functional.silu(hidden)).view_as(sample),)


def schedule_of(denoiser: Denoiser) -> Schedule:
    return SCHEDULES[denoiser.config.schedule]


def index_of(timestep: Tensor, schedule: Schedule) -> Tensor:
    """The index t (B,) of what a network takes for a time, `timestep` (B,)."""
    return torch.searchsorted(schedule.network_time, timestep)


def embed(timestep: Tensor, schedule: str) -> Tensor:
    """Log-SNR and sinusoids of a network's time (B, 2 F + 1)."""
    noise = SCHEDULES[schedule]
    t = index_of(timestep, noise)
    log_snr = (noise.alpha[t] / noise.sigma[t]).log().clamp(min=LEAST_LOG_SNR)[:, None]
    angle = math.pi / 2 * (t[:, None] / 999) * 2.0 ** torch.arange(NUM_FREQUENCIES)
    return torch.cat([log_snr, angle.cos(), angle.sin()], 1)


class Exact(nn.Module):
    """The prediction of a function f (x_t (B, D), t (B,)) -> x0 (B, D); called as a Network is."""

    def __init__(self, f: Callable[[Tensor, Tensor], Tensor], dim: int, schedule: str):
        super().__init__()
        self.f, self.config = f, narrow_network(dim, schedule).config
        self.precision = nn.Parameter(torch.empty(0))  # a base calls its denoiser in the precision of its weights

    def forward(self, x_t: Tensor, timestep: Tensor, **_: object) -> tuple[Tensor]:
        t = index_of(timestep, schedule_of(self))
        x0 = self.f(x_t.flatten(1).double(), t).view_as(x_t)
        return (prediction_from_x0(x0, x_t.double(), t, schedule_of(self), PREDICTIONS[self.config.schedule]),)


def narrow_network(dim: int, schedule: str) -> Network:
    """A network of one hidden feature, for its configuration."""
    return Network(in_channels=dim, out_channels=dim, block_out_channels=(1,), schedule=schedule)


class MixtureBase(UNetBase):
    """A teacher whose prompts change nothing."""

    family = "sd"
    kohya_version = "sd_v1"
    pipeline_class = StableDiffusionPipeline
    denoiser_class = Network

    def _schedule(self) -> tuple[str, Schedule]:
        name = self.denoiser.config.schedule
        return super()._schedule() if name == "vp" else (PREDICTIONS[name], SCHEDULES[name])

    def schedule_record(self) -> dict[str, Any]:
        return super().schedule_record() | {"schedule": self.denoiser.config.schedule}

    def _encode(self, prompts: list[str]) -> Conditioning:
        return {"context": torch.zeros(len(prompts), 1, 1)}

    @property
    def _dropped_prompt(self) -> Conditioning:
        return self._encode([""])


def base_of(denoiser: Denoiser) -> MixtureBase:
    """A base whose teacher is `denoiser`, as `teachers.load` would return it."""
    latents = FrozenDict(latent_channels=denoiser.config.in_channels, block_out_channels=(1,))
    pipeline = SimpleNamespace(
        unet=denoiser,
        vae=SimpleNamespace(config=latents),
        vae_scale_factor=1,
        scheduler=SimpleNamespace(config=BETAS | {"prediction_type": "epsilon"}),
        components={},
    )
    return MixtureBase(TEACHER, torch.device("cpu"), pipeline)


def base_under(student: Denoiser) -> MixtureBase:
    """A base to sample `student` with. Its own denoiser takes no target time, as no teacher's does."""
    return base_of(narrow_network(student.config.in_channels, student.config.schedule))


@contextmanager
def standing_in(denoiser: Denoiser) -> Iterator[None]:
    """Inside the block, stages load `denoiser` as their teacher, and students are Networks."""
    with patch.object(teachers, "load", lambda *_: base_of(copy.deepcopy(denoiser))):
        yield


def recipe(stage: Trajectories | Distill) -> Recipe:
    return Recipe(name="mixture", teacher=TEACHER, stages=[stage], device="cpu", trackers=[])


def store_of(teacher: Mixture, schedule: str, num_trajectories: int, num_held_out: int, folder: Path) -> Path:
    """The stage `trajectories`, run in `folder` with the exact teacher."""
    (folder / "prompts.txt").write_text("a mixture\n", encoding="utf-8")
    stage = Trajectories(
        prompts=str(folder / "prompts.txt"),
        num_trajectories=num_trajectories,
        num_held_out=num_held_out,
        solver_steps=48,
        batch_size=1024,
        shard_size=1024,
    )
    with standing_in(exact(teacher, schedule)):
        trajectories.run(stage, recipe(stage), {}, folder)
    return folder


def held_out(store: Path) -> Tensor:
    """Every state (N, 49, D, 1, 1) of the trajectories that are never trained on."""
    trajectories = Store(store)
    indices = torch.tensor(trajectories.held_out)
    return torch.stack([trajectories.states(indices, torch.full_like(indices, i)) for i in range(len(GRID))], 1)


def distilled(start: Network, store: Path, folder: Path, **settings: object) -> list[Student]:
    """The stage `distill`, run in `folder` with the `settings` of a recipe: the student after each phase."""
    usual = {"adapter": {"kind": "full"}, "batch_size": 64, "learning_rate": 1e-3, "optimizer_state": "reset"}
    usual |= {"num_segments": [8, 4, 2, 1]}
    quiet = {"log_every": 500, "save_every": 10**6, "sample_every": 10**6, "held_out_every": 10**6}
    stage = Distill(**(usual | quiet | settings))
    with standing_in(start):
        distill.run(stage, recipe(stage), {"trajectories": store}, folder)
        phases = sorted((folder / "snapshots").iterdir())
        return [students.load_student(base_of(start), phase) for phase in phases]


def network_like(
    teacher: Mixture, name: str, *, width: int, num_steps: int, seed: int, batch_size: int = 192, rate: float = 3e-3
) -> Network:
    """A network that starts as the teacher under the schedule `name`: regressed on its exact prediction."""
    generator, dim, schedule = torch.Generator().manual_seed(seed), teacher.means.shape[1], SCHEDULES[name]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = Network(in_channels=dim, out_channels=dim, block_out_channels=(width,), schedule=name)
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    for step in range(num_steps):
        set_rate(optimizer, rate * rate_factor(step, num_steps, warmup_steps=0))
        x0 = teacher.sample(batch_size, generator)
        t = GRID[torch.randint(len(GRID), (batch_size,), generator=generator)]
        x_t = add_noise(x0, torch.randn(x0.shape, generator=generator, dtype=torch.float64), t, schedule)
        mean = teacher.posterior_mean(x_t, t, schedule)
        target = prediction_from_x0(mean, x_t, t, schedule, PREDICTIONS[name]).float()
        optimizer.zero_grad()
        prediction = network(x_t.float()[..., None, None], schedule.network_time[t])[0].flatten(1)
        (prediction - target).square().mean().backward()
        optimizer.step()
    return network


def exact(teacher: Mixture, schedule: str) -> Exact:
    """The teacher itself."""
    return Exact(partial(teacher.posterior_mean, schedule=SCHEDULES[schedule]), teacher.means.shape[1], schedule)


def perfect(teacher: Mixture, name: str, num_segments: int) -> Exact:
    """A student without error under the schedule `name`: its one jump ends where the teacher's grid steps do."""
    schedule = SCHEDULES[name]

    def f(x_t: Tensor, t: Tensor) -> Tensor:
        s = segment_start(t, num_segments)
        state = x_t
        for here, after in pairwise(GRID):
            now, then = here.expand(len(x_t)), after.expand(len(x_t))
            stepped = ddim_step(state, teacher.posterior_mean(state, now, schedule), now, then, schedule)
            state = torch.where(((here <= t) & (after >= s))[:, None], stepped, state)
        return inverse_ddim_step(x_t, state, t, s, schedule)

    return Exact(f, teacher.means.shape[1], name)


def ends(
    denoiser: Denoiser, noise: Tensor, times: list[int], gamma: float = 0.0, seed: int = 0, conditioned: bool = False
) -> Tensor:
    """The states at index 0 (N, D, 1, 1) where our sampler ends from `noise`, with one step from each of `times`."""
    generator = torch.Generator().manual_seed(seed)
    states, x0s = rollout(base_under(denoiser), denoiser, context(noise), noise, times, gamma, generator, conditioned)
    t, s = (torch.full((len(noise),), time) for time in (times[-1], 0))
    return transfer(states[-1], x0s[-1], t, s, schedule_of(denoiser))


@torch.no_grad()
def jump_errors(denoiser: Denoiser, states: Tensor, num_segments: int) -> list[float]:
    """Mean distance between a jump from each milestone's stored state and the next stored milestone, top first."""
    errors = []
    for start, end in pairwise(milestones(num_segments).flip(0).tolist()):
        x_t, goal = (states[:, GRID.tolist().index(time)] for time in (start, end))
        t, s = (torch.full((len(x_t),), time) for time in (start, end))
        x0 = base_under(denoiser).x0(denoiser, x_t, t, context(x_t))
        errors.append(distance(transfer(x_t, x0, t, s, schedule_of(denoiser)), goal))
    return errors


def chain_error(
    denoiser: Denoiser, states: Tensor, num_steps: int, num_segments: int, conditioned: bool = False
) -> float:
    """Mean distance of the deterministic sampler's end to the stored end from the same noise."""
    times = sampling_times(num_steps, num_segments)
    return distance(ends(denoiser, states[:, 0], times, conditioned=conditioned), states[:, -1])


def context(x_t: Tensor) -> Conditioning:
    return {"context": x_t.new_zeros(len(x_t), 1, 1)}


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).flatten(1).norm(dim=1).mean().item()


def sliced_wasserstein(a: Tensor, b: Tensor, num_directions: int = 64) -> float:
    """Mean over directions of the Wasserstein-1 distance between two equally large samples (N, 2, ...)."""
    angle = torch.arange(num_directions) * math.pi / num_directions
    directions = torch.stack([angle.cos(), angle.sin()])
    sorted_a, sorted_b = ((x.flatten(1) @ directions).sort(0).values for x in (a, b))
    return (sorted_a - sorted_b).abs().mean().item()
