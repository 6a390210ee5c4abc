"""The bytes that stages write, by hand, from a denoiser of 1,000 weights of which 100 are trained."""

import pytest

import runs
from mlcm_rl.recipe import Evaluate, Start, TrainControl, TrainPerceptual, TrainTeacher
from mlcm_rl.recipe.takes import Values

VALUES = Values(denoiser=1000, trained=100, fake=10, latent=5, prompt=7, pixels=3)
SAVED = 4 + 8  # of a trained weight: it and its two moments, in float32
FAKE = {"matching": {"fake": {"rank": 2, "alpha": 2.0}}}
CASES = {
    "a student, its snapshots of two phases, and two checkpoints": (
        runs.distill(num_segments=[8, 1], keep_checkpoints=2),
        100 * 4 * 3 + 2 * (100 + 10) * SAVED,
    ),
    "a copy of the student, the adapter, and three checkpoints with the guard's best": (
        runs.tuning("feedback", "p", keep_checkpoints=3),
        1000 * 4 + 100 * 4 + 3 * (100 * (4 + SAVED) + 10 * SAVED),
    ),
    "a teacher in half precision, and a checkpoint with the average": (
        TrainTeacher(images="p", num_steps=1, batch_size=1, keep_checkpoints=1),
        1000 * 2 + 1000 * (SAVED + 4),
    ),
    "a ControlNet in half precision, and a checkpoint": (
        TrainControl(num_steps=1, batch_size=1, keep_checkpoints=1),
        1000 * 2 + 1000 * SAVED,
    ),
    "a network of 3 x 3 convolutions, the first of no channels yet, and a checkpoint": (
        TrainPerceptual(num_steps=1, widths=[4, 6], depths=[2, 1], keep_checkpoints=1),
        9 * (4 * (0 + 4) + 6 * 4) * (4 + SAVED),
    ),
    "a student that is there already, whole": (Start(path="p"), 1000 * 4),
    "prompts, the reference's latents twice, and the pictures of the page twice": (
        Evaluate(prompts="p", num_prompts=10, sampling_steps=[2], teacher_steps=[50], teacher_solvers=["ddim"]),
        4 * (10 * 7 + 2 * 10 * 5) + 3 * 3 * (2 * 5 * 8),  # 5 rows, at most 8 pictures of each
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_bytes_of_a_stage_by_hand(tiny_sdxl, tmp_path, case):
    stage, expected = CASES[case]
    before = [] if isinstance(stage, TrainTeacher | Start) else [runs.trajectories("p"), runs.distill()]
    recipe = runs.recipe(tiny_sdxl, tmp_path, [*before, stage])
    assert stage.disk(recipe, VALUES) == expected


@pytest.mark.parametrize(("keep", "num_states"), [("all", 17), ("milestones", 9)])
def test_a_store_has_its_states_the_last_x0_and_the_prompts(tiny_sdxl, tmp_path, keep, num_states):
    """Of 8 + 2 trajectories in 16 steps, in half precision; the prompts in the teacher's float32."""
    stage = runs.trajectories("p", num_trajectories=8, num_held_out=2, solver_steps=16, keep=keep, dtype="float16")
    recipe = runs.recipe(tiny_sdxl, tmp_path, [stage])
    assert stage.disk(recipe, VALUES) == 10 * ((num_states + 1) * 5 * 2 + 7 * 4)
