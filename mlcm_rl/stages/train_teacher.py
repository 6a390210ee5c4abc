"""Stage `train_teacher`: the denoiser's diffusion loss on captioned pictures. Makes a teacher out of a folder of them."""

import shutil
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from .. import adapters, bases, checkpoint, pictures
from ..bases import Base, Conditioning
from ..data import CaptionedImages
from ..equations.averaging import ema_decay, ema_update_
from ..equations.consistency import squared_l2
from ..equations.prediction import prediction_from_x0
from ..equations.schedule import add_noise, snr
from ..equations.segments import time_grid
from ..recipe import Recipe, TrainTeacher
from ..runtime import Runtime, epoch_order, generator, rate_factor, set_rate
from ..sampler import sample_teacher

ENCODED_AT_A_TIME = 256


def run(stage: TrainTeacher, recipe: Recipe, parents: dict[str, Path], folder: Path) -> None:
    """Train the denoiser of `recipe.teacher` into `folder/teacher`, a complete pipeline in diffusers' format.

    Its weights there are the exponential moving average, in half precision. Interrupted at any step and run again, it
    ends with the same bits.
    """
    rt = Runtime(recipe, stage, folder)
    base = bases.load(recipe.teacher, rt.device)
    denoiser = new_denoiser(base, stage, recipe.seed)
    trained = dict(denoiser.named_parameters())
    parameters = list(trained.values())
    average = {name: value.detach().clone() for name, value in trained.items()}
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=stage.betas, weight_decay=stage.weight_decay)
    captioned = CaptionedImages(stage.images, base.resolution)
    latents, captions = encode(base, captioned)

    weights = {"denoiser": trained, "average": average}
    first = checkpoint.load_training(folder, weights, optimizer)
    for step in rt.steps(first, stage.num_steps, "train_teacher"):
        set_rate(optimizer, stage.learning_rate * rate_factor(step, stage.num_steps, stage.warmup_steps))
        index = epoch_order(len(captioned), stage.batch_size, step, recipe.seed, "train_teacher")
        x0 = latents[index]
        draws = rt.generator("noise", step)
        t = torch.randint(base.schedule.num_times, (stage.batch_size,), generator=draws)
        eps = torch.randn(x0.shape, generator=draws)
        conditioning = choose_captions(base, captioned, captions, index, stage.prompt_dropout, draws)

        size = stage.batch_size // stage.gradient_accumulation
        parts = [slice(i, i + size) for i in range(0, stage.batch_size, size)]
        given = ({name: value[part] for name, value in conditioning.items()} for part in parts)
        losses = (loss(stage, base, denoiser, x0[p], eps[p], t[p], c) for p, c in zip(parts, given, strict=True))
        with rt.accelerator.autocast():
            record = rt.backward(losses, parameters, optimizer)
        ema_update_(average.values(), parameters, ema_decay(step, stage.ema_decay))

        if rt.due(step, stage.log_every):
            rt.log(step, **record)
        if recipe.samples.prompts and rt.due(step, stage.sample_every, stage.num_steps):
            save_samples(recipe, base, average, folder, step)
        if rt.due(step, stage.save_every):
            checkpoint.save_training(folder, step + 1, weights, optimizer)
    write_teacher(recipe, denoiser, average, folder / "teacher")


def new_denoiser(base: Base, stage: TrainTeacher, seed: int) -> UNet2DConditionModel:
    """The denoiser to train, float32: the teacher's own weights, or its architecture with fresh ones drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        denoiser = UNet2DConditionModel.from_config(base.denoiser.config)
    if stage.start == "teacher":
        denoiser.load_state_dict(base.denoiser.state_dict())
    if stage.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    return denoiser.to(base.device).train()


def encode(base: Base, captioned: CaptionedImages) -> tuple[Tensor, dict[str, Conditioning]]:
    """Latents (N, C, H, W) of the pictures, and every distinct caption's conditioning, all on the CPU and encoded once."""
    chunks = captioned.images.split(ENCODED_AT_A_TIME)
    latents = torch.cat([base.encode_images(chunk.to(base.device) / 255).cpu() for chunk in chunks])
    texts = sorted({text for texts in captioned.prompts for text in texts})
    captions: dict[str, Conditioning] = {}
    for start in range(0, len(texts), ENCODED_AT_A_TIME):
        part = texts[start : start + ENCODED_AT_A_TIME]
        encoded = {name: value.cpu() for name, value in base.encode_prompts(part).items()}
        captions |= {text: {name: value[i] for name, value in encoded.items()} for i, text in enumerate(part)}
    return latents, captions


def choose_captions(
    base: Base,
    captioned: CaptionedImages,
    captions: dict[str, Conditioning],
    index: Tensor,
    dropout: float,
    draws: torch.Generator,
) -> Conditioning:
    """One of each picture's captions (B, ...), or none for a share `dropout` of them, which teaches guidance."""
    dropped = {name: value[0].cpu() for name, value in base.unconditional(1).items()}
    chosen = []
    for i, (which, drop) in zip(index.tolist(), torch.rand(len(index), 2, generator=draws).tolist(), strict=True):
        texts = captioned.prompts[i]
        chosen.append(dropped if drop < dropout else captions[texts[int(which * len(texts))]])
    return {name: torch.stack([one[name] for one in chosen]) for name in dropped}


def loss(
    stage: TrainTeacher,
    base: Base,
    denoiser: torch.nn.Module,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    conditioning: Conditioning,
) -> Tensor:
    """Squared error of the network's own prediction, (B,) float32 (DDPM, eq. 14), with min-SNR weight where asked for."""
    x0, eps, t = (value.to(base.device) for value in (x0, eps, t))
    x_t = add_noise(x0, eps, t, base.schedule)
    wanted = prediction_from_x0(x0, x_t, t, base.schedule, base.prediction_type)
    given = base.predict(denoiser, x_t, t, {name: value.to(base.device) for name, value in conditioning.items()})
    error = squared_l2(given, wanted)
    if stage.min_snr_gamma is None:
        return error
    ratio = snr(t, base.schedule)
    return error * ratio.clamp(max=stage.min_snr_gamma) / ratio


def save_samples(recipe: Recipe, base: Base, average: dict[str, Tensor], folder: Path, step: int) -> None:
    """The recipe's fixed prompts and seeds at 25 guided steps, by the averaged weights."""
    prompts = recipe.samples.prompts
    conditioning, unconditional = base.encode_prompts(prompts), base.unconditional(len(prompts))
    noise = base.noise([generator(recipe.seed, "samples", i) for i in range(len(prompts))], len(prompts))
    times = time_grid(25, base.schedule.num_times)[:-1]
    with adapters.swapped(base.denoiser, average):
        x0 = sample_teacher(base, conditioning, unconditional, noise, times, recipe.teacher.guidance_scale)
    sheet = pictures.grid(base.decode(x0), num_columns=8)
    pictures.save_png(sheet, pictures.folder_of_samples(folder, step + 1))


def write_teacher(recipe: Recipe, denoiser: UNet2DConditionModel, average: dict[str, Tensor], folder: Path) -> None:
    """The recipe's teacher with the averaged denoiser in half precision, files of at most 14 MB."""
    with checkpoint.replacing(folder) as temporary:
        shutil.copytree(recipe.teacher.path, temporary, ignore=shutil.ignore_patterns("unet"))
        with adapters.swapped(denoiser, {name: value.half() for name, value in average.items()}):
            denoiser.save_pretrained(temporary / "unet", max_shard_size="14MB")
