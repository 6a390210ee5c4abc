"""The stages of preference learning."""

from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, model_validator

from .distill import MAX_ENCODED_AHEAD
from .reads import PICTURES, PROMPTS
from .stage import Requirement, Training
from .start import PREVIOUS, StudentSource
from .takes import SAVED, Networks, Pass, Values
from .types import (
    Fraction,
    Full,
    Guard,
    Lora,
    NonNegativeFloat,
    PositiveInt,
    Reward,
    TuningReward,
    TuningRewardEntry,
    Weight,
)

if TYPE_CHECKING:
    from .experiment import Recipe


class Tuning(Training):
    """What all stages of preference learning share: the student's sampler, the rewards, the guard."""

    leaves_student: ClassVar[bool] = True

    start: str | StudentSource | None = Field(
        None,
        description="the student to tune: `previous` for that of the stage before, distilled or tuned; a path, or an "
        "entry with a path, of one from elsewhere; default: the recipe's distilled one",
    )
    prompts: Annotated[str, PROMPTS] = Field(description=".txt (one a line) or .jsonl ({prompt, language, ...}) file")
    guard_prompts: Annotated[str | None, PROMPTS] = Field(
        None, description="prompt file that the guard watches; default: the same"
    )
    languages: dict[str, Weight] = Field(
        {}, description="weight of each language in the draw of prompts, others left out; default: as they come"
    )
    num_steps: PositiveInt = Field(description="optimiser steps")
    learning_rate: PositiveFloat = Field(1e-4, description="peak; decays to 0")
    warmup_steps: int = Field(0, ge=0, le=1_000_000_000, description="steps of linear warm-up")
    adapter: Lora = Field(Lora(rank=16, alpha=16.0), description="the preference adapter, over the distilled student")
    sampling_steps: int = Field(4, ge=1, le=8, description="of the student's sampler, which is what is tuned")
    gamma: Fraction | None = Field(None, description="noise put back between its steps; default: what suits it")
    rewards: list[TuningRewardEntry] = Field(
        min_length=1,
        description="trained on, names or entries; the weighted sum of those without max_drop is the reward",
    )
    multiplier_rate: PositiveFloat = Field(
        5.0, description="of rewards with max_drop: growth of a multiplier in a step, for each deviation beyond it"
    )
    normalise: bool = Field(True, description="put each reward on the scale of its running deviation before the sum")
    autoencoder_tiles: Annotated[int, Field(gt=0, le=16_384)] | None = Field(
        None, description="pixels a side of tiles that it works in, recomputed in the backward pass: less memory, seams"
    )
    guard: Guard = Field(description="what watches the tuning, picks its best step and stops it")

    @model_validator(mode="after")
    def _held_out_is_not_trained_on(self):
        both = {reward.name for reward in self.rewards} & {reward.name for reward in self.guard.rewards}
        if both:
            raise ValueError(f"guard.rewards: {', '.join(sorted(both))} is trained on; a guard needs another reward")
        return self

    @model_validator(mode="after")
    def _something_is_maximised(self):
        if not self.objectives:
            raise ValueError("rewards: all have max_drop; name one without it, to be maximised under the constraints")
        if not any(reward.weight for reward in self.objectives):
            raise ValueError("rewards: all weights are 0, so that nothing is maximised; give one another weight")
        if not self.max_drops and self.multiplier_rate != type(self).model_fields["multiplier_rate"].default:
            raise ValueError("multiplier_rate is of rewards with max_drop, and none has it")
        return self

    @property
    def encodes_ahead(self) -> bool:
        """Whether all prompts are encoded before the first step, so that text encoders can leave memory.

        In a long run they are not: every process would hold all of them, 0.3 MB each for SDXL.
        """
        return self.num_steps * self.batch_size <= MAX_ENCODED_AHEAD

    @property
    def reward_models(self) -> list[Reward]:
        """The reward models of the stage: those trained on, then those held out."""
        return [*self.rewards, *self.guard.rewards]

    @property
    def trained_on(self) -> list[Reward]:
        """The rewards that are maximised and those that may not fall."""
        return [*self.rewards]

    @property
    def objectives(self) -> list[TuningReward]:
        """The rewards whose weighted sum is maximised."""
        return [reward for reward in self.rewards if not reward.is_constraint]

    @property
    def max_drops(self) -> dict[str, float]:
        """How far each constrained reward may fall, in deviations of the reference, by its name."""
        return {reward.name: reward.max_drop for reward in self.rewards if reward.max_drop is not None}

    @property
    def needs_random_steps(self) -> bool:
        """Whether the sampler must put noise back."""
        return False

    @property
    def parents(self) -> tuple[str, ...]:
        """The teacher, the student to tune unless it is the one of the stage before, and the recipe's own reward."""
        return (*super().parents, *["distill"] * (self.start is None))

    @property
    def student_from(self) -> str:
        """The name among its parents of the stage whose student it tunes."""
        return "distill" if self.start is None else "start"

    @property
    def requirements(self) -> list[Requirement]:
        """The student to tune."""
        if self.start is None:
            reason = f"{self.kind} tunes a distilled student: it needs start: (a run, a folder, a file), or"
            return [Requirement(("distill",), reason)]
        from .experiment import STUDENTS  # computed from all kinds of stages, this one included

        return [Requirement(STUDENTS, f"start: {PREVIOUS} is the student of the stage before: it needs", "start")]

    @property
    def steps_per_phase(self) -> list[int]:
        """Optimiser steps, in one phase."""
        return [self.num_steps]

    @property
    def corrections(self) -> int:
        """One: multipliers grew by 0.1 where nothing was said, too little to hold a reward."""
        return int(bool(self.max_drops))

    @property
    def uses_teacher(self) -> bool:
        """Whether steps evaluate the teacher; if not, its denoiser leaves memory before the first."""
        return False

    @abstractmethod
    def step(self, samples: int, part: int) -> list[Pass]:
        """Return the passes of all optimiser steps: of `samples` in all, `part` of them in memory at a time."""

    def step_by_teacher(self, recipe: "Recipe", samples: int, part: int) -> list[Pass]:
        """Return those passes of all optimiser steps, after the others, that depend on the teacher of `recipe`."""
        return []

    def passes(self, recipe: "Recipe", part: int = 0) -> list[Pass]:
        """Return the passes of the steps, the guard's looks and sample grids."""
        part = part or self.micro_batch
        num_looks = -(-self.num_steps // self.guard.every) + 1  # and one at the reference
        watched, batch = num_looks * self.guard.num_prompts, min(part, self.guard.num_prompts)
        sampled = Pass("student", watched, self.sampling_steps, batch, is_chained=True, num_with_keys=1)
        look = replace(sampled, viewer="guard", in_step=False)
        samples = self.num_steps * self.batch_size
        of_steps = self.step(samples, part) + self.step_by_teacher(recipe, samples, part)
        return [*of_steps, look, *self.sample_grids(recipe)]

    def networks(self, distilled: Lora | Full) -> Networks:
        """Return the distilled student with the preference adapter, and the teacher's denoiser if steps evaluate it."""
        return Networks(
            distilled,
            preference=self.adapter,
            uses_teacher=self.uses_teacher,
            encodes_ahead=self.encodes_ahead,
            has_average=True,
            tiles=self.autoencoder_tiles,
        )

    def disk(self, recipe: "Recipe", values: Values) -> int:
        """Return the bytes of a copy of the distilled student, an upper bound, and of the adapter and checkpoints.

        A checkpoint has the adapter, the guard's best and the moments, and the fake score where there is one.
        """
        checkpoint = values.trained * (4 + SAVED) + values.fake * SAVED
        return 4 * values.denoiser + values.trained * 4 + self.keep_checkpoints * checkpoint


class Dpo(Tuning):
    """Preference pairs: the student's own samples, ranked by the rewards, or a table; hyper-parameters as in TRL."""

    maths: ClassVar[int] = 2  # noise by sample, the rewards' scale by the steps before

    kind: Literal["dpo"] = "dpo"
    form: Literal["endpoint", "diffusion_dpo", "pso"] = Field(
        "endpoint", description="log-ratio: errors at all times of the sampler, at one of them, or of its random steps"
    )
    pairs: Annotated[str | None, PICTURES] = Field(
        None,
        description="pairs to learn in place of the student's own samples, a .parquet file or a folder as `mlcm pairs` "
        "writes it, with columns prompt, chosen, rejected; `prompts` and `rewards` are then only the guard's to watch",
    )
    num_generations: int = Field(4, ge=2, le=1024, description="samples a prompt, of which the best and the worst")
    min_margin: NonNegativeFloat = Field(0.0, description="pairs nearer in reward than this are left out")
    beta: PositiveFloat = Field(100.0, description="strength of the tie to the reference: lower is looser")
    kappa: NonNegativeFloat = Field(
        1.0, description="weight of the rejected log-ratio: below 1 the margin is not won by spoiling the rejected"
    )
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust", "conservative"] = Field(
        "sigmoid",
        description="of the margin between chosen and rejected; robust and conservative allow for wrong labels",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="of robust and conservative: share of wrong labels")
    space: Literal["x0", "eps"] = Field("eps", description="of the errors: x0, or that weighted by SNR")

    @model_validator(mode="after")
    def _steps_are_random(self):
        if self.form == "pso" and self.gamma == 0.0:
            raise ValueError("form pso needs gamma above 0: a deterministic step has no probability")
        if self.form == "pso" and self.sampling_steps < 2:
            raise ValueError("form pso needs sampling_steps 2 or more: the last step puts no noise back")
        if self.label_smoothing and self.loss_type not in ("robust", "conservative"):
            raise ValueError(f"label_smoothing has no meaning for {self.loss_type}; take robust or conservative")
        if self.kappa != 1.0 and self.form == "pso":
            raise ValueError("kappa has no meaning for form pso; take endpoint or diffusion_dpo")
        return self

    @model_validator(mode="after")
    def _pairs_stand_for_samples(self):
        if self.pairs is None:
            return self
        if self.max_drops:
            raise ValueError(f"max_drop of {', '.join(self.max_drops)} is measured on samples, and pairs are a table's")
        if self.form == "pso":
            raise ValueError("form pso learns the steps of the student's own samples, and pairs are finished pictures")
        for name in ("num_generations", "min_margin"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is of the student's own samples; those of pairs are as the table has them")
        return self

    @property
    def needs_random_steps(self) -> bool:
        """Whether the sampler must put noise back."""
        return self.form == "pso"

    def passes(self, recipe: "Recipe", part: int = 0) -> list[Pass]:
        """Return the passes of all tuning, and the encoding of a table's pictures."""
        encoded = Pass("encoder", batch=part or self.micro_batch, in_step=False)
        return [encoded] * (self.pairs is not None) + super().passes(recipe, part)

    def step(self, samples: int, part: int) -> list[Pass]:
        """Return the samples to rank, and the evaluations of chosen and rejected for their log-ratios."""
        steps = self.sampling_steps
        measures = {"endpoint": steps, "diffusion_dpo": 1, "pso": steps - 1}[self.form]
        own, copies = Pass("student", 2 * samples, measures, 2 * part, gradient=True), self.num_generations
        sampled = Pass("student", samples * copies, steps, part * copies, is_chained=True, num_with_keys=1)
        ranked = [replace(sampled, viewer="rewards")] * (self.pairs is None)
        by_reference = [replace(one, role="reference") for one in ranked if self.max_drops]
        return [
            *ranked,
            *by_reference,
            Pass("reference", 2 * samples, measures),
            own,
        ]


class Policy(Tuning):
    """Policy gradient on the stochastic few-step sampler, for any reward; names as in TRL's GRPOConfig."""

    maths: ClassVar[int] = 3  # noise by sample, the rewards' scale by the steps before

    kind: Literal["policy"] = "policy"
    num_generations: int = Field(4, ge=2, le=1024, description="samples a prompt, compared with each other")
    num_iterations: PositiveInt = Field(1, description="optimiser steps on the same samples")
    clip_range: PositiveFloat = Field(1e-3, description="clip range of the probability ratio, per element")
    beta: NonNegativeFloat = Field(
        0.0, description="weight of the exact KL to the reference, per element; at 0 the reference is not passed"
    )
    scale_rewards: Literal["group", "none"] = Field(
        "group",
        description="divide a prompt's advantages by its samples' deviation; none: prompts all alike count less",
    )

    @model_validator(mode="after")
    def _groups_are_whole(self):
        if (self.batch_size // self.gradient_accumulation) % self.num_generations:
            raise ValueError(f"batch_size must hold whole groups of num_generations {self.num_generations}")
        if self.gamma == 0.0 or self.sampling_steps < 2:
            raise ValueError("gamma must be above 0 and sampling_steps 2 or more: no policy without random steps")
        return self

    @property
    def needs_random_steps(self) -> bool:
        """Whether the sampler must put noise back."""
        return True

    @property
    def samples_together(self) -> int:
        """Samples that must be in one process together: a prompt's group."""
        return self.num_generations

    def step(self, samples: int, part: int) -> list[Pass]:
        """Return the samples, and the evaluations for log-probabilities: of the reference, with `beta`, and current."""
        steps, actions = self.sampling_steps, self.sampling_steps - 1
        sampled = Pass("student", samples, steps, part, is_chained=True, viewer="rewards", num_with_keys=1)
        return [
            sampled,
            *[replace(sampled, role="reference")] * bool(self.max_drops),
            *[Pass("reference", samples, actions)] * bool(self.beta),
            Pass("student", samples * self.num_iterations, actions, part, gradient=True),
        ]
