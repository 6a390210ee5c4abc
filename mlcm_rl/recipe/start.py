"""Students from elsewhere: how a stage names one, and the stage that takes it in, in place of a distill stage."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, field_validator

from ..equations.axis import NUM_SEGMENTS, NUM_TIMES
from .reads import STUDENT
from .stage import OneStage
from .takes import Values
from .tree import Key, Node
from .types import Fraction, Strict

if TYPE_CHECKING:
    from .experiment import Recipe

PREVIOUS = "previous"
# How many evenly spaced times the steps of a grid are chosen from: `original_inference_steps` of LCM's and TCD's stock
# schedulers.
ORIGINAL_STEPS = {"milestones": NUM_SEGMENTS, "lcm": 50, "trailing": NUM_TIMES}

Time = Annotated[int, Field(ge=1, le=NUM_TIMES - 1)]
Grid = Literal["milestones", "lcm", "trailing"] | Annotated[list[Time], Field(min_length=1, max_length=NUM_SEGMENTS)]


def are_times(values: Sequence[Any]) -> bool:
    """Return whether `values` are times of a grid: whole numbers from 999 down to 1, each below the one before."""
    ends = [NUM_TIMES, *values, 0]
    return all(type(one) is int for one in values) and all(t > s for t, s in itertools.pairwise(ends))


class StudentSource(Strict):
    """A student from elsewhere, and what its files do not state of it."""

    path: Annotated[str, STUDENT] = Field(
        description="a run's folder (its last student), a stage's, an exported one, a pipeline or a denoiser in "
        "diffusers' format, or a .safetensors file of a LoRA or of a denoiser's weights"
    )
    gamma: Fraction | None = Field(
        None, description="noise put back between its steps: 1 as LCM, 0 as DDIM and Euler, between them as TCD's eta"
    )
    grid: Grid | None = Field(
        None,
        description="times that it is sampled at: milestones of 8 segments, lcm (LCM's and TCD's 50), trailing, or "
        "their list for one number of steps, such as [999, 759, 499, 259]",
    )
    num_segments: Literal[1, 2, 4, 8] | None = Field(
        None, description="K of its distillation, the phases of PCM; default: 1 where its files do not state it"
    )
    alpha: PositiveFloat | None = Field(
        None, description="of a LoRA file that holds none: it adds alpha / rank times its factors"
    )

    prediction: Literal["teacher", "x0"] | None = Field(
        None,
        description="what its network predicts: the same as its teacher's, or x0, as the one-step SDXL-Lightning; "
        "default: what its files state, else teacher",
    )

    @field_validator("grid")
    @classmethod
    def _times_descend(cls, grid: Grid | None) -> Grid | None:
        if isinstance(grid, list) and not are_times(grid):
            raise ValueError(f"times of a grid descend, from 999 at most; found {grid}")
        return grid


class Start(StudentSource, OneStage):
    """Takes in a student from elsewhere, for later stages to tune, evaluate, sample and export."""

    leaves_student: ClassVar[bool] = True

    kind: Literal["start"] = "start"

    def disk(self, recipe: "Recipe", values: Values) -> int:
        """Return the bytes of a whole denoiser, an upper bound."""
        return 4 * values.denoiser


def source_of(named: str | StudentSource) -> StudentSource:
    """Return what a path alone stands for: a student whose files state everything."""
    return StudentSource(path=named) if isinstance(named, str) else named


def stage_of(named: str | StudentSource) -> Start:
    """Return the stage that takes in the student `named`."""
    return Start(**source_of(named).model_dump())


def written_key(tree: Node, key: Key) -> Key:
    """Return where the file has the value at `key` of a recipe, whose stages are more: a `start` is one of its own."""
    stages = tree.child("stages")
    if key[:1] != ("stages",) or len(key) < 2 or stages is None or not isinstance(stages.content, list):
        return key
    places: list[Key] = []
    is_text: list[bool] = []
    for i, stage in enumerate(stages.content):
        named = [(name, one.content) for name in ("start", "student") if (one := stage.child(name)) is not None]
        sources = [(name, content) for name, content in named if content not in (None, PREVIOUS)]
        places += [*(("stages", i, name) for name, _ in sources), ("stages", i)]
        is_text += [*(isinstance(content, str) for _, content in sources), False]
    number = int(key[1])
    return places[number] if is_text[number] else (*places[number], *key[2:])
