"""The evaluate stage."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from .distill import Distill
from .preference import Tuning
from .reads import PROMPTS, Reads
from .stage import OneStage, Requirement
from .start import Start, StudentSource
from .takes import Networks, Pass, Role, Values
from .types import Fraction, Full, Lora, PositiveInt, Reward, presentation

if TYPE_CHECKING:
    from .experiment import Recipe

MIN_PROMPTS = 3  # for the standard error of a distance of distributions
FEATURES = 2 * 2048  # of a picture and its patch, by the widest of the networks that see them
MAX_SHOWN = 8  # pictures of a row on the page, if prompts are of two languages
WITH_GAMMA = Tuning, Start  # stages whose student is measured at a gamma of its own too


class Evaluate(OneStage):
    """Students beside their teacher on fixed prompts and seeds: report.json, report.html."""

    maths: ClassVar[int] = 2  # tuned students at the gamma that they were tuned under

    kind: Literal["evaluate"] = "evaluate"
    prompts: Annotated[str, PROMPTS] = Field(description="prompt file, disjoint from the one distilled on")
    num_prompts: PositiveInt = Field(64, description="the first so many of the file")
    sampling_steps: list[Annotated[int, Field(ge=1, le=8)]] = Field(
        [1, 2, 3, 4, 6, 8], min_length=1, description="network evaluations a picture, a row of the table each"
    )
    gammas: list[Fraction] = Field(
        [0.0, 1.0],
        description="of every student; a tuned one, and what it is compared with, at its own too; a snapshot of an "
        "earlier phase at its own alone",
    )
    grids: list[Literal["milestones", "paper"]] = Field(
        ["milestones"],
        min_length=1,
        description="times of the steps: those of the distillation, or the paper's sampler's",
    )
    students: Literal["last", "snapshots"] = Field(
        "last", description="the finished student, or the one after each phase too"
    )
    teacher_steps: list[Annotated[int, Field(ge=1, le=999)]] = Field(
        [25, 50], min_length=1, description="guided steps of the reference rows; the last is the reference"
    )
    teacher_solvers: list[Literal["ddim", "dpmpp", "unipc"]] = Field(
        ["ddim"], description="undistilled at equal evaluations"
    )
    also: list[str] = Field(
        [], description="others for the same table: runs, by their last student, or finished stages"
    )
    student: str | StudentSource | None = Field(
        None, description="a student from elsewhere to put in the table: a path, or an entry with a path"
    )
    judge: Annotated[str | None, Reads(holding="", is_network=True)] = Field(
        None, description="folder of a judge, for retrieval and KID, or for what is right on pictures of scenes"
    )
    rewards: list[str | Reward] = Field([], description="names, or entries, as in the tuning stages; no weights")
    inception: Annotated[str | None, Reads()] = Field(
        None,
        description=".safetensors file of FID's Inception, for FID and KID (mlcm_rl.evaluation.inception makes it)",
    )
    real_images: Annotated[str | None, Reads(holding="", of_pictures=True)] = Field(
        None, description="folder of real pictures that FID and KID compare with"
    )
    distribution: bool = Field(
        False,
        description="KID and FID to the teacher's own pictures of the same prompts, whole and on patches, by the judge "
        "or else by inception",
    )
    clip: Annotated[str | None, Reads(holding="config.json", is_network=True)] = Field(
        None, description="folder of a CLIP in transformers' format, for the CLIP score"
    )
    detector: Annotated[str | None, Reads(holding="config.json", is_network=True)] = Field(
        None,
        description="folder of an object detector in transformers' format, for GenEval's accuracy: prompts is then a "
        "file in GenEval's layout",
    )
    confidences: tuple[Fraction, Fraction] = Field(
        (0.3, 0.9), description="of the detector, above which an object is seen, and above which one is counted"
    )
    images_per_prompt: int = Field(1, gt=0, le=10_000, description="more than one also measures diversity")
    keep_pictures: bool = Field(False, description="keep every picture, samples/<row>/<index>.png, for other tools")
    batch_size: int = presentation(32, gt=0, le=65_536, description="pictures drawn at once")

    @property
    def reward_models(self) -> list[Reward]:
        """The reward models of the table; one that is only a name has its defaults."""
        return [Reward(name=one) if isinstance(one, str) else one for one in self.rewards]

    @model_validator(mode="after")
    def _rewards_stand_alone(self):
        names = [reward.name for reward in self.reward_models]
        for reward in self.reward_models:
            if names.count(reward.name) > 1:
                raise ValueError(f"rewards: {reward.name} is named twice; a report has one column of a name")
            if reward.weight != 1.0:
                raise ValueError(f"rewards: {reward.name} has a weight, but a report sums none; leave it out")
        return self

    @model_validator(mode="after")
    def _inception_has_real_images(self):
        if self.inception is not None and self.real_images is None and not self.distribution:
            raise ValueError(
                "inception needs real_images, a folder of real pictures to compare with, or distribution: true, to "
                "compare with the teacher's own"
            )
        if self.real_images is not None and self.inception is None:
            raise ValueError("real_images needs inception: the network that sees them")
        if self.inception is not None and not self.inception.endswith(".safetensors"):
            raise ValueError(
                f"inception must be a .safetensors file, found {self.inception}; "
                "`python -m mlcm_rl.evaluation.inception` converts the published weights"
            )
        return self

    @model_validator(mode="after")
    def _distribution_is_seen(self):
        if self.distribution and self.judge is None and self.inception is None:
            raise ValueError("distribution needs judge or inception: the network that sees the pictures")
        if self.distribution and self.num_prompts < MIN_PROMPTS:
            raise ValueError(f"distribution needs num_prompts of {MIN_PROMPTS} or more, is {self.num_prompts}")
        return self

    @model_validator(mode="after")
    def _confidences_have_a_detector(self):
        if self.detector is None and self.confidences != type(self).model_fields["confidences"].default:
            raise ValueError("confidences are those of a detector: name one, or leave them out")
        return self

    @property
    def parents(self) -> tuple[str, ...]:
        """The teacher, every student of the recipe, and its own reward if that is used."""
        from .experiment import STUDENTS  # computed from all kinds of stages, this one included

        return (*super().parents, *STUDENTS)

    @property
    def requirements(self) -> list[Requirement]:
        """A student, unless there are others' in `also`."""
        from .experiment import STUDENTS

        if self.also:
            return []
        return [Requirement(STUDENTS, "nothing to evaluate, without finished stages in also: it needs")]

    def passes(self, recipe: "Recipe", part: int = 0) -> list[Pass]:
        """Return the passes that sample the pictures of each row."""
        num_pictures = self.num_prompts * self.images_per_prompt
        rows: list[tuple[Role, int, int]] = [("teacher", *row) for row in self.rows_of_teacher(recipe)]
        rows += [("student", n, 1) for n in self.rows_of_students(recipe)]
        passes = [
            Pass(role, num_pictures, n, is_chained=True, viewer="person", in_step=False, num_with_keys=at_once)
            for role, n, at_once in rows
        ]
        # the first row, which is the teacher's, has as much in memory as any other, or more
        return [replace(passes[0], batch=self.batch_size), *passes[1:]]

    def evaluations_per_row(self, recipe: "Recipe") -> list[int]:
        """Return the evaluations a picture for each row."""
        return [n for n, _ in self.rows_of_teacher(recipe)] + self.rows_of_students(recipe)

    def rows_of_teacher(self, recipe: "Recipe") -> list[tuple[int, int]]:
        """Return the evaluations of a picture, and those of a step, of each row of the teacher's.

        They are the references, and the undistilled teacher with guidance, where whole steps fit, and without.
        """
        guided = recipe.teacher.evaluations
        references = [(guided * n, guided) for n in dict.fromkeys(self.teacher_steps)]
        ways = (guided, 1) if recipe.teacher.guidance_scale != 1.0 else (1,)
        undistilled = [(n, of_a_step) for n in self.sampling_steps for of_a_step in ways if n % of_a_step == 0]
        return references + undistilled * len(self.teacher_solvers)

    def rows_of_students(self, recipe: "Recipe") -> list[int]:
        """Return the evaluations a picture for each row of the students, an upper bound: equal rows are sampled once.

        Students are those of `also` and the recipe's own; snapshots in `also` are unknown until its folders are read.
        """
        from .experiment import gamma_of  # of all kinds of stages, this one included

        num_students = len(self.also) + len({one.kind for one in recipe.stages if one.leaves_student})
        stages = enumerate(recipe.stages)
        own = {one.kind: gamma_of(recipe.stages, i) for i, one in stages if isinstance(one, WITH_GAMMA)}
        unlisted = [gamma for gamma in own.values() if gamma not in self.gammas]
        at_own_gamma = len(unlisted) + len(set(unlisted))  # tuned ones, and the distilled one beside them
        distilled = [one for one in recipe.stages if isinstance(one, Distill)]
        if self.students == "snapshots" and distilled:
            at_own_gamma += len(distilled[-1].num_segments) - 1
        num_rows = len(self.gammas) * len(self.grids) * num_students + len(self.grids) * at_own_gamma
        return self.sampling_steps * num_rows

    def networks(self, distilled: Lora | Full) -> Networks:
        """Return the student, the teacher and the networks of the metrics; prompts are encoded before the first row."""
        measuring = tuple(path for path in (self.inception, self.clip, self.detector) if path)
        return Networks(distilled, encodes_ahead=True, measuring=measuring)

    def disk(self, recipe: "Recipe", values: Values) -> int:
        """Return the bytes of encoded prompts, of the reference's latents and features, and of pictures before PNG.

        The reference and the pictures on the page are stored twice, for later evaluations.
        """
        rows = len(self.evaluations_per_row(recipe))
        samples = self.num_prompts * self.images_per_prompt
        pictures = samples * rows * self.keep_pictures + 2 * rows * min(self.num_prompts, MAX_SHOWN)
        of_reference = values.latent + FEATURES * self.distribution
        return 4 * (self.num_prompts * values.prompt + 2 * samples * of_reference) + 3 * values.pixels * pictures
