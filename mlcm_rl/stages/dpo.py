"""Stage `dpo`: DPO's losses on preference pairs, on the student's own grid of times.

The pairs are the student's own samples, ranked by the rewards, or the pictures of a table.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data.pairs import PairTable
from ..equations import preference
from ..equations.policy import step_gaussian
from ..equations.schedule import add_noise
from ..models import pictures, students, teachers
from ..models.base import Base
from ..models.conditioning import Conditioning
from ..models.teachers import tell_truncated
from ..preference import tuning
from ..preference.constraints import Constraints
from ..preference.guard import HackingGuard
from ..recipe import Dpo, Recipe
from ..rewards import Combined, combine
from ..training import processes
from ..training.loop import Runtime, adamw, rate_factor, set_rate
from ..training.processes import on_rank_zero
from ..training.progress import progress


def run(stage: Dpo, recipe: Recipe, parents: dict[str, Path], folder: Path) -> None:
    """Tune a finished student into `folder`: `student/`, `guard.json`, `log.jsonl`, `samples/`.

    Interrupted at any step and run again, it ends with the same bits. `student/` is what the guard kept.
    Raises NonFiniteLoss before an update that is not finite.
    """
    rt = Runtime(recipe, stage, folder)
    base = teachers.load(recipe.teacher, rt.device)
    start = tuning.start_folder(stage, parents, folder)
    student = tuning.load(stage, base, start, recipe.seed)
    refuse_blind(stage, student)
    rewards = combine(stage.rewards, rt.device, stage.normalise)
    source: StoredPairs | OwnPairs
    source = StoredPairs(stage, base, recipe.seed) if stage.pairs else OwnPairs(stage, student, rewards, recipe.seed)
    tuning.encode_ahead(stage, recipe, base, source.texts)
    optimizer = adamw(students.trainable_parameters(student.denoiser), stage)
    trained = rt.prepare(student.denoiser, optimizer)
    guard = HackingGuard(rt, stage, student, trained, rewards)
    rewards.take_in(guard.reference_scores)  # their scale in the first step
    constraints = Constraints(stage, student, guard.reference_scores)

    # everything that a checkpoint holds beside the optimiser
    weights = {"student": trained, "best": guard.best}
    first = rt.resume(weights, rewards=rewards, guard=guard, **constraints.parts)
    for step in rt.steps(first, stage.num_steps, "dpo", lambda: guard.stopped):
        # one update
        rate = stage.learning_rate * rate_factor(step, stage.num_steps, stage.warmup_steps)
        set_rate(optimizer, rate)
        scores = tuning.Scores()
        rt.samples = source.texts(step)
        losses = (loss(stage, student, pairs, scores) for pairs in source.batches(step, constraints, scores))
        with rt.autocast():
            logged = rt.backward(losses) | scores.means()
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
class PairBatch:
    """B pairs of samples, each of one prompt: index 0 is the chosen sample, 1 the rejected one."""

    states: Tensor | None  # (2, N, B, C, H, W) that the sampler visited; a table's pictures have none
    x0: Tensor  # (2, B, C, H, W) of the samples
    conditioning: Conditioning  # (B, ...)
    weight: Tensor  # (B,) 1 where the two differ enough in reward, else 0
    generators: list[torch.Generator]  # B, of the noise that each pair is trained with


class OwnPairs:
    """Pairs of the student's samples, drawn anew in every step."""

    def __init__(self, stage: Dpo, student: tuning.TunableStudent, rewards: Combined, seed: int):
        self.stage, self.student, self.rewards = stage, student, rewards
        self.prompts = tuning.Prompts(stage, student.base, seed)
        rewards.refuse_unread(self.prompts.languages)

    def texts(self, step: int) -> list[str]:
        """Return the prompts of `step`."""
        return self.prompts.texts(step, self.stage.batch_size)

    def batches(self, step: int, constraints: Constraints, scores: tuning.Scores) -> Iterator[PairBatch]:
        """Yield the micro-batches of `step`."""
        stage, copies = self.stage, self.stage.num_generations
        size = stage.micro_batch * copies
        for start in self.prompts.starts(self.student.base, step, stage.batch_size, size, copies):
            yield rank_samples(stage, self.student, self.rewards, constraints, start, scores)


