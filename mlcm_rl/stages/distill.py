"""Stage `distill`: multistep consistency distillation, phase by phase from many segments to one (arXiv 2406.05768)."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..data.captions import RealPictures
from ..data.prompts import CaptionedImages, read_prompts
from ..data.training_points import Batch, NoisedData, OnLine, RenoisedSamples, SimulatedStates, Source, StoredStates
from ..data.trajectory_store import store_of
from ..equations import consistency
from ..equations.averaging import ema_decay, ema_update_
from ..equations.prediction import X0
from ..equations.schedule import snr
from ..equations.segments import phase_at
from ..models import pictures, students, teachers
from ..models.base import Base
from ..models.conditioning import Conditioning
from ..models.grids import SamplingGrid
from ..models.perceptual import Distance, Distances
from ..models.teachers import tell_truncated
from ..models.terms import Samples, terms_of
from ..models.terms_of_step import TermsOfStep, training_of
from ..recipe import Distill, Recipe, types
from ..recipe.distill import LOG, PERCEPTUAL
from ..storage import files
from ..training import processes
from ..training.loop import Runtime, adamw, rate_factor, set_rate
from ..training.seeding import generator

Weights = dict[str, Tensor]  # the trained parameters by name, or their average


def run(stage: Distill, recipe: Recipe, parents: dict[str, Path], folder: Path) -> None:
    """Train a student into `folder`: `student/`, one of `snapshots/` after each phase, `log.jsonl`, `samples/`.

    It starts as the teacher, or as the student of an earlier distill stage. Interrupted at any step and run again, it
    ends with the same bits. Raises NonFiniteLoss before an update that is not finite.
    """
    rt = Runtime(recipe, stage, folder)
    base = teachers.load(recipe.teacher, rt.device)
    start = parents["distill"] / "student" if "distill" in parents else None
    prediction = X0 if stage.prediction == "x0" else base.prediction_type
    student = students.student(base, stage.adapter, recipe.seed, stage.condition_on_target, start, prediction)
    if not stage.uses_teacher:
        base.forget_denoiser()
    if stage.gradient_checkpointing:
        base.checkpoint_blocks(student)
    optimizer = adamw(students.trainable_parameters(student), stage)
    trained = rt.prepare(student, optimizer)
    average = {name: value.detach().clone() for name, value in trained.items()} if stage.target_ema else trained
    network = Network(rt, base, student, average)
    source = make_source(stage, recipe, base, student, parents)
    distances = make_distances(stage, recipe, base, parents)
    real = real_pictures(stage, base)
    encode_ahead(stage, recipe, base, source, real)
    added_terms = terms_of(stage, base, recipe.seed, real.draw if real else None)
    terms = [(term, training_of(rt, term)) for term in added_terms]
    lengths = stage.per_phase("num_steps")

    # everything that a checkpoint holds beside the optimiser
    weights = {"student": trained} | ({"average": average} if stage.target_ema else {})
    first = rt.resume(weights)
    for step in rt.steps(first, sum(lengths), "distill"):
        # the phase: its settings, and each phase warms up anew
        phase, step_in_phase = phase_at(step, lengths)
        settings = PhaseSettings(stage, phase)
        if step_in_phase == 0 and settings.optimizer_state == "reset":
            optimizer.state.clear()  # moments of another target
        rate = settings.learning_rate * rate_factor(step_in_phase, lengths[phase], stage.warmup_steps)
        set_rate(optimizer, rate)

        # one update, on points that are a function of (seed, step) alone
        draw = source.draw(step, settings.num_segments, settings.pair, rt.generator("times", step))
        rt.samples = draw.index.tolist()
        parts = (source.realise(draw.rows(part)) for part in rt.micro_batches())
        measure = distances.of(settings.distance, step)
        added = TermsOfStep(rt, stage, base, student, terms, step, draw.s)
        losses = (loss(settings, network, part, measure, added) for part in parts)
        with rt.autocast():
            record = rt.backward(losses)
            record |= added.learn()  # the terms' own networks, from what the student made
        if stage.target_ema:
            ema_update_(average.values(), trained.values(), ema_decay(step, stage.target_ema))

        # the log, samples, snapshots and checkpoints
        if rt.is_logged(step):
            record |= added.means()
            rt.log(step, phase=phase, num_segments=settings.num_segments, learning_rate=rate, **record)
        is_measured = rt.due(step, stage.held_out_every, sum(lengths))
        if is_measured and isinstance(source, StoredStates) and source.store.num_held_out:
            measure = distances.of(settings.distance, "held out")
            with rt.autocast():
                held_out = held_out_loss(settings, network, source, measure)
            rt.log(step, phase=phase, num_segments=settings.num_segments, held_out_loss=held_out)
        if recipe.samples.prompts and rt.due(step, stage.sample_every, sum(lengths)):
            save_samples(rt, stage, recipe, base, student, settings.num_segments, step)
        if step_in_phase + 1 == lengths[phase]:
            snapshot = snapshot_folder(folder, phase, settings)
            rt.write(save_student, stage, recipe, base, settings.num_segments, snapshot)
        if rt.stopping or rt.due(step, stage.save_every):
            rt.save(step + 1)
    rt.write(save_student, stage, recipe, base, stage.num_segments[-1], folder / "student")


class PhaseSettings:
    """The settings of one phase of a progressive schedule, and its stage."""

    def __init__(self, stage: Distill, phase: int):
        self.stage = stage
        self.num_segments: int = stage.num_segments[phase]
        self.learning_rate: float = stage.per_phase("learning_rate")[phase]
        self.target: str = stage.per_phase("target")[phase]
        self.pair: str = stage.per_phase("pair")[phase]
        self.space: str = stage.per_phase("space")[phase]
        self.optimizer_state: str = stage.per_phase("optimizer_state")[phase]
        self.distance: str = stage.per_phase("distance")[phase]


@dataclass(frozen=True)
class Network:
    """The student, over its base, and the weights of the target: an average of the student's, or its own."""

    rt: Runtime
    base: Base
    student: torch.nn.Module
    average: Weights

    def x0(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, s: Tensor | None) -> Tensor:
        """Return f (B, C, H, W) of x_t at t (B,), for a conditioned student told s (B,)."""
        return self.base.x0(self.student, x_t, t, conditioning, s)

    @torch.no_grad()
    def target_x0(self, batch: Batch, s: Tensor | None) -> Tensor:
        """Return f (B, C, H, W) at the pair's second point, by the target, without gradient."""
        assert batch.x_r is not None
        with self.rt.swapped(self.average):
            return self.x0(batch.x_r, batch.r, batch.conditioning, s)


