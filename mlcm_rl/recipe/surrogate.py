"""The learned stand-in for rewards without gradient, of a `feedback` stage."""

from typing import Annotated

from pydantic import Field, PositiveFloat

from .types import HeadWidth, Strict


class Surrogate(Strict):
    """Heads on the frozen student's features, fitted online to the scores of its samples; their gradient tunes it."""

    num_generations: int = Field(
        4, ge=2, le=1024, description="samples a prompt; what is fitted is the difference of their scores"
    )
    num_updates: int = Field(4, ge=1, le=100, description="of the heads in a step, on the step's own scores")
    head_start: int = Field(10, ge=0, le=1_000_000_000, description="first steps, in which the heads alone learn")
    learning_rate: PositiveFloat = Field(1e-3, description="of the heads, constant")
    width: HeadWidth = Field(64, description="channels of a head's convolutions, a multiple of 4")
    time: Annotated[float, Field(gt=0, le=1)] = Field(
        0.2, description="part of the time axis that samples are noised to for their features; 1 is pure noise"
    )
