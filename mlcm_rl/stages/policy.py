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
    reference_means: list[Tensor]  # N - 1 of (B, C, H, W), of the same steps under the reference; none without beta
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
    """Return samples of the current policy, their advantages within each prompt's group, and the reference's means.

    What the steps were drawn from gives their log-probabilities: no pass but those of the sampler.
    """
    if constraints.limits:
        with constraints.reference_drawing(start):
            constraints.add_reference(student.sample(start), rewards, start, scores)
    states, x0s = student.rollout(start)
    total, raw = rewards(student.base.autoencoder.decode(x0s[-1]), start.prompts, start.languages)
    scores.add_rewards(raw)
    groups = (total - constraints.penalty(raw)).unflatten(0, (-1, stage.num_generations))
    advantages = policy.group_advantages(groups, scale=stage.scale_rewards == "group").flatten()
    steps = range(len(student.times) - 1)
    log_probs = [policy.gaussian_log_prob(states[i + 1], *step_gaussian(student, states[i], x0s[i], i)) for i in steps]
    references = reference_means(student, start, states) if stage.beta else []
    return Rollout(start, states, torch.stack(log_probs), references, advantages)


def reference_means(student: tuning.TunableStudent, start: tuning.Start, states: Tensor) -> list[Tensor]:
    """Return the means (B, C, H, W) of the steps from `states` (N, B, C, H, W), but the last, under the reference."""
    means = []
    for step, x_t in enumerate(states[:-1]):
        x0 = student.reference_x0(x_t, *student.jump(step, len(x_t)), start.conditioning)
        means.append(step_gaussian(student, x_t, x0, step)[0])
    return means


def loss(stage: Policy, student: tuning.TunableStudent, rollout: Rollout, scores: tuning.Scores) -> Tensor:
    """Return the mean over steps (B,) float32 of PPO's clipped loss with GRPO's advantages and the exact KL."""
    values = []
    for step in range(len(student.times) - 1):
        x_t = rollout.states[step]
        x0 = student.x0(x_t, *student.jump(step, len(x_t)), rollout.start.conditioning)
        mean, std = step_gaussian(student, x_t, x0, step)
        log_prob = policy.gaussian_log_prob(rollout.states[step + 1], mean, std)
        old = rollout.log_probs[step]
        clipped = ((log_prob - old).exp() - 1.0).abs() > stage.clip_range
        scores.add({"clipped": clipped.float()})
        # log-probabilities are per element, and so are ratio and clip range
        value = policy.clipped_surrogate(log_prob, old, rollout.advantages, stage.clip_range)
        if stage.beta:
            kl = policy.gaussian_kl(mean, rollout.reference_means[step], std) / mean[0].numel()
            scores.add({"kl": kl})
            value = value + stage.beta * kl
        values.append(value)
    return torch.stack(values).mean(0)


def step_gaussian(student: tuning.TunableStudent, x_t: Tensor, x0: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Return mean (B, C, H, W) and std of what step number `step` of the sampler draws from at `x_t` and its `x0`."""
    t, s = student.jump(step, len(x_t))
    return policy.step_gaussian(x_t, x0, t, s, student.gamma, student.base.schedule)
