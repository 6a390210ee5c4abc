"""The stage that gives a teacher the text encoder of another language."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveFloat, model_validator

from .reads import PROMPTS, Reads
from .stage import OneStage, Requirement, States, Training
from .takes import SAVED, Networks, Pass, TextNetwork, Values
from .types import Full, Lora, NonNegativeFloat, PositiveInt, presentation

if TYPE_CHECKING:
    from .experiment import Recipe

Languages = Annotated[list[Literal["zh", "ja", "ko"]], Field(min_length=1)]
MAX_WIDTH, MAX_LAYERS = 8192, 32


class AdaptText(Training):
    """Gives the teacher a text encoder of another language, through a small network; the denoiser stays as it is."""

    kind: Literal["adapt_text"] = "adapt_text"
    prompts: Annotated[str, PROMPTS] = Field(
        description="the .jsonl file of the trajectories before it; each line also has `parallel`, the same prompt in "
        "the new language"
    )
    encoder: Annotated[str, Reads(holding="config.json", is_network=True)] = Field(
        description="folder with a text encoder and its tokenizer, in transformers' format: safetensors, no code"
    )
    languages: Languages = Field(
        ["zh"], description="the prompts that go through the new encoder from now on, by their script"
    )
    width: int = Field(512, gt=0, le=MAX_WIDTH, multiple_of=8, description="of the network's blocks")
    num_layers: int = Field(2, gt=0, le=MAX_LAYERS, description="its blocks of attention to the encoder's states")
    num_steps: PositiveInt = Field(description="optimiser steps")
    learning_rate: PositiveFloat = Field(5e-4, description="peak; decays to 0")
    warmup_steps: int = Field(50, ge=0, le=1_000_000_000, description="steps of linear warm-up")
    features: NonNegativeFloat = Field(
        1.0, description="weight of the features: the states and the pooled vector of the teacher's own text encoders"
    )
    outputs: NonNegativeFloat = Field(1.0, description="weight of the denoiser's outputs on noised samples")
    held_out_every: PositiveInt = presentation(50, description="steps between losses on the held-out trajectories")

    @model_validator(mode="after")
    def _has_a_loss(self):
        if self.features == 0.0 and self.outputs == 0.0:
            raise ValueError("features and outputs are both 0, so that nothing is learned: weigh one of them")
        return self

    @property
    def parents(self) -> tuple[str, ...]:
        """The teacher, and the store of its own samples and English prompts."""
        return ("train_teacher", "trajectories")

    @property
    def requirements(self) -> list[Requirement]:
        """The store."""
        return [Requirement(("trajectories",))]

    @property
    def steps_per_phase(self) -> list[int]:
        """Optimiser steps, in one phase."""
        return [self.num_steps]

    def states_read(self, earlier: Sequence[OneStage]) -> States:
        """Return the fewest: it reads the samples that trajectories end in, and no state before."""
        return "milestones"

    def passes(self, recipe: "Recipe", part: int = 0) -> list[Pass]:
        """Return the denoiser's passes: without the prompt, through its own text encoders, and through the new one."""
        samples, batch = self.num_steps * self.batch_size, part or self.micro_batch
        steps = [
            Pass("target", samples, evaluations=2, batch=batch, output="prediction"),
            Pass("student", samples, batch=batch, gradient=True, output="prediction"),
        ]
        return [*(steps if self.outputs else []), *self.sample_grids(recipe, "teacher")]

    def networks(self, distilled: Lora | Full) -> Networks:
        """Return the teacher and the adapter; text encoders, the new one too, are gone before the first step."""
        adapter = TextNetwork(self.encoder, self.width, self.num_layers)
        return Networks(encodes_ahead=True, text_adapter=adapter)

    def disk(self, recipe: "Recipe", values: Values) -> int:
        """Return the bytes of the adapter with a copy of its encoder, and of checkpoints with Adam's moments."""
        encoder = sum(path.stat().st_size for path in Path(self.encoder).glob("*.safetensors"))
        return encoder + values.trained * (4 + SAVED * self.keep_checkpoints)
