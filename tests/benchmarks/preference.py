"""Seconds and memory of a step of preference learning, variant against variant in one run.

    python tests/benchmarks/preference.py [--steps 3] [--batch-size 8]        (or: make benchmark)

Every variant runs in a process of its own, one after another, so that peak memory is its own; feedback against K, the
steps with gradient, with and without gradient checkpointing, then online pairs and policy gradient, all of four steps
on the embedded teacher. A step is its rollout, decoding, reward, backward pass and optimiser. Ratios are to K = 1.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from distillation import PROMPTS, TEACHER, now, peak_mb
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlcm_rl.models import students, teachers
from mlcm_rl.preference import tuning
from mlcm_rl.preference.constraints import Constraints
from mlcm_rl.recipe import Dpo, Feedback, Lora, Policy
from mlcm_rl.rewards import combine
from mlcm_rl.stages import dpo, feedback, policy

FIRST = "feedback, K = 1"
VARIANTS = {
    FIRST: {"kind": Feedback, "num_grad_steps": 1},
    "feedback, K = 2": {"kind": Feedback, "num_grad_steps": 2},
    "feedback, K = 4": {"kind": Feedback, "num_grad_steps": 4},
    "... K = 1, checkpointing": {"kind": Feedback, "num_grad_steps": 1, "gradient_checkpointing": True},
    "... K = 2, checkpointing": {"kind": Feedback, "num_grad_steps": 2, "gradient_checkpointing": True},
    "... K = 4, checkpointing": {"kind": Feedback, "num_grad_steps": 4, "gradient_checkpointing": True},
    "dpo online, 4 samples a pair": {"kind": Dpo},
    "policy, groups of 4": {"kind": Policy, "gamma": 1.0},
}
SETTINGS = {
    "prompts": PROMPTS,
    "num_steps": 1,
    "rewards": [{"name": "emoji_style"}],
    "guard": {"rewards": [{"name": "emoji_alignment"}]},
}


def measure(name: str, num_steps: int, batch_size: int) -> dict[str, float]:
    """Median seconds of a step after one to warm up, and peak memory in MB, of one variant."""
    settings = {key: value for key, value in VARIANTS[name].items() if key != "kind"}
    stage = VARIANTS[name]["kind"](batch_size=batch_size, **(SETTINGS | settings))
    base = teachers.load(TEACHER, "cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as place:
        description = {"num_segments": 4, "family": base.family, "prediction_type": base.prediction_type}
        students.save_student(students.student(base, Lora(), seed=0), Path(place) / "student", description)
        student = tuning.load(stage, base, Path(place) / "student", seed=0)
    rewards = combine(stage.rewards, base.device)
    parameters = list(student.parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    prompts, seconds = tuning.Prompts(stage, base, 0), []
    for step in range(num_steps + 1):
        started = now()
        loss(stage, student, rewards, prompts, step).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(now() - started)
    return {"seconds": statistics.median(seconds[1:]), "peak_mb": peak_mb()}


def loss(stage, student: tuning.TunableStudent, rewards, prompts: tuning.Prompts, step: int) -> torch.Tensor:
    """The loss of one step (B,), as its stage takes it."""
    scores, constraints = tuning.Scores(), Constraints(stage, student, {})
    if isinstance(stage, Feedback):
        (start,) = prompts.starts(student.base, step, stage.batch_size, stage.batch_size)
        return feedback.loss(stage, student, rewards, constraints, None, start, None, len(student.times) - 1, scores)
    if isinstance(stage, Dpo):
        (pairs,) = dpo.OwnPairs(stage, student, rewards, 0).batches(step, constraints, scores)
        return dpo.loss(stage, student, pairs, scores)
    copies = stage.num_generations
    (start,) = prompts.starts(student.base, step, stage.batch_size // copies, stage.batch_size, copies)
    return policy.loss(
        stage, student, policy.sample_rollout(stage, student, rewards, constraints, start, scores), scores
    )


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
    table = Table("", title=title, box=SIMPLE_HEAD)
    for head in ("s a step", "ratio", "a second", "peak MB"):
        table.add_column(head, justify="right", no_wrap=True)
    reference = None
    for name in track(VARIANTS, "variants", console=Console(stderr=True)):
        sizes = ("--steps", str(arguments.steps), "--batch-size", str(arguments.batch_size))
        command = [sys.executable, __file__, "--only", name, *sizes]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(output.stdout.splitlines()[-1])
        reference = reference or found["seconds"]
        rate = arguments.batch_size / found["seconds"]
        figures = (f"{found['seconds']:.2f}", f"{found['seconds'] / reference:.2f}", f"{rate:.1f}")
        table.add_row(name, *figures, f"{found['peak_mb']:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
