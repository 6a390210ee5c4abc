"""The passes that each stage's step takes, on roles without data: what `memory` tries.

It follows the stages' own losses in what is computed with gradient and what without, and in what is held meanwhile;
passes that hold less than another one of their step are left out. The numbers that come out mean nothing.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..equations.segments import sampling_times
from ..models import sampler, students
from ..models.base import Base, Conditioning
from ..recipe import Distill, Dpo, Evaluate, Feedback, Policy, Recipe, Reward, Stage, TrainTeacher, Trajectories, Tuning
from ..rewards import RewardModel
from ..training import processes as distributed

PROMPT = "panda"  # rewards read some prompt


@dataclass(frozen=True)
class Roles:
    """Teacher and student on the meta device, and the rewards that could be built there, by name."""

    base: Base
    student: nn.Module
    conditioned: bool
    num_tokens: int
    rewards: dict[str, RewardModel]
    failed: set[str]  # rewards that could not be asked there; what they take is not known
    own_precision: Callable[[], AbstractContextManager[None]]  # what is frozen computes in it
    forget_copies: Callable[[], None]  # trained weights change places
    small_decoder: nn.Module | None = None  # draws for the rewards trained on, where there is one

    def points(self, count: int) -> tuple[Tensor, Tensor, Conditioning]:
        """States (count, C, H, W), times (count,) and conditioning (count, ...)."""
        empty = {"device": self.base.device}
        conditioning = self.base.empty_conditioning(count, self.num_tokens)
        t = torch.ones(count, dtype=torch.int64, **empty)
        return torch.empty(count, *self.base.latent_shape, **empty), t, conditioning

    def x0(self, count: int) -> Tensor:
        """The student's x0 (count, C, H, W)."""
        x_t, t, conditioning = self.points(count)
        return self.base.x0(self.student, x_t, t, conditioning, t if self.conditioned else None)

    def teacher_x0(self, count: int, guidance_scale: float) -> Tensor:
        """The guided teacher's x0 (count, C, H, W)."""
        x_t, t, conditioning = self.points(count)
        with self.own_precision():
            return self.base.guided_x0(x_t, t, conditioning, conditioning, guidance_scale)

    def sample(self, count: int, grad_steps: int = 0) -> Tensor:
        """The student's samples (count, C, H, W); steps before those with gradient hold less and are left out."""
        noise, _, given = self.points(count)
        times = sampling_times(max(1, grad_steps))
        return sampler.sample(self.base, self.student, given, noise, times, 0.0, None, self.conditioned, grad_steps)

    def encode(self, count: int) -> Tensor:
        """Latents (count, C, H, W) of as many pictures."""
        side = self.base.resolution
        return self.base.encode_images(torch.empty(count, 3, side, side, device=self.base.device))

    def scores(self, latents: Tensor, asked: list[Reward], small: nn.Module | None = None) -> Tensor:
        """The sum (count,) of what the rewards `asked` say of `latents`, decoded by a `small` decoder if given."""
        images = self.base.decode(latents, small)
        total = images.mean((1, 2, 3))
        for one in asked:
            if one.name in self.rewards:
                total = total + self._score(one, images)
        return total

    def _score(self, asked: Reward, images: Tensor) -> Tensor:
        """One reward's scores (count,), or zeros where it cannot be asked without data."""
        reward = self.rewards[asked.name]
        try:
            with self.own_precision():
                parts = [reward(part, [PROMPT] * len(part)) for part in images.split(asked.chunk_size or len(images))]
        except (Exception, SystemExit):  # another's code may look at values, which are not there
            self.failed.add(asked.name)
            return images.new_zeros(len(images))
        return torch.cat(parts)


def step(stage: TrainTeacher | Distill | Tuning, recipe: Recipe, roles: Roles) -> Tensor:
    """The loss of one micro-batch of `stage`, with its graph."""
    taken: dict[type, Callable[[Any, Recipe, Roles], Tensor]] = {
        TrainTeacher: _train_teacher,
        Distill: _distill,
        Feedback: _feedback,
        Dpo: _dpo,
        Policy: _policy,
    }
    return taken[type(stage)](stage, recipe, roles)


