"""Stage `adapt_text`: the text encoder of another language for a teacher, by distillation on parallel prompts.

The way of PEA-Diffusion (arXiv 2311.17086). Its pictures are the teacher's own samples here: only prompts are needed.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data.prompts import parallel_prompts
from ..data.trajectory_store import Store, refuse_mismatch, store_of
from ..equations.adaptation import effect_lost, feature_error
from ..equations.schedule import add_noise
from ..models import pictures, teachers, text_adapter
from ..models.base import Base
from ..models.conditioning import CONTEXT, Conditioning, concatenated, on_device
from ..models.text_adapter import TextAdapter, sizes_of, stacked_states
from ..models.text_encoder import TextEncoder
from ..recipe import AdaptText, Recipe
from ..recipe.languages import guess_language
from ..recipe.takes import TextNetwork
from ..storage import finite
from ..storage.hashing import sha256
from ..training.loop import Runtime, adamw, rate_factor, set_rate
from ..training.seeding import epoch_order, generator

MOST_MEASURED = 1024  # prompts whose encodings the outputs' means and deviations are of


def run(stage: AdaptText, recipe: Recipe, parents: dict[str, Path], folder: Path) -> None:
    """Train a text adapter into `folder/text_adapter`, with a copy of its encoder; the teacher stays as it is.

    Interrupted at any step and run again, it ends with the same bits.
    """
    rt = Runtime(recipe, stage, folder)
    base = teachers.load(recipe.teacher, rt.device)
    store = open_store(stage, recipe, base, parents["trajectories"])
    texts = texts_of(stage)
    data = Data(base, store, encode(stage, recipe, base, texts[: store.provenance.total]), texts)
    adapter = new_adapter(stage, data, recipe.seed)
    if stage.gradient_checkpointing:
        base.checkpoint_blocks(base.denoiser)
    optimizer = adamw(adapter.parameters(), stage)
    trained = rt.prepare(adapter, optimizer)

    for step in rt.steps(rt.resume({"adapter": trained}), stage.num_steps, "adapt_text"):
        # samples, times and noise of the step
        rate = stage.learning_rate * rate_factor(step, stage.num_steps, stage.warmup_steps)
        set_rate(optimizer, rate)
        index = epoch_order(store.num_trajectories, stage.batch_size, step, recipe.seed, "adapt_text")
        rt.samples = index.tolist()
        batch = data.noised(index, rt.generator("noise", step))

        # one update
        parts = (batch.rows(part) for part in rt.micro_batches())
        with rt.autocast():
            record = rt.backward(loss(stage, terms(stage, base, adapter, data, part)) for part in parts)

        # the log, samples and checkpoints
        if rt.is_logged(step):
            rt.log(step, learning_rate=rate, **record)
        if store.num_held_out and rt.due(step, stage.held_out_every, stage.num_steps):
            with rt.autocast():
                rt.log(step, **held_out(stage, base, adapter, data, recipe.seed))
        if recipe.samples.prompts and rt.due(step, stage.sample_every, stage.num_steps):
            save_samples(rt, recipe, base, adapter, data, step)
        if rt.stopping or rt.due(step, stage.save_every):
            rt.save(step + 1)
    description = text_adapter.describe(
        adapter.sizes, stage.languages, base.num_tokens, base.family, teachers.teacher_hash(recipe.teacher)
    )
    rt.write(text_adapter.save, description, Path(stage.encoder), folder / "text_adapter")


def open_store(stage: AdaptText, recipe: Recipe, base: Base, folder: Path) -> Store:
    """Return the store of the trajectories in `folder`. Raise CheckpointError for one of other prompts or weights."""
    store = store_of(folder, recipe.teacher, base)
    refuse_mismatch(folder / "store.json", vars(store.provenance), {"prompts_hash": sha256(Path(stage.prompts))})
    return store


def texts_of(stage: AdaptText) -> list[str]:
    """Return the prompts of the stage's file in the new language."""
    return [prompt.parallel or "" for prompt in parallel_prompts(stage.prompts, stage.languages)]


def encode(stage: AdaptText, recipe: Recipe, base: Base, texts: list[str]) -> dict[str, Tensor]:
    """Return the new encoder's states (L', H) of each prompt that it reads, on the CPU; no encoder stays in memory.

    The prompts are `texts`, those of the store's trajectories, and those of the sample grid in the new languages.
    """
    prompts = recipe.samples.prompts
    new = [prompt for prompt in prompts if guess_language(prompt) in stage.languages]
    base.encode_ahead(prompt for prompt in prompts if prompt not in new)
    encoder = TextEncoder(Path(stage.encoder), base.num_tokens, base.device)
    states = {}
    for text in dict.fromkeys([*new, *texts]):
        states[text] = encoder.encode(text).cpu()
        finite.refuse_encoded({CONTEXT: states[text][None]}, [text], torch.float32)
    return states


