"""Stages of the teacher: its own training, and its trajectories."""

from typing import Literal

from pydantic import Field, PositiveFloat, model_validator

from .types import Fraction, OneStage, PositiveInt, Training, presentation


class TrainTeacher(Training):
    """The denoiser's diffusion loss on a captioned image folder: trains the teacher itself."""

    kind: Literal["train_teacher"] = "train_teacher"
    images: str = Field(description="folder with metadata.jsonl ({file_name, prompts}) beside the pictures")
    num_steps: PositiveInt
    learning_rate: PositiveFloat = 4e-4
    warmup_steps: int = Field(100, ge=0, le=1_000_000_000)
    ema_decay: Fraction = 0.999
    prompt_dropout: Fraction = Field(0.1, description="share of prompts dropped for classifier-free guidance")
    min_snr_gamma: PositiveFloat | None = Field(None, description="most an error of x0 weighs, arXiv 2303.09556")
    start: Literal["teacher", "random"] = Field("random", description="denoiser weights to begin from")


class Trajectories(OneStage):
    """The teacher's guided DDIM trajectories from noise to data, every state kept."""

    kind: Literal["trajectories"] = "trajectories"
    prompts: str = Field(description=".txt (one a line) or .jsonl ({prompt, language, ...}) file")
    num_trajectories: int = Field(gt=0, le=10_000_000)
    num_held_out: int = Field(0, ge=0, le=10_000_000, description="trajectories after those, for the held-out loss")
    num_steps: int = Field(48, ge=8, le=992, description="solver steps: 8 segments of 6")
    batch_size: int = presentation(
        16, gt=0, le=65_536, description="solved at a time; another number moves the states in their last bits"
    )
    dtype: Literal["float32", "float16"] = Field("float32", description="of the stored states; never bfloat16")
    shard_size: PositiveInt = presentation(64, description="trajectories in a file")

    @model_validator(mode="after")
    def _steps_hold_milestones(self):
        if self.num_steps % 8:
            raise ValueError(f"num_steps {self.num_steps} must be a multiple of 8: milestones lie on the grid")
        if (self.num_trajectories + self.num_held_out) > 1_000_000 * self.shard_size:
            raise ValueError(f"shard_size {self.shard_size} would make more than a million files: make it larger")
        return self
