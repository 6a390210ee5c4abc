"""Stage `feedback`: a reward's gradient through the student's last sampling steps (DRaFT, ReFL; TLCM's MPS stage)."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data.training_points import Batch, StoredStates
from ..data.trajectory_store import store_of
from ..equations import consistency, feedback
from ..models import students, teachers
from ..models.base import Base
from ..models.student_description import jumps_whole_segments
from ..models.terms import matching_of
from ..models.terms_of_step import MatchingOfStep, training_of
from ..preference import tuning
from ..preference.constraints import Constraints
from ..preference.guard import HackingGuard
from ..preference.surrogate import LearnedReward
from ..recipe import Distill, Feedback, Recipe
from ..rewards import Combined, combine, refuse_without_gradient
from ..training import autocast
from ..training.loop import Runtime, adamw, rate_factor, set_rate
from ..training.processes import on_rank_zero


def run(stage: Feedback, recipe: Recipe, parents: dict[str, Path], folder: Path) -> None:
    """Tune a finished student into `folder`: `student/`, `guard.json`, `log.jsonl`, `samples/`.

    Interrupted at any step and run again, it ends with the same bits. `student/` is what the guard kept.
    Raises ValueError for rewards that it cannot use or that do not read the prompts, NonFiniteLoss before an update
    that is not finite.
    """
    rt = Runtime(recipe, stage, folder)
    base = teachers.load(recipe.teacher, rt.device)
    start = tuning.start_folder(stage, parents, folder)
    student = tuning.load(stage, base, start, recipe.seed)
    rewards = combine(stage.rewards, rt.device, stage.normalise)
    if stage.surrogate is None:
        refuse_without_gradient({name: member.model for name, member in rewards.members.items()})
    prompts, copies = tuning.Prompts(stage, base, recipe.seed), stage.samples_together
    rewards.refuse_unread(prompts.languages)
    if stage.shape == "mps_hinge":
        refuse_without_irrelevant(rewards, prompts)
    source = stored_states(stage, recipe, base, start, parents["trajectories"]) if stage.consistency else None
    tuning.encode_ahead(stage, recipe, base, lambda step: prompts.texts(step, stage.batch_size // copies))
    optimizer = adamw(students.trainable_parameters(student.denoiser), stage)
    trained = rt.prepare(student.denoiser, optimizer)
    matching = matching_of(stage, base, recipe.seed)
    term = (matching, training_of(rt, matching)) if matching else None
    guard = HackingGuard(rt, stage, student, trained, rewards)
    rewards.take_in(guard.reference_scores)  # their scale in the first step
    constraints = Constraints(stage, student, guard.reference_scores)
    texts = prompts.texts(0, stage.batch_size // copies)
    learned = LearnedReward(stage, student, rt, texts[0], recipe.seed) if stage.surrogate else None

    # everything that a checkpoint holds beside the optimiser
    weights = {"student": trained, "best": guard.best}
    first = rt.resume(weights, rewards=rewards, guard=guard, **constraints.parts)
    for step in rt.steps(first, stage.num_steps, "feedback", lambda: guard.stopped):
        # one update
        rate = 0.0
        if not (learned and learned.has_head_start(step)):
            rate = stage.learning_rate * rate_factor(step, stage.num_steps, stage.warmup_steps)
        if learned and learned.ends_head_start(step):
            optimizer.state.clear()  # moments of heads that had learned nothing
        set_rate(optimizer, rate)
        draws, scoring = rt.generator("draws", step), Scoring(rewards, constraints, learned, tuning.Scores())
        rt.samples = prompts.texts(step, stage.batch_size // copies)
        points = source.draw(step, student.num_segments, "next", draws) if source else None
        stored = [points.rows(part) for part in rt.micro_batches()] if points else []
        last = last_step(stage, len(student.times), draws)
        matched = MatchingOfStep(rt, term, step, stage.batch_size, stage.copies_scored) if term else None
        losses = (
            loss(stage, student, scoring, own, source.realise(stored[i]) if source else None, last, matched)
            for i, own in enumerate(prompts.starts(base, step, stage.batch_size // copies, stage.micro_batch, copies))
        )
        with rt.autocast():
            logged = rt.backward(losses) | scoring.scores.means()
            if learned:
                logged |= learned.learn(step)
            if matched:
                logged |= matched.learn()  # from the samples that were scored
        rewards.take_in(scoring.scores.rewards())
        logged |= constraints.take_in(scoring.scores)

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


def refuse_without_irrelevant(rewards: Combined, prompts: tuning.Prompts) -> None:
    """Raise ValueError where no prompt is irrelevant to another, or a reward does not depend on prompts."""
    if not rewards.needs_prompt:
        raise ValueError("rewards: shape mps_hinge needs rewards that depend on the prompt; take hinge")
    if len({prompt.prompt for prompt in prompts.prompts}) < 2:
        raise ValueError(f"prompts: shape mps_hinge needs two different ones, {prompts.stage.prompts} holds one")


@dataclass(frozen=True)
class Scoring:
    """What scores the samples of a step, and the raw scores that it has given so far.

    `learned` stands in for rewards without gradient, if the stage has such.
    """

    rewards: Combined
    constraints: Constraints
    learned: LearnedReward | None
    scores: tuning.Scores


def loss(
    stage: Feedback,
    student: tuning.TunableStudent,
    scoring: Scoring,
    start: tuning.Start,
    stored: Batch | None,
    last: int,
    matched: MatchingOfStep | None = None,
) -> Tensor:
    """Return the loss of a micro-batch, one value a sample (B,) float32; its raw scores go into `scoring`.

    Reward, anchor and distribution matching have a value for each copy of a sample, KL and the consistency loss one for
    each sample.
    """
    if scoring.constraints.limits:
        with scoring.constraints.reference_drawing(start):
            sample = graded_sample(stage, student, start, last)[1]
            scoring.constraints.add_reference(sample, scoring.rewards, start, scoring.scores)
    x_t, x0, t, copies = graded_sample(stage, student, start, last)
    value = reward_loss(stage, student, scoring, x0, start)
    conditioning = start.repeated(copies)
    if stage.anchor:
        reference = student.reference_x0(x_t.detach(), t, torch.zeros_like(t), conditioning)
        value = value + stage.anchor * consistency.squared_l2(x0, reference)
    value = value.unflatten(0, (copies, -1)).mean(0)
    if stage.kl:
        value = value + stage.kl * step_kl(student, start)
    if stored is not None:
        value = value + stage.consistency * stored_loss(student, stored)
    if matched is not None:
        term = matched.loss(x0, conditioning)
        scoring.scores.add({"matching": term})
        value = value + term
    return value


def last_step(stage: Feedback, num_steps: int, draws: torch.Generator) -> int:
    """Return the sampler's step at which scored samples end: its last, or for `random` one late step for all."""
    if stage.gradient == "random":
        return feedback.random_late_step(num_steps, stage.num_grad_steps, draws)
    return num_steps - 1


