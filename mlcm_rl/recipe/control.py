"""The stage that trains a ControlNet for a teacher and its students."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveFloat

from .reads import PICTURES
from .stage import OneStage, Requirement, States, Training
from .takes import SAVED, Networks, Pass, Values
from .types import Fraction, Full, Lora, PositiveInt

if TYPE_CHECKING:
    from .experiment import Recipe

CONTROLLED = "UNet2DConditionModel"  # diffusers' class of the denoisers that have a ControlNet here


class TrainControl(Training):
    """Trains a ControlNet that lets the teacher, and its students, follow the edges of a picture."""

    kind: Literal["train_control"] = "train_control"
    images: Annotated[str | None, PICTURES] = Field(
        None,
        description="folder with metadata.jsonl ({file_name, prompts}) beside the pictures; default: the teacher's own "
        "samples, of the trajectories before it",
    )
    num_steps: PositiveInt = Field(description="optimiser steps")
    learning_rate: PositiveFloat = Field(1e-4, description="peak; decays to 0")
    warmup_steps: int = Field(50, ge=0, le=1_000_000_000, description="steps of linear warm-up")
    prompt_dropout: Fraction = Field(
        0.5, description="share of prompts dropped, so that edges alone must do (arXiv 2302.05543, section 3.3)"
    )
    min_snr_gamma: PositiveFloat | None = Field(
        None,
        description="most an error of x0 weighs, arXiv 2303.09556; below 1 most times weigh alike in x0, so that the "
        "noisy ones, where shapes are decided, count",
    )

    @property
    def parents(self) -> tuple[str, ...]:
        """The teacher and, without pictures, the store of its samples."""
        return (*super().parents, *["trajectories"] * (self.images is None))

    @property
    def requirements(self) -> list[Requirement]:
        """The store, without pictures."""
        reason = "without images train_control learns from the teacher's samples: it needs"
        return [] if self.images else [Requirement(("trajectories",), reason)]

    @property
    def steps_per_phase(self) -> list[int]:
        """Optimiser steps, in one phase."""
        return [self.num_steps]

    def states_read(self, earlier: Sequence[OneStage]) -> States | None:
        """Return the fewest: it reads the samples that trajectories end in, and no state before."""
        return None if self.images else "milestones"

    def passes(self, recipe: "Recipe", part: int = 0) -> list[Pass]:
        """Return the passes of the steps: the gradient goes through the denoiser into the ControlNet."""
        samples, batch = self.num_steps * self.batch_size, part or self.micro_batch
        coding = [Pass("encoder", batch=self.micro_batch, in_step=False)] if self.images else []
        return [*coding, Pass("student", samples, batch=batch, gradient=True, output="prediction")]

    def networks(self, distilled: Lora | Full) -> Networks:
        """Return the ControlNet over the teacher."""
        return Networks(has_control=True)

    def disk(self, recipe: "Recipe", values: Values) -> int:
        """Return the bytes of a ControlNet in half precision and of checkpoints with Adam's moments, as of a denoiser.

        It is a copy of less than half of one.
        """
        return values.denoiser * (2 + self.keep_checkpoints * SAVED)
