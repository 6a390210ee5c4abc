"""The parts of a recipe's types: strictness, presentation fields, the teacher, adapters, rewards, the guard."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat, model_validator

from . import families


def _not_negligible(weight: float) -> float:
    """Return a weight. Raise ValueError if it is above 0 and so small that float32 would never draw its language."""
    if 0 < weight < MIN_WEIGHT:
        raise ValueError(
            f"weight {weight} is above 0 and below {MIN_WEIGHT}: weights are compared, so write larger ones"
        )
    return weight


MIN_WEIGHT = 1e-6
Weight = Annotated[float, Field(ge=0, le=1_000_000), AfterValidator(_not_negligible)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
COMMIT = r"^[0-9a-f]{40}$"
VARIANT = r"^[a-z0-9_]+$"
# Counts have a limit: a larger number is a slip, and objects of that number would fill any memory before an error.
PositiveInt = Annotated[int, Field(gt=0, le=1_000_000_000)]
HeadWidth = Annotated[int, Field(gt=0, le=65_536, multiple_of=4)]  # in groups of 4
Quantised = Literal["int8", "nf4"]
if TYPE_CHECKING:
    Family = str
else:
    Family = Literal[tuple(families.names())]  # those of other distributions too
MIN_WATCHED = 2  # prompts of a guard, whose gain is in deviations over them
TRAINED = "trained"  # the reward model of a `train_reward` stage


def default_gamma(num_segments: int, conditioned: bool) -> float:
    """Return a student's default gamma: 1 (re-noising) for one segment without a target time, else 0."""
    return 1.0 if num_segments == 1 and not conditioned else 0.0


def sampling_segments(num_segments: int, conditioned: bool) -> int:
    """Return the segments whose boundaries a student's sampler visits: its own, or 1 where it knows its target time."""
    return 1 if conditioned else num_segments


def presentation(default: Any, **settings: Any) -> Any:
    """Return a field that cannot change a stage's result and is therefore not in its fingerprint."""
    return Field(default, json_schema_extra={"presentation": True}, **settings)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Teacher(Strict):
    """The model to distil: a folder in diffusers format (or a hub name with a pinned revision)."""

    path: str = Field(description="folder in diffusers format, relative to the recipe's file, or a hub name")
    revision: str | None = Field(None, pattern=COMMIT, description="pinned commit of a hub model")
    family: Family = Field(description="what kind of model it is: sdxl, sd, or another in mlcm_rl/recipe/families.py")
    guidance_scale: NonNegativeFloat = Field(8.0, description="classifier-free guidance of the teacher (1 = none)")
    dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="precision of the frozen weights")
    resolution: int | None = Field(None, gt=0, le=16_384, description="pixels a side; default: the model's own")
    variant: str | None = Field(
        None, pattern=VARIANT, description="of its weight files, fp16 for model.fp16.safetensors; default: none"
    )
    lora: str | None = Field(
        None, description="file of a LoRA over it, .safetensors in diffusers' or kohya's layout: part of the teacher"
    )
    lora_weight: float = Field(1.0, description="factor of what `lora` adds")
    memory_format: Literal["contiguous", "channels_last"] = Field(
        "contiguous", description="layout of the convolutions' weights; channels_last draws faster on most hardware"
    )

    text_adapter: str | None = Field(
        None,
        description="folder that an adapt_text stage left: prompts in its languages go through it, all others through "
        "the teacher's own text encoders",
    )

    quantise: Quantised | None = Field(
        None,
        description="integers that the denoiser's linear layers are stored in, for LoRA students: int8 has 1 byte a "
        "weight, nf4 0.56; default: dtype",
    )

    @property
    def evaluations(self) -> int:
        """Evaluations of a guided pass: one with the prompt and, unless the guidance scale is 1, one without.

        One too where the scale is an input of the denoiser.
        """
        return 1 if self.guidance_scale == 1.0 or families.layout_of(self.family).embeds_guidance else 2


class Samples(Strict):
    """The fixed prompts and seeds of the sample grids."""

    prompts: list[str] = Field([], description="prompts of the sample grids, any language")
    sampling_steps: list[Annotated[int, Field(ge=1, le=8)]] = Field(
        [1, 2, 4, 8], min_length=1, description="network evaluations a picture, a column each"
    )


class Lora(Strict):
    """Low-rank adapter on the family's published target modules."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(64, gt=0, le=65_536, description="of the two factors of each weight's update")
    alpha: PositiveFloat = Field(64.0, description="alpha / rank times the factors are added to a weight")


class Full(Strict):
    """All weights of the denoiser."""

    kind: Literal["full"] = "full"


class Reward(Strict):
    """A reward model and its weight in a sum of several."""

    name: str = Field(description="file in reward_models, or another distribution's; see `mlcm rewards list`")
    weight: float = Field(1.0, description="factor of its score in the sum; below 0, less of it is better")
    settings: dict[str, Any] = Field({}, description="of the reward model itself; see its card")
    dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="precision of its weights")
    device: str | None = Field(None, description="where it runs; default: with the student")
    chunk_size: PositiveInt | None = Field(None, description="pictures scored at a time; default: the whole batch")

    @property
    def is_constraint(self) -> bool:
        """Whether it may not fall, instead of being part of the sum."""
        return False

    @property
    def is_of_this_recipe(self) -> bool:
        """Whether it is the reward of the recipe's own `train_reward` stage: `trained`, without a folder."""
        return self.name == TRAINED and "folder" not in self.settings

    def from_folder(self, folder: str) -> "Reward":
        """Return the reward with `folder` in its settings if it is the recipe's own, else as it is."""
        return (
            self.model_copy(update={"settings": self.settings | {"folder": folder}}) if self.is_of_this_recipe else self
        )


class TuningReward(Reward):
    """A reward model that a stage trains on: with a weight in the sum, or as a constraint."""

    max_drop: NonNegativeFloat | None = Field(
        None,
        exclude_if=lambda limit: limit is None,  # so that stages without constraints have the fingerprints of before
        description="a constraint in place of a weight: the mean may fall below the reference's by this many of the "
        "reference's standard deviations, and no more",
    )

    @property
    def is_constraint(self) -> bool:
        """Whether it may not fall, instead of being part of the sum."""
        return self.max_drop is not None

    @model_validator(mode="after")
    def _constraint_has_no_weight(self):
        if self.is_constraint and self.weight != 1.0:
            raise ValueError(f"weight has no meaning beside max_drop: {self.name} is a constraint, not part of the sum")
        return self


def _as_reward(one: str | Reward) -> Reward:
    return Reward(name=one) if isinstance(one, str) else one


def _as_tuning_reward(one: str | TuningReward) -> TuningReward:
    return TuningReward(name=one) if isinstance(one, str) else one


if TYPE_CHECKING:
    RewardEntry = Reward
    TuningRewardEntry = TuningReward
else:  # in a file a name alone stands for an entry with that name
    RewardEntry = Annotated[str | Reward, AfterValidator(_as_reward)]
    TuningRewardEntry = Annotated[str | TuningReward, AfterValidator(_as_tuning_reward)]


class Guard(Strict):
    """Stops a run that hacks its reward, by held-out rewards on fixed prompts and noise."""

    rewards: list[RewardEntry] = Field(min_length=1, description="held out: never trained on; names, or entries")
    num_prompts: int = Field(
        64, ge=MIN_WATCHED, le=1_000_000_000, description="watched; gains are in units of the deviation over them"
    )
    every: PositiveInt = Field(20, description="steps between looks")
    patience: PositiveInt = Field(3, description="looks in a row without a better held-out reward that end the run")
