"""The recipe: every setting of a run as strict types, and nothing that needs torch.

A recipe names a teacher and a list of stages. `kind` picks the stage; unknown keys are errors. A field marked with
`presentation` cannot change a result (how often to log, where to put files) and stays out of the fingerprint.

Only types stand here: `file.py` loads a file into them and says what is wrong with it. A validator's message
begins with the name of the setting that it is about, so that the error points at that setting's line.
"""

from collections.abc import Iterator
from copy import deepcopy
from importlib.util import find_spec
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PrivateAttr, model_validator

from . import hinges
from .evaluation import Evaluate
from .types import (
    Fraction,
    Full,
    Guard,
    Lora,
    NonNegativeFloat,
    OneStage,
    PositiveInt,
    Reward,
    RewardEntry,
    Samples,
    Strict,
    Teacher,
    Training,
    Weight,
    default_gamma,
    presentation,
)

NAME = r"^[a-z0-9][a-z0-9_-]*$"
RESERVED = ("stages", "rows")  # folders under runs that hold all runs' results
NumSegments = Literal[8, 4, 2, 1]
# What a distill stage is that leaves its form open: the one that the study found best. It leaves it open where it names
# none of OWN_FORM, no list of phases, and nothing but OPEN of what is not for this form.
RECOMMENDED = {"condition_on_target": True, "segments": [1], "budgets": [2, 3, 4, 6, 8], "distance": "log_l2"}
OWN_FORM = ("condition_on_target", "segments", "budgets")
PER_PHASE = ("num_steps", "learning_rate", "target", "pair", "space", "distance", "optimizer_state")
OPEN = {"method": "segments", "source": "trajectories", "target": "trajectory", "space": "z"}
MOST_ENCODED_AHEAD = 8192  # prompts of a stage's steps that are kept encoded


class TrainTeacher(Training):
    """The denoiser's diffusion loss on a captioned image folder: trains the teacher itself."""

    kind: Literal["train_teacher"] = "train_teacher"
    images: str = Field(description="folder with metadata.jsonl ({file_name, prompts}) beside the pictures")
    num_steps: PositiveInt
    learning_rate: PositiveFloat = 4e-4
    warmup_steps: int = Field(100, ge=0, le=1_000_000_000)
    ema_decay: Fraction = 0.999
    prompt_dropout: Fraction = Field(0.1, description="share of prompts dropped for classifier-free guidance")
    min_snr_gamma: PositiveFloat | None = Field(None, description="most an error of x0 weighs, arXiv 2303.09556")
    start: Literal["teacher", "random"] = Field("random", description="denoiser weights to begin from")


class TrainReward(Training):
    """A head over frozen picture features, by Bradley-Terry on a table of pairs: a taste made the reward `trained`."""

    kind: Literal["train_reward"] = "train_reward"
    pairs: str = Field(
        description="pairs to learn, a .parquet file or a folder as `mlcm pairs` writes it, with columns prompt, "
        "chosen, rejected"
    )
    backbone: Literal["efficientnet_lite0", "mobilenet_v2"] = Field(
        "efficientnet_lite0", description="the shipped body whose features the head reads"
    )
    resolution: int = Field(64, gt=0, le=16_384, description="pixels a side that pictures are read at, as drawn")
    held_out: float = Field(0.2, gt=0, lt=1, description="share of the prompts whose pairs only measure the head")
    num_steps: PositiveInt = 400
    batch_size: int = Field(64, gt=0, le=65_536, description="pairs per optimiser step")
    learning_rate: PositiveFloat = Field(2e-3, description="peak; decays to 0")
    weight_decay: NonNegativeFloat = 0.05
    dropout: float = Field(0.5, ge=0, lt=1, description="of the features")
    held_out_every: PositiveInt = presentation(20, description="steps between measures on the held-out pairs")


