"""The terms that a stage adds to its loss: distribution matching, and the adversary.

Each has a network of its own that learns, after the student's update, from what the student made in the step: the score
of its samples (role `fake`), or heads on the teacher's features. A term is on clean samples; an adversary may be of all
jumps of distillation, and then sees both ends under the noise of a time above theirs. What a stage's step does with its
terms is in `terms_of_step`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from ..equations import adversarial as losses
from ..equations.consistency import squared_l2
from ..equations.matching import loss_of_gradient, matching_gradient, times_between
from ..equations.prediction import prediction_from_x0
from ..equations.schedule import add_noise, noise_up
from ..recipe import Distill, Feedback, Lora
from ..recipe.terms import Adversarial, Matching, Term
from ..training import autocast
from ..training.seeding import seed_of
from . import students
from .base import Base
from .conditioning import Conditioning, on_device
from .features import features
from .heads import Heads, frozen, paired, shapes_of


@dataclass(frozen=True)
class Noised:
    """The noise of an update, under which samples are compared: times t (B,) and noise (B, C, H, W), on the CPU.

    Where pictures are real, `real` are their latents (B, C, H, W) and `captions` their conditioning. Where samples have
    noise already, `s` (B,) are their times, at most `t`.
    """

    t: Tensor
    noise: Tensor
    real: Tensor | None = None
    captions: Conditioning | None = None
    s: Tensor | None = None

    def rows(self, index: Tensor) -> "Noised":
        """Return what is drawn for the samples `index` (b,)."""
        real = None if self.real is None else self.real[index]
        captions = None if self.captions is None else at_rows(self.captions, index)
        s = None if self.s is None else self.s[index]
        return Noised(self.t[index], self.noise[index], real, captions, s)

    def on(self, base: Base, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the samples `x` (B, C, H, W) with the noise, and the times, on their device."""
        t, noise = self.t.to(x.device), self.noise.to(x.device)
        if self.s is None:
            return add_noise(x, noise, t, base.schedule), t
        return noise_up(x, noise, self.s.to(x.device), t, base.schedule), t


@dataclass(frozen=True)
class Samples:
    """Latents `x0` (b, C, H, W) under `conditioning`, clean or, where a term is of all jumps, those of their ends.

    `rows` (b,), on the CPU, are their places in the batch. Of jumps, `start` is where they began: x_t (b, C, H, W) at t
    (b,), and `target` (b, C, H, W) what the distance compares them with.
    """

    rows: Tensor
    x0: Tensor
    conditioning: Conditioning
    start: tuple[Tensor, Tensor] | None = None
    target: Tensor | None = None

    def at(self, index: Tensor) -> "Samples":
        """Return those at `index` (n,)."""
        place, conditioning = index.to(self.x0.device), at_rows(self.conditioning, index.to(self.x0.device))
        start = None if self.start is None else (self.start[0][place], self.start[1][place])
        target = None if self.target is None else self.target[place]
        return Samples(self.rows[index.cpu()], self.x0[place], conditioning, start, target)

    def detached(self) -> "Samples":
        """Return them without their graph."""
        target = None if self.target is None else self.target.detach()
        return replace(self, x0=self.x0.detach(), target=target)


@dataclass(frozen=True)
class Made:
    """What the student made of a micro-batch, without gradient, as a term sees it.

    jumps     f of its points, of those whose jumps end at time 0; of a term of all jumps, their ends
    weight    1 (b,); 0 for the one jump that stands in where none ends there
    sampled   its own samples in a few steps; None where no term learns from them
    """

    jumps: Samples
    weight: Tensor
    sampled: Samples | None


# a generator and a batch's size -> latents (B, C, H, W) of pictures, and the conditioning of their captions, on the CPU
Pictures = Callable[[torch.Generator, int], tuple[Tensor, Conditioning]]


class AddedTerm(Protocol):
    """A term: a loss for the student, and a network that learns from what the student made."""

    name: str
    weight: float
    network_name: str
    learning_rate: float
    num_updates: int  # of the network for each of the student's
    warmup_steps: int  # in which the network learns and the student has no term
    learns_from_samples: bool  # of a few steps
    of_all_jumps: bool  # not of those alone that end at time 0
    sees_ends: bool  # where jumps end, and not their x0: at time 0 the two differ by the noise that is left there

    @property
    def network(self) -> nn.Module: ...

    def draw(self, generator: torch.Generator, batch_size: int, s: Tensor) -> Noised: ...  # s (B,): the jumps' ends

    def loss(self, samples: Samples, noised: Noised) -> Tensor: ...  # the student's, (B,)

    def network_loss(self, made: Made, noised: Noised) -> Tensor: ...  # the network's own; `noised` is the batch's


