"""The stage that trains a reward for preference learning."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from .reads import PICTURES
from .stage import Training
from .types import NonNegativeFloat, PositiveInt, presentation


class TrainReward(Training):
    """Trains the reward `trained` on a table of pairs, by Bradley-Terry: a head over frozen picture features."""

    kind: Literal["train_reward"] = "train_reward"
    pairs: Annotated[str, PICTURES] = Field(
        description="pairs to learn, a .parquet file or a folder as `mlcm pairs` writes it, with columns prompt, "
        "chosen, rejected"
    )
    backbone: Literal["efficientnet_lite0", "mobilenet_v2"] = Field(
        "efficientnet_lite0", description="the shipped body whose features the head reads"
    )
    resolution: int = Field(64, gt=0, le=16_384, description="pixels a side that pictures are read at, as drawn")
    held_out: float = Field(0.2, gt=0, lt=1, description="share of the prompts whose pairs only measure the head")
    num_steps: PositiveInt = Field(400, description="optimiser steps")
    batch_size: int = Field(64, gt=0, le=65_536, description="pairs per optimiser step")
    learning_rate: PositiveFloat = Field(2e-3, description="peak; decays to 0")
    weight_decay: NonNegativeFloat = Field(0.05, description="of AdamW, a step, times the learning rate")
    dropout: float = Field(0.5, ge=0, lt=1, description="of the features")
    held_out_every: PositiveInt = presentation(20, description="steps between measures on the held-out pairs")

    @property
    def parents(self) -> tuple[str, ...]:
        """None."""
        return ()

    @property
    def steps_per_phase(self) -> list[int]:
        """Optimiser steps, in one phase."""
        return [self.num_steps]