class Trajectories(OneStage):
    """The teacher's guided DDIM trajectories from noise to data, every state kept."""

    kind: Literal["trajectories"] = "trajectories"
    prompts: str = Field(description=".txt (one a line) or .jsonl ({prompt, language, ...}) file")
    num_trajectories: int = Field(gt=0, le=10_000_000)
    num_held_out: int = Field(0, ge=0, le=10_000_000, description="trajectories after those, for the held-out loss")
    num_steps: int = Field(48, ge=8, le=992, description="solver steps: 8 segments of 6")
    batch_size: int = presentation(
        16, gt=0, le=65_536, description="solved at a time; another number moves the states in their last bits"
    )
    dtype: Literal["float32", "float16"] = Field("float32", description="of the stored states; never bfloat16")
    shard_size: PositiveInt = presentation(64, description="trajectories in a file")

    @model_validator(mode="after")
    def _steps_hold_milestones(self):
        if self.num_steps % 8:
            raise ValueError(f"num_steps {self.num_steps} must be a multiple of 8: milestones lie on the grid")
        if (self.num_trajectories + self.num_held_out) > 1_000_000 * self.shard_size:
            raise ValueError(f"shard_size {self.shard_size} would make more than a million files: make it larger")
        return self


class Distill(Training):
    """Multistep consistency distillation. A list holds one entry a phase; a single value is meant for every phase.

    A stage that leaves its form open is the recommended one: told its target, one student for budgets [2, 3, 4, 6, 8].
    """

    kind: Literal["distill"] = "distill"
    method: Literal["segments", "inter_segment"] = Field(
        "segments", description="segments: stage 1; inter_segment: stage 2"
    )
    source: Literal["trajectories", "online", "data"] = Field(
        "trajectories", description="stored states; the paper's Algorithm 1; or real latents plus noise, as LCM"
    )
    images: str | None = Field(None, description="captioned image folder, for source: data")
    prompts: str | None = Field(None, description="prompt file, for source: online and for inter_segment on samples")
    adapter: Lora | Full = Field(default_factory=Lora, discriminator="kind")
    segments: list[NumSegments] = Field(
        [8, 4, 2, 1], min_length=1, max_length=10, description="of each phase; [1] where the form is left open"
    )
    num_steps: PositiveInt | list[PositiveInt] = Field(description="optimiser steps of each phase")
    learning_rate: PositiveFloat | list[PositiveFloat] = Field(1e-4, description="peak; decays to 0 within each phase")
    warmup_steps: int = Field(0, ge=0, le=1_000_000_000, description="linear warm-up at the start of each phase")
    target: Literal["trajectory", "consistency"] | list[Literal["trajectory", "consistency"]] = Field(
        "trajectory", description="stored milestone state, or the student's own jump from the pair's second point"
    )
    pair: Literal["next", "random"] | list[Literal["next", "random"]] = Field(
        "next", description="second point of a consistency pair: one grid step down, or any stored point of the segment"
    )
    space: Literal["z", "x0"] | list[Literal["z", "x0"]] = Field(
        "z", description="loss on the latents at the segment's start, or on x0 with weight SNR + 1"
    )
    distance: Literal["l2", "huber", "log_l2"] | list[Literal["l2", "huber", "log_l2"]] = Field(
        "l2",
        description="squared; by Huber; or the logarithm of its mean, where near and far jumps weigh alike, as "
        "where the form is left open",
    )
    target_ema: Fraction = Field(0.0, description="decay of the target's averaged weights; 0 = the student's own")
    optimizer_state: Literal["keep", "reset"] | list[Literal["keep", "reset"]] = Field(
        "keep", description="what a phase does at its start with Adam's moments of the one before"
    )
    condition_on_target: bool = Field(
        False,
        description="give the student the time it jumps to: one for all steps; true where the form is left open",
    )
    budgets: list[Annotated[int, Field(ge=1, le=8)]] = Field(
        [],
        description="with condition_on_target: draw the jumps of samplers with these numbers of steps, and no others; "
        "[2, 3, 4, 6, 8] where the form is left open",
    )
    skip: int = Field(20, gt=0, le=999, description="times between a pair's points for source online and data")
    num_teacher_steps: int = Field(3, gt=0, le=125, description="inter_segment: p, teacher steps between milestones")
    num_student_steps: int = Field(4, ge=1, le=8, description="inter_segment: q, steps of the student's own sample")
    renoise: Literal["student", "stored"] = Field(
        "stored", description="inter_segment: what is re-noised to a milestone"
    )
    held_out_every: PositiveInt = presentation(50, description="steps between losses on the held-out trajectories")

    @model_validator(mode="after")
    def _open_form_is_the_recommended(self):
        said = self.model_fields_set
        has_phases = any(isinstance(getattr(self, name), list) for name in PER_PHASE)
        is_open = all(getattr(self, name) == value for name, value in OPEN.items())
        if is_open and not has_phases and not said & set(OWN_FORM):
            self.__dict__.update({name: value for name, value in deepcopy(RECOMMENDED).items() if name not in said})
        return self

    @model_validator(mode="after")
    def _phases_agree(self):
        for name in PER_PHASE:
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != len(self.segments):
                raise ValueError(f"{name} has {len(value)} entries for {len(self.segments)} phases ({self.segments})")
        if list(self.segments) != sorted(self.segments, reverse=True):
            raise ValueError(f"segments {self.segments} must not increase: phases merge segments")
        if self.method == "inter_segment" and list(self.segments) != [1]:
            raise ValueError("method: inter_segment is consistency over the whole time axis, so segments must be [1]")
        if self.method == "inter_segment" and self.renoise == "student" and self.prompts is None:
            raise ValueError("renoise: student needs prompts: a prompt file")
        if self.budgets and not (self.condition_on_target and list(self.segments) == [1]):
            raise ValueError("budgets are jumps across segments: they need condition_on_target: true and segments: [1]")
        if self.budgets and (self.source != "trajectories" or "consistency" in self.per_phase("target")):
            raise ValueError("budgets are jumps between stored states: they need those, and target: trajectory")
        pairs = zip(self.per_phase("space"), self.per_phase("distance"), strict=True)
        if ("x0", "log_l2") in pairs:
            raise ValueError(
                "distance: log_l2 weighs all jumps alike and space: x0 does not; with log_l2 take space: z"
            )
        if self.source == "data" and self.images is None:
            raise ValueError("source: data needs images: a captioned image folder")
        if self.source == "online" and self.prompts is None:
            raise ValueError("source: online needs prompts: a prompt file")
        if self.source != "trajectories" and self.method == "segments" and "trajectory" in self.per_phase("target"):
            raise ValueError(f"source: {self.source} stores no states, so target must be consistency")
        return self

    @property
    def reads_trajectories(self) -> bool:
        """Whether a store of trajectories is needed."""
        return self.renoise == "stored" if self.method == "inter_segment" else self.source == "trajectories"

    @property
    def asks_teacher(self) -> bool:
        """Whether steps encode prompts and ask the teacher; its networks can leave before the first where none does."""
        return self.method == "inter_segment" or self.source != "trajectories"

    @property
    def default_gamma(self) -> float:
        """The sampler's gamma that suits the finished student."""
        return default_gamma(self.segments[-1], self.condition_on_target)

    def per_phase(self, name: str) -> list:
        """The value of `name` for each phase."""
        value = getattr(self, name)
        return list(value) if isinstance(value, list) else [value] * len(self.segments)


