"""Rewards that may not fall: a Lagrange multiplier for each, by dual ascent on the drop that a step measures.

A drop is (mean of the reference - mean) / deviation of the reference: the guard's unit, so that one limit means the
same for rewards of all scales and is read off the guard's curves. A step measures it on its own prompts, where the
reference draws from the same noise: a paired difference has far less variance than two means.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..equations import constraints
from ..equations.statistics import deviation
from ..models import students
from ..recipe import Tuning
from ..rewards import Combined
from ..storage.files import CheckpointError
from . import tuning


class Constraints:
    """The multipliers of a stage's rewards with `max_drop`; those of a step are from the steps before it."""

    def __init__(self, stage: Tuning, student: tuning.TunableStudent, reference_scores: dict[str, Tensor]):
        """Begin with multipliers of 0. Raises ValueError for a reward whose `reference_scores` (P,) are all 0."""
        self.student, self.rate, self.limits = student, stage.multiplier_rate, stage.max_drops
        self.units = {name: deviation(reference_scores[name]) for name in self.limits}
        for name in [name for name, unit in self.units.items() if not unit]:
            raise ValueError(
                f"rewards: {name} gives every watched sample of the student before tuning 0, so that no drop can be "
                "measured: take its max_drop away, or name other guard_prompts"
            )
        self.multipliers, self.drops = dict.fromkeys(self.limits, 0.0), dict.fromkeys(self.limits, 0.0)

    @property
    def parts(self) -> dict[str, "Constraints"]:
        """What a checkpoint holds of them, by name; nothing where no reward is constrained."""
        return {"constraints": self} if self.limits else {}

    def penalty(self, raw: dict[str, Tensor]) -> Tensor | float:
        """Return what the loss has beside that of the rewards that are maximised, (B,); 0 where none is constrained."""
        terms = (constraints.penalty(raw[name], self.multipliers[name], self.units[name]) for name in self.limits)
        return sum(terms, 0.0)

    @contextmanager
    def reference_drawing(self, start: tuning.Start) -> Iterator[None]:
        """Let the student be the reference inside, without gradient; `start` draws the same noise again after it."""
        states = [one.get_state() for one in start.generators]
        with torch.no_grad(), students.as_reference(self.student.denoiser):
            yield
        for one, state in zip(start.generators, states, strict=True):
            one.set_state(state)

    def add_reference(self, x0: Tensor, rewards: Combined, start: tuning.Start, scores: tuning.Scores) -> None:
        """Put the constrained scores of the reference's `x0` (n B, C, H, W), n of each prompt, into `scores`."""
        copies = len(x0) // len(start.prompts)
        images = self.student.base.autoencoder.decode(x0, self.student.small_decoder)
        raw = rewards.raw(images, start.prompts * copies, start.languages * copies, only=self.limits)
        scores.add({f"{tuning.REFERENCE}{name}": values for name, values in raw.items()})

    def take_in(self, scores: tuning.Scores) -> dict[str, float]:
        """Move the multipliers by the drops of a whole step. Return both, and drops in deviations, for the log."""
        if not self.limits:
            return {}
        own, reference = scores.rewards(), scores.whole(tuning.REFERENCE)
        for name, limit in self.limits.items():
            self.drops[name] = constraints.mean_drop(own[name], reference[name], self.units[name])
            self.multipliers[name] = constraints.dual_ascent(self.multipliers[name], self.drops[name], limit, self.rate)
        logged = {f"drop/{name}": value for name, value in self.drops.items()}
        return logged | {f"multiplier/{name}": value for name, value in self.multipliers.items()}

    def state(self) -> dict:
        """Return the multipliers by reward, for a checkpoint's JSON, which keeps floats exactly."""
        return dict(self.multipliers)

    def load_state(self, state: dict) -> None:
        """Restore a `state`. Raises CheckpointError if it is of other rewards."""
        if state.keys() != self.limits.keys():
            raise CheckpointError(
                f"the checkpoint holds multipliers of {', '.join(state) or 'no reward'}: delete checkpoints/"
            )
        self.multipliers = dict(state)