def make_source(
    stage: Distill, recipe: Recipe, base: Base, student: torch.nn.Module, parents: dict[str, Path]
) -> Source:
    """Return the source of points that `stage` names. Raises CheckpointError for a store of another teacher."""
    store = None
    if stage.reads_trajectories:
        store = store_of(parents["trajectories"], recipe.teacher, base)
    if stage.method == "inter_segment":
        prompts = None if store else read_texts(stage, base)
        return RenoisedSamples(stage, base, student, store, prompts, recipe.seed)
    if stage.method == "simulation":
        return SimulatedStates(stage, base, student, read_texts(stage, base), recipe.seed)
    if store is not None:
        return StoredStates(stage, base, store, recipe.seed)
    if stage.source == "online":
        return OnLine(stage, base, read_texts(stage, base), recipe.seed)
    return NoisedData(stage, base, *encoded_pictures(stage, base), recipe.seed)


def make_distances(stage: Distill, recipe: Recipe, base: Base, parents: dict[str, Path]) -> Distances:
    """Return the distances of `stage`, with the networks of the perceptual ones in memory."""
    place = Path(stage.lpips) if stage.lpips is not None else parents.get("train_perceptual")
    return Distances(stage, base, place, recipe.seed)


def encode_ahead(stage: Distill, recipe: Recipe, base: Base, source: Source, real: RealPictures | None) -> None:
    """Encode the texts of `source`, of `real` pictures and of the sample grid once, and free the text encoders.

    Does nothing where these would be too many to keep, or more than the steps draw.
    """
    texts = [*source.texts, *(real.texts if real else [])]
    if len(set(texts)) <= stage.most_encoded_ahead:
        base.encode_ahead([*recipe.samples.prompts, *texts])


def real_pictures(stage: Distill, base: Base) -> RealPictures | None:
    """Return the pictures that an adversary takes for real, where the stage asks for such."""
    if stage.adversarial is None or stage.adversarial.real != "images":
        return None
    return RealPictures(base, *encoded_pictures(stage, base))


def encoded_pictures(stage: Distill, base: Base) -> tuple[Tensor, list[list[str]]]:
    """Return the latents (N, C, H, W) of the stage's pictures, on the CPU, and the captions of each."""
    assert stage.images is not None  # the recipe checks it
    folder = CaptionedImages(stage.images, base.resolution)
    tell_truncated(base, [text for captions in folder.prompts for text in captions], stage.images)
    return pictures.encode_all(base, folder.parts(stage.micro_batch), len(folder)), folder.prompts


def read_texts(stage: Distill, base: Base) -> list[str]:
    """Return the prompts of a stage whose teacher samples online."""
    assert stage.prompts is not None  # the recipe checks it
    texts = [prompt.prompt for prompt in read_prompts(stage.prompts)]
    tell_truncated(base, texts, stage.prompts)
    return texts


