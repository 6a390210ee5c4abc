"""Base of the families with variance-preserving noise: their schedule, and how stock diffusers samples a student."""

from typing import Any

import torch
from diffusers import LCMScheduler, TCDScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from ..equations.prediction import X0
from ..equations.schedule import Schedule, scaled_linear_betas, vp_schedule
from .base import Base
from .grids import USUAL, SamplingGrid

SCHEDULE_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
    "steps_offset",  # has no effect here, but Stable Diffusion's pipelines warn where it is not 1
)


class VPBase(Base):
    """A teacher whose scheduler's betas define its noise, and which predicts epsilon, v or x0."""

    def _schedule(self) -> tuple[str, Schedule]:
        scheduler = self.pipeline.scheduler.config
        return scheduler["prediction_type"], schedule_of(scheduler)

    @property
    def student_predictions(self) -> tuple[str, ...]:
        """Return the teacher's type, and x0, which divides no error by the small alpha of the noisiest times."""
        return (self.prediction_type, X0)

    def schedule_record(self) -> dict[str, Any]:
        settings = self.pipeline.scheduler.config.items()
        return {key: value for key, value in settings if key.startswith(("beta", "num_", "predict"))}

    def stock_scheduler(
        self, gamma: float, grid: SamplingGrid = USUAL, prediction_type: str | None = None
    ) -> LCMScheduler | TCDScheduler:
        """Return LCM's scheduler for gamma 1, else TCD's, whose `eta` is gamma.

        Pipelines pass eta 0 by default. TCD's last step ends at index 0, not at x0. Raise ValueError if the scheduler
        cannot visit the grid.
        """
        teacher = self.pipeline.scheduler.config
        settings = {key: teacher[key] for key in SCHEDULE_KEYS if key in teacher}
        settings["prediction_type"] = prediction_type or self.prediction_type
        kind = LCMScheduler if gamma == 1.0 else TCDScheduler
        scheduler = kind(**settings, original_inference_steps=grid.original_steps)
        num_steps = grid.steps[-1]
        expected = self.schedule.network_time[grid.by_steps.times(num_steps)].tolist()
        if isinstance(grid.name, str):
            scheduler.set_timesteps(num_steps)
        else:
            scheduler.set_timesteps(timesteps=expected)
        if scheduler.timesteps.tolist() != expected:
            raise ValueError(
                f"a teacher of {teacher['num_train_timesteps']} times has the {grid} {expected}; "
                f"{type(scheduler).__name__} visits {scheduler.timesteps.tolist()}: no stock pipeline can sample it"
            )
        return scheduler


def schedule_of(scheduler: dict[str, Any]) -> Schedule:
    """Return the noise schedule (T,) of a diffusers scheduler's configuration.

    Raise ValueError for an unsupported form, and for zero terminal SNR with epsilon prediction: at alpha = 0 the noise
    does not determine x0.
    """
    form, num_times = scheduler.get("beta_schedule"), scheduler["num_train_timesteps"]
    start, end = scheduler.get("beta_start", 0.0), scheduler.get("beta_end", 0.0)
    if scheduler.get("trained_betas") is not None:
        betas = torch.tensor(scheduler["trained_betas"], dtype=torch.float64)
    elif form == "scaled_linear":
        betas = scaled_linear_betas(num_times, start, end)
    elif form == "linear":
        betas = torch.linspace(start, end, num_times, dtype=torch.float64)
    else:
        raise ValueError(f"scheduler: beta_schedule {form!r} is not supported (scaled_linear, linear, trained_betas)")
    if scheduler.get("rescale_betas_zero_snr"):
        if scheduler["prediction_type"] == "epsilon":
            raise ValueError(
                "scheduler: rescale_betas_zero_snr with prediction_type epsilon leaves no signal at the last time, "
                "so its x0 is 0 / 0; use a v_prediction teacher or switch the rescaling off"
            )
        betas = rescale_zero_terminal_snr(betas)
    return vp_schedule(betas)
