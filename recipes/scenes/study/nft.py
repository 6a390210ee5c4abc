"""DiffusionNFT's loss on a few-step student, beside what this project tunes with: does it collapse?

    python recipes/scenes/study/nft.py [--seeds 2] [--num-steps 125] [KEY=VALUE ...]

A row of the study of tuning and no stage: the loss of arXiv 2509.16117 on the demo's distilled student, with the
rewards, guard, batch and adapter of the row `policy` of `recipes/study/tuning.py scenes without_gradient`, hence at
equal calls of the reward. It is a forward-process loss: finished samples are noised to a time of the student's own
sampler, and the network is pulled to samples that score above their prompt's mean, and away from those below, by two
implicit policies around the one that sampled. Users report that it blurs few-step models and then collapses them; the
looks of its guard say whether.

It writes what a stage writes (student/, guard.json, log.jsonl) to runs/study/nft-STRENGTH-RATE-SEED, prints its looks,
and goes on from its newest checkpoint when it is run again.
"""

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from mlcm_rl import pipeline
from mlcm_rl.equations.schedule import add_noise
from mlcm_rl.models import students, teachers
from mlcm_rl.preference import tuning
from mlcm_rl.preference.guard import HackingGuard
from mlcm_rl.recipe import Policy, Recipe
from mlcm_rl.recipe.file import load
from mlcm_rl.report.guard_history import history
from mlcm_rl.rewards import Combined, combine
from mlcm_rl.training.loop import Runtime, adamw, rate_factor, set_rate
from mlcm_rl.training.processes import on_rank_zero

sys.path.append(str(Path(__file__).parents[2] / "study"))  # what all studies share

from tuning import RECIPES, stage_of, with_stages

STRENGTH = 1.0  # the paper's beta: how far the implicit policies are from the one that sampled
CLIP = 1.0  # of a reward above its prompt's mean, in running deviations
OLD_DECAY = 0.5  # of the policy that samples, an average of the trained one


