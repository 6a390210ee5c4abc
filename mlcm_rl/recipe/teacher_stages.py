"""The stages of the teacher: its own training, and its trajectories."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveFloat, model_validator

from ..equations.axis import NUM_SEGMENTS
from .reads import PICTURES, PROMPTS
from .stage import OneStage, States, Training
from .takes import AVERAGED, BYTES, Networks, Pass, Values
from .types import Fraction, Full, Lora, PositiveInt, presentation

if TYPE_CHECKING:
    from .experiment import Recipe


class TrainTeacher(Training):
    """Trains the teacher itself, by the denoiser's diffusion loss on a captioned image folder."""

    kind: Literal["train_teacher"] = "train_teacher"
    images: Annotated[str, PICTURES] = Field(
        description="folder with metadata.jsonl ({file_name, prompts}) beside the pictures"
    )
    num_steps: PositiveInt = Field(description="optimiser steps")
    learning_rate: PositiveFloat = Field(4e-4, description="peak; decays to 0")
    warmup_steps: int = Field(100, ge=0, le=1_000_000_000, description="steps of linear warm-up")
    ema_decay: Fraction = Field(
        0.999, description="a step, of the running average of the weights, which is what is left"
    )
    prompt_dropout: Fraction = Field(0.1, description="share of prompts dropped for classifier-free guidance")
    min_snr_gamma: PositiveFloat | None = Field(None, description="most an error of x0 weighs, arXiv 2303.09556")
    times: Literal["uniform", "logit_normal"] = Field(
        "uniform", description="how times are drawn; logit_normal: seldom near both ends, as Stable Diffusion 3"
    )
    start: Literal["teacher", "random"] = Field("random", description="denoiser weights to begin from")

    @property
    def corrections(self) -> int:
        """One: the min-SNR weight was that of epsilon, whatever the teacher predicts."""
        return int(self.min_snr_gamma is not None)

    @property
    def parents(self) -> tuple[str, ...]:
        """None."""
        return ()

    @property
    def steps_per_phase(self) -> list[int]:
        """Optimiser steps, in one phase."""
        return [self.num_steps]

    def passes(self, recipe: "Recipe", part: int = 0) -> list[Pass]:
        """Return the encoding of pictures, the passes of the steps, and sample grids by the trained network."""
        samples, batch = self.num_steps * self.batch_size, part or self.micro_batch
        return [
            Pass("encoder", batch=self.micro_batch, in_step=False),
            Pass("student", samples, batch=batch, gradient=True, output="prediction"),
            *self.sample_grids(recipe, "teacher"),
        ]

    def networks(self, distilled: Lora | Full) -> Networks:
        """Return a second denoiser beside the teacher's, with its average."""
        return Networks(Full(), has_average=True)

    def disk(self, recipe: "Recipe", values: Values) -> int:
        """Return the bytes of a teacher in half precision, and of checkpoints with weights, average and moments."""
        return values.denoiser * (2 + self.keep_checkpoints * AVERAGED)


class Trajectories(OneStage):
    """Stores the teacher's guided DDIM trajectories from noise to data."""

    kind: Literal["trajectories"] = "trajectories"
    prompts: Annotated[str, PROMPTS] = Field(description=".txt (one a line) or .jsonl ({prompt, language, ...}) file")
    num_trajectories: int = Field(gt=0, le=10_000_000, description="to store, each of one prompt and one noise")
    num_held_out: int = Field(0, ge=0, le=10_000_000, description="trajectories after those, for the held-out loss")
    solver_steps: int = Field(24, ge=8, le=992, description="steps of the teacher's solver: 8 segments of 3")
    batch_size: int = presentation(
        16, gt=0, le=65_536, description="solved at a time; another number moves the states in their last bits"
    )
    dtype: Literal["float32", "float16"] = Field("float32", description="of the stored states; never bfloat16")
    shard_size: PositiveInt = presentation(64, description="trajectories in a file")
    keep: Literal["auto", "milestones", "all"] = presentation(
        "auto",
        description="states that are stored: those of the milestones, or all that the solver went through; auto: what "
        "the later stages of this recipe read, all where none does",
    )

    @model_validator(mode="after")
    def _steps_hold_milestones(self):
        if self.solver_steps % 8:
            raise ValueError(f"solver_steps {self.solver_steps} must be a multiple of 8: milestones lie on the grid")
        if (self.num_trajectories + self.num_held_out) > 1_000_000 * self.shard_size:
            raise ValueError(f"shard_size {self.shard_size} would make more than a million files: make it larger")
        return self

    @property
    def num_stored(self) -> int:
        """Number of trajectories that it stores."""
        return self.num_trajectories + self.num_held_out

    def keeps(self, recipe: "Recipe") -> States:
        """Return which states are stored."""
        if self.keep != "auto":
            return self.keep
        read = {stage.states_read(recipe.stages[:i]) for i, stage in enumerate(recipe.stages)}
        return "milestones" if read - {None} == {"milestones"} else "all"

    def variant(self, recipe: "Recipe") -> str:
        """Return "milestones" where no other states are stored."""
        return "" if self.keeps(recipe) == "all" else "milestones"

    @property
    def corrections(self) -> int:
        """What prompts became was rounded to the states' precision."""
        return int(self.dtype == "float16")

    def passes(self, recipe: "Recipe", part: int = 0) -> list[Pass]:
        """Return the solver's passes."""
        guided, steps = recipe.teacher.evaluations, self.solver_steps
        return [Pass("teacher", self.num_stored, steps * guided, self.batch_size, in_step=False, num_with_keys=guided)]

    def networks(self, distilled: Lora | Full) -> Networks:
        """Return the teacher, whose text encoders leave memory when all prompts are encoded."""
        return Networks(encodes_ahead=True)

    def disk(self, recipe: "Recipe", values: Values) -> int:
        """Return the bytes of the states, of the last x0, and of the encoded prompts, one a trajectory at most."""
        num_states = self.solver_steps + 1 if self.keeps(recipe) == "all" else NUM_SEGMENTS + 1
        states = (num_states + 1) * values.latent * BYTES[self.dtype]
        return self.num_stored * (states + values.prompt * BYTES[recipe.teacher.dtype])
