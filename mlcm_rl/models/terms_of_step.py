"""The terms in one step: what they add to the student's loss, then the updates of their own networks.

In distillation (`TermsOfStep`) they are beside a distance: where a jump ends above time 0, a term of clean samples is
0. In tuning (`MatchingOfStep`) distribution matching is beside a reward, on the samples that it scores.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..equations.segments import sampling_times
from ..recipe import Distill
from ..training import processes
from ..training.beside import Beside
from ..training.loop import Runtime
from .base import Base
from .conditioning import Conditioning
from .sampler import sample_of_seeds
from .terms import AddedTerm, DistributionMatching, Made, Samples


def training_of(rt: Runtime, term: AddedTerm) -> Beside:
    """Return the training of the network of `term` beside the student, which checkpoints hold too from here on."""
    return rt.train_beside(term.network_name, term.network, term.learning_rate)


class NetworksOfStep:
    """The terms' own networks in one step: what they compare under which noise, and their updates.

    What is drawn is a function of (seed, step) alone, for the whole batch. Of several `copies` of each sample, the
    first ones of all samples come first.
    """

    def __init__(
        self,
        rt: Runtime,
        terms: Sequence[tuple[AddedTerm, Beside]],
        step: int,
        batch_size: int,
        s: Tensor,
        copies: int = 1,
    ):
        self.rt, self.terms, self.step, self.batch_size, self.copies = rt, terms, step, batch_size, copies
        self.s = s  # (n B,) the ends of the batch's jumps, on the CPU
        self.noised = [term.draw(rt.generator(term.name, step), len(s), s) for term, _ in terms]
        self.micro_batches = iter(rt.micro_batches())
        self.made: list[list[Made]] = []  # of each micro-batch, one a term

    def rows(self) -> Tensor:
        """Return the places (n b,) in the batch of the samples of the next micro-batch, and of all their copies."""
        own = torch.arange(self.batch_size)[next(self.micro_batches)]
        return torch.cat([own + copy * self.batch_size for copy in range(self.copies)])

    def learn(self) -> dict[str, float]:
        """Update the terms' own networks on what the student made in the step; return the losses and gradient norms.

        A network of several updates learns from the same samples each time, under other noise. A loss is the mean over
        the samples that it is of, and left out where there are none.
        """
        record: dict[str, float] = {}
        for i, (term, network) in enumerate(self.terms):
            for update in range(term.num_updates):
                draws = self.rt.generator(f"{network.name} {update}", self.step)
                noised = term.draw(draws, len(self.s), self.s)
                losses_of_parts = (self.of_samples(term.network_loss(made[i], noised)) for made in self.made)
                last = self.rt.backward(losses_of_parts, network)
            of_all = term.learns_from_samples or term.of_all_jumps
            share = 1.0 if of_all else (self.s == 0).float().mean().item()
            record |= {f"{network.name}_loss": last["loss"] / share} if share else {}
            record[f"{network.name}_grad_norm"] = last["grad_norm"]
        return record

    def of_samples(self, values: Tensor) -> Tensor:
        """Return the means (b,) of `values` (n b,) over the copies of each sample."""
        return values if self.copies == 1 else values.unflatten(0, (self.copies, -1)).mean(0)


class MatchingOfStep(NetworksOfStep):
    """Distribution matching in one step of tuning, on the samples that rewards score, from which the fake score learns.

    A step may score several `copies` of each of its `batch_size` samples.
    """

    def __init__(
        self, rt: Runtime, matching: tuple[DistributionMatching, Beside], step: int, batch_size: int, copies: int
    ):
        clean = torch.zeros(copies * batch_size, dtype=torch.int64)
        super().__init__(rt, [matching], step, batch_size, clean, copies)
        self.term, _ = matching

    def loss(self, x0: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the term (b,) times its weight on the next micro-batch's samples `x0` (n b, C, H, W).

        It is the mean over the n copies of each sample, and 0 while the fake score warms up.
        """
        samples = Samples(self.rows(), x0.detach(), conditioning)
        self.made.append([Made(samples, torch.ones(len(x0), device=x0.device), samples)])
        if self.step < self.term.warmup_steps:
            return self.of_samples(x0.new_zeros(len(x0)))
        noised = self.noised[0].rows(samples.rows)
        return self.term.weight * self.of_samples(self.term.loss(replace(samples, x0=x0), noised))


