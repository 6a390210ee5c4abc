"""DiffusionNFT's loss by hand, its loop on a tiny student, and that it has the study's stage at equal calls."""

import nft
import pytest
import torch

import runs
from mlcm_rl import pipeline
from mlcm_rl.recipe import Lora, Policy
from mlcm_rl.recipe.file import load


def test_nfts_loss_pulls_to_good_samples_and_away_from_bad_ones_by_hand():
    """On policy both implicit policies are the old one; their gradients are opposite, so that the shares decide."""
    old, sample = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]])
    x0 = old.clone().requires_grad_()
    positive, negative = nft.implicit_errors(x0, old, sample, strength=0.5)
    assert positive.tolist() == negative.tolist() == [pytest.approx(2.5 / 1.5)]
    (up,) = torch.autograd.grad(positive.sum(), x0, retain_graph=True)
    (down,) = torch.autograd.grad(negative.sum(), x0)
    torch.testing.assert_close(up, 0.5 * (old - sample) / 1.5)
    torch.testing.assert_close(down, -up)
    shares = nft.optimality(torch.tensor([[1.0, 2.0, 6.0]]), clip=2.0)
    assert shares.tolist() == [[0.0, 0.25, 1.0]]


def test_it_takes_the_row_of_the_study_that_it_is_compared_with():
    stage = nft.stage_of(load(nft.RECIPES / "scenes_demo.yaml", []), "scenes", "without_gradient", "policy", 1)
    assert isinstance(stage, Policy)
    assert (stage.seed, stage.batch_size * stage.num_steps) == (1, 8000)


def test_its_loop_tunes_a_student_and_keeps_what_a_stage_keeps(tiny_sdxl, tmp_path):
    adapter = Lora(rank=2, alpha=2.0)
    stages = [runs.trajectories(runs.write_prompts(tmp_path)), runs.distill(num_segments=[2], adapter=adapter)]
    recipe = runs.recipe(tiny_sdxl, tmp_path, stages)
    student = pipeline.run(recipe)[-1].folder / "student"
    stage = runs.tuning("policy", recipe.stages[0].prompts)
    folder = tmp_path / "nft"
    folder.mkdir()
    nft.run(stage, recipe, student, folder, strength=1.0)
    assert {"student", "guard.json", "log.jsonl"} <= {path.name for path in folder.iterdir()}
    looks = nft.history(folder)
    assert [look["step"] for look in looks] == [1, 2]
    assert all(look["guard/distance"] > 0 for look in looks)