def loss(
    settings: PhaseSettings,
    network: Network,
    batch: Batch,
    measure: Distance,
    added: TermsOfStep | None = None,
) -> Tensor:
    """Return the distillation loss of `batch`, (B,) float32 (TLCM v6, eq. 7; inter_segment: eq. 10).

    The terms that are `added` to the distance are part of it, and with `method: simulation` all of it.
    """
    stage, schedule = settings.stage, network.base.schedule
    s = batch.s if stage.condition_on_target else None
    x0 = network.x0(batch.x_t, batch.t, batch.conditioning, s)
    if stage.method == "simulation":  # a fake score learns from the samples that the terms move
        assert added is not None
        nothing = 0.0 * x0.flatten(1).mean(1)  # in the graph, for steps in which all terms warm up
        return added.beside(nothing, jumps_of(batch, x0, x0, added), x0.detach())
    if stage.method == "inter_segment":
        assert batch.x_r is not None
        target = consistency.inter_segment_target(network.target_x0(batch, s), batch.x_r, batch.r)
        # both compare x0; that of space x0 has the weight of `consistency.loss_in_x0`, and z none
        weight = snr(batch.t, schedule) + 1.0 if settings.space == "x0" else 1.0
        distance = weight * measure(x0, target, batch.conditioning)
        if added is None:
            return distance
        return added.beside(distance, jumps_of(batch, x0, target, added), batch.sample)
    if settings.target == "trajectory":  # the teacher's stored state at s
        assert batch.x_s is not None
        target = batch.x_s
    else:  # the target network's jump from r to s
        assert batch.x_r is not None
        target = consistency.transfer(batch.x_r, network.target_x0(batch, s), batch.r, batch.s, schedule)
    error = consistency.LOSSES[settings.space]
    if settings.distance in PERCEPTUAL:  # of x0, whatever the space: g has noise
        is_log = settings.distance.startswith(LOG)
        error = consistency.log_perceptual_loss if is_log else consistency.PERCEPTUAL_LOSSES[settings.space]
    compared = partial(measure, conditioning=batch.conditioning)
    distance = error(x0, batch.x_t, batch.t, target, batch.s, schedule, compared)
    if added is None:
        return distance
    ends = consistency.transfer(batch.x_t, x0, batch.t, batch.s, schedule) if added.sees_ends else None
    return added.beside(distance, jumps_of(batch, x0, target, added), batch.sample, ends)


def jumps_of(batch: Batch, x0: Tensor, target: Tensor, added: TermsOfStep) -> Samples:
    """Return the jumps from the points of `batch`, the next micro-batch, for the terms: x0, target (B, C, H, W)."""
    return Samples(added.rows(), x0, batch.conditioning, (batch.x_t, batch.t), target)


@torch.no_grad()
def held_out_loss(settings: PhaseSettings, network: Network, source: StoredStates, measure: Distance) -> float:
    """Return the mean loss over the held-out trajectories, at the same times throughout a phase."""
    index = torch.tensor(source.store.held_out)
    draw = source.draw_for(index, settings.num_segments, settings.pair, generator(source.seed, "held out"))
    parts = (draw.rows(part) for part in processes.equal_parts(len(index), settings.stage.micro_batch))
    losses = [loss(settings, network, source.realise(part), measure) for part in parts]
    return processes.gather(torch.cat(losses))[: len(index)].mean().item()


def snapshot_folder(folder: Path, phase: int, settings: PhaseSettings) -> Path:
    """Return the folder of the student after `phase`."""
    return folder / "snapshots" / f"phase-{phase}-K{settings.num_segments}"


def save_student(
    student: torch.nn.Module, stage: Distill, recipe: Recipe, base: Base, num_segments: int, folder: Path
) -> None:
    """Write the current student to `folder`, with the description that samplers and exports need."""
    description = {
        "num_segments": num_segments,
        "budgets": stage.steps_learned(num_segments),
        "conditioned": stage.condition_on_target,
        **students.expected_of(base),
        "teacher": files.public(recipe.teacher.path),
        "teacher_hash": teachers.teacher_hash(recipe.teacher),
    }
    if stage.starts == "milestones":
        description["starts"] = stage.starts
    if recipe.teacher.quantise is not None:
        description["quantise"] = recipe.teacher.quantise
    students.save_student(student, folder, description)


def save_samples(
    rt: Runtime, stage: Distill, recipe: Recipe, base: Base, student: torch.nn.Module, num_segments: int, step: int
) -> None:
    """Write the grid of fixed prompts and seeds, sampled by the current student at its default gamma."""
    conditioned = stage.condition_on_target
    gamma = types.default_gamma(num_segments, conditioned)
    grid = SamplingGrid(num_segments=types.sampling_segments(num_segments, conditioned))
    with rt.autocast():
        sheet = pictures.sample_grid(base, student, recipe.samples, recipe.seed, grid, conditioned, gamma)
    pictures.save_samples(rt, sheet, step)
