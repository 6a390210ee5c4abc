"""Stage `distill`: multistep consistency distillation, phase by phase from many segments to one (arXiv 2406.05768)."""

from pathlib import Path

import torch
from torch import Tensor

from ..data.prompts import CaptionedImages, read_prompts
from ..data.training_points import Batch, NoisedData, OnLine, RenoisedSamples, Source, StoredStates
from ..data.trajectory_store import Store, expected_of
from ..equations import consistency
from ..equations.averaging import ema_decay, ema_update_
from ..equations.schedule import snr
from ..equations.segments import phase_at
from ..models import pictures, students, teachers
from ..models.base import Base
from ..models.teachers import tell_truncated
from ..recipe import Distill, Recipe, types
from ..storage import files
from ..training.loop import Runtime, rate_factor, set_rate
from ..training.processes import on_rank_zero
from ..training.seeding import generator

Weights = dict[str, Tensor]  # the trained parameters by name, or their average


def run(stage: Distill, recipe: Recipe, parents: dict[str, Path], folder: Path) -> None:
    """Train a student into `folder`: `student/`, one of `snapshots/` after each phase, `log.jsonl`, `samples/`.

    It starts as the teacher, or as the student of an earlier distill stage. Interrupted at any step and run again, it
    ends with the same bits. Raises NonFiniteLoss before an update that would not be a number.
    """
    rt = Runtime(recipe, stage, folder)
    base = teachers.load(recipe.teacher, rt.device)
    start = parents["distill"] / "student" if "distill" in parents else None
    student = students.student(base, stage.adapter, recipe.seed, stage.condition_on_target, start)
    if not stage.uses_teacher:
        base.forget_denoiser()
    if stage.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    parameters = students.trainable_parameters(student)
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=stage.betas, weight_decay=stage.weight_decay, fused=True)
    trained = rt.prepare(student, optimizer)
    average = {name: value.detach().clone() for name, value in trained.items()} if stage.target_ema else trained
    source = make_source(stage, recipe, base, student, parents)
    if not stage.uses_teacher:
        base.encode_ahead(recipe.samples.prompts)  # the store has all others
    lengths = stage.per_phase("num_steps")

    weights = {"student": trained} | ({"average": average} if stage.target_ema else {})
    first = rt.resume(weights)
    for step in rt.steps(first, sum(lengths), "distill"):
        phase, step_in_phase = phase_at(step, lengths)
        settings = PhaseSettings(stage, phase)
        if step_in_phase == 0 and settings.optimizer_state == "reset":
            optimizer.state.clear()
        rate = settings.learning_rate * rate_factor(step_in_phase, lengths[phase], stage.warmup_steps)
        set_rate(optimizer, rate)

        draw = source.draw(step, settings.num_segments, settings.pair, rt.generator("times", step))
        rt.samples = draw.index.tolist()
        parts = (source.realise(draw.rows(part)) for part in rt.micro_batches())
        losses = (loss(rt, stage, settings, base, student, average, part) for part in parts)
        with rt.autocast():
            record = rt.backward(losses)
        if stage.target_ema:
            ema_update_(average.values(), trained.values(), ema_decay(step, stage.target_ema))

        if rt.due(step, stage.log_every):
            rt.log(step, phase=phase, num_segments=settings.num_segments, learning_rate=rate, **record)
        if isinstance(source, StoredStates) and source.store.num_held_out and rt.due(step, stage.held_out_every):
            held_out = held_out_loss(rt, stage, settings, base, student, average, source)
            rt.log(step, phase=phase, num_segments=settings.num_segments, held_out_loss=held_out)
        if recipe.samples.prompts and rt.due(step, stage.sample_every, sum(lengths)):
            save_samples(stage, recipe, base, student, settings.num_segments, folder, step)
        if step_in_phase + 1 == lengths[phase]:
            snapshot = snapshot_folder(folder, phase, settings)
            rt.write(save_student, stage, recipe, base, settings.num_segments, snapshot)
        if rt.stopping or rt.due(step, stage.save_every):
            rt.save(step + 1)
    rt.write(save_student, stage, recipe, base, stage.num_segments[-1], folder / "student")


class PhaseSettings:
    """The settings of one phase of a progressive schedule."""

    def __init__(self, stage: Distill, phase: int):
        self.num_segments: int = stage.num_segments[phase]
        self.learning_rate: float = stage.per_phase("learning_rate")[phase]
        self.target: str = stage.per_phase("target")[phase]
        self.pair: str = stage.per_phase("pair")[phase]
        self.space: str = stage.per_phase("space")[phase]
        self.optimizer_state: str = stage.per_phase("optimizer_state")[phase]
        self.distance = consistency.DISTANCES[stage.per_phase("distance")[phase]]


