"""The stage that trains a perceptual distance of latents."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveFloat, model_validator

from .lpips_layout import VGG_DEPTHS, VGG_WIDTHS
from .reads import PICTURES
from .stage import OneStage, Requirement, States, Training
from .takes import SAVED, LpipsSizes, Networks, Pass, Values
from .types import Full, Lora, PositiveInt, presentation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .experiment import Recipe

Distortion = Literal["blur", "noise", "warp", "colour", "jpeg"]
DISTORTIONS: tuple[Distortion, ...] = ("blur", "noise", "warp", "colour", "jpeg")
Width = Annotated[int, Field(gt=0, le=65_536)]
KERNEL_ELEMENTS = 9  # of a convolution, for each channel in and out


class TrainPerceptual(Training):
    """Trains an LPIPS on latents, to tell which of two distortions of a picture is the weaker.

    The pairs are made as those of BAPPS are, which people judged (arXiv 1801.03924, section 2), with a known answer.
    """

    kind: Literal["train_perceptual"] = "train_perceptual"
    images: Annotated[str | None, PICTURES] = Field(
        None,
        description="folder with metadata.jsonl ({file_name, prompts}) beside the pictures; default: the teacher's own "
        "samples, of the trajectories before it",
    )
    num_steps: PositiveInt = Field(description="optimiser steps")
    batch_size: int = Field(32, gt=0, le=65_536, description="pairs per optimiser step")
    learning_rate: PositiveFloat = Field(1e-3, description="peak; decays to 0")
    warmup_steps: int = Field(20, ge=0, le=1_000_000_000, description="linear warm-up of the learning rate")
    widths: list[Width] = Field(list(VGG_WIDTHS), min_length=2, description="channels of each slice; default: VGG16's")
    depths: list[Annotated[int, Field(gt=0, le=100)]] = Field(
        list(VGG_DEPTHS), min_length=2, description="convolutions of each slice; default: VGG16's"
    )
    distortions: list[Distortion] = Field(list(DISTORTIONS), min_length=1, description="kinds that it learns from")
    held_out_distortions: list[Distortion] = Field([], description="kinds that only measure it")
    held_out: float = Field(0.2, gt=0, lt=1, description="share of the pictures that only measure it")
    crop: PositiveInt | None = Field(None, description="pixels a side of the part that is distorted; default: all")
    num_held_out_pairs: int = presentation(512, ge=2, le=1_000_000, description="of each kind of measure")
    held_out_every: PositiveInt = presentation(100, description="steps between measures")

    @model_validator(mode="after")
    def _lists_agree(self):
        if len(self.widths) != len(self.depths):
            raise ValueError(f"depths has {len(self.depths)} entries for {len(self.widths)} slices of widths")
        both = [name for name in self.distortions if name in self.held_out_distortions]
        if both:
            raise ValueError(f"held_out_distortions: {', '.join(both)} is learned from: leave it out of distortions")
        return self

    @property
    def parents(self) -> tuple[str, ...]:
        """The teacher and, without pictures, the store of its samples."""
        return (*super().parents, *["trajectories"] * (self.images is None))

    @property
    def requirements(self) -> list[Requirement]:
        """The store, without pictures."""
        reason = "without images train_perceptual learns from the teacher's samples: it needs"
        return [] if self.images else [Requirement(("trajectories",), reason)]

    @property
    def steps_per_phase(self) -> list[int]:
        """Optimiser steps, in one phase."""
        return [self.num_steps]

    @property
    def lpips_sizes(self) -> LpipsSizes:
        """The network that it trains."""
        return LpipsSizes(tuple(self.widths), tuple(self.depths))

    def states_read(self, earlier: "Sequence[OneStage]") -> States | None:
        """Return the fewest: it reads the samples that trajectories end in, and no state before."""
        return None if self.images else "milestones"

    def passes(self, recipe: "Recipe", part: int = 0) -> list[Pass]:
        """Return the encoding of a picture and its two distortions, and the two distances."""
        samples, batch = self.num_steps * self.batch_size, part or self.micro_batch
        return [Pass("encoder", batch=3 * batch), Pass("lpips", samples, 2, batch, gradient=True)]

    def networks(self, distilled: Lora | Full) -> Networks:
        """Return the network that is trained; the denoiser leaves memory."""
        return Networks(uses_teacher=False, lpips="", trains_lpips=True)

    def disk(self, recipe: "Recipe", values: Values) -> int:
        """Return the bytes of the network and of its checkpoints with Adam's moments."""
        counts = zip([0, *self.widths], self.widths, self.depths, strict=False)
        weights = sum(KERNEL_ELEMENTS * width * (before + (depth - 1) * width) for before, width, depth in counts)
        return weights * (4 + self.keep_checkpoints * SAVED)
