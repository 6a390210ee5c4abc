"""Stage `train_control`: a ControlNet that follows edges, over the frozen teacher (arXiv 2302.05543)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.captions import Captions, StoredPrompts
from ..data.prompts import CaptionedImages
from ..data.trajectory_store import store_of
from ..equations.consistency import squared_l2
from ..equations.edges import edge_map
from ..equations.prediction import min_snr_weight, prediction_from_x0
from ..equations.schedule import add_noise
from ..models import control, pictures, teachers
from ..models.base import Base
from ..models.conditioning import Conditioning, on_device
from ..models.teachers import tell_truncated
from ..recipe import Recipe, TrainControl
from ..storage import files
from ..training import autocast
from ..training.loop import Runtime, adamw, rate_factor, set_rate
from ..training.seeding import epoch_order


def run(stage: TrainControl, recipe: Recipe, parents: dict[str, Path], folder: Path) -> None:
    """Train a ControlNet into `folder/control`, in half precision; the teacher stays as it is.

    Interrupted at any step and run again, it ends with the same bits.
    """
    rt = Runtime(recipe, stage, folder)
    base = teachers.load(recipe.teacher, rt.device)
    drawings = drawings_of(stage, recipe, base, parents)
    network = control.new_control_net(base, recipe.seed).train()
    if stage.gradient_checkpointing:
        base.checkpoint_blocks(base.denoiser)
        base.checkpoint_blocks(network)
    optimizer = adamw(network.parameters(), stage)
    trained = rt.prepare(network, optimizer)

    for step in rt.steps(rt.resume({"control": trained}), stage.num_steps, "train_control"):
        # drawings, times, noise and captions of the step
        rate = stage.learning_rate * rate_factor(step, stage.num_steps, stage.warmup_steps)
        set_rate(optimizer, rate)
        index = epoch_order(len(drawings.latents), stage.batch_size, step, recipe.seed, "train_control")
        rt.samples = index.tolist()
        draws = rt.generator("noise", step)
        t = torch.randint(base.schedule.num_times, (stage.batch_size,), generator=draws)
        eps = torch.randn(stage.batch_size, *base.latent_shape, generator=draws)
        conditioning = drawings.captions.draw(index, draws)

        # one update
        parts = rt.micro_batches()
        conditionings = ({name: value[part] for name, value in conditioning.items()} for part in parts)
        losses = (
            loss(stage, base, network, *drawings.rows(index[p]), eps[p], t[p], c)
            for p, c in zip(parts, conditionings, strict=True)
        )
        with rt.autocast():
            record = rt.backward(losses)

        # the log, samples and checkpoints
        if rt.is_logged(step):
            rt.log(step, learning_rate=rate, **record)
        if rt.due(step, stage.sample_every, stage.num_steps):
            save_samples(rt, recipe, base, network, drawings, step)
        if rt.stopping or rt.due(step, stage.save_every):
            rt.save(step + 1)
    rt.write(write_control, folder / "control")


@dataclass(frozen=True)
class Drawings:
    """Pictures to learn from: their latents (N, C, H, W) and edges (N, 1, H', W'), uint8, on the CPU, and captions."""

    latents: Tensor
    edges: Tensor
    captions: Captions | StoredPrompts

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return latents (B, C, H, W) and edges (B, 3, H', W') float32 of the drawings `index` (B,)."""
        return self.latents[index], self.edges[index].float().expand(-1, 3, -1, -1)


def drawings_of(stage: TrainControl, recipe: Recipe, base: Base, parents: dict[str, Path]) -> Drawings:
    """Return the stage's pictures, or without them the samples of the trajectories that are not held out."""
    size = stage.micro_batch
    if stage.images is None:
        store = store_of(parents["trajectories"], recipe.teacher, base)
        latents = store.x0(torch.arange(store.num_trajectories))
        images = (base.autoencoder.decode(part.to(base.device)) for part in latents.split(size))
        with torch.no_grad():
            edges = torch.cat([edge_map(part).byte().cpu() for part in images])
        return Drawings(latents, edges, StoredPrompts(base, store, stage.prompt_dropout))
    captioned = CaptionedImages(stage.images, base.resolution)
    tell_truncated(base, [text for captions in captioned.prompts for text in captions], stage.images)
    found: list[Tensor] = []

    def parts() -> Iterator[Tensor]:
        for part in captioned.parts(size):
            found.append(edge_map(part / 255).byte())
            yield part

    latents = pictures.encode_all(base, parts(), len(captioned))
    return Drawings(latents, torch.cat(found), Captions(base, captioned.prompts, stage.prompt_dropout))


def loss(
    stage: TrainControl,
    base: Base,
    network: nn.Module,
    x0: Tensor,
    edges: Tensor,
    eps: Tensor,
    t: Tensor,
    conditioning: Conditioning,
) -> Tensor:
    """Return the squared error (B,) float32 of the teacher's prediction under the ControlNet (its paper's eq. 5).

    It has the stage's min-SNR weight.
    """
    x0, edges, eps, t = (value.to(base.device) for value in (x0, edges, eps, t))
    x_t = add_noise(x0, eps, t, base.schedule)
    with control.controlled(base.denoiser, network, edges):
        prediction = base.predict(base.denoiser, x_t, t, on_device(conditioning, base.device))
    error = squared_l2(prediction, prediction_from_x0(x0, x_t, t, base.schedule, base.prediction_type))
    if stage.min_snr_gamma is None:
        return error
    return error * min_snr_weight(t, base.schedule, base.prediction_type, stage.min_snr_gamma)


@torch.no_grad()
def save_samples(rt: Runtime, recipe: Recipe, base: Base, network: nn.Module, drawings: Drawings, step: int) -> None:
    """Write a grid of two rows: the edges of the first drawings, and what the guided teacher draws along them."""
    count = min(pictures.TEACHER_COLUMNS, len(drawings.latents))
    draws = torch.Generator().manual_seed(0)
    conditioning = on_device(drawings.captions.draw(torch.arange(count), draws), base.device)
    edges = drawings.rows(torch.arange(count))[1].to(base.device)
    with control.controlled(base.denoiser, network, edges.repeat(recipe.teacher.evaluations, 1, 1, 1)):
        images = pictures.of_teacher(base, conditioning, recipe.seed)
    pictures.save_samples(rt, pictures.grid(torch.cat([edges, images]), num_columns=count), step)


def write_control(network: Any, folder: Path) -> None:
    """Write the ControlNet in half precision to `folder`, as diffusers opens it."""
    with files.replacing(folder) as temporary:
        with autocast.in_halves(network, "the ControlNet"):
            network.save_pretrained(temporary)
        files.forget_origin(temporary)
