"""What a report holds: the parts of report.json, and what the page shows of them.

The parts of report.json are read from its file too, so they are pydantic's; a key that a file does not have takes its
default and is not written. The parts of the page are dataclasses. P prompts, I pictures of each.
"""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Point = tuple[int, float | None]  # optimiser step, value
Verdict = Literal["ahead", "level", "behind"]


class Part(BaseModel):
    """A part of report.json. Its fields are the file's keys, in the file's order."""

    model_config = ConfigDict(frozen=True)

    def as_json(self) -> dict[str, Any]:
        """Return the part as plain values, without the keys that were left at their defaults."""
        return self.model_dump(exclude_unset=True)


# ---- what was measured ----


class Summary(Part):
    """A mean over prompts; None stands for NaN."""

    mean: float | None
    se: float | None  # standard error of the mean
    n: int  # prompts that have a value
    values: list[float | None] = []  # (P,); empty where the mean is all that is kept
    samples: list[list[float | None]] = []  # (P, I); empty where there is one picture, or none to compare


class TrainingCost(Part):
    """Network evaluations that a student's training took."""

    samples: int = 0  # drawn for optimiser steps
    store: int = 0  # of the teacher for stored trajectories
    online: int = 0  # of the teacher in the steps themselves
    student: int = 0  # of the student and of its target
    total: int
    teacher_per_sample: float
    student_per_sample: float


class SampledRow(Part):
    """One line of the table before it is measured: which network, under which sampler, at which cost."""

    id: str  # also the folder of its pictures
    role: str  # reference | undistilled | student
    name: str  # "teacher", or which student
    sampler: str  # in words
    num_steps: int
    num_evaluations: int
    solver: str | None = None  # of the teacher
    guidance_scale: float | None = None  # of the teacher; 1 is none
    times: tuple[int, ...] | None = None  # of a student, and so are the rest
    gamma: float | None = None
    grid: str | None = None
    num_segments: int | None = None
    conditioned: bool = False
    default: bool = False  # at the student's own gamma, on the milestones
    training: TrainingCost | None = None


class Row(SampledRow):
    """One line of the table with what was measured of it."""

    latency_ms: float  # a picture
    latency_ms_se: float | None = None  # None of a single batch
    metrics: dict[str, Summary]


class Prompt(Part):
    """A prompt of the evaluation; the page shows the pictures of a few."""

    prompt: str
    language: str
    concept: str | None = None
    style: str | None = None
    parallel: str | None = None
    shown: bool = False


class Environment(Part):
    """Hardware, versions and commit of a measurement."""

    device: str
    platform: str
    python: str
    versions: dict[str, str]  # by package
    commit: str | None


class Network(Part):
    """The files of a network that measured."""

    files: dict[str, str]  # name -> sha256
    num_real_images: int | None = None


class LossCurve(Part):
    """The losses of one phase of a distill stage."""

    stage: int = 1  # its place in the chain of distill stages
    phase: int  # from 0
    num_segments: int
    loss: list[Point]
    held_out_loss: list[Point]


class Measurements(Part):
    """What an evaluation has measured, before anything is compared."""

    format: int
    name: str
    created: str  # ISO 8601
    environment: Environment
    teacher: dict[str, Any]  # the recipe's, without private paths; so are the settings of the stage
    settings: dict[str, Any]
    networks: dict[str, Network] = {}
    reference: str  # id of the row that distances are taken to
    prompts: list[Prompt]
    rows: list[Row]
    curves: list[LossCurve]


# ---- what is compared ----


class Comparison(Part):
    """A student's row against a teacher's in one metric, over the prompts that both have."""

    num_evaluations: int | None = None  # None in the headline, which says it once
    metric: str
    student: str  # id of its row
    teacher: str
    difference: float | None  # student minus teacher
    se: float | None
    verdict: Verdict


class Headline(Part):
    """Whether the student beats the undistilled teacher at few evaluations."""

    num_evaluations: int
    passed: bool
    checks: list[Comparison]
    text: str