class Tuning(Training):
    """What the stages of preference learning have in common: the student's sampler, the rewards, the guard."""

    prompts: str = Field(description=".txt (one a line) or .jsonl ({prompt, language, ...}) file")
    guard_prompts: str | None = Field(None, description="prompt file that the guard watches; default: the same")
    languages: dict[str, Weight] = Field(
        {}, description="weight of each language in the draw of prompts, others left out; default: as they come"
    )
    num_steps: PositiveInt
    learning_rate: PositiveFloat = Field(1e-4, description="peak; decays to 0")
    warmup_steps: int = Field(0, ge=0, le=1_000_000_000)
    adapter: Lora = Field(Lora(rank=16, alpha=16.0), description="the preference adapter, over the distilled student")
    sampling_steps: int = Field(4, ge=1, le=8, description="of the student's sampler, which is what is tuned")
    gamma: Fraction | None = Field(None, description="noise put back between its steps; default: what suits it")
    rewards: list[RewardEntry] = Field(
        min_length=1, description="trained on, names or entries; their weighted sum is the reward"
    )
    normalise: bool = Field(True, description="put each reward on the scale of its running deviation before the sum")
    autoencoder_tiles: Annotated[int, Field(gt=0, le=16_384)] | None = Field(
        None, description="pixels a side of tiles that it works in, recomputed in the backward pass: less memory, seams"
    )
    guard: Guard

    @model_validator(mode="after")
    def _held_out_is_not_trained_on(self):
        both = {reward.name for reward in self.rewards} & {reward.name for reward in self.guard.rewards}
        if both:
            raise ValueError(f"guard.rewards: {', '.join(sorted(both))} is trained on; a guard needs another reward")
        return self

    @property
    def encodes_ahead(self) -> bool:
        """Whether all prompts are encoded before the first step, so that text encoders can leave memory.

        Of a long run they are not: each would be kept in every process's own memory, 0.3 MB of SDXL's.
        """
        return self.num_steps * self.batch_size <= MOST_ENCODED_AHEAD

    @property
    def reward_models(self) -> list[Reward]:
        """Every reward model that the stage asks: those trained on, then those held out."""
        return [*self.rewards, *self.guard.rewards]

    @property
    def needs_random_steps(self) -> bool:
        """Whether the sampler must put noise back."""
        return False


