"""The passes that a stage says it takes (`recipe.takes`), taken on roles without data: what `memory` tries.

Those with gradient stay in one graph until the backward pass. The numbers that come out mean nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from ..equations.segments import sampling_times
from ..models import sampler, students
from ..models.base import Base, Conditioning
from ..recipe import Recipe, Reward, Stage
from ..recipe.takes import Pass
from ..rewards import RewardModel

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
    has_average: bool = False  # the target is an average of the student's weights
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

    def prediction(self, count: int) -> Tensor:
        """What the student's network itself gives (count, C, H, W)."""
        x_t, t, conditioning = self.points(count)
        return self.base.predict(self.student, x_t, t, conditioning)

    def target_x0(self, count: int) -> Tensor:
        """The target's x0 (count, C, H, W), whose weights take the place of the student's meanwhile."""
        if self.has_average:
            self.forget_copies()
        x0 = self.x0(count)
        if self.has_average:
            self.forget_copies()
        return x0

    def reference_x0(self, count: int) -> Tensor:
        """The reference's x0 (count, C, H, W)."""
        with students.as_reference(self.student):
            return self.x0(count)

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
        return self.base.autoencoder.encode(torch.empty(count, 3, side, side, device=self.base.device))

    def scores(self, latents: Tensor, asked: list[Reward], small: nn.Module | None = None) -> Tensor:
        """The sum (count,) of what the rewards `asked` say of `latents`, decoded by a `small` decoder if given."""
        images = self.base.autoencoder.decode(latents, small)
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


def step(stage: Stage, recipe: Recipe, roles: Roles, part: int) -> Tensor:
    """Return the loss of one micro-batch of `stage`, with its graph, of the `part` of it that a process has."""
    return reduce(torch.add, _terms(stage, recipe, roles, part))


def _terms(stage: Stage, recipe: Recipe, roles: Roles, part: int) -> Iterator[Tensor]:
    """Yield what the loss is the sum of."""
    alive: list[Tensor] = []  # a sample that rewards saw stays for the terms beside theirs
    for taken in stage.passes(recipe, part):
        if not taken.in_step or not taken.batch:
            continue
        if not taken.gradient:
            _without_gradient(taken, stage, recipe, roles)
        elif taken.viewer:
            steps = int(taken.evaluations)
            alive.append(roles.sample(taken.batch, steps) if taken.is_chained else roles.x0(taken.batch))
            for _ in range(taken.num_looks):
                yield _seen(taken, stage, roles, alive[-1]).sum()
        else:
            network = roles.prediction if taken.output == "prediction" else roles.x0
            yield torch.stack([network(taken.batch).square().mean() for _ in range(int(taken.evaluations))]).sum()


@torch.no_grad()
def between_steps(stage: Stage, recipe: Recipe, roles: Roles, part: int = 0) -> None:
    """Take what is outside the steps: pictures encoded, sample grids, the guard's look, a stage without gradients."""
    for taken in stage.passes(recipe, part):
        if taken.batch and not taken.in_step:
            _without_gradient(taken, stage, recipe, roles)


@torch.no_grad()
def _without_gradient(taken: Pass, stage: Stage, recipe: Recipe, roles: Roles) -> None:
    """Take one batch of a pass that leaves no graph, and let those look at its pictures who do."""
    found = {
        "teacher": lambda: roles.teacher_x0(taken.batch, recipe.teacher.guidance_scale),
        "student": lambda: roles.sample(taken.batch),
        "target": lambda: roles.target_x0(taken.batch),
        "reference": lambda: roles.reference_x0(taken.batch),
        "encoder": lambda: roles.encode(taken.batch),
    }[taken.role]()
    if taken.viewer:
        _seen(taken, stage, roles, found)


def _seen(taken: Pass, stage: Stage, roles: Roles, x0: Tensor) -> Tensor:
    """Return what those say (B,) who see the pictures of `x0` (B, C, H, W)."""
    if taken.viewer == "person":
        return roles.base.autoencoder.decode(x0)
    small = roles.small_decoder if taken.viewer == "rewards" else None
    return roles.scores(x0, stage.trained_on if taken.viewer == "rewards" else stage.reward_models, small)
