"""What every stage says of itself, and what all stages that train have in common.

A kind of stage is a type here with its settings, and a module of its name in `stages` with `run`. All else that is to
be known of it stands in the type: what it starts from, its maths number, what it reads, takes and leaves.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveFloat, model_validator

from .takes import Networks, Pass, Values
from .types import Decay, Full, Lora, NonNegativeFloat, PositiveInt, Reward, Strict, presentation

if TYPE_CHECKING:
    from .experiment import Recipe

States = Literal["milestones", "all"]


class OneStage(Strict):
    """What every stage has in common."""

    maths: ClassVar[int] = 1  # raised when results would come out differently for the same settings
    leaves_student: ClassVar[bool] = False

    seed: int | None = Field(None, ge=0, description="of this stage alone; default: the recipe's")

    @property
    def corrections(self) -> int:
        """Before how many corrections a stage set like this one came out wrongly; they left all others as they were.

        Its maths number is higher by as much: raising that of the kind would orphan the folders of the others.
        """
        return 0

    @property
    def reward_models(self) -> list[Reward]:
        """Every reward model that the stage asks."""
        return []

    @property
    def trained_on(self) -> list[Reward]:
        """Those of them that its steps ask."""
        return []

    @property
    def parents(self) -> tuple[str, ...]:
        """The kinds of earlier stages that it starts from, the latest of each, where the recipe has them."""
        asks_trained = any(reward.is_of_this_recipe for reward in self.reward_models)
        return ("train_teacher", "train_reward") if asks_trained else ("train_teacher",)

    @property
    def steps_per_phase(self) -> list[int]:
        """Optimiser steps of each phase, most stages having one; none where nothing is trained."""
        return []

    @property
    def num_stored(self) -> int:
        """Trajectories that it stores, shard by shard."""
        return 0

    def states_read(self, earlier: Sequence["OneStage"]) -> States | None:
        """Return which states of stored trajectories it reads, None where it reads none.

        `earlier` are the stages before it, for one that reads as they did.
        """
        return None

    def variant(self, recipe: "Recipe") -> str:
        """Return what the name of its folder ends in where it leaves less than it could; "" where it leaves all.

        What is left out is nothing that the stages of `recipe` read: results are the same, and a folder that has all
        is taken where it is finished.
        """
        return ""

    def passes(self, recipe: "Recipe", part: int = 0) -> list[Pass]:
        """Return its passes, in the order in which a step takes them.

        `part`: samples of a micro-batch that a process has, where several share it; 0 where one has all of them. An
        empty list stands for so little that nobody plans for it.
        """
        return []

    def networks(self, distilled: Lora | Full) -> Networks:
        """Return what it has in memory; `distilled` is the adapter of the student that it starts from or draws with."""
        return Networks()

    def disk(self, recipe: "Recipe", values: Values) -> int:
        """Return the bytes that it leaves, with its newest checkpoints while it runs."""
        return 0


class Training(OneStage):
    """What every stage that trains has in common."""

    if TYPE_CHECKING:
        kind: str  # which each of them gives its own value

    batch_size: int = Field(gt=0, le=65_536, description="samples per optimiser step")
    gradient_accumulation: PositiveInt = Field(
        1, description="micro-batches a step is split into; must divide batch_size"
    )
    gradient_checkpointing: bool = presentation(
        False, description="recompute activations in the backward pass: less memory, the same gradients"
    )
    precision: Literal["no", "bf16"] = Field("no", description="autocast of the student's passes")
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    max_grad_norm: PositiveFloat = 1.0
    log_every: PositiveInt = presentation(10)
    save_every: PositiveInt = presentation(200, description="steps between checkpoints to resume from")
    keep_checkpoints: PositiveInt = presentation(2, description="newest checkpoints that stay, the guard's best inside")
    sample_every: PositiveInt = presentation(200, description="steps between sample grids")

    @model_validator(mode="after")
    def _accumulation_divides_batch(self):
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"gradient_accumulation {self.gradient_accumulation} does not divide batch_size {self.batch_size}"
            )
        return self

    @property
    def micro_batch(self) -> int:
        """Samples that are in memory at a time."""
        return self.batch_size // self.gradient_accumulation

    @property
    def samples_together(self) -> int:
        """Samples that one process must have together."""
        return 1

    def sample_grids(self, recipe: "Recipe", role: Literal["teacher", "student"] = "student") -> list[Pass]:
        """Return the pass that draws the recipe's fixed prompts, where it has any."""
        count = len(recipe.samples.prompts)
        return [Pass(role, batch=count, is_chained=True, seen_by="person", in_step=False)] if count else []
