"""Sources of the points of a distillation step: stored trajectories, the online teacher, or noised data.

A source draws times and noise for a whole step (`draw`), then computes the states of a part of it (`realise`), so that
a step is the same for every split into micro-batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..equations.axis import NUM_SEGMENTS
from ..equations.schedule import add_noise
from ..equations.segments import draw_jumps, draw_steps, milestones, sampling_times, segment_start
from ..equations.solver import ddim_step, gamma_step
from ..models.base import Base
from ..models.conditioning import Conditioning, on_device
from ..models.sampler import sample_of_seeds, step_x0
from ..recipe import Distill
from ..storage.files import CheckpointError
from ..training.seeding import epoch_order
from .trajectory_store import Store

RENOISING_GAMMA = 1.0  # every step of the sampler draws all noise again (TLCM v6, Algorithm 2)


@dataclass(frozen=True)
class Draw:
    """The random choices of one step: which samples, their times t > r >= s, and noise for sources that need it."""

    index: Tensor  # (B,) row of the store, the prompt file or the picture folder
    t: Tensor  # (B,)
    r: Tensor  # (B,)
    s: Tensor  # (B,)
    noise: Tensor | None = None  # (B, C, H, W), on the CPU
    seed: Tensor | None = None  # (B,) for sources whose sampler draws more noise
    caption: Tensor | None = None  # (B,) in [0, 1): which of a picture's captions

    def rows(self, part: slice | list[int]) -> "Draw":
        """Return the draw of the samples `part`."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        rows: dict[str, Any] = {name: None if value is None else value[part] for name, value in columns.items()}
        return Draw(**rows)


@dataclass(frozen=True)
class Batch:
    """Points on trajectories, on the device: x_t at t, x_r at r, and, if states are stored, x_s at s.

    `sample` is the student's own in a few steps, if the points were made from one.
    """

    x_t: Tensor  # (B, C, H, W)
    x_r: Tensor | None
    x_s: Tensor | None
    t: Tensor  # (B,)
    r: Tensor
    s: Tensor
    conditioning: Conditioning
    sample: Tensor | None = None  # (B, C, H, W)


def draw_target(t: Tensor, num_segments: Sequence[int], any_milestone: bool, generator: torch.Generator) -> Tensor:
    """Return s (B,): the start of t's segment or, for a conditioned student, any milestone from there to below t.

    Each sample draws its K from `num_segments`, distinct, if there are several. With fewer segments the range of a
    conditioned student grows and still includes the targets of earlier phases, so that it does not forget them.
    """
    start = segment_start(t, num_segments[0])
    if len(num_segments) > 1:
        starts = torch.stack([segment_start(t, k) for k in num_segments])
        start = starts[torch.randint(len(num_segments), t.shape, generator=generator), torch.arange(len(t))]
    if not any_milestone:
        return start
    ends = milestones(NUM_SEGMENTS)
    first, last = torch.searchsorted(ends, start), torch.searchsorted(ends, t) - 1
    offset = (torch.rand(t.shape, generator=generator) * (last - first + 1)).long()
    return ends[first + offset]


def drawn_segments(stage: Distill, num_segments: int) -> list[int]:
    """Return the K, distinct, that samples of a phase of `num_segments` draw from: earlier ones by `keep_segments`."""
    earlier = [k for k in stage.num_segments if k > num_segments] if stage.keep_segments else []
    return list(dict.fromkeys([*earlier, num_segments]))


