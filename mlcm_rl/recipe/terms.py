"""Terms that a stage adds to its loss, on the clean samples that the student makes: distill and feedback."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, model_validator

from .takes import Pass
from .types import HeadWidth, Lora, NonNegativeFloat, Strict, Teacher

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

    weight: PositiveFloat = Field(1.0, description="factor of the term in the loss")
    times: tuple[Part, Part] = Field(
        (0.02, 0.98), description="parts of the time axis that noise is drawn between, evenly; 1 is pure noise"
    )

    @model_validator(mode="after")
    def _times_ascend(self):
        if self.times[0] >= self.times[1]:
            raise ValueError(f"times {list(self.times)} must ascend: the first is the smallest noise")
        return self

    @property
    @abstractmethod
    def warm_up(self) -> tuple[str, int]:
        """The key, and the steps in which the term's own network learns and the student has no term yet."""

    def conflicts(self, num_steps: int) -> Iterator[str]:
        """Yield what is wrong with the term in a stage of `num_steps` optimiser steps."""
        key, warmup_steps = self.warm_up
        if warmup_steps >= num_steps:
            yield (
                f"{key} {warmup_steps} of {num_steps} steps leave none in which the term acts on the student: lower it"
            )

    def acting(self, num_steps: int) -> float:
        """Return the share of a stage's `num_steps` in which the term acts on the student."""
        return max(0.0, 1 - self.warm_up[1] / num_steps)


class Matching(Term):
    """Distribution matching without pictures (DMD): moves samples to where the teacher's are more likely."""

    fake: Fake = Field(Fake(), description="the score of the student's own samples, trained beside it")
    guidance_scale: NonNegativeFloat | None = Field(
        None, description="of the teacher, in this term; default: teacher.guidance_scale"
    )

    @property
    def warm_up(self) -> tuple[str, int]:
        """Those of the fake score."""
        return "matching.fake.warmup_steps", self.fake.warmup_steps

    def passes_of_loss(self, teacher: Teacher, num_steps: int, samples: float, batch: int) -> list[Pass]:
        """Return the guided teacher's passes and the fake score's, without gradient, for `samples` of all steps.

        Those of the warm-up have none. `batch` of them are in memory at a time.
        """
        scale = self.guidance_scale
        guided = teacher if scale is None else teacher.model_copy(update={"guidance_scale": scale})
        matched = samples * self.acting(num_steps)
        return [Pass("teacher", matched, guided.evaluations, batch), Pass("fake", matched, batch=batch)]

    def pass_of_network(self, samples: float, batch: int) -> Pass:
        """Return the fake score's own training on `samples` of all steps, `batch` of them in memory at a time."""
        return Pass("fake", samples, self.fake.num_updates, batch, gradient=True, output="prediction", beside=True)


class Adversarial(Term):
    """Heads on the frozen teacher's features tell real samples from the student's, which learns to pass for real."""

    weight: PositiveFloat = Field(0.1, description="factor of the term in the loss")
    loss: Literal["hinge", "softplus", "relativistic"] = Field(
        "hinge",
        description="of the heads: hinge stops at a margin of 1, softplus is GAN's logistic loss; relativistic is of "
        "the difference between a sample and its own target, by which heads learn at once",
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
    sees_start: bool = Field(
        False,
        description="the heads see where a jump began too, beside its end, as SDXL-Lightning's: what passes for real "
        "is the end of this jump, not of any",
    )
    learning_rate: PositiveFloat = Field(1e-4, description="of the heads, constant")
    warmup_steps: int = Field(
        0,
        ge=0,
        le=1_000_000_000,
        description="of the stage, in which the heads learn and the student has no such term yet",
    )
    gradient_penalty: NonNegativeFloat = Field(1e-5, description="weight of R1 on the features of real samples")
    width: HeadWidth = Field(64, description="channels of a head's convolutions, a multiple of 4")

    @property
    def warm_up(self) -> tuple[str, int]:
        """Those of the heads."""
        return "adversarial.warmup_steps", self.warmup_steps