def implicit_errors(x0: Tensor, old_x0: Tensor, sample: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Return errors (B,) to `sample` of the implicit positive policy and of the negative one, b = `strength`:

        (1 - b) old + b x0      and      (1 + b) old - b x0

    in x0 in place of the paper's velocity: the two differ by a factor of the time alone. Each squared error is divided
    by its own mean absolute error, as by the paper's adaptive weight.
    """
    positive = (1 - strength) * old_x0 + strength * x0
    negative = (1 + strength) * old_x0 - strength * x0
    return weighted(positive, sample), weighted(negative, sample)


def weighted(x0: Tensor, sample: Tensor) -> Tensor:
    """The squared error (B,) over the mean absolute error, which carries no gradient."""
    error = (x0 - sample).flatten(1)
    return (error.square().mean(1)) / error.detach().abs().mean(1).clamp(min=1e-5)


def optimality(groups: Tensor, clip: float) -> Tensor:
    """Return 1/2 + 1/2 clip(r - mean) (P, n): each sample's share in the positive policy, of n of each of P prompts.

    Rewards are in running deviations already, which the paper divides by here.
    """
    centred = groups - groups.mean(1, keepdim=True)
    return 0.5 + 0.5 * (centred / clip).clamp(-1.0, 1.0)


def run(stage: Policy, recipe: Recipe, start: Path, folder: Path, strength: float) -> None:
    """Tune the student in `start` into `folder` by DiffusionNFT's loss. The loop is that of `stages/policy.py`."""
    rt = Runtime(recipe, stage, folder)
    base = teachers.load(recipe.teacher, rt.device)
    student = tuning.load(stage, base, start, recipe.seed)
    rewards = combine(stage.rewards, rt.device, stage.normalise)
    prompts, copies = tuning.Prompts(stage, base, recipe.seed), stage.num_generations
    rewards.refuse_unread(prompts.languages)
    tuning.encode_ahead(stage, recipe, base, lambda step: prompts.texts(step, stage.batch_size // copies))
    parameters = students.trainable_parameters(student.denoiser)
    optimizer = adamw(parameters, stage)
    trained = rt.prepare(student.denoiser, optimizer)
    old = {name: value.detach().clone() for name, value in trained.items()}  # the policy that samples
    guard = HackingGuard(rt, stage, student, trained, rewards)
    rewards.take_in(guard.reference_scores)
    first = rt.resume({"student": trained, "best": guard.best, "old": old}, rewards=rewards, guard=guard)
    for step in rt.steps(first, stage.num_steps, "nft", lambda: guard.stopped):
        rate = stage.learning_rate * rate_factor(step, stage.num_steps, stage.warmup_steps)
        set_rate(optimizer, rate)
        scores = tuning.Scores()
        rt.samples = prompts.texts(step, stage.batch_size // copies)
        starts = prompts.starts(base, step, stage.batch_size // copies, stage.micro_batch, copies)
        with rt.autocast():
            losses = (loss(stage, rt, student, rewards, old, one, scores, strength) for one in starts)
            logged = rt.backward(losses) | scores.means()
        rewards.take_in(scores.rewards())
        for name, value in old.items():
            value.lerp_(trained[name].detach(), 1.0 - OLD_DECAY)
        if rt.due(step, stage.guard.every, stage.num_steps):
            logged |= guard.look(step + 1)
        if rt.is_logged(step) or rt.due(step, stage.guard.every, stage.num_steps):
            rt.log(step, learning_rate=rate, **logged)
        if rt.stopping or rt.due(step, stage.save_every):
            rt.save(step + 1)
    with rt.swapped(guard.best):
        rt.write(students.save_tuned, start, folder / "student", guard.verdict.kept_step)
    on_rank_zero(guard.finish, folder)


def loss(
    stage: Policy,
    rt: Runtime,
    student: tuning.TunableStudent,
    rewards: Combined,
    old: dict[str, Tensor],
    start: tuning.Start,
    scores: tuning.Scores,
    strength: float,
) -> Tensor:
    """Return the loss (B,): of samples of the old policy, noised to a time of its sampler, by their rewards' shares."""
    base = student.base
    steps = tuning.draw_steps(len(student.times), start.generators)
    t, _ = student.jumps(steps)
    s = torch.zeros_like(t)
    with torch.no_grad(), rt.swapped(old):
        sample = student.sample(start)
        x_t = add_noise(sample, base.noise(start.generators, len(sample)), t, base.schedule)
        old_x0 = student.x0(x_t, t, s, start.conditioning)
        total, raw = rewards(base.autoencoder.decode(sample), start.prompts, start.languages)
    scores.add_rewards(raw)
    share = optimality(total.unflatten(0, (-1, stage.num_generations)), CLIP).flatten()
    positive, negative = implicit_errors(student.x0(x_t, t, s, start.conditioning), old_x0, sample, strength)
    return share * positive + (1.0 - share) * negative


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--num-steps", type=int, default=125)
    parser.add_argument("--strength", type=float, default=STRENGTH, help="the paper's beta")
    parser.add_argument("--learning-rate", type=float, help="peak; default: that of the row `policy`")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="put over the recipe's settings")
    arguments = parser.parse_args()
    base = load(RECIPES / "scenes_demo.yaml", arguments.overrides)
    start = pipeline.run(with_stages(base, "nft-student", []))[-1].folder / "student"
    for seed in range(arguments.seeds):
        policy = stage_of(base, "scenes", "without_gradient", "policy", seed)
        assert isinstance(policy, Policy)
        rate = arguments.learning_rate or policy.learning_rate
        stage = policy.model_copy(update={"num_steps": arguments.num_steps, "learning_rate": rate})
        folder = Path(base.runs) / "study" / f"nft-{arguments.strength:g}-{rate:g}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        run(stage, base.model_copy(update={"seed": seed}), start, folder, arguments.strength)
        for look in history(folder):
            gains = f"gain {look['guard/trained_gain']:+.3f}, held out {look['guard/held_out_gain']:+.3f}"
            Console().print(f"nft-{seed}, step {look['step']}: {gains}, distance {look['guard/distance']:.4f}")


if __name__ == "__main__":
    main()