class TermsOfStep(NetworksOfStep):
    """The terms of one step of distillation: what they add to the student's loss, and their own networks' updates."""

    def __init__(
        self,
        rt: Runtime,
        stage: Distill,
        base: Base,
        student: nn.Module,
        terms: list[tuple[AddedTerm, Beside]],
        step: int,
        s: Tensor,
    ):
        super().__init__(rt, terms, step, stage.batch_size, s)
        self.stage, self.base, self.student = stage, base, student
        self.seeds = torch.Tensor()
        if self.needs_samples:
            self.seeds = torch.randint(2**62, (stage.batch_size,), generator=rt.generator("sample", step))
        self.sums = torch.zeros(1 + len(terms), device=base.device)

    @property
    def needs_samples(self) -> bool:
        """Return whether a term learns from the student's few-step samples."""
        return any(term.learns_from_samples for term, _ in self.terms)

    @property
    def sees_ends(self) -> bool:
        """Return whether a term compares where jumps end."""
        return any(term.sees_ends for term, _ in self.terms)

    def beside(self, distance: Tensor, jumps: Samples, sample: Tensor | None, ends: Tensor | None = None) -> Tensor:
        """Return the student's loss (B,) on the next micro-batch: `distance` (B,) and the terms, times their weights.

        `jumps`, at the places of `rows`, have the x0 that the distance compares with their target; `ends` (B, C, H, W)
        are where they end, if that is another state. Without terms it is `distance` itself. A `sample` is made where a
        term learns from one and there is none.
        """
        if not self.terms:
            return distance
        distance, rows = self.stage.distance_weight * distance, jumps.rows
        if self.needs_samples and sample is None:
            sample = self._sample(jumps.conditioning, self.seeds[rows])
        sampled = None if sample is None else Samples(rows, sample, jumps.conditioning)

        # the jumps that end at time 0; the first one, at weight 0, if none does
        clean = (self.s[rows] == 0).nonzero().flatten() if (self.s[rows] == 0).any() else torch.zeros(1).long()
        weight_of_clean = (self.s[rows][clean] == 0).float().to(distance.device)
        values, made = [distance], []
        for (term, _), noised in zip(self.terms, self.noised, strict=True):
            seen = jumps if ends is None or not term.sees_ends else replace(jumps, x0=ends)
            index, weight = torch.arange(len(rows)).to(distance.device), torch.ones_like(distance)
            if not term.of_all_jumps:
                seen, index, weight = seen.at(clean), clean.to(distance.device), weight_of_clean
            added = torch.zeros_like(distance)
            if self.step >= term.warmup_steps:
                value = term.loss(seen, noised.rows(seen.rows))
                added = added.index_add(0, index, term.weight * value * weight)
            values.append(added)
            made.append(Made(seen.detached(), weight, sampled))
        self.made.append(made)
        parts = torch.stack(values)
        self.sums = self.sums + parts.detach().sum(1)
        return parts.sum(0)

    def means(self) -> dict[str, float]:
        """Return the means over the step's samples of the distance and of each term, which add up to the loss.

        Waits for all processes. Empty where there are no terms.
        """
        names = ["distance", *(term.name for term, _ in self.terms)] if self.terms else []
        sums = processes.all_reduce(self.sums).tolist() if names else []
        return {name: value / self.stage.batch_size for name, value in zip(names, sums, strict=True)}

    def _sample(self, conditioning: Conditioning, seeds: Tensor) -> Tensor:
        """Return the student's samples (B, C, H, W) in a few steps, by its default sampler."""
        times, conditioned = sampling_times(self.stage.num_student_steps), self.stage.condition_on_target
        gamma = self.stage.default_gamma
        return sample_of_seeds(self.base, self.student, conditioning, seeds, times, gamma, conditioned)