class StoredPairs:
    """The pairs of a table in the stage's languages, their pictures encoded once.

    N pairs: `prompts` (N), `x0` (2, N, C, H, W) on the CPU. Raises ValueError for a table or a picture that cannot be
    read.
    """

    def __init__(self, stage: Dpo, base: Base, seed: int):
        self.stage, self.base, self.seed = stage, base, seed
        assert stage.pairs is not None
        table = PairTable(stage.pairs)
        self.prompts = tuning.spoken(table.prompts, stage.languages, stage.pairs)
        tell_truncated(base, [prompt.prompt for prompt in self.prompts], stage.pairs)
        own = set(self.prompts)
        index = [i for i, prompt in enumerate(table.prompts) if prompt in own]
        self.order = tuning.Order(self.prompts, stage, seed)
        self.x0 = torch.cat(list(self._encoded(table, index)), dim=1)

    def texts(self, step: int) -> list[str]:
        """Return the prompts of `step`."""
        return [self.prompts[i].prompt for i in self.order.draw(step, self.stage.batch_size).tolist()]

    def batches(self, step: int, constraints: Constraints, scores: tuning.Scores) -> Iterator[PairBatch]:
        """Yield the micro-batches of `step`; a table's pairs are ranked already, under no constraints."""
        index = self.order.draw(step, self.stage.batch_size)
        for rows in processes.micro_batches(len(index), self.stage.micro_batch):
            part = index[rows.start : rows.stop]
            conditioning = self.base.encode_prompts([self.prompts[i].prompt for i in part.tolist()])
            x0 = self.x0[:, part].to(self.base.device)
            generators = tuning.sample_generators(self.seed, self.stage, step, rows)
            yield PairBatch(None, x0, conditioning, torch.ones(len(part), device=x0.device), generators)

    def _encoded(self, table: PairTable, index: list[int]) -> Iterator[Tensor]:
        """Yield latents (2, b, C, H, W) of the pairs `index`, b as many as a process has pairs in a micro-batch."""
        size = processes.part(self.stage.micro_batch, processes.world_size())
        with progress(len(index), "encode pairs") as bar:
            for part in (index[i : i + size] for i in range(0, len(index), size)):
                images = torch.stack([table.pictures(i, self.base.resolution) for i in part], dim=1)
                yield torch.stack([pictures.encode(self.base, one) for one in images])
                bar.advance(len(part))


def rank_samples(
    stage: Dpo,
    student: tuning.TunableStudent,
    rewards: Combined,
    constraints: Constraints,
    start: tuning.Start,
    scores: tuning.Scores,
) -> PairBatch:
    """Sample the n copies of each prompt of `start`; return the best and the worst by the Lagrangian of the rewards."""
    if constraints.limits:
        with constraints.reference_drawing(start):
            constraints.add_reference(student.sample(start), rewards, start, scores)
    states, x0s = student.rollout(start)
    x0 = x0s[-1]
    with torch.no_grad():
        total, raw = rewards(student.base.autoencoder.decode(x0), start.prompts, start.languages)
    scores.add_rewards(raw)
    groups = (total - constraints.penalty(raw)).unflatten(0, (-1, stage.num_generations))  # (B, n)
    first = torch.arange(len(groups), device=total.device) * stage.num_generations
    best, worst = groups.argmax(1), groups.argmin(1)
    index = torch.stack([first + best, first + worst])  # (2, B)
    margin = (groups.amax(1) - groups.amin(1)) > stage.min_margin  # equal rewards are no preference
    conditioning = {name: value[first] for name, value in start.conditioning.items()}
    generators = start.generators[:: stage.num_generations]
    return PairBatch(states[:, index].transpose(0, 1), x0[index], conditioning, margin.float(), generators)


def loss(stage: Dpo, student: tuning.TunableStudent, pairs: PairBatch, scores: tuning.Scores) -> Tensor:
    """Return the preference loss (B,) float32; a pair of weight 0 counts 0."""
    chosen, rejected = log_ratios(stage, student, pairs)
    weight = pairs.weight
    scores.add({"pairs_kept": weight})
    if chosen.ndim == 2:  # a loss a step: every random step of the two rollouts is a pair of its own
        weight = weight.expand_as(chosen)
    kept = weight > 0  # in others chosen and rejected are equals, or one sample
    scores.add(
        {
            "accuracy": preference.implicit_accuracy(chosen, rejected)[kept],
            "margin": preference.implicit_margin(chosen, rejected, stage.beta)[kept],
            "log_ratio_chosen": chosen[kept],
            "log_ratio_rejected": rejected[kept],
        }
    )
    value = weight * preference.preference_loss(chosen, rejected, stage.beta, stage.loss_type, stage.label_smoothing)
    return value.mean(0) if chosen.ndim == 2 else value


