"""Base of the UNet families, Stable Diffusion and SDXL, with variance-preserving noise."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import LCMScheduler, TCDScheduler, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from torch import Tensor

from ..equations.schedule import Schedule, scaled_linear_betas, vp_schedule
from ..equations.segments import NUM_SEGMENTS, sampling_times
from .base import TARGET_TIME_WIDTH, Base
from .conditioning import Conditioning

# The modules that the published TLCM adapter changes (from its inference code; the same as LCM-LoRA's).
LORA_TARGETS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
]
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


class UNetBase(Base):
    """A teacher whose denoiser is a UNet2DConditionModel."""

    denoiser_class = UNet2DConditionModel
    denoiser_part = "unet"
    lora_targets = LORA_TARGETS
    time_layer = "time_embedding"
    has_target_time_pipeline = True

    def _sizes(self) -> tuple[int, tuple[int, int, int]]:
        guidance = self.denoiser.config.time_cond_proj_dim
        if guidance is not None:
            raise ValueError(
                f"teacher {self.teacher.path}: the denoiser has time_cond_proj_dim {guidance}, an embedding of the "
                "guidance scale: it is distilled already; name the model that it was made from"
            )
        return super()._sizes()

    def _schedule(self) -> tuple[str, Schedule]:
        scheduler = self.pipeline.scheduler.config
        return scheduler["prediction_type"], schedule_of(scheduler)

    def schedule_record(self) -> dict[str, Any]:
        settings = self.pipeline.scheduler.config.items()
        return {key: value for key, value in settings if key.startswith(("beta", "num_", "predict"))}

    def empty_denoiser(self, config: Mapping[str, Any], condition: bool) -> UNet2DConditionModel:
        """Return a new denoiser; with `condition` its configuration has the target time's width too.

        The width is an argument beside `config`, not in it: for keys that a teacher's file lacks, diffusers ignores
        `config` and takes its own default.
        """
        width = TARGET_TIME_WIDTH if condition else None
        denoiser = self.denoiser_class.from_config(config, time_cond_proj_dim=width)
        return self.with_target_time(denoiser) if condition else denoiser

    @staticmethod
    def conditioning_shapes(config: Mapping[str, Any], num_tokens: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"context": (num_tokens, config["cross_attention_dim"])}
        if config.get("addition_embed_type") is not None:
            sizes = 6 * config["addition_time_embed_dim"]
            shapes["pooled"] = (config["projection_class_embeddings_input_dim"] - sizes,)
        return shapes

    def time_sinusoids(self, denoiser: UNet2DConditionModel, t: Tensor) -> Tensor:
        return denoiser.time_proj(self.schedule.network_time[t])

    def _added_conditions(self, conditioning: Conditioning, dtype: torch.dtype) -> dict[str, Tensor] | None:
        """Return the denoiser's `added_cond_kwargs`, for families that have them."""
        return None

    @contextmanager
    def same_prompts(self, denoiser: torch.nn.Module) -> Iterator[None]:
        """Keep the keys and values of the cross-attention, which are functions of the prompts, from the first pass."""
        names = (".attn2.to_k", ".attn2.to_v")
        layers = [layer for name, layer in denoiser.named_modules() if name.endswith(names)]
        before = [vars(layer).get("forward") for layer in layers]  # of a layer that something else has wrapped
        for layer in layers:
            layer.forward = _once(layer.forward)
        try:
            yield
        finally:
            for layer, forward in zip(layers, before, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward

    def predict(
        self, denoiser: torch.nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, s: Tensor | None = None
    ) -> Tensor:
        dtype = next(denoiser.parameters()).dtype
        target_time = None if s is None else get_timestep_embedding(s, TARGET_TIME_WIDTH).to(dtype)
        return denoiser(
            x_t.to(dtype),
            self.schedule.network_time[t],
            encoder_hidden_states=conditioning["context"].to(dtype),
            timestep_cond=target_time,
            added_cond_kwargs=self._added_conditions(conditioning, dtype),
            return_dict=False,
        )[0].float()

    def stock_scheduler(self, gamma: float) -> LCMScheduler | TCDScheduler:
        """Return LCM's scheduler for gamma 1, else TCD's, whose `eta` is gamma.

        Pipelines pass eta 0 by default. TCD's last step ends at index 0, not at x0. Raise ValueError if the scheduler
        cannot visit the milestones.
        """
        teacher = self.pipeline.scheduler.config
        settings = {key: teacher[key] for key in SCHEDULE_KEYS if key in teacher}
        scheduler = (LCMScheduler if gamma == 1.0 else TCDScheduler)(**settings, original_inference_steps=NUM_SEGMENTS)
        scheduler.set_timesteps(NUM_SEGMENTS)
        expected = sampling_times(NUM_SEGMENTS)
        if scheduler.timesteps.tolist() != expected:
            raise ValueError(
                f"a teacher of {self.schedule.num_times} times has milestones {expected}; "
                f"{type(scheduler).__name__} visits {scheduler.timesteps.tolist()}: no stock pipeline can sample it"
            )
        return scheduler


def _once(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that calls `function` the first time, and later returns that result whatever it is given."""
    results: list[Tensor] = []

    def first_result(*arguments: Any, **settings: Any) -> Tensor:
        if not results:
            results.append(function(*arguments, **settings))
        return results[0]

    return first_result


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
