"""Stage `train_teacher`: train a teacher from a folder of captioned pictures by the diffusion loss."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.captions import Captions
from ..data.prompts import CaptionedImages
from ..equations.averaging import ema_decay, ema_update_
from ..equations.consistency import squared_l2
from ..equations.prediction import min_snr_weight, prediction_from_x0
from ..equations.schedule import add_noise, logit_normal_times
from ..models import pictures, teachers
from ..models.base import Base
from ..models.conditioning import Conditioning, on_device
from ..models.files import folder_of
from ..models.teachers import tell_truncated
from ..recipe import Recipe, TrainTeacher
from ..storage import files
from ..training import autocast
from ..training.loop import Runtime, adamw, rate_factor, set_rate
from ..training.seeding import epoch_order


def run(stage: TrainTeacher, recipe: Recipe, parents: dict[str, Path], folder: Path) -> None:
    """Train the denoiser of `recipe.teacher` into `folder/teacher`, a complete pipeline in diffusers' format.

    Its weights there are the exponential moving average, in half precision. Interrupted at any step and run again, it
    ends with the same bits.
    """
    rt = Runtime(recipe, stage, folder)
    base = teachers.load(recipe.teacher, rt.device)
    source = folder_of(recipe.teacher)  # its other parts are copied beside the denoiser after the last step
    denoiser = new_denoiser(base, stage, recipe.seed)
    optimizer = adamw(denoiser.parameters(), stage)
    trained = rt.prepare(denoiser, optimizer)
    average = {name: value.detach().clone() for name, value in trained.items()}
    captioned = CaptionedImages(stage.images, base.resolution)
    tell_truncated(base, [text for captions in captioned.prompts for text in captions], stage.images)
    latents = pictures.encode_all(base, captioned.parts(stage.micro_batch), len(captioned))
    captions = Captions(base, captioned.prompts, stage.prompt_dropout)

    # everything that a checkpoint holds beside the optimiser
    weights = {"denoiser": trained, "average": average}
    first = rt.resume(weights)
    for step in rt.steps(first, stage.num_steps, "train_teacher"):
        # pictures, times, noise and captions of the step
        rate = stage.learning_rate * rate_factor(step, stage.num_steps, stage.warmup_steps)
        set_rate(optimizer, rate)
        index = epoch_order(len(captioned), stage.batch_size, step, recipe.seed, "train_teacher")
        rt.samples = index.tolist()
        x0 = latents[index]
        draws = rt.generator("noise", step)
        t = draw_times(stage, base.schedule.num_times, draws)
        eps = torch.randn(x0.shape, generator=draws)
        conditioning = captions.draw(index, draws)

        # one update
        parts = rt.micro_batches()
        conditionings = ({name: value[part] for name, value in conditioning.items()} for part in parts)
        losses = (
            loss(stage, base, denoiser, x0[p], eps[p], t[p], c) for p, c in zip(parts, conditionings, strict=True)
        )
        with rt.autocast():
            record = rt.backward(losses)
        ema_update_(average.values(), trained.values(), ema_decay(step, stage.ema_decay))

        # the log, samples and checkpoints
        if rt.is_logged(step):
            rt.log(step, learning_rate=rate, **record)
        if recipe.samples.prompts and rt.due(step, stage.sample_every, stage.num_steps):
            with rt.swapped(average):
                save_samples(rt, recipe, base, denoiser, step)
        if rt.stopping or rt.due(step, stage.save_every):
            rt.save(step + 1)
    # the average of the weights, not the last ones
    with rt.swapped(average):
        rt.write(write_teacher, base.denoiser_part, source, folder / "teacher")


def new_denoiser(base: Base, stage: TrainTeacher, seed: int) -> nn.Module:
    """Return the denoiser to train, in float32: with the teacher's own weights, or new ones drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        denoiser = base.simplify(type(base.denoiser).from_config(base.denoiser.config))
    if stage.start == "teacher":
        denoiser.load_state_dict(base.denoiser.state_dict())
    if stage.gradient_checkpointing:
        base.checkpoint_blocks(denoiser)
    return denoiser.to(base.device).train()


def draw_times(stage: TrainTeacher, num_times: int, draws: torch.Generator) -> Tensor:
    """Return the times (B,) of a step, distributed as the stage says."""
    if stage.times == "logit_normal":
        return logit_normal_times(torch.randn(stage.batch_size, generator=draws), num_times)
    return torch.randint(num_times, (stage.batch_size,), generator=draws)


def loss(
    stage: TrainTeacher,
    base: Base,
    denoiser: nn.Module,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    conditioning: Conditioning,
) -> Tensor:
    """Return the squared error (B,) float32 of the prediction (DDPM, eq. 14), with the stage's min-SNR weight."""
    x0, eps, t = (value.to(base.device) for value in (x0, eps, t))
    x_t = add_noise(x0, eps, t, base.schedule)
    target = prediction_from_x0(x0, x_t, t, base.schedule, base.prediction_type)
    prediction = base.predict(denoiser, x_t, t, on_device(conditioning, base.device))
    error = squared_l2(prediction, target)
    if stage.min_snr_gamma is None:
        return error
    return error * min_snr_weight(t, base.schedule, base.prediction_type, stage.min_snr_gamma)


def save_samples(rt: Runtime, recipe: Recipe, base: Base, denoiser: nn.Module, step: int) -> None:
    """Write the grid of the recipe's fixed prompts and seeds, drawn by `denoiser` in the teacher's place."""
    conditioning = base.encode_prompts(recipe.samples.prompts)
    with as_teacher(base, denoiser):
        images = pictures.of_teacher(base, conditioning, recipe.seed)
    pictures.save_samples(rt, pictures.grid(images, pictures.TEACHER_COLUMNS), step)


@contextmanager
def as_teacher(base: Base, denoiser: nn.Module) -> Iterator[None]:
    """Put `denoiser` in the teacher's place of `base` inside."""
    own, base.denoiser = base.denoiser, denoiser
    try:
        yield
    finally:
        base.denoiser = own


def write_teacher(denoiser: Any, part: str, source: Path, folder: Path) -> None:
    """Write the pipeline in `source`, with `denoiser` in half precision as its component `part`, to `folder`."""
    with files.replacing(folder) as temporary:
        shutil.copytree(source, temporary, ignore=shutil.ignore_patterns(part))
        with autocast.in_halves(denoiser, "the trained teacher"):
            denoiser.save_pretrained(temporary / part)
        files.forget_origin(temporary)
