"""Stage `policy`: policy gradient on the stochastic few-step sampler, for any reward (RLCM, GRPO)."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..equations import policy
from ..models import students, teachers
from ..preference import tuning
from ..preference.constraints import Constraints
from ..preference.guard import HackingGuard
from ..recipe import Policy, Recipe
from ..rewards import Combined, combine
from ..training.loop import Runtime, adamw, rate_factor, set_rate
from ..training.processes import on_rank_zero


def run(stage: Policy, recipe: Recipe, parents: dict[str, Path], folder: Path) -> None:
    """Tune a finished student into `folder`: `student/`, `guard.json`, `log.jsonl`, `samples/`.

    Interrupted at any step and run again, it ends with the same bits. `student/` is what the guard kept.
    Raises NonFiniteLoss before an update that is not finite.
    """
    rt = Runtime(recipe, stage, folder)
    base = teachers.load(recipe.teacher, rt.device)
    start = tuning.start_folder(stage, parents, folder)
    student = tuning.load(stage, base, start, recipe.seed)
    rewards = combine(stage.rewards, rt.device, stage.normalise)
    prompts, copies = tuning.Prompts(stage, base, recipe.seed), stage.num_generations
    rewards.refuse_unread(prompts.languages)
    tuning.encode_ahead(stage, recipe, base, lambda step: prompts.texts(step, stage.batch_size // copies))
    optimizer = adamw(students.trainable_parameters(student.denoiser), stage)
    trained = rt.prepare(student.denoiser, optimizer)
    guard = HackingGuard(rt, stage, student, trained, rewards)
    rewards.take_in(guard.reference_scores)  # their scale in the first step
    constraints = Constraints(stage, student, guard.reference_scores)

    # everything that a checkpoint holds beside the optimiser
    weights = {"student": trained, "best": guard.best}
    first = rt.resume(weights, rewards=rewards, guard=guard, **constraints.parts)
    for step in rt.steps(first, stage.num_steps, "policy", lambda: guard.stopped):
        # one update
        rate = stage.learning_rate * rate_factor(step, stage.num_steps, stage.warmup_steps)
        set_rate(optimizer, rate)
        scores = tuning.Scores()
        rt.samples = prompts.texts(step, stage.batch_size // copies)
        with rt.autocast():
            starts = prompts.starts(base, step, stage.batch_size // copies, stage.micro_batch, copies)
            rollouts = [sample_rollout(stage, student, rewards, constraints, one, scores) for one in starts]
            # the first update is on policy; later ones reuse its samples, and PPO's clip bounds them
            for _ in range(stage.num_iterations):
                losses = (loss(stage, student, one, scores) for one in rollouts)
                logged = rt.backward(losses)
        logged |= scores.means()
        rewards.take_in(scores.rewards())
        logged |= constraints.take_in(scores)

        # the guard, the log, samples and checkpoints
        is_watched = rt.due(step, stage.guard.every, stage.num_steps)
        if is_watched:
            logged |= guard.look(step + 1)
        if is_watched or rt.is_logged(step):
            rt.log(step, learning_rate=rate, **logged)
        if is_watched:
            rt.log_picture(step, "guard", guard.curves, folder)
        if recipe.samples.prompts and rt.due(step, stage.sample_every, stage.num_steps):
            student.save_samples(recipe, rt, step)
        if rt.stopping or rt.due(step, stage.save_every):
            rt.save(step + 1)
    # the student that the guard kept, not the last one
    with rt.swapped(guard.best):
        rt.write(students.save_tuned, start, folder / "student", guard.verdict.kept_step)
    on_rank_zero(guard.finish, folder)


@dataclass(frozen=True)
class Rollout:
    """B samples of the sampler with their advantages.

    The sampler's last step adds no noise: it has no density, and is not an action of the policy.
    """

    start: tuning.Start
    states: Tensor  # (N, B, C, H, W)
    log_probs: Tensor  # (N - 1, B) of the steps, under the policy that sampled them
    reference_means: Tensor  # (N - 1, B, C, H, W) of the same steps under the reference
    advantages: Tensor  # (B,)


@torch.no_grad()
def sample_rollout(
    stage: Policy,
    student: tuning.TunableStudent,
    rewards: Combined,
    constraints: Constraints,
    start: tuning.Start,
    scores: tuning.Scores,
) -> Rollout:
    """Return samples of the current policy, their advantages within each prompt's group, and the reference's means."""
    if constraints.limits:
        with constraints.reference_drawing(start):
            _, x0 = student.rollout(start.conditioning, start.noise, start.generators)
            constraints.add_reference(x0, rewards, start, scores)
    states, x0 = student.rollout(start.conditioning, start.noise, start.generators)
    total, raw = rewards(student.base.autoencoder.decode(x0), start.prompts, start.languages)
    scores.add_rewards(raw)
    groups = (total - constraints.penalty(raw)).unflatten(0, (-1, stage.num_generations))
    advantages = policy.group_advantages(groups, scale=stage.scale_rewards == "group").flatten()
    steps = range(len(student.times) - 1)
    references = [step_mean(student, start, states, step, reference=True)[0] for step in steps]
    log_probs = [policy.gaussian_log_prob(states[step + 1], *step_mean(student, start, states, step)) for step in steps]
    return Rollout(start, states, torch.stack(log_probs), torch.stack(references), advantages)


def loss(stage: Policy, student: tuning.TunableStudent, rollout: Rollout, scores: tuning.Scores) -> Tensor:
    """Return the mean over steps (B,) float32 of PPO's clipped loss with GRPO's advantages and the exact KL."""
    values = []
    for step in range(len(student.times) - 1):
        mean, std = step_mean(student, rollout.start, rollout.states, step)
        log_prob = policy.gaussian_log_prob(rollout.states[step + 1], mean, std)
        old = rollout.log_probs[step]
        kl = policy.gaussian_kl(mean, rollout.reference_means[step], std) / mean[0].numel()
        clipped = ((log_prob - old).exp() - 1.0).abs() > stage.clip_range
        scores.add({"kl": kl, "clipped": clipped.float()})
        # log-probabilities are per element, and so are ratio and clip range
        surrogate = policy.clipped_surrogate(log_prob, old, rollout.advantages, stage.clip_range)
        values.append(surrogate + stage.beta * kl)
    return torch.stack(values).mean(0)


def step_mean(
    student: tuning.TunableStudent, start: tuning.Start, states: Tensor, step: int, reference: bool = False
) -> tuple[Tensor, Tensor]:
    """Return mean (B, C, H, W) and std of the Gaussian that the sampler's step number `step` draws from."""
    t, s = student.jump(step, len(start.noise))
    network = student.reference_x0 if reference else student.x0
    x0 = network(states[step], t, s, start.conditioning)
    return policy.step_gaussian(states[step], x0, t, s, student.gamma, student.base.schedule)