def _train_teacher(stage: TrainTeacher, recipe: Recipe, roles: Roles) -> Tensor:
    x_t, t, conditioning = roles.points(stage.micro_batch)
    return roles.base.predict(roles.student, x_t, t, conditioning).square().mean()


def _distill(stage: Distill, recipe: Recipe, roles: Roles) -> Tensor:
    size = stage.micro_batch
    if stage.asks_teacher:
        roles.teacher_x0(size, recipe.teacher.guidance_scale)
    loss = roles.x0(size).square().mean()
    if stage.method == "inter_segment" or "consistency" in stage.per_phase("target"):
        if stage.target_ema:
            roles.forget_copies()
        with torch.no_grad():
            roles.x0(size)
        if stage.target_ema:
            roles.forget_copies()
    return loss


def _feedback(stage: Feedback, recipe: Recipe, roles: Roles) -> Tensor:
    size = stage.micro_batch
    if stage.gradient == "low_variance":
        x0 = roles.x0(size * stage.num_copies)
    else:
        x0 = roles.sample(size, stage.num_grad_steps if stage.gradient == "last" else 1)
    loss = roles.scores(x0, stage.rewards, roles.small_decoder).sum()
    if stage.shape == "mps_hinge":
        loss = loss + roles.scores(x0, stage.rewards, roles.small_decoder).sum()
    if stage.anchor:
        with torch.no_grad(), students.as_reference(roles.student):
            roles.x0(len(x0))
    for weight in (stage.kl, stage.consistency):
        if weight:
            loss = loss + roles.x0(size).square().mean()
    return loss


def _dpo(stage: Dpo, recipe: Recipe, roles: Roles) -> Tensor:
    if not stage.pairs:
        _scored(stage, roles, stage.micro_batch * stage.num_generations)
    passes = {"endpoint": stage.sampling_steps, "diffusion_dpo": 1, "pso": stage.sampling_steps - 1}[stage.form]
    return _together(roles, 2 * stage.micro_batch, passes)


def _policy(stage: Policy, recipe: Recipe, roles: Roles) -> Tensor:
    _scored(stage, roles, stage.micro_batch)
    return _together(roles, stage.micro_batch, stage.sampling_steps - 1)


@torch.no_grad()
def _scored(stage: Tuning, roles: Roles, count: int) -> None:
    """Samples and what the rewards trained on say of them."""
    roles.scores(roles.sample(count), stage.rewards)


def _together(roles: Roles, count: int, passes: int) -> Tensor:
    """`passes` of the student on `count` samples in one graph; the reference's, which hold less, are left out."""
    return torch.stack([roles.x0(count).square().mean() for _ in range(passes)]).sum()


@torch.no_grad()
def between_steps(stage: Stage, recipe: Recipe, roles: Roles, processes: int = 1) -> None:
    """What is encoded, drawn and measured outside the steps: pictures that a stage reads, sample grids, the guard's
    look, a stage without gradients."""
    guidance_scale = recipe.teacher.guidance_scale
    if isinstance(stage, Trajectories | Evaluate):
        x0 = roles.teacher_x0(stage.batch_size, guidance_scale)
        if isinstance(stage, Evaluate):
            roles.base.decode(x0)
        return
    of_data = isinstance(stage, Distill) and stage.method == "segments" and stage.source == "data"
    if isinstance(stage, TrainTeacher) or of_data:
        roles.encode(stage.micro_batch)
    if isinstance(stage, Dpo) and stage.pairs:
        roles.encode(distributed.part(stage.micro_batch, processes))
    if isinstance(stage, Tuning):
        latents = roles.sample(min(max(1, stage.micro_batch // processes), stage.guard.num_prompts))
        roles.scores(latents, [*stage.rewards, *stage.guard.rewards])
    if num_grid := len(recipe.samples.prompts):
        teacher = isinstance(stage, TrainTeacher)
        roles.base.decode(roles.teacher_x0(num_grid, guidance_scale) if teacher else roles.sample(num_grid))
