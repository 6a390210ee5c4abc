"""The base types of all stages, and of those that train.

A kind of stage is a type in this package with its settings, and a module of its name in `stages` with `run`. Everything
else about it is in the type: its parents, its maths number, what it reads, and the passes, networks and disk it takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveFloat, model_validator

from .takes import LpipsSizes, Networks, Pass, Values
from .types import Decay, Full, Lora, NonNegativeFloat, PositiveInt, Reward, Strict, presentation

if TYPE_CHECKING:
    from .experiment import Recipe

States = Literal["milestones", "all"]


@dataclass(frozen=True)
class Requirement:
    """A stage that must stand earlier in the recipe: one of these `kinds`, the first of which the message names.

    `reason` begins the message; the default is the stage's kind and "needs". `setting` is the key at fault; the default
    is the stage itself.
    """

    kinds: tuple[str, ...]
    reason: str = ""
    setting: str = ""


class OneStage(Strict):
    """What every stage has in common."""

    maths: ClassVar[int] = 1  # raised when results would come out differently for the same settings
    leaves_student: ClassVar[bool] = False

    seed: int | None = Field(None, ge=0, description="of this stage alone; default: the recipe's")

    @property
    def corrections(self) -> int:
        """How many bug fixes changed the result of these settings, and not that of others.

        The number is added to `maths`: raising `maths` itself would orphan finished stages that the fixes left alone.
        """
        return 0

    @property
    def reward_models(self) -> list[Reward]:
        """The reward models of the stage."""
        return []

    @property
    def trained_on(self) -> list[Reward]:
        """The reward models that its steps train on."""
        return []

    @property
    def parents(self) -> tuple[str, ...]:
        """The kinds of earlier stages that it starts from: the latest of each that the recipe has."""
        uses_trained = any(reward.is_of_this_recipe for reward in self.reward_models)
        return ("train_teacher", "adapt_text", *["train_reward"] * uses_trained)

    @property
    def requirements(self) -> list[Requirement]:
        """The earlier stages that it cannot run without; a recipe that lacks one is refused."""
        return []

    @property
    def steps_per_phase(self) -> list[int]:
        """Optimiser steps of each phase; most stages have one phase, and none if nothing is trained."""
        return []

    @property
    def num_stored(self) -> int:
        """Number of trajectories that it stores."""
        return 0

    @property
    def lpips_sizes(self) -> LpipsSizes | None:
        """The latent LPIPS that it trains, None where it trains none."""
        return None

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
        """Return its passes, in the order of a step.

        `part` is the number of a micro-batch's samples in each of several processes, 0 for a single process. An empty
        list means that the stage takes too little to plan for.
        """
        return []

    def networks(self, distilled: Lora | Full) -> Networks:
        """Return the networks in memory; `distilled` is the adapter of the student that it starts from or samples."""
        return Networks()

    def disk(self, recipe: "Recipe", values: Values) -> int:
        """Return the bytes of its results and, while it runs, of its newest checkpoints."""
        return 0


class Training(OneStage):
    """What every stage that trains has in common."""

    if TYPE_CHECKING:
        kind: str  # each type has its own value

    batch_size: int = Field(gt=0, le=65_536, description="samples per optimiser step; of dpo, pairs")
    gradient_accumulation: PositiveInt = Field(
        1, description="micro-batches a step is split into; must divide batch_size"
    )
    gradient_checkpointing: bool = presentation(
        False, description="recompute activations in the backward pass: less memory, the same gradients"
    )
    precision: Literal["no", "bf16"] = Field("no", description="autocast of the student's passes")
    weight_decay: NonNegativeFloat = Field(0.0, description="of AdamW, a step, times the learning rate")
    betas: tuple[Decay, Decay] = Field(
        (0.9, 0.999), description="decays a step of AdamW's averages of the gradient and of its square"
    )
    max_grad_norm: PositiveFloat = Field(
        1.0, description="gradients of a larger norm, over all weights, are scaled to it"
    )
    log_every: PositiveInt = presentation(
        10,
        description="steps between records of log.jsonl and the trackers, which have the first and the last step too",
    )
    save_every: PositiveInt = presentation(200, description="steps between checkpoints to resume from")
    keep_checkpoints: PositiveInt = presentation(
        2, description="number of newest checkpoints kept; each also holds the guard's best step"
    )
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
        """Number of samples in memory at a time."""
        return self.batch_size // self.gradient_accumulation

    @property
    def samples_together(self) -> int:
        """Number of samples that must be in one process together."""
        return 1

    def sample_grids(self, recipe: "Recipe", role: Literal["teacher", "student"] = "student") -> list[Pass]:
        """Return the pass that samples the recipe's fixed prompts, if it has any."""
        count = len(recipe.samples.prompts)
        return [Pass(role, batch=count, is_chained=True, viewer="person", in_step=False)] if count else []
