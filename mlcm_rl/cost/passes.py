"""The passes of a stage (`recipe.takes`) through networks on the meta device, which `memory` measures.

Those with gradient stay in one graph until the backward pass. Values have shapes and no content.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor, nn

from ..equations.segments import sampling_times
from ..models import perceptual, sampler, students
from ..models.base import Base
from ..models.conditioning import Conditioning
from ..models.control import controlled
from ..models.features import features
from ..models.heads import Heads, frozen, paired
from ..models.lpips import LatentLpips
from ..models.text_adapter import TextAdapter
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
    own_precision: Callable[[], AbstractContextManager[None]]  # of frozen networks
    forget_copies: Callable[[], None]  # called where trained weights change places
    has_average: bool = False  # the target is an average of the student's weights
    small_decoder: nn.Module | None = None  # decodes for the rewards trained on, where there is one
    text_adapter: TextAdapter | None = None  # trained in place of the student, whose conditioning it makes
    control_net: nn.Module | None = None  # trained in place of the student, on which it acts
    lpips: LatentLpips | None = None  # compares latents, or is trained in place of the student
    trains_lpips: bool = False
    feature_blocks: tuple[int, ...] = ()  # of the teacher, which compares latents
    failed: set[str] = field(default_factory=set)  # rewards that could not be called there: of unknown memory
    beside: dict[str, nn.Module] = field(default_factory=dict)  # trained beside the student, by role
    is_tuned: bool = False  # whether a preference adapter is trained, over a student that is the reference

    @property
    def trained(self) -> nn.Module:
        """The network that is trained, by a stage that trains one."""
        return (self.lpips if self.trains_lpips else None) or self.text_adapter or self.control_net or self.student

    def points(self, count: int) -> tuple[Tensor, Tensor, Conditioning]:
        """Return states (count, C, H, W), times (count,) and conditioning (count, ...)."""
        device = self.base.device
        conditioning = self.base.empty_conditioning(count, self.num_tokens)
        if self.text_adapter is not None:
            states = torch.empty(count, self.num_tokens, self.text_adapter.sizes.states, device=device)
            conditioning = self.text_adapter(states, torch.empty(count, dtype=torch.int64, device=device))
        t = torch.ones(count, dtype=torch.int64, device=device)
        return torch.empty(count, *self.base.latent_shape, device=device), t, conditioning

    def x0(self, count: int) -> Tensor:
        """Return the student's x0 (count, C, H, W)."""
        x_t, t, conditioning = self.points(count)
        with self._controlled():
            return self.base.x0(self.student, x_t, t, conditioning, t if self.conditioned else None)

    def prediction(self, count: int) -> Tensor:
        """Return the prediction of the student's network (count, C, H, W)."""
        x_t, t, conditioning = self.points(count)
        with self._controlled():
            return self.base.predict(self.student, x_t, t, conditioning)

    def _controlled(self) -> AbstractContextManager[None]:
        """Return a block in which the ControlNet acts, if one is trained."""
        if self.control_net is None:
            return nullcontext()
        side = self.base.resolution
        return controlled(self.student, self.control_net, torch.empty(1, 3, side, side, device=self.base.device))

    def target_x0(self, count: int) -> Tensor:
        """Return the target's x0 (count, C, H, W); its weights take the place of the student's meanwhile."""
        if self.has_average:
            self.forget_copies()
        x0 = self.x0(count)
        if self.has_average:
            self.forget_copies()
        return x0

    def reference_x0(self, count: int) -> Tensor:
        """Return the reference's x0 (count, C, H, W)."""
        with students.as_reference(self.student):
            return self.x0(count)

    def distance(self, network: str, count: int) -> Tensor:
        """Return the distances (count,) of latents by LPIPS or by the teacher's features, with their gradient."""
        a, _, conditioning = self.points(count)
        b = torch.empty_like(a)
        if network == "features":
            blocks, noise = self.feature_blocks, b[:1]
            perceptual.refuse_blocks(self.base, blocks)
            with self.own_precision():
                return perceptual.teacher_distance(self.base, a.requires_grad_(), b, conditioning, noise, 0, blocks)
        assert self.lpips is not None
        with self.own_precision():
            if self.trains_lpips:
                return self.lpips(a, b)
            return perceptual.lpips_distance(self.lpips, a.requires_grad_(), b)

    def fake_x0(self, count: int) -> Tensor:
        """Return the x0 (count, C, H, W) of the score of the student's samples."""
        x_t, t, conditioning = self.points(count)
        return self.base.x0(self.beside["fake"], x_t, t, conditioning)

    def fake_loss(self, count: int) -> Tensor:
        """Return what that score is trained by, ()."""
        x_t, t, conditioning = self.points(count)
        return self.base.predict(self.beside["fake"], x_t, t, conditioning).square().mean()

    def read(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> list[Tensor]:
        """Return the features (count, D, h, w) that heads read: the teacher's, in tuning those of the reference."""
        if not self.is_tuned:
            return features(self.base, x_t, t, conditioning)
        with students.as_reference(self.student):
            return features(
                self.base, x_t, t, conditioning, self.student, torch.zeros_like(t) if self.conditioned else None
            )

    def passing_for_real(self, count: int) -> Tensor:
        """Return what an adversary's heads say of the student's samples, (), with the graph back to these."""
        x_t, t, conditioning = self.points(count)
        with self.own_precision():
            read = self.read(x_t.requires_grad_(), t, conditioning)
        with frozen(self.beside["heads"]):
            return self._logits(read)

    def heads_loss(self, count: int) -> Tensor:
        """Return what the heads are trained by on `count` samples, (), with its penalty's graph left out."""
        x_t, t, conditioning = self.points(count)
        with self.own_precision(), torch.no_grad():
            read = self.read(x_t, t, conditioning)
        return self._logits(read)

    def _logits(self, read: list[Tensor]) -> Tensor:
        """Return the sum of the heads' mean logits, (), of the features of as many states as they see."""
        network = self.beside["heads"]
        assert isinstance(network, Heads)
        logits = network(paired(read, read) if network.num_states > 1 else read)
        return torch.stack([one.mean() for one in logits]).sum()

    def teacher_x0(self, count: int, guidance_scale: float) -> Tensor:
        """Return the guided teacher's x0 (count, C, H, W)."""
        x_t, t, conditioning = self.points(count)
        with self.own_precision(), self.base.same_prompts(self.base.denoiser):  # what it keeps is in memory too
            return self.base.guided_x0(x_t, t, conditioning, conditioning, guidance_scale)

    def sample(self, count: int, grad_steps: int = 0) -> Tensor:
        """Return the student's samples (count, C, H, W); steps before those with gradient are left out."""
        noise, _, conditioning = self.points(count)
        times = sampling_times(max(1, grad_steps))
        return sampler.sample(
            self.base, self.student, conditioning, noise, times, 0.0, None, self.conditioned, grad_steps
        )

    def encode(self, count: int) -> Tensor:
        """Return the latents (count, C, H, W) of as many pictures."""
        side = self.base.resolution
        return self.base.autoencoder.encode(torch.empty(count, 3, side, side, device=self.base.device))

    def scores(
        self, latents: Tensor, rewards: list[Reward], small: nn.Module | None = None, num_scores: int = 1
    ) -> Tensor:
        """Return the sum (count,) of the scores of `rewards` for `latents`, decoded by a `small` decoder if given.

        The pictures, decoded once, are scored `num_scores` times: under one prompt and another.
        """
        images = self.base.autoencoder.decode(latents, small)
        total = images.mean((1, 2, 3))
        for one in [one for one in rewards if one.name in self.rewards] * num_scores:
            total = total + self._score(one, images)
        return total

    def _score(self, settings: Reward, images: Tensor) -> Tensor:
        """Return one reward's scores (count,), or zeros where it cannot be called without data."""
        reward = self.rewards[settings.name]
        try:
            with self.own_precision():
                parts = [
                    reward(part, [PROMPT] * len(part)) for part in images.split(settings.chunk_size or len(images))
                ]
        except (Exception, SystemExit):  # code of others may read values, which do not exist here
            self.failed.add(settings.name)
            return images.new_zeros(len(images))
        return torch.cat(parts)


def step(stage: Stage, recipe: Recipe, roles: Roles, part: int) -> Tensor:
    """Return the loss of one micro-batch of `stage`, with its graph; a process has `part` samples of it."""
    return reduce(torch.add, _terms(stage, recipe, roles, part))


def _terms(stage: Stage, recipe: Recipe, roles: Roles, part: int) -> Iterator[Tensor]:
    """Yield the terms of the loss."""
    alive: list[Tensor] = []  # samples that rewards scored stay in memory for the other terms
    for one_pass in stage.passes(recipe, part):
        if not one_pass.in_step or not one_pass.batch or one_pass.beside:
            continue
        if not one_pass.gradient:
            _without_gradient(one_pass, stage, recipe, roles)
        elif one_pass.role in ("lpips", "features"):
            times = int(one_pass.evaluations)
            yield torch.stack([roles.distance(one_pass.role, one_pass.batch).mean() for _ in range(times)]).sum()
        elif one_pass.role == "heads":
            yield roles.passing_for_real(one_pass.batch)
        elif one_pass.viewer:
            steps = int(one_pass.evaluations)
            alive.append(roles.sample(one_pass.batch, steps) if one_pass.is_chained else roles.x0(one_pass.batch))
            yield _scores(one_pass, stage, roles, alive[-1]).sum()
        else:
            network = roles.prediction if one_pass.output == "prediction" else roles.x0
            yield torch.stack([network(one_pass.batch).square().mean() for _ in range(int(one_pass.evaluations))]).sum()


def beside(stage: Stage, recipe: Recipe, roles: Roles, part: int) -> Iterator[Tensor]:
    """Yield the losses of the networks that are trained beside the student, each of one update's micro-batch."""
    for one_pass in stage.passes(recipe, part):
        if one_pass.beside:
            yield roles.fake_loss(one_pass.batch) if one_pass.role == "fake" else 2 * roles.heads_loss(one_pass.batch)


def before_steps(stage: Stage, recipe: Recipe, roles: Roles, part: int = 0) -> None:
    """Take the passes before the first step: pictures are encoded."""
    for one_pass in stage.passes(recipe, part):
        if one_pass.batch and one_pass.role == "encoder":
            _without_gradient(one_pass, stage, recipe, roles)


def between_steps(stage: Stage, recipe: Recipe, roles: Roles, part: int = 0) -> None:
    """Take the passes between steps: sample grids, the guard's looks, a stage without gradients."""
    for one_pass in stage.passes(recipe, part):
        if one_pass.batch and not one_pass.in_step and one_pass.role != "encoder":
            _without_gradient(one_pass, stage, recipe, roles)


@torch.no_grad()
def _without_gradient(one_pass: Pass, stage: Stage, recipe: Recipe, roles: Roles) -> None:
    """Take one batch of a pass that leaves no graph, with the scores of its pictures."""
    x0 = {
        "teacher": lambda: roles.teacher_x0(one_pass.batch, recipe.teacher.guidance_scale),
        "student": lambda: roles.sample(one_pass.batch),
        "target": lambda: roles.target_x0(one_pass.batch),
        "reference": lambda: roles.reference_x0(one_pass.batch),
        "encoder": lambda: roles.encode(one_pass.batch),
        "fake": lambda: roles.fake_x0(one_pass.batch),
    }[one_pass.role]()
    if one_pass.viewer:
        _scores(one_pass, stage, roles, x0)


def _scores(one_pass: Pass, stage: Stage, roles: Roles, x0: Tensor) -> Tensor:
    """Return the scores (B,) of the pictures of `x0` (B, C, H, W), or the pictures where a person sees them."""
    if one_pass.viewer == "person":
        return roles.base.autoencoder.decode(x0)
    small = roles.small_decoder if one_pass.viewer == "rewards" else None
    return roles.scores(
        x0, stage.trained_on if one_pass.viewer == "rewards" else stage.reward_models, small, one_pass.num_scores
    )
