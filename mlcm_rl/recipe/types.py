"""What a recipe's types are made of: strictness, settings that change no result, the teacher, adapters, rewards."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat

from . import families


def _no_speck(weight: float) -> float:
    """Return a weight. Raise ValueError for one beside which the draw in float32 would be of nothing."""
    if 0 < weight < LEAST_WEIGHT:
        raise ValueError(
            f"weight {weight} is above 0 and below {LEAST_WEIGHT}: weights are compared, so write larger ones"
        )
    return weight


LEAST_WEIGHT = 1e-6
Weight = Annotated[float, Field(ge=0, le=1_000_000), AfterValidator(_no_speck)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
COMMIT = r"^[0-9a-f]{40}$"
VARIANT = r"^[a-z0-9_]+$"
# Counts end somewhere: beyond, a number is a slip, and what is made of so many fills any memory before it is refused.
PositiveInt = Annotated[int, Field(gt=0, le=1_000_000_000)]
if TYPE_CHECKING:
    Family = str
else:
    Family = Literal[tuple(families.names())]  # those of other distributions too
TRAINED = "trained"  # the reward model that reads what a `train_reward` stage has made


def default_gamma(num_segments: int, conditioned: bool) -> float:
    """The sampler's gamma that suits a student: 1 (re-noise) for one segment, else 0, as when told where jumps end."""
    return 1.0 if num_segments == 1 and not conditioned else 0.0


def presentation(default: Any, **settings: Any) -> Any:
    """A field that cannot change a stage's result and is therefore not hashed into its fingerprint."""
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
    memory_format: Literal["contiguous", "channels_last"] = Field(
        "contiguous", description="layout of the convolutions' weights; channels_last draws faster on most hardware"
    )

    @property
    def evaluations(self) -> int:
        """What a guided pass counts: the network is evaluated with the prompt and, where that changes it, without."""
        return 1 if self.guidance_scale == 1.0 else 2


class Samples(Strict):
    """The fixed prompts and seeds of the grids that runs leave behind."""

    prompts: list[str] = Field([], description="prompts of the sample grids, any language")
    sampling_steps: list[Annotated[int, Field(ge=1, le=8)]] = Field([1, 2, 4, 8], min_length=1)


class Lora(Strict):
    """Low-rank adapter on the family's published target modules."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(64, gt=0, le=65_536)
    alpha: PositiveFloat = 64.0


class Full(Strict):
    """All weights of the denoiser."""

    kind: Literal["full"] = "full"


class Reward(Strict):
    """A reward model, and what it weighs in a sum of several."""

    name: str = Field(description="file in reward_models, or another distribution's; see `mlcm rewards list`")
    weight: float = 1.0
    settings: dict[str, Any] = Field({}, description="of the reward model itself; see its card")
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    device: str | None = Field(None, description="where it runs; default: with the student")
    chunk_size: PositiveInt | None = Field(None, description="pictures scored at a time; default: the whole batch")

    @property
    def is_of_this_recipe(self) -> bool:
        """Whether it is what the recipe's own `train_reward` stage makes: `trained`, from no folder named here."""
        return self.name == TRAINED and "folder" not in self.settings

    def from_folder(self, folder: str) -> "Reward":
        """The same, read from `folder` where it is the recipe's own."""
        return (
            self.model_copy(update={"settings": self.settings | {"folder": folder}}) if self.is_of_this_recipe else self
        )


def _named(one: str | Reward) -> Reward:
    return Reward(name=one) if isinstance(one, str) else one


if TYPE_CHECKING:
    RewardEntry = Reward
else:  # in a file a name alone stands for an entry with that name
    RewardEntry = Annotated[str | Reward, AfterValidator(_named)]


class Guard(Strict):
    """What stops a run that hacks its reward: rewards that it is not trained on, watched on fixed prompts and noise."""

    rewards: list[RewardEntry] = Field(min_length=1, description="held out: never trained on; names, or entries")
    num_prompts: int = Field(
        64, ge=2, le=1_000_000_000, description="watched; gains are in units of the deviation over them"
    )
    every: PositiveInt = Field(20, description="steps between looks")
    patience: PositiveInt = Field(3, description="looks in a row without a better held-out reward that end the run")