def new_adapter(stage: AdaptText, data: "Data", seed: int) -> TextAdapter:
    """Return the adapter to train, in float32: drawn from `seed`, its output the mean of the teacher's encodings."""
    index = torch.arange(min(data.store.prompts.count, data.store.num_trajectories, MOST_MEASURED))
    measured = data.store.conditioning(index)
    shapes = {name: value.shape[1:] for name, value in measured.items()}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        adapter = TextAdapter(sizes_of(TextNetwork(stage.encoder, stage.width, stage.num_layers), shapes))
    adapter.measure([data.states[data.texts[i]] for i in index.tolist()], measured)
    return adapter.to(data.base.device).train()


@dataclass(frozen=True)
class Batch:
    """Noised samples x_t (B, C, H, W) of the teacher's at times t (B,), of trajectories `index` (B,)."""

    index: Tensor
    x_t: Tensor
    t: Tensor

    def rows(self, part: slice) -> "Batch":
        """Return a part of the batch."""
        return Batch(self.index[part], self.x_t[part], self.t[part])


@dataclass(frozen=True)
class Data:
    """The teacher's samples and encodings in `store`, and of the same prompts in the new language the `states`."""

    base: Base
    store: Store
    states: dict[str, Tensor]
    texts: list[str]  # the prompt of trajectory i is number i modulo their number

    def noised(self, index: Tensor, draws: torch.Generator) -> Batch:
        """Return the samples of trajectories `index` (B,) with noise, at times that are drawn evenly."""
        x0, schedule = self.store.x0(index), self.base.schedule
        t = torch.randint(schedule.num_times, (len(index),), generator=draws)
        eps = torch.randn(x0.shape, generator=draws)
        x0, eps, times = (value.to(self.base.device) for value in (x0, eps, t))
        return Batch(index, add_noise(x0, eps, times, schedule), times)

    def own(self, index: Tensor) -> Conditioning:
        """Return what the teacher's own text encoders made of the prompts of trajectories `index` (B,)."""
        return on_device(self.store.conditioning(index), self.base.device)

    def states_of(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the new encoder's states (B, L', H) and their lengths (B,) for trajectories `index` (B,)."""
        texts = [self.texts[i % len(self.texts)] for i in index.tolist()]
        return stacked_states([self.states[text] for text in texts], self.base.device)


def terms(stage: AdaptText, base: Base, adapter: TextAdapter, data: Data, batch: Batch) -> dict[str, Tensor]:
    """Return the terms of the loss of `batch`, (B,) float32 each, without their weights."""
    own, made = data.own(batch.index), adapter(*data.states_of(batch.index))
    errors = []
    for name, value in made.items():
        deviation = adapter.get_buffer(f"{name}_deviation")
        pair = (value, own[name]) if name == CONTEXT else (value[:, None], own[name][:, None])
        errors.append(feature_error(*pair, deviation.reshape(-1)))
    features = {"features": torch.stack(errors).mean(0)}
    if not stage.outputs:
        return features
    with torch.no_grad():  # what the denoiser says with the prompt in the teacher's own language, and without it
        target = base.predict(base.denoiser, batch.x_t, batch.t, own)
        unprompted = base.predict(base.denoiser, batch.x_t, batch.t, base.unconditional(len(batch.t)))
    prediction = base.predict(base.denoiser, batch.x_t, batch.t, made)
    return features | {"outputs": effect_lost(prediction, target, unprompted)}


def loss(stage: AdaptText, terms: dict[str, Tensor]) -> Tensor:
    """Return the weighted sum (B,) of `terms`."""
    weights = {"features": stage.features, "outputs": stage.outputs}
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum(0)


@torch.no_grad()
def held_out(stage: AdaptText, base: Base, adapter: TextAdapter, data: Data, seed: int) -> dict[str, float]:
    """Return loss and terms over the held-out trajectories, at the same times and noise throughout."""
    index = torch.tensor(data.store.held_out)
    batch, size = data.noised(index, generator(seed, "adapt_text", "held out")), stage.micro_batch
    parts = [terms(stage, base, adapter, data, batch.rows(slice(i, i + size))) for i in range(0, len(index), size)]
    means = {name: torch.cat([part[name] for part in parts]).mean() for name in parts[0]}
    named = {f"held_out_{name}": mean.item() for name, mean in means.items()}
    return {"held_out_loss": loss(stage, means).item(), **named}


@torch.no_grad()
def save_samples(rt: Runtime, recipe: Recipe, base: Base, adapter: TextAdapter, data: Data, step: int) -> None:
    """Write the grid of the recipe's fixed prompts and seeds, drawn by the teacher."""

    def encoded(prompt: str) -> Conditioning:
        if prompt in data.states:
            return adapter(*stacked_states([data.states[prompt]], base.device))
        return base.encode_prompts([prompt])

    conditioning = concatenated([encoded(prompt) for prompt in recipe.samples.prompts])
    images = pictures.of_teacher(base, conditioning, recipe.seed)
    pictures.save_samples(rt, pictures.grid(images, pictures.TEACHER_COLUMNS), step)
