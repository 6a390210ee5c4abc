"""A whole recipe: a teacher and a list of stages."""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Annotated, Literal, get_args

from pydantic import Field, PrivateAttr, field_validator, model_validator

from .adapt_text import AdaptText
from .control import TrainControl
from .distill import Distill
from .evaluation import Evaluate
from .feedback import Feedback
from .perceptual import TrainPerceptual
from .preference import Dpo, Policy, Tuning
from .stage import OneStage
from .start import PREVIOUS, Start, stage_of
from .teacher_stages import TrainTeacher, Trajectories
from .train_reward import TrainReward
from .types import (
    Samples,
    Strict,
    Teacher,
    presentation,
)

NAME = r"^[a-z0-9][a-z0-9_-]*$"
RESERVED = ("stages", "rows")  # folders under runs that hold all runs' results


Stage = Annotated[
    TrainTeacher
    | AdaptText
    | TrainControl
    | TrainPerceptual
    | TrainReward
    | Trajectories
    | Distill
    | Start
    | Feedback
    | Dpo
    | Policy
    | Evaluate,
    Field(discriminator="kind"),
]
STAGES: dict[str, type[OneStage]] = {one.model_fields["kind"].default: one for one in get_args(get_args(Stage)[0])}
STUDENTS = tuple(kind for kind, one in STAGES.items() if one.leaves_student)
TUNING = tuple(kind for kind, one in STAGES.items() if issubclass(one, Tuning))  # each tunes the distilled student


class Recipe(Strict):
    """One experiment, from a teacher to a report."""

    name: str = Field(pattern=NAME, description="folder of links under runs")
    seed: int = Field(
        0, ge=0, description="seed of all random draws: noise, prompts, initial weights; same seed, same bits"
    )
    teacher: Teacher = Field(description="the model to distil")
    stages: list[Stage] = Field(min_length=1, description="what is done, in order; each goes on from those before it")
    samples: Samples = presentation(Samples(), description="pictures that are drawn while a student trains")
    runs: str = presentation("runs", description="folder that holds every run")
    device: Literal["auto", "cpu", "cuda", "mps"] = presentation(
        "auto", description="where it computes; auto: the first of cuda, mps and cpu that is here"
    )
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = presentation(
        ["tensorboard"], description="services that receive figures and pictures during training, beside log.jsonl"
    )
    _file_texts: dict[str, str] = PrivateAttr(default_factory=dict)  # paths in rewards' settings -> the file's text

    _places: dict[int, str] = PrivateAttr(default_factory=dict)  # of stages that its file has elsewhere, by number

    def place(self, number: int) -> str:
        """Return where the recipe's file has a stage: "stages[2]", or "stages[2].start" where a setting names it."""
        return self._places.get(number, f"stages[{number}]")

    @field_validator("stages")
    @classmethod
    def _starts_are_stages(cls, stages: list[OneStage]) -> list[OneStage]:
        """Put a start stage before each stage that names a student from elsewhere, which then is the previous one."""
        return [one for stage in stages for one in _with_start(stage)]

    @model_validator(mode="after")
    def _name_is_free(self):
        if self.name in RESERVED:
            raise ValueError(f"name {self.name} is that of a folder under runs that all runs share; take another")
        return self


def _with_start(stage: OneStage) -> list[OneStage]:
    """Return `stage`, after a start stage if it names a student from elsewhere."""
    if isinstance(stage, Tuning) and stage.start not in (None, PREVIOUS):
        assert stage.start is not None
        return [stage_of(stage.start), stage.model_copy(update={"start": PREVIOUS})]
    if isinstance(stage, Evaluate) and stage.student is not None:
        return [stage_of(stage.student), stage.model_copy(update={"student": None})]
    return [stage]


def student_before(stages: Sequence[OneStage], position: int) -> int | None:
    """Return the position of the stage whose student the stage at `position` goes on from or samples.

    That is the last distilled one for a distill stage and for tuning without `start`, else the last one; None without.
    """
    stage = stages[position]
    if isinstance(stage, Start):
        return None
    is_of_distilled = isinstance(stage, Distill) or (isinstance(stage, Tuning) and stage.start is None)
    kinds = ("distill",) if is_of_distilled else STUDENTS
    return max((i for i in range(position) if _kind(stages[i]) in kinds), default=None)


def origin_of(stages: Sequence[OneStage], position: int) -> OneStage | None:
    """Return the stage that made the student which the stage at `position` and those before it tune; None without."""
    before = student_before(stages, position)
    while before is not None and isinstance(stages[before], Tuning):
        before = student_before(stages, before)
    return None if before is None else stages[before]


def gamma_of(stages: Sequence[OneStage], position: int) -> float | None:
    """Return the gamma that the student of the stage at `position` is sampled under by default.

    None where only its files state it.
    """
    stage = stages[position]
    if isinstance(stage, Distill):
        return stage.default_gamma
    if isinstance(stage, Tuning) and stage.gamma is None:
        before = student_before(stages, position)
        return None if before is None else gamma_of(stages, before)
    return stage.gamma if isinstance(stage, Tuning | Start) else None


def _kind(stage: OneStage) -> str:
    return type(stage).model_fields["kind"].default


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