class DistributionMatching:
    """Distribution matching (TLCM v6, eq. 12): the student's samples go where the teacher's are more likely.

    The score of the student's samples is an adapter over the frozen teacher, whose weights it shares. It learns by the
    teacher's own prediction loss from the student's few-step samples; in tuning these are the samples of the loss.
    """

    name, network_name, learns_from_samples, of_all_jumps, sees_ends = "matching", "fake", True, False, False

    def __init__(self, settings: Matching, base: Base, seed: int):
        self.settings, self.base, self.weight = settings, base, settings.weight
        scale = settings.guidance_scale
        self.guidance_scale = base.teacher.guidance_scale if scale is None else scale
        self.network = students.student(
            base, Lora(rank=settings.fake.rank, alpha=settings.fake.alpha), seed_of(seed, "fake")
        )
        self.learning_rate, self.num_updates = settings.fake.learning_rate, settings.fake.num_updates
        self.warmup_steps = settings.fake.warmup_steps

    def draw(self, generator: torch.Generator, batch_size: int, s: Tensor) -> Noised:
        """Return the noise of one update of a whole batch, for clean samples whatever the ends `s` of jumps."""
        return draw_noise(self.settings, self.base, generator, batch_size)

    def loss(self, samples: Samples, noised: Noised) -> Tensor:
        """Return the student's loss (B,): its gradient is that of distribution matching on x0 (B, C, H, W)."""
        base, x0, conditioning = self.base, samples.x0, samples.conditioning
        with torch.no_grad():
            x_t, t = noised.on(base, x0)
            real = base.guided_x0(x_t, t, conditioning, base.unconditional(len(x0)), self.guidance_scale)
            fake = base.x0(self.network, x_t, t, conditioning)
            gradient = matching_gradient(x0, real, fake)
        return loss_of_gradient(x0, gradient)

    def network_loss(self, made: Made, noised: Noised) -> Tensor:
        """Return the prediction loss (B,) of the fake score on the student's few-step samples."""
        base, sampled = self.base, made.sampled
        assert sampled is not None
        x_t, t = noised.rows(sampled.rows).on(base, sampled.x0)
        prediction = base.predict(self.network, x_t, t, sampled.conditioning)
        return squared_l2(prediction, prediction_from_x0(sampled.x0, x_t, t, base.schedule, base.prediction_type))