def graded_sample(
    stage: Feedback, student: tuning.TunableStudent, start: tuning.Start, last: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return the sample of steps 0 .. `last` that rewards score, with the gradient of `stage.gradient`.

    Return the last state and its x0, (n B, C, H, W) each; its time t (n B,); and n, the copies of each sample.
    """
    if stage.gradient == "low_variance":  # DRaFT-LV: the finished sample, noised n times to the last step's time
        x0 = student.sample(start)
        t, _ = student.jump(last, len(x0))
        eps = torch.stack([student.base.noise(start.generators, len(x0)) for _ in range(stage.num_copies)])
        x_t = feedback.renoised_copies(x0, eps, t, student.base.schedule)
        t = t.repeat(stage.num_copies)
        x0 = student.x0(x_t, t, torch.zeros_like(t), start.repeated(stage.num_copies))
        return x_t, x0, t, stage.num_copies
    grad_steps = 1 if stage.gradient == "random" else stage.num_grad_steps
    for x_t, x0 in student.walk(start, last, grad_steps):  # noqa: B007  (those of the last step are used)
        pass
    t, _ = student.jump(last, len(start.noise))
    return x_t, x0, t, 1


def reward_loss(
    stage: Feedback, student: tuning.TunableStudent, scoring: Scoring, x0: Tensor, start: tuning.Start
) -> Tensor:
    """Return the loss (n B,) on the rewards of samples `x0` (n B, C, H, W), n of each prompt, in the stage's form."""
    copies = len(x0) // len(start.prompts)

    def of(sample: Tensor) -> Tensor:
        images = student.base.autoencoder.decode(sample, student.small_decoder)
        return lagrangian(stage, scoring, images, start, copies)

    learned = scoring.learned
    if stage.form == "direct" and learned is None:
        return of(x0)
    # the gradient at the sample alone: of the rewards, or of what has learned from their scores
    if learned is None:
        sample = x0.detach().requires_grad_()
        value = of(sample)
        with autocast.own(sample.device):
            (gradient,) = torch.autograd.grad(value.sum(), sample)
    else:
        with torch.no_grad():
            real = of(x0)
        predicted, rise = learned.gradient(x0, start, -real)
        value, gradient = -predicted, -rise
    if stage.form == "bounded":
        return consistency.squared_l2(x0, feedback.bounded_target(x0, -gradient, stage.target_bound))
    return feedback.at_known_gradient(value, gradient, x0)


def lagrangian(stage: Feedback, scoring: Scoring, images: Tensor, start: tuning.Start, copies: int) -> Tensor:
    """Return the loss (n B,) on the rewards of `images` (n B, 3, H, W), n = `copies` of each prompt.

    It is the negative Lagrangian: of the summed reward in its shape, and of the rewards that may not fall.
    """
    rewards, prompts, languages = scoring.rewards, start.prompts * copies, start.languages * copies
    total, raw = rewards(images, prompts, languages)
    scoring.scores.add_rewards(raw)
    if stage.shape == "negative":
        shaped = feedback.negative(total)
    elif stage.shape == "hinge":
        shaped = feedback.hinge(total, stage.threshold)
    else:  # the same pictures under the next prompt, which they should not fit
        irrelevant = rewards.total(rewards.raw(images, start.next_prompts * copies, start.next_languages * copies))
        shaped = feedback.mps_hinge(total, irrelevant, stage.threshold)
    return shaped + scoring.constraints.penalty(raw)


def step_kl(student: tuning.TunableStudent, start: tuning.Start) -> Tensor:
    """Return the KL (B,) to the reference of one random stochastic step of each sample, per element."""
    states, _ = student.rollout(start)
    steps = tuning.draw_steps(len(student.times) - 1, start.generators)
    t, s = student.jumps(steps)
    x_t = states[steps, torch.arange(len(steps))]
    reference = student.reference_x0(x_t, t, s, start.conditioning)
    x0 = student.x0(x_t, t, s, start.conditioning)
    kl = feedback.step_kl(x0, reference, t, s, student.gamma, student.base.schedule)
    return kl / x0[0].numel()


def stored_states(stage: Feedback, recipe: Recipe, base: Base, start: Path, trajectories: Path) -> StoredStates:
    """Return the stored trajectories as a source of points, drawn as the student in `start` was distilled on them.

    Raises CheckpointError for a store of another teacher.
    """
    student = students.describe(start)
    distilled = Distill(
        num_segments=[student["num_segments"]],
        starts="milestones" if jumps_whole_segments(student) else "any",
        condition_on_target=student["conditioned"],
        budgets=student["budgets"] if student["conditioned"] else [],
        batch_size=stage.batch_size,
        num_steps=1,
    )
    return StoredStates(distilled, base, store_of(trajectories, recipe.teacher, base), recipe.seed)


def stored_loss(student: tuning.TunableStudent, batch: Batch) -> Tensor:
    """Return the squared error (B,) of the student's jumps between stored states: it stays a consistency model."""
    x0 = student.x0(batch.x_t, batch.t, batch.s, batch.conditioning, gamma=0.0)
    assert batch.x_s is not None
    x_s = consistency.transfer(batch.x_t, x0, batch.t, batch.s, student.base.schedule)
    return consistency.squared_l2(x_s, batch.x_s)
