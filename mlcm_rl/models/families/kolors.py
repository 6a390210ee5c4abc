"""Kolors: SDXL's UNet on the states of ChatGLM3, which reads Chinese and English; 1100 times."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from diffusers import KolorsPipeline, LCMScheduler, TCDScheduler

from ...equations.schedule import Schedule, at_indices
from ..conditioning import Conditioning
from ..grids import USUAL, SamplingGrid
from .sdxl import Family as StableDiffusionXL

NUM_TOKENS = 256  # of the stock pipeline, which passes no other number on


class Family(StableDiffusionXL):
    """Kolors, and models of the same structure at any width.

    Its schedule has 1100 times, and the index t stands for the time round((t + 1) 137 / 125) - 1: the milestones are
    136, 273, ..., 1095, which stock few-step schedulers visit, and the times above 1095 are not used. Their alpha is
    0.0344 at the end and 0.0354 at 1095.
    """

    family = "kolors"
    card_tag = "kolors"
    comfyui = None
    pipeline_class = KolorsPipeline

    @property
    def kohya_version(self) -> None:
        """Return None: no tool that reads kohya's layout reads ChatGLM."""
        return None

    @property
    def original_texts(self) -> dict[str, str]:
        return {}

    def _schedule(self) -> tuple[str, Schedule]:
        prediction_type, schedule = super()._schedule()
        return prediction_type, at_indices(schedule)

    def stock_scheduler(
        self, gamma: float, grid: SamplingGrid = USUAL, prediction_type: str | None = None
    ) -> LCMScheduler | TCDScheduler:
        """Return LCM's scheduler for gamma 1, TCD's for gamma 0.

        Raise ValueError for a gamma between: TCDScheduler goes down to a share of its own time, which is not the time
        of that share of our index.
        """
        if 0.0 < gamma < 1.0:
            raise ValueError(
                f"gamma {gamma:g}: TCDScheduler would go down to other times of {self.teacher.path} than our sampler; "
                "sample with `mlcm sample`, or export a student that was tuned under 0 or 1"
            )
        return super().stock_scheduler(gamma, grid, prediction_type)

    @staticmethod
    def conditioning_shapes(config: Mapping[str, Any], num_tokens: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes at the pipeline's own number of tokens; its tokenizer names none."""
        return StableDiffusionXL.conditioning_shapes(config, NUM_TOKENS)

    @property
    def num_tokens(self) -> int:
        return NUM_TOKENS

    @cached_property
    def _dropped_prompt(self) -> Conditioning:
        """Return the encoding of the empty prompt, whatever `force_zeros_for_empty_prompt` is."""
        return self._encode([""])