class Adversary:
    """Heads on the frozen teacher's features tell real samples from the student's (TLCM v6, eq. 13; LogCD).

    Both get the same noise first. What is real is the target of the distance: between milestones, the student's own
    output at the one below. With `pictures`, these are real instead. Of all jumps, both are at a jump's end, and the
    noise brings them from its time up to another.

    Heads that see the start read its features, at its own time, beside those of the end: the adversary is then of
    pairs of states, as that of SDXL-Lightning (arXiv 2402.13929, section 3.3), and not of ends alone.
    """

    name, network_name, learns_from_samples, num_updates = "adversarial", "heads", False, 1

    def __init__(self, settings: Adversarial, base: Base, seed: int, pictures: Pictures | None = None):
        self.settings, self.base, self.weight, self.pictures = settings, base, settings.weight, pictures
        shapes = shapes_of(base, base.unconditional(1))
        num_states = 2 if settings.sees_start else 1
        self.network = Heads(shapes, settings.width, seed_of(seed, "heads"), num_states).to(base.device)
        self.learning_rate, self.of_all_jumps = settings.learning_rate, settings.jumps == "all"
        self.warmup_steps, self.sees_ends = settings.warmup_steps, settings.real == "milestones"
        self.losses = losses.LOSSES[settings.loss]

    def draw(self, generator: torch.Generator, batch_size: int, s: Tensor) -> Noised:
        """Return the noise of an update of a whole batch whose jumps end at `s` (B,), and pictures if such are real."""
        noised = draw_noise(self.settings, self.base, generator, batch_size, s if self.of_all_jumps else None)
        if self.pictures is None:
            return noised
        return Noised(noised.t, noised.noise, *self.pictures(generator, batch_size))

    def loss(self, samples: Samples, noised: Noised) -> Tensor:
        """Return the student's loss (B,) on its samples; the heads are not trained by it."""
        starts = self._read_starts(samples)
        with frozen(self.network):
            read = features(self.base, *noised.on(self.base, samples.x0), samples.conditioning)
            logits = of_real = self.network(paired(read, starts))
            if self.losses.is_of_pairs:
                of_real = self.network(paired(self._read(*real_of(samples, noised), noised), starts))
        values = [self.losses.student(real, fake) for real, fake in zip(of_real, logits, strict=True)]
        return torch.stack(values).mean(0)

    def network_loss(self, made: Made, noised: Noised) -> Tensor:
        """Return the heads' loss (B,), the mean over the heads, with the penalty on the features of real samples."""
        fake, noised = made.jumps, noised.rows(made.jumps.rows)
        starts = self._read_starts(fake)
        of_fake = self.network(paired(self._read(fake.x0, fake.conditioning, noised), starts))
        read = self._read(*real_of(fake, noised), noised)
        of_real = self.network(paired(read, starts))
        parts = [self.losses.heads(one, other) for one, other in zip(of_real, of_fake, strict=True)]
        if weight := self.settings.gradient_penalty:
            parts += [weight * losses.gradient_penalty(*pair) for pair in zip(of_real, read, strict=True)]
        return torch.stack(parts).sum(0) / len(of_real) * made.weight

    def _read(self, x0: Tensor, conditioning: Conditioning, noised: Noised) -> list[Tensor]:
        """Return the teacher's features of `x0` (B, C, H, W) with the noise, to differentiate by."""
        with torch.no_grad():
            read = features(self.base, *noised.on(self.base, x0), conditioning)
        return [one.requires_grad_() for one in read]

    @torch.no_grad()
    def _read_starts(self, samples: Samples) -> list[Tensor] | None:
        """Return the teacher's features of where the jumps began; None where the heads do not see them."""
        if not self.settings.sees_start:
            return None
        assert samples.start is not None
        return features(self.base, *samples.start, samples.conditioning)


def real_of(samples: Samples, noised: Noised) -> tuple[Tensor, Conditioning]:
    """Return the real latents (b, C, H, W) beside `samples` and their conditioning: the targets, or pictures drawn."""
    if noised.real is not None and noised.captions is not None:
        device = samples.x0.device
        return noised.real.to(device), on_device(noised.captions, device)
    assert samples.target is not None
    return samples.target, samples.conditioning


def terms_of(stage: Distill, base: Base, seed: int, pictures: Pictures | None) -> list[AddedTerm]:
    """Return the terms of `stage`; their networks are drawn from `seed`."""
    terms: list[AddedTerm] = []
    if matching := matching_of(stage, base, seed):
        terms.append(matching)
    if stage.adversarial:
        terms.append(Adversary(stage.adversarial, base, seed, pictures))
        if stage.gradient_checkpointing:
            base.checkpoint_blocks(base.denoiser)  # gradients come through it
    return terms


def matching_of(stage: Distill | Feedback, base: Base, seed: int) -> DistributionMatching | None:
    """Return the distribution matching of `stage`, None without; its fake score is drawn from `seed`."""
    if stage.matching is None:
        return None
    matching = DistributionMatching(stage.matching, base, seed)
    if stage.precision == "bf16":
        autocast.frozen_in_bfloat16(matching.network)
    if stage.gradient_checkpointing:
        base.checkpoint_blocks(matching.network)
    return matching


def draw_noise(
    settings: Term, base: Base, generator: torch.Generator, batch_size: int, s: Tensor | None = None
) -> Noised:
    """Return times between the settings' and noise, for an update of a whole batch; those above `s` (B,), if given."""
    share = torch.rand(batch_size, generator=generator)
    t = times_between(share, *settings.times, base.schedule.num_times, 0 if s is None else s)
    return Noised(t, torch.randn(batch_size, *base.latent_shape, generator=generator), s=s)


def at_rows(conditioning: Conditioning, index: Tensor) -> Conditioning:
    """Return the rows `index` (b,) of `conditioning` (B, ...)."""
    return {name: value[index] for name, value in conditioning.items()}