class Feedback(Tuning):
    """The gradient of a differentiable reward through the student's last sampling steps."""

    kind: Literal["feedback"] = "feedback"
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
    small_decoder: str | None = Field(
        None, description="folder of an AutoencoderTiny that draws for the rewards trained on, never for the guard"
    )
    _hinge_is_settled = model_validator(mode="after")(hinges.settle)

    @model_validator(mode="after")
    def _sampler_has_those_steps(self):
        if self.num_grad_steps > self.sampling_steps:
            raise ValueError(f"num_grad_steps {self.num_grad_steps} is more than sampling_steps {self.sampling_steps}")
        if self.kl and self.gamma == 0.0:
            raise ValueError("kl needs gamma above 0: a deterministic step has no distribution; take anchor")
        if self.kl and self.sampling_steps < 2:
            raise ValueError("kl needs sampling_steps 2 or more: the last step puts no noise back; take anchor")
        return self

    @property
    def reads_trajectories(self) -> bool:
        """Whether a store of trajectories is needed."""
        return self.consistency > 0

    @property
    def needs_random_steps(self) -> bool:
        """Whether the sampler must put noise back."""
        return self.kl > 0


class Dpo(Tuning):
    """Preference pairs: the student's own samples, ranked by the rewards, or a table; hyper-parameters as in TRL."""

    kind: Literal["dpo"] = "dpo"
    form: Literal["endpoint", "diffusion_dpo", "pso"] = Field(
        "endpoint", description="log-ratio: errors at all times of the sampler, at one of them, or of its random steps"
    )
    pairs: str | None = Field(
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
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust", "conservative"] = "sigmoid"
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


class Policy(Tuning):
    """Policy gradient on the stochastic few-step sampler, for any reward; names as in TRL's GRPOConfig."""

    kind: Literal["policy"] = "policy"
    num_generations: int = Field(4, ge=2, le=1024, description="samples a prompt, compared with each other")
    num_iterations: PositiveInt = Field(1, description="optimiser steps on the same samples")
    epsilon: PositiveFloat = Field(1e-3, description="clip range of the probability ratio, per element")
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
        """Samples that one process must have together: a prompt's group."""
        return self.num_generations


Stage = Annotated[
    TrainTeacher | TrainReward | Trajectories | Distill | Feedback | Dpo | Policy | Evaluate,
    Field(discriminator="kind"),
]


class Recipe(Strict):
    """One experiment, from a teacher to a report."""

    name: str = Field(pattern=NAME, description="folder of links under runs")
    seed: int = Field(0, ge=0)
    teacher: Teacher
    stages: list[Stage] = Field(min_length=1)
    samples: Samples = presentation(Samples())
    runs: str = presentation("runs", description="folder that holds every run")
    device: Literal["auto", "cpu", "cuda", "mps"] = presentation("auto")
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = presentation(["tensorboard"])
    _written: dict[str, str] = PrivateAttr(default_factory=dict)  # paths in rewards' settings -> the file's text

    @model_validator(mode="after")
    def _name_is_free(self):
        if self.name in RESERVED:
            raise ValueError(f"name {self.name} is that of a folder under runs that all runs share; take another")
        return self


def missing_trackers(recipe: Recipe) -> Iterator[tuple[int, str]]:
    """Yield (its place in `trackers`, what to do) of every tracker of `recipe` that is not installed."""
    for i, name in enumerate(recipe.trackers):
        if find_spec(name) is None:
            yield i, f"{name} is not installed: pip install 'mlcm-rl[{name}]', or take it out of trackers"
