"""Seconds and memory of a step of preference learning, variant against variant in one run.

    python tests/benchmarks/preference.py [--steps 3] [--batch-size 8]        (or: make benchmark)

Every variant runs in a process of its own, one after another, so that peak memory is its own; feedback against K, the
steps with gradient, with and without gradient checkpointing, then online pairs and policy gradient, all of four steps
on the embedded teacher. A step is its rollout, decoding, reward, backward pass and optimiser. Ratios are to K = 1.
"""

import argparse
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
from measuring import in_own_process, now, peak_mb, table_of_figures
from rich.console import Console
from rich.progress import track
from torch import Tensor
from training_step import DEVICE, PROMPTS, TEACHER, TrainingStep, recipe_of

from mlcm_rl.models import students, teachers
from mlcm_rl.preference import tuning
from mlcm_rl.preference.constraints import Constraints
from mlcm_rl.recipe import Dpo, Feedback, Lora, Policy
from mlcm_rl.rewards import Combined, combine
from mlcm_rl.stages import dpo, feedback, policy

Tuned = Feedback | Dpo | Policy
VARIANTS: dict[str, tuple[type[Tuned], dict[str, object]]] = {
    "feedback, K = 1": (Feedback, {"num_grad_steps": 1}),
    "feedback, K = 2": (Feedback, {"num_grad_steps": 2}),
    "feedback, K = 4": (Feedback, {"num_grad_steps": 4}),
    "... K = 1, checkpointing": (Feedback, {"num_grad_steps": 1, "gradient_checkpointing": True}),
    "... K = 2, checkpointing": (Feedback, {"num_grad_steps": 2, "gradient_checkpointing": True}),
    "... K = 4, checkpointing": (Feedback, {"num_grad_steps": 4, "gradient_checkpointing": True}),
    "dpo online, 4 samples a pair": (Dpo, {"num_generations": 4}),
    "policy, groups of 4": (Policy, {"num_generations": 4, "gamma": 1.0}),
}
SETTINGS: dict[str, object] = {
    "prompts": PROMPTS,
    "num_steps": 1,
    "rewards": [{"name": "emoji_style"}],
    "guard": {"rewards": [{"name": "emoji_alignment"}]},
}


def measure(name: str, num_steps: int, batch_size: int) -> dict[str, float]:
    """Return median seconds of a step after one to warm up, and peak memory in MB, of one variant."""
    kind, settings = VARIANTS[name]
    stage = kind.model_validate(SETTINGS | settings | {"batch_size": batch_size})
    recipe = recipe_of(stage)
    base = teachers.load(TEACHER, DEVICE)
    with tempfile.TemporaryDirectory() as place:
        start = Path(place) / "student"
        description = {"num_segments": 4, **students.expected_of(base)}
        students.save_student(students.student(base, Lora(), recipe.seed), start, description)
        student = tuning.load(stage, base, start, recipe.seed)
        training = TrainingStep(recipe, stage, student.denoiser, Path(place))
    rewards = combine(stage.rewards, base.device, stage.normalise)
    prompts, seconds = tuning.Prompts(stage, base, recipe.seed), []
    for step in range(num_steps + 1):
        started, scores = now(), tuning.Scores()
        draws = training.rt.generator("draws", step)
        training.update(partial(loss, stage, student, rewards, prompts, step, draws, scores))
        rewards.take_in(scores.rewards())
        seconds.append(now() - started)
    return {"seconds": statistics.median(seconds[1:]), "peak_mb": peak_mb()}


def loss(
    stage: Tuned,
    student: tuning.TunableStudent,
    rewards: Combined,
    prompts: tuning.Prompts,
    step: int,
    draws: torch.Generator,
    scores: tuning.Scores,
) -> Tensor:
    """Return the loss (B,) of a step, as its stage takes it; the raw scores go into `scores`."""
    constraints = Constraints(stage, student, {})
    if isinstance(stage, Dpo):
        (pairs,) = dpo.OwnPairs(stage, student, rewards, prompts.seed).batches(step, constraints, scores)
        return dpo.loss(stage, student, pairs, scores)
    copies = stage.samples_together
    (start,) = prompts.starts(student.base, step, stage.batch_size // copies, stage.micro_batch, copies)
    if isinstance(stage, Feedback):
        scoring = feedback.Scoring(rewards, constraints, None, scores)
        last = feedback.last_step(stage, len(student.times), draws)
        return feedback.loss(stage, student, scoring, start, None, last)
    rollout = policy.sample_rollout(stage, student, rewards, constraints, start, scores)
    return policy.loss(stage, student, rollout, scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--only", choices=list(VARIANTS), help="measure one variant and print it as JSON")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments.steps, arguments.batch_size)))
        return
    title = f"Preference learning, batch {arguments.batch_size}: samples, pairs for dpo"
    table = table_of_figures(title, "", "s a step", "ratio", "a second", "peak MB")
    sizes = ("--steps", arguments.steps, "--batch-size", arguments.batch_size)
    reference = None
    for name in track(VARIANTS, "variants", console=Console(stderr=True)):
        figures = in_own_process(__file__, "--only", name, *sizes)
        seconds = figures["seconds"]
        reference = reference or seconds
        rate, peak = arguments.batch_size / seconds, figures["peak_mb"]
        table.add_row(name, f"{seconds:.2f}", f"{seconds / reference:.2f}", f"{rate:.1f}", f"{peak:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
