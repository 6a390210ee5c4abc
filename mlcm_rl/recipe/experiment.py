"""A whole recipe: a teacher and a list of stages."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Annotated, Literal, get_args

from pydantic import Field, PrivateAttr, model_validator

from .adapt_text import AdaptText
from .control import TrainControl
from .distill import Distill
from .evaluation import Evaluate
from .preference import Dpo, Feedback, Policy, TrainReward, Tuning
from .stage import OneStage
from .teacher_stages import TrainTeacher, Trajectories
from .types import (
    Samples,
    Strict,
    Teacher,
    presentation,
)

NAME = r"^[a-z0-9][a-z0-9_-]*$"
RESERVED = ("stages", "rows")  # folders under runs that hold all runs' results


Stage = Annotated[
    TrainTeacher | AdaptText | TrainControl | TrainReward | Trajectories | Distill | Feedback | Dpo | Policy | Evaluate,
    Field(discriminator="kind"),
]
STAGES: dict[str, type[OneStage]] = {one.model_fields["kind"].default: one for one in get_args(get_args(Stage)[0])}
STUDENTS = tuple(kind for kind, one in STAGES.items() if one.leaves_student)
TUNING = tuple(kind for kind, one in STAGES.items() if issubclass(one, Tuning))  # each tunes the distilled student


class Recipe(Strict):
    """One experiment, from a teacher to a report."""

    name: str = Field(pattern=NAME, description="folder of links under runs")
    seed: int = Field(0, ge=0)
    teacher: Teacher
    stages: list[Stage] = Field(min_length=1)
    samples: Samples = presentation(Samples())
    runs: str = presentation("runs", description="folder that holds every run")
    device: Literal["auto", "cpu", "cuda", "mps"] = presentation("auto")
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = presentation(["tensorboard"])
    _file_texts: dict[str, str] = PrivateAttr(default_factory=dict)  # paths in rewards' settings -> the file's text

    @model_validator(mode="after")
    def _name_is_free(self):
        if self.name in RESERVED:
            raise ValueError(f"name {self.name} is that of a folder under runs that all runs share; take another")
        return self


def missing_library(quantise: str | None) -> str | None:
    """Return what to do where `teacher.quantise` needs a library that is not installed; None where nothing is to do."""
    if quantise is None or find_spec("bitsandbytes") is not None:
        return None
    return f"{quantise} needs bitsandbytes, which is not installed: pip install 'mlcm-rl[quantised]', or leave it out"


def missing_trackers(recipe: Recipe) -> Iterator[tuple[int, str]]:
    """Yield (its place in `trackers`, what to do) of every tracker of `recipe` that is not installed."""
    for i, name in enumerate(recipe.trackers):
        if find_spec(name) is None:
            yield i, f"{name} is not installed: pip install 'mlcm-rl[{name}]', or take it out of trackers"