class StoredStates:
    """`source: trajectories`: points of stored trajectories, without evaluations of the teacher."""

    def __init__(self, stage: Distill, base: Base, store: Store, seed: int):
        self.stage, self.base, self.store, self.seed = stage, base, store, seed
        self.times = torch.tensor(store.times)
        self.position = {time: i for i, time in enumerate(store.times)}
        if stage.states_drawn == "all" and len(store.times) < len(store.provenance.grid):
            own = store.provenance.own_folder(store.folder)
            way = "set keep: all in the trajectories stage"
            if own != store.folder:
                way = f"its name is that of a store of all: move it to {own}, or delete it, and run again"
            raise CheckpointError(
                f"{store.folder} holds {len(store.times)} of {len(store.provenance.grid)} states of each trajectory, "
                f"those of the milestones, and jumps without budgets begin at any state: {way}"
            )
        for num_segments in stage.num_segments:
            if lacking := sorted(set(milestones(num_segments).tolist()) - set(store.times)):
                raise CheckpointError(
                    f"{store.folder} has no states at the ends of {num_segments} segments, the first of them at time "
                    f"{lacking[0]}: solver_steps of the trajectories stage must be a multiple of {num_segments}"
                )

    @property
    def texts(self) -> list[str]:
        """Return the texts that it encodes: none, since the store has their conditioning."""
        return []

    def draw(self, step: int, num_segments: int, pair: str, generator: torch.Generator) -> Draw:
        index = epoch_order(self.store.num_trajectories, self.stage.batch_size, step, self.seed, "distill")
        return self.draw_for(index, num_segments, pair, generator)

    def draw_for(self, index: Tensor, num_segments: int, pair: str, generator: torch.Generator) -> Draw:
        """Draw times for the trajectories `index` (B,)."""
        if self.stage.budgets:  # jumps of samplers, whatever `num_segments` is
            t, s = draw_jumps(self.stage.budgets, len(index), generator)
        elif self.stage.starts == "milestones":
            t, s = draw_steps(num_segments, len(index), generator)
        else:
            t = self.times[torch.randint(len(self.times) - 1, index.shape, generator=generator)]
            s = draw_target(t, drawn_segments(self.stage, num_segments), self.stage.condition_on_target, generator)
        next_point, last = self._positions(t) + 1, self._positions(s)
        skipped = _share_of(last - next_point, generator)
        second = next_point + skipped if pair == "random" else next_point
        if self.stage.ends == "random":
            s = self.times[second + _share_of(last - second, generator)]
        return Draw(index, t, self.times[second], s)

    def realise(self, draw: Draw) -> Batch:
        x_t, x_s = (self.store.states(draw.index, self._positions(time)) for time in (draw.t, draw.s))
        x_r = self.store.states(draw.index, self._positions(draw.r)) if any(self.stage.jumps_again) else None
        return _on(self.base.device, x_t, x_r, x_s, draw, self.store.conditioning(draw.index))

    def _positions(self, times: Tensor) -> Tensor:
        return torch.tensor([self.position[time] for time in times.tolist()])


