"""A learned stand-in for rewards without gradient: heads on the frozen student's features, fitted online.

In every step the student's samples are scored by the rewards, the heads' gradient at these samples tunes it, and the
heads are then fitted to the new scores (the way of TDM-R1, 2026). They are right where the student samples now,
and no further: old scores are of a student that is gone. What is fitted is the difference between the scores of one
prompt's samples: how hard a prompt is has no gradient, and is most of what scores differ by. It is a regression, since
rewards that count give equal scores to many pairs, which a comparison of pairs would leave out.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..equations import feedback
from ..equations.matching import times_between
from ..equations.schedule import add_noise
from ..models import students
from ..models.conditioning import Conditioning
from ..models.features import features
from ..models.heads import Heads, frozen
from ..recipe import Feedback
from ..training import autocast, processes
from ..training.loop import Runtime
from . import tuning


@dataclass(frozen=True)
class Scored:
    """A micro-batch of samples x0 (B, C, H, W) with their starts, scores (B,), and what was predicted of them (B,)."""

    x0: Tensor
    start: tuning.Start
    scores: Tensor
    predicted: Tensor


class LearnedReward:
    """The heads of a stage's surrogate and what they learn from in a step."""

    def __init__(self, stage: Feedback, student: tuning.TunableStudent, rt: Runtime, prompt: str, seed: int):
        """Begin with heads drawn from `seed`, for features of the shapes that `prompt` gives."""
        assert stage.surrogate is not None
        self.settings, self.student, self.rt = stage.surrogate, student, rt
        empty = torch.zeros(1, *student.base.latent_shape, device=student.base.device)
        with torch.no_grad(), students.as_reference(student.denoiser):
            read = self._features(empty, student.base.encode_prompts([prompt]))
        shapes = [states.shape[1:] for states in read]
        self.heads = Heads(shapes, self.settings.width, seed).to(student.base.device)
        self.training = rt.train_beside("surrogate", self.heads, self.settings.learning_rate)
        self.scored: list[Scored] = []

    def has_head_start(self, step: int) -> bool:
        """Whether the heads alone learn in `step`."""
        return step < self.settings.head_start

    def ends_head_start(self, step: int) -> bool:
        """Whether `step` is the first one after it."""
        return 0 < self.settings.head_start == step

    def gradient(self, x0: Tensor, start: tuning.Start, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return the predicted rewards (B,) of samples `x0` (B, C, H, W), and their gradient by `x0`.

        The heads will learn from these samples' `scores` (B,) when the step's samples are all scored.
        """
        scale = 2.0 ** math.floor(math.log2(x0[0].numel()))  # a power of two is exact
        # the gradient is taken before the adapter is back: blocks may be computed again in it
        reference = students.as_reference(self.student.denoiser)
        with reference, frozen(self.heads), autocast.own(x0.device):
            predicted, gradient = feedback.value_and_gradient(lambda sample: self._predict(sample, start), x0, scale)
        self.scored.append(Scored(x0.detach(), start, scores.detach(), predicted))
        return predicted, gradient

    def predict(self, x0: Tensor, start: tuning.Start) -> Tensor:
        """Return the predicted rewards (B,) of `x0` (B, C, H, W), noised by the samples' own generators."""
        with students.as_reference(self.student.denoiser):
            return self._predict(x0, start)

    def _predict(self, x0: Tensor, start: tuning.Start) -> Tensor:
        base = self.student.base
        noise = base.noise(start.generators, len(x0))
        x_t = add_noise(x0, noise, self._times(len(x0)), base.schedule)
        read = self._features(x_t, start.conditioning)
        return torch.stack([places.mean(1) for places in self.heads(read)]).mean(0)

    def _features(self, x_t: Tensor, conditioning: Conditioning) -> list[Tensor]:
        """Return what the blocks of the reference make of x_t (B, C, H, W), (B, D, h, w) each, with gradient."""
        student, t = self.student, self._times(len(x_t))
        s = torch.zeros_like(t) if student.conditioned else None
        return features(student.base, x_t, t, conditioning, student.denoiser, s)

    def _times(self, count: int) -> Tensor:
        shares = torch.full((count,), self.settings.time, device=self.student.base.device)
        return times_between(shares, 0.0, 1.0, self.student.base.schedule.num_times)

    def learn(self, step: int) -> dict[str, float]:
        """Fit the heads to the scores of `step`; return for the log what they were worth before.

        surrogate/correlation is that of prediction and score between the samples of a prompt, on samples that the heads
        have not learned from; reward_calls counts the scores so far, which for `policy` are its steps times its batch.
        """
        predicted, scores = (
            processes.gather(torch.cat([getattr(one, name) for one in self.scored])).cpu().double()
            for name in ("predicted", "scores")
        )
        worth = feedback.correlation_within(*(self._groups(one) for one in (predicted, scores)))
        for _ in range(self.settings.num_updates):
            figures = self.rt.backward(self._losses(), beside=self.training)
        self.scored = []
        logged = {"surrogate/correlation": worth, "reward_calls": float((step + 1) * len(scores))}
        return logged | {f"surrogate/{name}": value for name, value in figures.items()}

    def _losses(self) -> Iterator[Tensor]:
        for one in self.scored:
            predicted = self._groups(self.predict(one.x0, one.start))
            yield feedback.centred_error(predicted, self._groups(one.scores)).flatten()

    def _groups(self, values: Tensor) -> Tensor:
        return values.unflatten(0, (-1, self.settings.num_generations))