class GuardRecord(Part):
    """What the guard of a tuning stage has left (guard.json)."""

    stopped: bool
    kept_step: int  # 0 is the distilled student
    held_out: float = 0.0  # gain of the student of that step, and so is the next
    trained: float = 0.0
    looks_without_gain: int = 0
    warnings: list[str]


class TunedComparison(Part):
    """A tuned student's default row against that of the distilled student, by metric.

    `drops` are those of the constrained rewards, in standard deviations of the distilled student's pictures.
    """

    num_steps: int
    row: str  # id of the tuned student's row
    reference: str
    differences: dict[str, Summary]  # tuned minus distilled
    win_rates: dict[str, Summary]
    drops: dict[str, Summary] = {}


class TunedStudent(Part):
    """A student of preference learning beside the distilled one that it started from."""

    name: str
    reference: str  # name of the distilled student
    rewards: dict[str, str]  # name -> "trained on", "constraint" or "held out"
    max_drops: dict[str, float] = {}  # of the constraints, in standard deviations of the distilled student's pictures
    num_steps: int  # of the stage
    guard: GuardRecord
    curves: dict[str, list[Point]]
    comparisons: list[TunedComparison] = []


class Report(Measurements):
    """The whole of report.json."""

    comparisons: list[Comparison]
    product: str | None = None  # name of the student that the recipe makes
    tuned: list[TunedStudent] = []
    headline: Headline


# ---- what the page shows ----


@dataclass(frozen=True)
class Line:
    """The rows of one sampler of one network, as their evaluations grow."""

    label: str
    colour: str
    dash: str  # an SVG dash array, empty for a solid line
    rows: list[Row]


@dataclass(frozen=True)
class Tile:
    """One check of the headline."""

    label: str
    better: str
    student: str
    teacher: str
    solver: str
    reference: str | None
    difference: str
    verdict: Verdict


@dataclass(frozen=True)
class TableRow:
    """One row of the table of all rows."""

    label: str
    cells: list[str]
    default: bool


@dataclass(frozen=True)
class ComparisonRow:
    """One row of the table of comparisons."""

    num_evaluations: int | None
    metric: str
    student: str
    teacher: str
    values: tuple[str, str]  # of the student and of the teacher
    difference: str
    verdict: Verdict


@dataclass(frozen=True)
class Picture:
    """One picture on the page."""

    uri: str  # data:
    is_right: bool | None  # by a judge of scenes; None without one


@dataclass(frozen=True)
class GalleryPrompt:
    """The pictures of one prompt, by number of evaluations; None where there is no row."""

    text: str
    language: str
    language_name: str
    student: dict[int, Picture | None]
    teacher: dict[int, Picture | None]
    reference: Picture | None


@dataclass(frozen=True)
class Gallery:
    """Student and undistilled teacher at each number of evaluations, and the reference."""

    prompts: list[GalleryPrompt]
    budgets: list[int]  # numbers of evaluations
    reference: Row
    student: Row | None
    solvers: dict[int, str]  # the teacher's, by number of evaluations


@dataclass(frozen=True)
class Card:
    """A tuned student in words and with the plot of its gains."""

    name: str
    sentence: str
    verdict: str
    constraints: list[str]
    warnings: list[str]
    plots: list[str]  # SVG


@dataclass(frozen=True)
class NumberTable:
    """A table of figures in groups of lines; the first `num_words` columns after the `first` are words."""

    title: str
    first: str  # head of the first column
    heads: list[str]
    num_words: int
    groups: list[tuple[str, list[list[str]]]]  # heading, lines of cells


@dataclass(frozen=True)
class PairPrompt:
    """The pictures of one prompt before and after tuning, by column."""

    text: str
    language: str
    language_name: str
    pictures: dict[str, Picture | None]


@dataclass(frozen=True)
class PairGallery:
    """A distilled student's pictures beside those of the students tuned from it."""

    num_steps: int
    columns: list[str]
    prompts: list[PairPrompt]


@dataclass(frozen=True)
class TunedSection:
    """The section on preference learning."""

    cards: list[Card]
    tables: list[NumberTable]
    galleries: list[PairGallery]