def refuse_blind(stage: Dpo, student: tuning.TunableStudent) -> None:
    """Raise ValueError where errors in eps are all zero: at pure noise, which is a flow's last time."""
    has_signal = student.base.schedule.alpha[student.times].any()
    if stage.form != "pso" and stage.space == "eps" and not has_signal:
        raise ValueError(
            f"space: eps weighs errors by the signal, and at the only time of {len(student.times)} sampling step this "
            "teacher's states hold none: set space: x0, or sampling_steps: 2 or more"
        )


def log_ratios(stage: Dpo, student: tuning.TunableStudent, pairs: PairBatch) -> tuple[Tensor, Tensor]:
    """Return log pi / pi_ref of chosen and rejected: (B,) each, or (N - 1, B) of the random steps for form pso.

    `kappa` weighs the rejected one as in `preference.offline_pso_log_ratios`, of which form diffusion_dpo is half:
    offline PSO's beta of 200 is 400 there. Form endpoint sums the errors at all N times of the sampler, at N times the
    passes of diffusion_dpo, which takes one random time for each pair.
    """
    num_steps, size = len(student.times), len(pairs.generators)
    if stage.form == "pso":
        ratios = torch.stack([step_log_ratio(student, pairs, step) for step in range(num_steps - 1)])
        return ratios[:, 0], ratios[:, 1]
    steps = [torch.full((size,), step) for step in range(num_steps)]
    if stage.form == "diffusion_dpo":
        steps = [tuning.draw_steps(num_steps, pairs.generators)]
    eps = student.base.noise(pairs.generators, size)  # for chosen and rejected, student and reference
    errors = [denoising_errors(stage, student, pairs, each, eps) for each in steps]
    own, reference = (torch.stack(values) for values in zip(*errors, strict=True))  # (N or 1, 2, B) each
    if stage.form == "diffusion_dpo":
        ratio = preference.diffusion_dpo_log_ratio(own[0], reference[0])
    else:
        ratio = preference.endpoint_log_ratio(own, reference)
    return ratio[0], stage.kappa * ratio[1]


def denoising_errors(
    stage: Dpo, student: tuning.TunableStudent, pairs: PairBatch, steps: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the errors (2, B) of student and reference on samples noised to the times of `steps` (B,)."""
    x0, conditioning = pairs.x0.flatten(0, 1), both(pairs.conditioning)
    t, s = student.jumps(steps.repeat(2))
    x_t = add_noise(x0, eps.repeat(2, 1, 1, 1), t, student.base.schedule)
    predictions = (student.reference_x0(x_t, t, s, conditioning), student.x0(x_t, t, s, conditioning))
    reference, own = (
        preference.denoising_error(one, x0, t, student.base.schedule, stage.space).unflatten(0, (2, -1))
        for one in predictions
    )
    return own, reference


def step_log_ratio(student: tuning.TunableStudent, pairs: PairBatch, step: int) -> Tensor:
    """Return log pi / pi_ref (2, B), per element, of the step of each rollout from its state number `step`."""
    assert pairs.states is not None  # the recipe allows form pso on own samples alone
    x_t, x_s = pairs.states[:, step].flatten(0, 1), pairs.states[:, step + 1].flatten(0, 1)
    conditioning = both(pairs.conditioning)
    t, s = student.jump(step, len(x_t))
    reference, own = student.reference_x0(x_t, t, s, conditioning), student.x0(x_t, t, s, conditioning)
    mean, std = step_gaussian(x_t, own, t, s, student.gamma, student.base.schedule)
    reference_mean, _ = step_gaussian(x_t, reference, t, s, student.gamma, student.base.schedule)
    return preference.online_pso_log_ratio(x_s, mean, reference_mean, std).unflatten(0, (2, -1))


def both(conditioning: Conditioning) -> Conditioning:
    """Return the conditioning (2 B, ...) of the chosen samples, then of the rejected ones."""
    return {name: torch.cat([value, value]) for name, value in conditioning.items()}