def make_source(
    stage: Distill, recipe: Recipe, base: Base, student: torch.nn.Module, parents: dict[str, Path]
) -> Source:
    """The source of points that `stage` names. Raises CheckpointError for a store of another teacher."""
    store = None
    if stage.reads_trajectories:
        store = Store(parents["trajectories"], expected_of(recipe.teacher, base))
    if stage.method == "inter_segment":
        prompts = None if store else read_texts(stage, base)
        return RenoisedSamples(stage, base, student, store, prompts, recipe.seed)
    if store is not None:
        return StoredStates(stage, base, store, recipe.seed)
    if stage.source == "online":
        return OnLine(stage, base, read_texts(stage, base), recipe.seed)
    assert stage.images is not None  # which the recipe sees to
    folder = CaptionedImages(stage.images, base.resolution)
    tell_truncated(base, [text for captions in folder.prompts for text in captions], stage.images)
    latents = pictures.encode(base, folder.images, stage.micro_batch)
    return NoisedData(stage, base, latents, folder.prompts, recipe.seed)


def read_texts(stage: Distill, base: Base) -> list[str]:
    """The prompts of a stage that has the teacher draw."""
    assert stage.prompts is not None  # which the recipe sees to
    texts = [prompt.prompt for prompt in read_prompts(stage.prompts)]
    tell_truncated(base, texts, stage.prompts)
    return texts


def loss(
    rt: Runtime,
    stage: Distill,
    settings: PhaseSettings,
    base: Base,
    student: torch.nn.Module,
    average: Weights,
    batch: Batch,
) -> Tensor:
    """The distillation loss of `batch`, one value a sample (B,) float32 (TLCM v6, eq. 7; eq. 10 for inter_segment)."""
    s = batch.s if stage.condition_on_target else None
    x0 = base.x0(student, batch.x_t, batch.t, batch.conditioning, s)
    if stage.method == "inter_segment":
        x0_at_r = no_grad_x0(rt, base, student, average, batch, s)
        assert batch.x_r is not None
        target = consistency.inter_segment_target(x0_at_r, batch.x_r, batch.r)
        weight = snr(batch.t, base.schedule) + 1.0 if settings.space == "x0" else 1.0
        return weight * settings.distance(x0, target)
    if settings.target == "trajectory":
        assert batch.x_s is not None
        target = batch.x_s
    else:
        x0_at_r = no_grad_x0(rt, base, student, average, batch, s)
        assert batch.x_r is not None
        target = consistency.transfer(batch.x_r, x0_at_r, batch.r, batch.s, base.schedule)
    error = consistency.LOSSES[settings.space]
    return error(x0, batch.x_t, batch.t, target, batch.s, base.schedule, settings.distance)


@torch.no_grad()
def no_grad_x0(
    rt: Runtime, base: Base, student: torch.nn.Module, average: Weights, batch: Batch, s: Tensor | None
) -> Tensor:
    """f at the pair's second point (B, C, H, W), by the target network: the student's own weights or their average."""
    assert batch.x_r is not None
    with rt.swapped(average):
        return base.x0(student, batch.x_r, batch.r, batch.conditioning, s)


@torch.no_grad()
def held_out_loss(
    rt: Runtime,
    stage: Distill,
    settings: PhaseSettings,
    base: Base,
    student: torch.nn.Module,
    average: Weights,
    source: StoredStates,
) -> float:
    """Mean loss over the held-out trajectories, at the same times whenever it is asked for in a phase."""
    index = torch.tensor(source.store.held_out)
    draw = source.draw_for(index, settings.num_segments, settings.pair, generator(source.seed, "held out"))
    parts = draw.split(stage.micro_batch)
    losses = [loss(rt, stage, settings, base, student, average, source.realise(part)) for part in parts]
    return torch.cat(losses).mean().item()


def snapshot_folder(folder: Path, phase: int, settings: PhaseSettings) -> Path:
    return folder / "snapshots" / f"phase-{phase}-K{settings.num_segments}"


def save_student(
    student: torch.nn.Module, stage: Distill, recipe: Recipe, base: Base, num_segments: int, folder: Path
) -> None:
    """The student as it is now, with what a sampler and an export need to know of it."""
    description = {
        "num_segments": num_segments,
        "budgets": stage.budgets,
        "conditioned": stage.condition_on_target,
        "family": base.family,
        "prediction_type": base.prediction_type,
        "teacher": files.public(recipe.teacher.path),
        "teacher_hash": teachers.teacher_hash(recipe.teacher),
    }
    students.save_student(student, folder, description)


def save_samples(
    stage: Distill, recipe: Recipe, base: Base, student: torch.nn.Module, num_segments: int, folder: Path, step: int
) -> None:
    """The grid of fixed prompts and seeds, by the sampler that suits the student as it is now."""
    conditioned = stage.condition_on_target
    gamma = types.default_gamma(num_segments, conditioned)
    sheet = pictures.sample_grid(base, student, recipe.samples, recipe.seed, num_segments, conditioned, gamma)
    on_rank_zero(pictures.save_png, sheet, pictures.samples_path(folder, step + 1))