class OnLine:
    """`source: online`: TLCM's Algorithm 1. 8 - k guided DDIM steps from noise to t in segment k, then one to r."""

    def __init__(self, stage: Distill, base: Base, prompts: list[str], seed: int):
        self.stage, self.base, self.prompts, self.seed = stage, base, prompts, seed

    @property
    def texts(self) -> list[str]:
        """Return the texts that it encodes."""
        return self.prompts

    def draw(self, step: int, num_segments: int, pair: str, generator: torch.Generator) -> Draw:
        index = epoch_order(len(self.prompts), self.stage.batch_size, step, self.seed, "distill")
        return _draw_between_milestones(self.base, self.stage, index, num_segments, pair, generator)

    def realise(self, draw: Draw) -> Batch:
        base, weight = self.base, self.base.teacher.guidance_scale
        assert draw.noise is not None
        conditioning = base.encode_prompts([self.prompts[i] for i in draw.index.tolist()])
        x_t, t, r = draw.noise.to(base.device, copy=True), draw.t.to(base.device), draw.r.to(base.device)
        steps_of_each = NUM_SEGMENTS + 1 - torch.searchsorted(milestones(NUM_SEGMENTS), draw.t)
        num_steps, top = steps_of_each.to(base.device), base.schedule.num_times - 1
        for step in range(int(steps_of_each.max())):
            # rows are chosen on the CPU: a choice by a mask on the device would wait for it
            rows = (steps_of_each > step).nonzero().flatten().to(base.device)
            start, end = (top - (top - t) * (step + j) // num_steps for j in (0, 1))
            x_t[rows] = _guided_step(base, x_t, start, end, conditioning, weight, rows)
        x_r = _guided_step(base, x_t, t, r, conditioning, weight)
        return _on(base.device, x_t, x_r, None, draw, conditioning)


class NoisedData:
    """`source: data`: latents of real pictures with noise, then one guided DDIM step, as in LCM."""

    def __init__(self, stage: Distill, base: Base, latents: Tensor, captions: list[list[str]], seed: int):
        self.stage, self.base, self.latents, self.captions, self.seed = stage, base, latents, captions, seed

    @property
    def texts(self) -> list[str]:
        """Return the texts that it encodes: all captions of all pictures."""
        return [text for captions in self.captions for text in captions]

    def draw(self, step: int, num_segments: int, pair: str, generator: torch.Generator) -> Draw:
        index = epoch_order(len(self.latents), self.stage.batch_size, step, self.seed, "distill")
        draw = _draw_between_milestones(self.base, self.stage, index, num_segments, pair, generator)
        return replace(draw, caption=torch.rand(index.shape, generator=generator))

    def realise(self, draw: Draw) -> Batch:
        base = self.base
        assert draw.noise is not None
        assert draw.caption is not None
        captions = (self.captions[i] for i in draw.index.tolist())
        texts = [
            texts_of_one[int(part * len(texts_of_one))]
            for texts_of_one, part in zip(captions, draw.caption.tolist(), strict=True)
        ]
        conditioning = base.encode_prompts(texts)
        t, r = draw.t.to(base.device), draw.r.to(base.device)
        x_t = add_noise(self.latents[draw.index].to(base.device), draw.noise.to(base.device), t, base.schedule)
        x_r = _guided_step(base, x_t, t, r, conditioning, base.teacher.guidance_scale)
        return _on(base.device, x_t, x_r, None, draw, conditioning)


class RenoisedSamples:
    """`method: inter_segment`: clean samples with noise to a milestone, then p teacher steps to the milestone below.

    The samples are stored ones or the student's own (TLCM v6, Algorithm 2).
    """

    def __init__(
        self,
        stage: Distill,
        base: Base,
        student: torch.nn.Module,
        store: Store | None,
        prompts: list[str] | None,
        seed: int,
    ):
        self.stage, self.base, self.student, self.store, self.prompts, self.seed = (
            stage,
            base,
            student,
            store,
            prompts,
            seed,
        )
        self.num_samples = store.num_trajectories if store else len(prompts or ())

    @property
    def texts(self) -> list[str]:
        """Return the texts that it encodes; none where samples are stored."""
        return self.prompts or []

    def draw(self, step: int, num_segments: int, pair: str, generator: torch.Generator) -> Draw:
        index = epoch_order(self.num_samples, self.stage.batch_size, step, self.seed, "distill")
        ends = milestones(NUM_SEGMENTS)
        above = torch.randint(1, NUM_SEGMENTS + 1, index.shape, generator=generator)
        noise = torch.randn(len(index), *self.base.latent_shape, generator=generator)
        seed = torch.randint(2**62, index.shape, generator=generator)
        return Draw(index, ends[above], ends[above - 1], torch.zeros_like(index), noise, seed)

    @torch.no_grad()
    def realise(self, draw: Draw) -> Batch:
        base, num_steps = self.base, self.stage.num_teacher_steps
        assert draw.noise is not None
        x0, conditioning = self._samples(draw)
        t, r = draw.t.to(base.device), draw.r.to(base.device)
        x_t = x_r = add_noise(x0, draw.noise.to(base.device), t, base.schedule)
        with base.same_prompts(base.denoiser):
            for step in range(num_steps):
                start, end = (t - (t - r) * (step + j) // num_steps for j in (0, 1))
                x_r = _guided_step(base, x_r, start, end, conditioning, base.teacher.guidance_scale)
        batch = _on(base.device, x_t, x_r, None, draw, conditioning)
        return batch if self.store else replace(batch, sample=x0)

    def _samples(self, draw: Draw) -> tuple[Tensor, Conditioning]:
        """Return clean latents (B, C, H, W) and the conditioning of their prompts, on the device."""
        device = self.base.device
        if self.store:
            conditioning = on_device(self.store.conditioning(draw.index), device)
            return self.store.x0(draw.index).to(device), conditioning
        assert self.prompts is not None
        assert draw.seed is not None
        conditioning = self.base.encode_prompts([self.prompts[i] for i in draw.index.tolist()])
        times, conditioned = sampling_times(self.stage.num_student_steps), self.stage.condition_on_target
        x0 = sample_of_seeds(self.base, self.student, conditioning, draw.seed, times, RENOISING_GAMMA, conditioned)
        return x0, conditioning


class SimulatedStates:
    """`method: simulation`: states that the student's own sampler visits, each at a random one of its steps.

    Its sampler is that of consistency models: every step takes noise anew (DMD2, arXiv 2405.14867, section 4.5).
    """

    def __init__(self, stage: Distill, base: Base, student: torch.nn.Module, prompts: list[str], seed: int):
        self.stage, self.base, self.student, self.prompts, self.seed = stage, base, student, prompts, seed
        self.times = sampling_times(stage.num_student_steps)

    @property
    def texts(self) -> list[str]:
        """Return the texts that it encodes."""
        return self.prompts

    def draw(self, step: int, num_segments: int, pair: str, generator: torch.Generator) -> Draw:
        index = epoch_order(len(self.prompts), self.stage.batch_size, step, self.seed, "distill")
        t = torch.tensor(self.times)[torch.randint(len(self.times), index.shape, generator=generator)]
        seed = torch.randint(2**62, index.shape, generator=generator)
        return Draw(index, t, torch.zeros_like(t), torch.zeros_like(t), seed=seed)

    @torch.no_grad()
    def realise(self, draw: Draw) -> Batch:
        base, conditioned = self.base, self.stage.condition_on_target
        assert draw.seed is not None
        conditioning = base.encode_prompts([self.prompts[i] for i in draw.index.tolist()])
        generators = [torch.Generator().manual_seed(seed) for seed in draw.seed.tolist()]
        x_t = base.noise(generators, len(generators))
        for t, s in zip(self.times, self.times[1:], strict=False):
            # rows are chosen on the CPU: a choice by a mask on the device would wait for it
            going_on = (draw.t < t).nonzero().flatten()
            # where none goes on the first one stands in: all processes evaluate a sharded student equally often
            chosen = going_on if len(going_on) else torch.zeros(1, dtype=torch.int64)
            noise = base.noise([generators[i] for i in chosen.tolist()], len(chosen))
            rows = chosen.to(base.device)
            start, end = (torch.full_like(rows, time) for time in (t, s))
            own = {name: value[rows] for name, value in conditioning.items()}
            x0 = step_x0(base, self.student, own, x_t[rows], start, end, 1.0, conditioned)
            if len(going_on):
                x_t[rows] = gamma_step(x_t[rows], x0, start, end, noise, 1.0, base.schedule)
        return _on(base.device, x_t, None, None, draw, conditioning)


Source = StoredStates | OnLine | NoisedData | RenoisedSamples | SimulatedStates


def _draw_between_milestones(
    base: Base, stage: Distill, index: Tensor, num_segments: int, pair: str, generator: torch.Generator
) -> Draw:
    """Draw t uniformly from the times above 0, and r: `stage.skip` below t (or uniform from s to t), never below s."""
    t = torch.randint(1, base.schedule.num_times, index.shape, generator=generator)
    s = draw_target(t, drawn_segments(stage, num_segments), stage.condition_on_target, generator)
    below = s + (torch.rand(index.shape, generator=generator) * (t - s)).long()
    r = below if pair == "random" else torch.maximum(t - stage.skip, s)
    if stage.ends == "random":
        s = s + _share_of(r - s, generator)
    noise = torch.randn(len(index), *base.latent_shape, generator=generator)
    return Draw(index, t, r, s, noise)


def _share_of(count: Tensor, generator: torch.Generator) -> Tensor:
    """Return a whole number (B,) from 0 to `count` (B,), each alike."""
    return (torch.rand(count.shape, generator=generator) * (count + 1)).long()


def _guided_step(
    base: Base,
    x_t: Tensor,
    t: Tensor,
    r: Tensor,
    conditioning: Conditioning,
    guidance_scale: float,
    rows: Tensor | slice = slice(None),
) -> Tensor:
    """Return the states after one guided DDIM step of the teacher from t to r, for `rows` of the batch."""
    x_t, t, r = x_t[rows], t[rows], r[rows]
    conditioning_rows = {name: value[rows] for name, value in conditioning.items()}
    x0 = base.guided_x0(x_t, t, conditioning_rows, base.unconditional(len(x_t)), guidance_scale)
    return ddim_step(x_t, x0, t, r, base.schedule)


def _on(
    device: torch.device, x_t: Tensor, x_r: Tensor | None, x_s: Tensor | None, draw: Draw, conditioning: Conditioning
) -> Batch:
    x_r, x_s = (None if x is None else x.to(device) for x in (x_r, x_s))
    t, r, s = (time.to(device) for time in (draw.t, draw.r, draw.s))
    return Batch(x_t.to(device), x_r, x_s, t, r, s, on_device(conditioning, device))
