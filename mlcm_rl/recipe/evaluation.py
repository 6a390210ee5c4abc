"""The stage that measures."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .types import Fraction, OneStage, PositiveInt, Reward, presentation


class Evaluate(OneStage):
    """Students beside their teacher on fixed prompts and seeds: report.json, report.html."""

    kind: Literal["evaluate"] = "evaluate"
    prompts: str = Field(description="prompt file, disjoint from the one distilled on")
    num_prompts: PositiveInt = 64
    num_steps: list[Annotated[int, Field(ge=1, le=8)]] = Field([1, 2, 3, 4, 6, 8], min_length=1)
    gammas: list[Fraction] = Field(
        [0.0, 1.0],
        description="of every student; a tuned one, and what it is compared with, at its own too; a snapshot of an "
        "earlier phase at its own alone",
    )
    grids: list[Literal["milestones", "paper"]] = Field(["milestones"], min_length=1)
    students: Literal["last", "snapshots"] = Field(
        "last", description="the finished student, or the one after each phase too"
    )
    teacher_steps: list[Annotated[int, Field(ge=1, le=999)]] = Field(
        [25, 50], min_length=1, description="guided steps of the reference rows; the last is the reference"
    )
    teacher_solvers: list[Literal["ddim", "dpmpp", "unipc"]] = Field(
        ["ddim"], description="undistilled at equal evaluations"
    )
    also: list[str] = Field([], description="further finished stage folders to put in the same table")
    judge: str | None = Field(None, description="folder of a judge, for retrieval and KID")
    rewards: list[str | Reward] = Field([], description="names, or entries, as in the tuning stages; no weights")
    inception: str | None = Field(
        None,
        description=".safetensors file of FID's Inception, for FID and KID (mlcm_rl.evaluation.inception makes it)",
    )
    real_images: str | None = Field(None, description="folder of real pictures that FID and KID compare with")
    clip: str | None = Field(None, description="folder of a CLIP in transformers' format, for the CLIP score")
    images_per_prompt: int = Field(1, gt=0, le=10_000, description="more than one also measures diversity")
    keep_pictures: bool = Field(False, description="keep every picture, samples/<row>/<index>.png, for other tools")
    batch_size: int = presentation(32, gt=0, le=65_536)

    @property
    def reward_models(self) -> list[Reward]:
        """Every reward model that measures, a name alone with its defaults."""
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
        if self.inception is not None and self.real_images is None:
            raise ValueError("inception needs real_images: a folder of real pictures to compare with")
        if self.real_images is not None and self.inception is None:
            raise ValueError("real_images needs inception: the network that sees them")
        if self.inception is not None and not self.inception.endswith(".safetensors"):
            raise ValueError(
                f"inception must be a .safetensors file, found {self.inception}; "
                "`python -m mlcm_rl.evaluation.inception` converts the published weights"
            )
        return self
