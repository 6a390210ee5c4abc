"""A toy kind of stage: its type."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import PositiveFloat

from .reads import PROMPTS
from .stage import Requirement, Training
from .takes import Networks, Pass, Values
from .types import Full, Lora, PositiveInt

if TYPE_CHECKING:
    from .experiment import Recipe


class Imitate(Training):
    """Teaches the distilled student the teacher's first guess at every prompt."""

    maths: ClassVar[int] = 7  # any number: another is another result
    leaves_student: ClassVar[bool] = True

    kind: Literal["imitate"] = "imitate"
    prompts: Annotated[str, PROMPTS]
    adapter: Lora
    num_steps: PositiveInt
    learning_rate: PositiveFloat = 1e-4

    @property
    def parents(self) -> tuple[str, ...]:
        """The teacher and the student to go on with."""
        return (*super().parents, "distill")

    @property
    def requirements(self) -> list[Requirement]:
        """The student to go on with."""
        return [Requirement(("distill",))]

    @property
    def steps_per_phase(self) -> list[int]:
        """Optimiser steps, in one phase."""
        return [self.num_steps]

    def passes(self, recipe: "Recipe", part: int = 0) -> list[Pass]:
        """Return the teacher's guess and the student's."""
        samples, batch = self.num_steps * self.batch_size, part or self.micro_batch
        return [
            Pass("teacher", samples, recipe.teacher.evaluations, batch),
            Pass("student", samples, batch=batch, gradient=True),
            *self.sample_grids(recipe),
        ]

    def networks(self, distilled: Lora | Full) -> Networks:
        """Return the student's and the teacher's."""
        return Networks(self.adapter)

    def disk(self, recipe: "Recipe", values: Values) -> int:
        """Return the bytes of the student and of checkpoints with Adam's moments."""
        return values.trained * (4 + 12 * self.keep_checkpoints)
