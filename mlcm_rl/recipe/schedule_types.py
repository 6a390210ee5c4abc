"""Types of a teacher's scheduler_config.json: variance-preserving schedules, and rectified flows."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from .teacher_types import Configuration

Beta = Annotated[float, Field(gt=0, lt=1)]
Infinite = Annotated[float, Field(allow_inf_nan=True)]  # -Infinity in files of diffusers' multistep solvers
MIN_SIGNAL = 1e-8  # of alpha^2 at the last time: below, x0 is a quotient of rounding errors
Shift = Annotated[float, Field(gt=0, le=1_000)]
LogShift = Annotated[float, Field(ge=-7, le=7)]  # exp(7) is about 1000
Tokens = Annotated[int, Field(gt=0, le=2**24)]
SHIFT_OF_TOKENS = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")


class Scheduler(Configuration):
    """scheduler/scheduler_config.json: a variance-preserving schedule."""

    class_name: str = Field("", alias="_class_name")
    num_train_timesteps: Annotated[int, Field(ge=2, le=10_000)] = 1000
    beta_start: Beta = 0.0001
    beta_end: Beta = 0.02
    beta_schedule: Literal["scaled_linear", "linear"] | None = "linear"
    trained_betas: list[Beta] | None = None
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    rescale_betas_zero_snr: bool = False
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading"
    steps_offset: Annotated[int, Field(ge=0, lt=1000)] = 0
    set_alpha_to_one: bool = False
    clip_sample: bool = False
    skip_prk_steps: bool = False
    thresholding: Literal[False] = False
    interpolation_type: Literal["linear", "log_linear"] = "linear"
    timestep_type: Literal["discrete"] = "discrete"
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    sigma_min: float | None = None
    sigma_max: float | None = None
    use_karras_sigmas: bool = False  # null is refused: diffusers adds the three up
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    lambda_min_clipped: Infinite = -math.inf

    @model_validator(mode="after")
    def _preserves_variance(self):
        if self.class_name.startswith(("Flow", "EDM")):
            raise ValueError(f"_class_name {self.class_name} preserves no variance, as this family's schedule must")
        return self

    @model_validator(mode="after")
    def _noise_grows_to_an_end(self):
        if self.trained_betas is not None:
            betas: Sequence[float] = self.trained_betas
            if len(betas) != self.num_train_timesteps:
                raise ValueError(f"trained_betas has {len(betas)} entries for {self.num_train_timesteps} times")
        elif self.beta_start > self.beta_end:
            raise ValueError(f"beta_start {self.beta_start} is above beta_end {self.beta_end}: noise would shrink")
        else:
            power = 2 if self.beta_schedule == "scaled_linear" else 1
            start, end = (beta ** (1 / power) for beta in (self.beta_start, self.beta_end))
            steps = self.num_train_timesteps - 1
            betas = [(start + (end - start) * t / steps) ** power for t in range(steps + 1)]
        if sum(math.log1p(-beta) for beta in betas) < math.log(MIN_SIGNAL):
            key = "trained_betas" if self.trained_betas is not None else "beta_end"
            raise ValueError(f"{key}: so much noise leaves no signal at the last time")
        return self

    @model_validator(mode="after")
    def _is_of_many_steps(self):
        is_euler = self.class_name.startswith("Euler")
        if is_euler and self.timestep_spacing == "trailing" and self.prediction_type == "epsilon":
            raise ValueError(
                f"timestep_spacing trailing of a {self.class_name} that predicts epsilon is how models that are "
                "distilled to a few steps are published (Turbo, Lightning); name the model that it was made from, or "
                "write leading if it is not distilled: the key has no other effect here"
            )
        return self

    @model_validator(mode="after")
    def _the_last_time_says_something(self):
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "rescale_betas_zero_snr with prediction_type epsilon leaves no signal at the last time, so its x0 is "
                "0 / 0; use a v_prediction teacher or switch the rescaling off"
            )
        return self


class FlowScheduler(Configuration):
    """scheduler/scheduler_config.json: a rectified flow of a thousand times with one shift."""

    class_name: Literal[
        "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "DPMSolverMultistepScheduler"
    ] = Field(alias="_class_name")
    num_train_timesteps: Literal[1000] = 1000
    shift: Shift = 1.0
    flow_shift: Shift = 1.0  # of DPMSolverMultistepScheduler, with the two below
    use_flow_sigmas: bool = False
    prediction_type: str = "epsilon"
    use_dynamic_shifting: bool = False
    base_shift: LogShift | None = 0.5  # with the four below of dynamic shifting alone
    max_shift: LogShift | None = 1.15
    base_image_seq_len: Tokens | None = 256
    max_image_seq_len: Tokens | None = 4096
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    invert_sigmas: Literal[False] = False
    stochastic_sampling: Literal[False] = False
    use_karras_sigmas: Literal[False] = False
    use_exponential_sigmas: Literal[False] = False
    use_beta_sigmas: Literal[False] = False
    lambda_min_clipped: Infinite = -math.inf

    @model_validator(mode="after")
    def _is_a_flow(self):
        is_solver = self.class_name.startswith("DPMSolver")
        for key, expected in (("use_flow_sigmas", True), ("prediction_type", "flow_prediction")):
            if is_solver and getattr(self, key) != expected:
                raise ValueError(f"{key}: expected {expected}, as a rectified flow has, found {getattr(self, key)}")
        if self.use_dynamic_shifting and self.class_name != "FlowMatchEulerDiscreteScheduler":
            raise ValueError(f"use_dynamic_shifting: expected False in a {self.class_name}, found True")
        return self

    @model_validator(mode="after")
    def _shift_grows_with_tokens(self):
        if not self.use_dynamic_shifting:
            return self
        for key in SHIFT_OF_TOKENS:
            if getattr(self, key) is None:
                raise ValueError(f"{key}: expected a number, of which use_dynamic_shifting makes the shift, found None")
        if self.time_shift_type != "exponential":
            raise ValueError(
                f"time_shift_type: expected exponential, the shift exp(mu), found {self.time_shift_type}, the shift mu"
            )
        base, most = self.base_image_seq_len, self.max_image_seq_len
        if base is not None and most is not None and most <= base:
            raise ValueError(f"max_image_seq_len: expected more than base_image_seq_len {base}, found {most}")
        return self
