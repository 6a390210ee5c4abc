"""Base of the rectified-flow transformers: their schedule, and how stock diffusers samples a student."""

import math
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
)
from torch import Tensor

from ..equations.schedule import Schedule, flow_schedule, flow_shift
from ..recipe import Teacher, teacher_files
from ..recipe.schedule_types import SHIFT_OF_TOKENS, FlowScheduler
from .base import Base
from .grids import USUAL, SamplingGrid

MAX_SHIFT = 1e6  # beyond it, and below its inverse, only the ends of the time axis would be noise or picture


class FlowBase(Base):
    """A teacher whose denoiser is a transformer that predicts eps - x0 on rectified flow."""

    denoiser_part = "transformer"

    def __init__(self, teacher: Teacher, device: torch.device, pipeline: DiffusionPipeline):
        # a local folder's file is checked when the recipe is read, a hub model's here
        settings = {**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__}
        teacher_files.validated(settings, FlowScheduler, f"teacher {teacher.path}: scheduler/scheduler_config.json")
        super().__init__(teacher, device, pipeline)

    @property
    def shift(self) -> float:
        """Return the shift of the time axis towards noise: fixed, or a function of the number of image tokens.

        Raise ValueError if that function has no useful value for this resolution.
        """
        scheduler = self.pipeline.scheduler
        if isinstance(scheduler, DPMSolverMultistepScheduler):
            return scheduler.config.flow_shift
        if not self.shifts_by_tokens:
            return scheduler.config.shift
        _, height, width = self.latent_shape
        tokens = height * width // self.geometry.multiple**2
        try:
            shift = flow_shift(tokens, *(scheduler.config[key] for key in SHIFT_OF_TOKENS))
        except OverflowError:
            shift = math.inf
        if not 1 / MAX_SHIFT <= shift <= MAX_SHIFT:
            raise ValueError(
                f"teacher {self.teacher.path}: scheduler/scheduler_config.json: {', '.join(SHIFT_OF_TOKENS)}: they "
                f"make a shift of {shift:g} for the {tokens} tokens of a picture of {self.resolution} pixels a side; "
                f"expected between {1 / MAX_SHIFT:g} and {MAX_SHIFT:g}"
            )
        return shift

    @property
    def shifts_by_tokens(self) -> bool:
        """Return whether the scheduler's shift depends on the number of image tokens."""
        return bool(self.pipeline.scheduler.config.get("use_dynamic_shifting", False))

    def _schedule(self) -> tuple[str, Schedule]:
        return "flow", flow_schedule(self.shift)

    def divided_times(self, t: Tensor, precision: torch.dtype) -> Tensor:
        """Return the times (B,) of t as pipelines in this `precision` give them to a denoiser that multiplies by T.

        They are rounded, then divided.
        """
        return self.schedule.network_time[t].to(precision) / self.schedule.num_times

    def schedule_record(self) -> dict[str, Any]:
        return {"num_train_timesteps": self.schedule.num_times, "shift": self.shift}

    def stock_scheduler(
        self, gamma: float, grid: SamplingGrid = USUAL, prediction_type: str | None = None
    ) -> FlowMatchEulerDiscreteScheduler | FlowMatchLCMScheduler:
        """Return Euler's scheduler for gamma 0, LCM's for gamma 1; both need the sigmas of `stock_call`, of any grid.

        LCM's draws its noise from the global generator in most pipelines. Raise ValueError for any other gamma, which
        no stock scheduler of flows has.
        """
        if gamma not in (0.0, 1.0):
            raise ValueError(
                f"gamma {gamma:g}: diffusers' schedulers of rectified flow are deterministic (0) or draw all noise "
                "again (1): sample with `mlcm sample`, or export a student that was tuned under 0 or 1"
            )
        kind = FlowMatchLCMScheduler if gamma == 1.0 else FlowMatchEulerDiscreteScheduler
        return kind(num_train_timesteps=self.schedule.num_times, shift=self.shift, use_dynamic_shifting=False)

    def stock_call(self, times: list[int]) -> dict[str, Any]:
        """Return the sigmas of `times` before the shift, u = (t + 1) / T; the scheduler applies the shift itself.

        Given the number of steps alone, stock schedulers visit other times: they shift their last sigma twice.
        """
        sigmas = [(t + 1) / self.schedule.num_times for t in times]
        return {"num_inference_steps": len(times), "sigmas": sigmas}
