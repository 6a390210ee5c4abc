"""The denoiser's training: a stopped one goes on with the same bits, and no step draws a held-out scene."""

import random

import pytest
import torch

from scene_latents import scenes_of_part
from scenes import read_concepts
from train_denoiser import Batches, Checkpoint, build_denoiser, build_optimizers
from wordings import Writer


def update(denoiser, optimizers, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in denoiser.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    for optimizer in optimizers:
        optimizer.step()


@pytest.mark.slow
def test_a_training_that_is_loaded_goes_on_with_the_same_bits(tmp_path):
    denoiser, checkpoint = build_denoiser(), Checkpoint(tmp_path / "state")
    optimizers = build_optimizers(denoiser, 1e-3)
    average = {name: p.detach().clone() * 0.5 for name, p in denoiser.named_parameters()}
    assert checkpoint.load(denoiser, average, optimizers) == 0
    for step in range(2):
        update(denoiser, optimizers, step)
    checkpoint.save(denoiser, average, optimizers, 2)
    update(denoiser, optimizers, 2)

    again = build_denoiser(seed=1)
    fresh, other = build_optimizers(again, 1e-3), {name: torch.zeros_like(p) for name, p in average.items()}
    assert checkpoint.load(again, other, fresh) == 2
    update(again, fresh, 2)
    assert all(torch.equal(other[name], value) for name, value in average.items())
    for (name, ours), theirs in zip(again.named_parameters(), denoiser.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_batch_has_the_latents_of_its_scenes_and_some_empty_prompts():
    concepts = read_concepts()
    scenes = scenes_of_part(0, [concept.codepoint for concept in concepts])
    latents = torch.arange(len(scenes)).half().reshape(-1, 1, 1, 1)
    batches = Batches(scenes, latents, Writer(concepts))
    found, prompts = batches.draw(400, (0.0, 1.0, 0.0, 0.0), random.Random(0))
    relations = {scenes[int(value)].relation for value in found.flatten().tolist()}
    assert relations == {"count"}
    assert 0.05 < prompts.count("") / len(prompts) < 0.15
