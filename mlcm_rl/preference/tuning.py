"""Parts of the stages of preference learning: the student in its two roles, its sampler, prompts and scores.

Letters beside those of `models.base`: N steps of the sampler.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.prompts import Prompt, read_prompts
from ..models import pictures, sampler, student_files, students, teachers
from ..models.base import Base
from ..models.conditioning import Conditioning
from ..models.gammas import default_gamma_of
from ..models.grids import SamplingGrid
from ..models.student_description import grid_of
from ..models.teachers import tell_truncated
from ..recipe import Feedback, Recipe, Tuning
from ..recipe.languages import code_meant
from ..training import processes
from ..training.loop import Runtime
from ..training.seeding import epoch_order, generator

REWARD, REFERENCE = "reward/", "reference/"  # before a reward's name in a log: the student's score, the reference's


@dataclass(frozen=True)
class TunableStudent:
    """A finished student with a trainable `preference` adapter over it, and the sampler that is tuned."""

    base: Base
    denoiser: torch.nn.Module
    times: list[int]  # (N,) descending
    gamma: float
    conditioned: bool
    num_segments: int
    grid: SamplingGrid
    small_decoder: torch.nn.Module | None = None  # decodes for the rewards trained on, where there is one

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The trained weights, those of the preference adapter, by name."""
        return {name: value for name, value in self.denoiser.named_parameters() if value.requires_grad}

    def sample(self, start: "Start") -> Tensor:
        """Return the sampler's sample x0 (B, C, H, W), without gradient."""
        return sampler.sample(
            self.base,
            self.denoiser,
            start.conditioning,
            start.noise,
            self.times,
            self.gamma,
            start.generators,
            self.conditioned,
        )

    def rollout(self, start: "Start") -> tuple[Tensor, Tensor]:
        """Return the sampler's states and the x0 of each, (N, B, C, H, W) both, without gradient."""
        return sampler.rollout(
            self.base,
            self.denoiser,
            start.conditioning,
            start.noise,
            self.times,
            self.gamma,
            start.generators,
            self.conditioned,
        )

    def walk(self, start: "Start", last: int, grad_steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (x_t, x0) of the sampler's steps 0 .. `last`, the final `grad_steps` of them with gradient.

        Step `last` ends at 0: its x0 is a finished sample, whatever steps would still have followed.
        """
        times = self.times[: last + 1]
        return sampler.walk(
            self.base,
            self.denoiser,
            start.conditioning,
            start.noise,
            times,
            self.gamma,
            start.generators,
            self.conditioned,
            grad_steps,
        )

    def x0(self, x_t: Tensor, t: Tensor, s: Tensor, conditioning: Conditioning, gamma: float | None = None) -> Tensor:
        """Return the x0 (B, C, H, W) of a step of the sampler from `t` to `s` (B,), with gradient if enabled."""
        gamma = self.gamma if gamma is None else gamma
        return sampler.step_x0(self.base, self.denoiser, conditioning, x_t, t, s, gamma, self.conditioned)

    @torch.no_grad()
    def reference_x0(self, x_t: Tensor, t: Tensor, s: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the same of the reference: the student without its preference adapter, as it was before."""
        with students.as_reference(self.denoiser):
            return self.x0(x_t, t, s, conditioning)

    def jump(self, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Return start and end (B,) of the sampler's step number `step`; the last one ends at 0."""
        t, s = ([*self.times, 0][i] for i in (step, step + 1))
        shape: dict[str, Any] = {"dtype": torch.int64, "device": self.base.device}
        return torch.full((batch_size,), t, **shape), torch.full((batch_size,), s, **shape)

    def jumps(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Return start and end (B,) of the sampler's steps number `steps` (B,), one for each sample."""
        times = torch.tensor([*self.times, 0])
        return times[steps].to(self.base.device), times[steps + 1].to(self.base.device)

    def save_samples(self, recipe: Recipe, rt: Runtime, step: int) -> None:
        """Write the grid of the recipe's fixed prompts and seeds, sampled by the current student."""
        sheet = pictures.sample_grid(
            self.base, self.denoiser, recipe.samples, recipe.seed, self.grid, self.conditioned, self.gamma
        )
        pictures.save_samples(rt, sheet, step)


def start_folder(stage: Tuning, parents: dict[str, Path], folder: Path) -> Path:
    """Return the folder of the student that `stage` tunes, in the folder of one of its `parents`.

    One that was tuned before is written to `folder` first, with that tuning as part of it, until the stage is finished.
    """
    student = parents[stage.student_from] / "student"
    if "preference" not in students.describe(student):
        return student
    start = folder / "checkpoints" / "start"
    description = student_files.untuned_description(student)
    processes.on_rank_zero(student_files.write_untuned, student, start, description)
    return start


def load(stage: Tuning, base: Base, start: Path, seed: int) -> TunableStudent:
    """Return the student in folder `start`, ready to be tuned by `stage`.

    Raises ValueError where its grid has no times for the stage's number of steps; where the stage needs a random
    sampler, sets no gamma, and the student's own is 0; and for tiles or a small decoder that do not fit the teacher.
    """
    described = students.describe(start)
    conditioned, num_segments = described["conditioned"], described["num_segments"]
    gamma = default_gamma_of(start) if stage.gamma is None else stage.gamma
    if gamma == 0.0 and stage.needs_random_steps:
        raise ValueError(
            f"gamma: the student in {start} samples without noise (gamma 0) unless told otherwise, and this stage "
            "needs random steps; set gamma, for example 0.3"
        )
    denoiser = students.for_preference(base, stage.adapter, seed, start)
    if not stage.uses_teacher:
        base.forget_denoiser()  # the reference is the student
    if stage.gradient_checkpointing:
        base.checkpoint_blocks(denoiser)
        base.autoencoder.checkpoint_blocks()
    if stage.autoencoder_tiles:
        base.autoencoder.use_tiles(stage.autoencoder_tiles)
    small = small_decoder(stage, base)
    grid = grid_of(described)
    return TunableStudent(
        base, denoiser, grid.times(stage.sampling_steps), gamma, conditioned, num_segments, grid, small
    )


def small_decoder(stage: Tuning, base: Base) -> torch.nn.Module | None:
    """Return the small decoder of `stage`, None where it names none. Raises as `teachers.small_decoder` does."""
    if not isinstance(stage, Feedback) or stage.small_decoder is None:
        return None
    small = teachers.small_decoder(stage.small_decoder, base)
    if stage.gradient_checkpointing:
        small.enable_gradient_checkpointing()
    return small


@dataclass(frozen=True)
class Start:
    """The start of B samples: prompts, their conditioning, noise, and a generator each for the noise of later steps."""

    prompts: list[str]
    languages: list[str]
    conditioning: Conditioning
    noise: Tensor  # (B, C, H, W)
    generators: list[torch.Generator]
    next_prompts: list[str]  # of the next sample of the step with another one, the first after the last
    next_languages: list[str]

    def repeated(self, copies: int) -> Conditioning:
        """Return the conditioning (n B, ...) of n = `copies` copies of every sample, the whole first copy first."""
        return {name: value.repeat(copies, *[1] * (value.ndim - 1)) for name, value in self.conditioning.items()}


class Scores:
    """Values for the log of one step, one a sample, collected over its micro-batches; rewards as reward/<name>."""

    def __init__(self) -> None:
        self.values: dict[str, list[Tensor]] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Append `values` (b,) of a micro-batch, by name."""
        for name, value in values.items():
            self.values.setdefault(name, []).append(value.detach().float())

    def add_rewards(self, raw: dict[str, Tensor]) -> None:
        """Append the scores (b,) of a micro-batch, by reward."""
        self.add({f"{REWARD}{name}": value for name, value in raw.items()})

    def rewards(self) -> dict[str, Tensor]:
        """Gather the raw scores (B,) of the whole step from all processes, by reward."""
        return self.whole(REWARD)

    def whole(self, prefix: str) -> dict[str, Tensor]:
        """Gather the values (B,) of the whole step whose names begin with `prefix`, by the rest of the name."""
        own = {name.removeprefix(prefix): parts for name, parts in self.values.items() if name.startswith(prefix)}
        return {name: processes.gather(torch.cat(parts)) for name, parts in own.items()}

    def means(self) -> dict[str, float]:
        """Return the mean of each value over all processes, for the log; none of what no sample has.

        Waits for all processes.
        """
        if not self.values:
            return {}
        whole = [torch.cat(parts) for parts in self.values.values()]
        sums = torch.stack([values.sum() for values in whole])  # in one transfer: each one waits for the device
        totals = processes.total(*sums.tolist(), *map(len, whole))
        named = zip(self.values, totals[: len(whole)], totals[len(whole) :], strict=True)
        return {name: value / count for name, value, count in named if count}


class Prompts:
    """The prompts of a stage, in epochs, or sampled by the weights of their languages."""

    def __init__(self, stage: Tuning, base: Base, seed: int):
        self.stage, self.seed = stage, seed
        self.prompts = spoken(read_prompts(stage.prompts), stage.languages, stage.prompts)
        self.order = Order(self.prompts, stage, seed)
        tell_truncated(base, [prompt.prompt for prompt in self.prompts], stage.prompts)

    def starts(self, base: Base, step: int, count: int, size: int, copies: int = 1) -> Iterator["Start"]:
        """Yield starts for the `count` prompts of `step`, each `copies` times in a row, in micro-batches of `size`.

        A micro-batch has the rows of this process; all copies of a prompt are in one.
        """
        prompts = self.draw(step, count)
        own, after = ([one for one in each for _ in range(copies)] for each in (prompts, others(prompts, self.prompts)))
        for rows in processes.micro_batches(len(own), size, copies):
            generators = sample_generators(self.seed, self.stage, step, rows)
            yield start(base, [own[i] for i in rows], generators, [after[i] for i in rows])

    @property
    def languages(self) -> set[str]:
        """The languages of all prompts."""
        return {prompt.language for prompt in self.prompts}

    def texts(self, step: int, count: int) -> list[str]:
        """Return the texts of the `count` prompts of `step`."""
        return [prompt.prompt for prompt in self.draw(step, count)]

    def draw(self, step: int, count: int) -> list[Prompt]:
        """Return the `count` prompts of `step`."""
        return [self.prompts[i] for i in self.order.draw(step, count).tolist()]


def encode_ahead(stage: Tuning, recipe: Recipe, base: Base, texts: Callable[[int], list[str]]) -> None:
    """Encode the prompts `texts` of every step, the guard's and the sample grid's, and free the text encoders.

    Does nothing where these would be too many prompts to keep.
    """
    if not stage.encodes_ahead:
        return
    watched = [prompt.prompt for prompt in watched_prompts(stage)]
    steps = (text for step in range(stage.num_steps) for text in texts(step))
    base.encode_ahead([*recipe.samples.prompts, *watched, *steps])


def watched_prompts(stage: Tuning) -> list[Prompt]:
    """Return the prompts of the guard's looks. Raises ValueError for a single one: it has no standard deviation."""
    path = stage.guard_prompts or stage.prompts
    prompts = spoken(read_prompts(path), stage.languages, path)[: stage.guard.num_prompts]
    if len(prompts) < 2:
        raise ValueError(f"guard: {path} holds 1 prompt to watch; a gain is in deviations over 2 prompts or more")
    return prompts


class Order:
    """Which of `prompts` belong to a step: in epochs, or sampled by the weights of their languages.

    A language's weight is shared evenly by its prompts, which are counted once.
    """

    def __init__(self, prompts: list[Prompt], stage: Tuning, seed: int):
        self.size, self.parts, self.weights = len(prompts), (seed, stage.kind, "prompts"), None
        if stage.languages:
            languages = [prompt.language for prompt in prompts]
            counts = Counter(languages)
            self.weights = torch.tensor([stage.languages[one] / counts[one] for one in languages])

    def draw(self, step: int, count: int) -> Tensor:
        """Return the indices (count,) of the prompts of `step`."""
        if self.weights is None:
            return epoch_order(self.size, count, step, *self.parts)
        draws = generator(*self.parts, step)
        return torch.multinomial(self.weights, count, replacement=True, generator=draws)


def sample_generators(seed: int, stage: Tuning, step: int, numbers: Iterable[int]) -> list[torch.Generator]:
    """Return one generator for each of the samples `numbers` of `step`, for all the noise that the sample needs.

    It is a function of the sample's number in the step, so that a step is the same however it is split.
    """
    return [generator(seed, stage.kind, "sample", step, number) for number in numbers]


def draw_steps(num_steps: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Return the number (B,) of one of `num_steps` steps for each sample, drawn by its own generator."""
    return torch.tensor([int(torch.randint(num_steps, (), generator=one)) for one in generators])


def spoken(prompts: list[Prompt], languages: dict[str, float], path: str) -> list[Prompt]:
    """Return the `prompts` in `languages` of weight above 0; all where there are no `languages`.

    Raises ValueError where none is left.
    """
    chosen = [prompt for prompt in prompts if not languages or languages.get(prompt.language, 0.0) > 0.0]
    if not chosen:
        present = ", ".join(sorted({prompt.language for prompt in prompts}))
        codes = [code for code in map(code_meant, languages) if code]
        meant = f"; did you mean {', '.join(codes)}?" if codes else ""
        raise ValueError(f"languages: {path} holds no prompt in {', '.join(languages)}, only in {present}{meant}")
    return chosen


def others(prompts: list[Prompt], more: Sequence[Prompt] = ()) -> list[Prompt]:
    """Return for each of `prompts` the next one with another text, in a circle.

    Where all are alike it is the first other one of `more`, and itself where there is none.
    """
    return [
        next((one for one in chain(prompts[i + 1 :], prompts[:i], more) if one.prompt != own.prompt), own)
        for i, own in enumerate(prompts)
    ]


def start(
    base: Base, prompts: list[Prompt], generators: list[torch.Generator], after: list[Prompt] | None = None
) -> Start:
    """Return a start for each of `prompts`, its noise drawn by its own one of `generators`.

    `after` holds a prompt with another text for each; by default the next one here.
    """
    texts, languages = [prompt.prompt for prompt in prompts], [prompt.language for prompt in prompts]
    following = others(prompts) if after is None else after
    return Start(
        texts,
        languages,
        base.encode_prompts(texts),
        base.noise(generators, len(generators)),
        generators,
        [prompt.prompt for prompt in following],
        [prompt.language for prompt in following],
    )
