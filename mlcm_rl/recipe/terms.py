"""Terms that a distill stage adds to its distance, on the clean samples that the student makes."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, model_validator

from .types import Lora, NonNegativeFloat, PositiveInt, Strict

Part = Annotated[float, Field(ge=0, le=1)]


class Fake(Lora):
    """The score of the student's own samples: an adapter over the frozen teacher, trained beside the student."""

    learning_rate: PositiveFloat = Field(1e-4, description="constant")
    num_updates: int = Field(5, ge=1, le=100, description="of it for each of the student's, as DMD2")
    warmup_steps: int = Field(
        0, ge=0, le=1_000_000_000, description="of the stage, in which it learns and the student has no such term yet"
    )


class Term(Strict):
    """What the terms share: a weight, and the noise under which samples are compared."""

    weight: PositiveFloat = Field(1.0, description="factor of the term in the sum with the distance")
    times: tuple[Part, Part] = Field(
        (0.02, 0.98), description="parts of the time axis that noise is drawn between, evenly; 1 is pure noise"
    )

    @model_validator(mode="after")
    def _times_ascend(self):
        if self.times[0] >= self.times[1]:
            raise ValueError(f"times {list(self.times)} must ascend: the first is the smallest noise")
        return self


class Matching(Term):
    """Distribution matching without pictures (DMD): moves samples to where the teacher's are more likely."""

    fake: Fake = Field(Fake(), description="the score of the student's own samples, trained beside it")
    guidance_scale: NonNegativeFloat | None = Field(
        None, description="of the teacher, in this term; default: teacher.guidance_scale"
    )


class Adversarial(Term):
    """Heads on the frozen teacher's features tell real samples from the student's, which learns to pass for real."""

    weight: PositiveFloat = Field(0.1, description="factor of the term in the sum with the distance")
    loss: Literal["hinge", "softplus"] = Field(
        "hinge", description="of the heads: hinge stops at a margin of 1, softplus is GAN's logistic loss"
    )
    real: Literal["milestones", "images"] = Field(
        "milestones",
        description="what is real: the target of the distance, for inter_segment the student's own output at the "
        "milestone below; or the pictures of images",
    )
    jumps: Literal["clean", "all"] = Field(
        "clean",
        description="which jumps it is of: those that end at time 0; or all, where the student's end and its target "
        "get the noise of a time above their own, as PCM",
    )
    learning_rate: PositiveFloat = Field(1e-4, description="of the heads, constant")
    gradient_penalty: NonNegativeFloat = Field(1e-5, description="weight of R1 on the features of real samples")
    width: PositiveInt = Field(64, description="channels of a head's convolutions, a multiple of 4")

    @model_validator(mode="after")
    def _width_has_groups(self):
        if self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of 4, the number of groups that are normalised")
        return self
