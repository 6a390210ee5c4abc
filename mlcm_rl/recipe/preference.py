"""The stages of preference learning."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, model_validator

from . import hinge_defaults
from .distill import MAX_ENCODED_AHEAD, MOMENTS_BYTES, Distill
from .reads import PICTURES, PROMPTS, Reads
from .stage import OneStage, Requirement, States, Training
from .start import PREVIOUS, StudentSource
from .surrogate import Surrogate
from .takes import Networks, Pass, Values
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
        0.1, description="of rewards with max_drop: growth of a multiplier in a step, for each deviation beyond it"
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

    @abstractmethod
    def step(self, samples: int, part: int) -> list[Pass]:
        """Return the passes of all optimiser steps: of `samples` in all, `part` of them in memory at a time."""

    def passes(self, recipe: "Recipe", part: int = 0) -> list[Pass]:
        """Return the passes of the steps, the guard's looks and sample grids."""
        part = part or self.micro_batch
        num_looks = -(-self.num_steps // self.guard.every) + 1  # and one at the reference
        watched, batch = num_looks * self.guard.num_prompts, min(part, self.guard.num_prompts)
        sampled = Pass("student", watched, self.sampling_steps, batch, is_chained=True, num_with_keys=1)
        look = replace(sampled, viewer="guard", in_step=False)
        return [*self.step(self.num_steps * self.batch_size, part), look, *self.sample_grids(recipe)]

    def networks(self, distilled: Lora | Full) -> Networks:
        """Return the distilled student with the preference adapter, without the teacher's denoiser."""
        return Networks(
            distilled,
            preference=self.adapter,
            uses_teacher=False,
            encodes_ahead=self.encodes_ahead,
            has_average=True,
            tiles=self.autoencoder_tiles,
        )

    def disk(self, recipe: "Recipe", values: Values) -> int:
        """Return the bytes of a copy of the distilled student, an upper bound, and of the adapter and checkpoints."""
        return 4 * values.denoiser + values.trained * (4 + self.keep_checkpoints * (4 + MOMENTS_BYTES))


class Feedback(Tuning):
    """The gradient of a differentiable reward through the student's last sampling steps."""

    maths: ClassVar[int] = 3  # noise by sample, the rewards' scale by the steps before

    kind: Literal["feedback"] = "feedback"
    form: Literal["direct", "bounded"] = Field(
        "direct",
        description="the reward's gradient through the sampler, or a step of bounded size up that gradient as the "
        "target of a squared error (OPSD)",
    )
    target_bound: PositiveFloat = Field(
        0.1, description="of form bounded: root mean square of the step from a sample's x0 to its target"
    )
    gradient: Literal["last", "random", "low_variance"] = Field(
        "last", description="through the last steps (DRaFT-K), one random late one (ReFL), re-noised copies (DRaFT-LV)"
    )
    num_grad_steps: PositiveInt = Field(1, description="K of `last`; how many late steps `random` draws from")
    num_copies: int = Field(2, gt=0, le=1024, description="of `low_variance`: n re-noised copies of a sample")
    shape: Literal["negative", "hinge", "mps_hinge"] = Field(
        "negative", description="-r; relu(threshold - r); or that and relu of r under another's prompt, of raw scores"
    )
    threshold: float = Field(0.0, description="of the hinges, on the summed reward's scale; 16 for mps_hinge of mps")
    anchor: NonNegativeFloat = Field(0.0, description="weight of the mean squared distance to the reference's last x0")
    kl: NonNegativeFloat = Field(0.0, description="weight of one stochastic step's KL to the reference, per element")
    consistency: NonNegativeFloat = Field(0.0, description="weight of the distillation loss on stored trajectories")
    surrogate: Surrogate | None = Field(
        None, description="a learned stand-in whose gradient is taken, so that rewards need none; default: their own"
    )
    small_decoder: Annotated[str | None, Reads(holding="config.json", is_network=True)] = Field(
        None, description="folder of an AutoencoderTiny that draws for the rewards trained on, never for the guard"
    )
    _hinge_is_settled = model_validator(mode="after")(hinge_defaults.settle)

    @model_validator(mode="after")
    def _sampler_has_those_steps(self):
        if self.num_grad_steps > self.sampling_steps:
            raise ValueError(f"num_grad_steps {self.num_grad_steps} is more than sampling_steps {self.sampling_steps}")
        if self.surrogate and self.shape != "negative":
            raise ValueError(
                f"shape {self.shape} is of rewards with a gradient; surrogate learns the sum: take negative"
            )
        if self.surrogate and self.gradient == "low_variance":
            raise ValueError("gradient: low_variance scores copies of a sample; with surrogate take last or random")
        if self.surrogate and (self.batch_size // self.gradient_accumulation) % self.surrogate.num_generations:
            raise ValueError(
                f"batch_size must hold whole groups of surrogate.num_generations {self.surrogate.num_generations}"
            )
        if self.surrogate and self.surrogate.head_start >= self.num_steps:
            raise ValueError(
                f"surrogate.head_start {self.surrogate.head_start} of num_steps {self.num_steps} leaves no step in "
                "which the student is tuned: lower it"
            )
        if self.form == "bounded" and self.gradient == "last" and self.num_grad_steps > 1:
            raise ValueError(
                "num_grad_steps: form bounded has the target of one step; take 1, or gradient: random for any late one"
            )
        if self.form != "bounded" and self.target_bound != type(self).model_fields["target_bound"].default:
            raise ValueError("target_bound is of form bounded")
        if self.kl and self.gamma == 0.0:
            raise ValueError("kl needs gamma above 0: a deterministic step has no distribution; take anchor")
        if self.kl and self.sampling_steps < 2:
            raise ValueError("kl needs sampling_steps 2 or more: the last step puts no noise back; take anchor")
        return self

    def states_read(self, earlier: Sequence[OneStage]) -> States | None:
        """Return the states that its student was distilled on, for the term that keeps it a consistency model."""
        distilled = [stage for stage in earlier if isinstance(stage, Distill)]
        return distilled[-1].states_drawn if self.consistency and distilled else None

    @property
    def reads_trajectories(self) -> bool:
        """Whether a store of trajectories is needed."""
        return self.consistency > 0

    @property
    def needs_random_steps(self) -> bool:
        """Whether the sampler must put noise back."""
        return self.kl > 0

    @property
    def samples_together(self) -> int:
        """Samples that must be in one process together: a prompt's, whose scores are compared by a surrogate."""
        return self.surrogate.num_generations if self.surrogate else 1

    def networks(self, distilled: Lora | Full) -> Networks:
        """Return those of all tuning, and the heads of a surrogate."""
        return replace(super().networks(distilled), head_width=self.surrogate.width if self.surrogate else 0)

    @property
    def parents(self) -> tuple[str, ...]:
        """Those of all tuning, and the student's store of trajectories if it is read."""
        return (*super().parents, *["trajectories"] * self.reads_trajectories)

    @property
    def requirements(self) -> list[Requirement]:
        """Those of all tuning, and the student's store of trajectories if it is read."""
        store = Requirement(("trajectories",), "consistency needs", "consistency")
        return [*super().requirements, *[store] * self.reads_trajectories]

    def step(self, samples: int, part: int) -> list[Pass]:
        """Return the sampling steps without and with gradient, and the passes of each term beside the reward."""
        steps, copies = self.sampling_steps, self.num_copies if self.gradient == "low_variance" else 1
        graded = {"last": self.num_grad_steps, "random": 1, "low_variance": 1}[self.gradient]
        before = {
            "last": steps - self.num_grad_steps,
            "random": steps - (self.num_grad_steps - 1) / 2 - 1,
            "low_variance": steps,
        }[self.gradient]
        scored = Pass(
            "student",
            samples * copies,
            graded,
            part * copies,
            gradient=True,
            is_chained=self.gradient != "low_variance",
            viewer="rewards",
            num_scores=2 if self.shape == "mps_hinge" else 1,
        )
        with_keys = 1 if self.gradient == "low_variance" else None  # the others have gradient in the same sampler
        passes = [Pass("student", samples, before, is_chained=True, num_with_keys=with_keys), scored]
        if self.surrogate:  # scored without gradient; the heads' gradient is taken at the sample
            scores = replace(passes[0], batch=part, viewer="rewards")
            passes = [scores, replace(scored, viewer=""), Pass("heads", samples, batch=part, gradient=True)]
            passes.append(Pass("heads", samples, self.surrogate.num_updates, part, gradient=True, beside=True))
        if self.max_drops:  # the same samples by the reference
            passes += [replace(one, role="reference", gradient=False, num_scores=1) for one in passes[:2]]
        if self.anchor:
            passes.append(Pass("reference", samples * copies, batch=part * copies))
        if self.kl:  # of one step of a sample of its own
            sampled = Pass("student", samples, steps, is_chained=True, num_with_keys=1)
            passes += [sampled, Pass("reference", samples)]
        own_terms = (self.kl > 0) + (self.consistency > 0)
        return passes + [Pass("student", samples, batch=part, gradient=True)] * own_terms


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
    beta: NonNegativeFloat = Field(0.0, description="weight of the exact KL to the reference, per element")
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
        """Return the samples, and the evaluations for log-probabilities: old, of the reference, and current."""
        steps, actions = self.sampling_steps, self.sampling_steps - 1
        sampled = Pass("student", samples, steps, part, is_chained=True, viewer="rewards", num_with_keys=1)
        return [
            sampled,
            *[replace(sampled, role="reference")] * bool(self.max_drops),
            Pass("student", samples, actions),
            Pass("reference", samples, actions),
            Pass("student", samples * self.num_iterations, actions, part, gradient=True),
        ]
