"""Teachers. One file a family holds what is its own; `Base` is what the families share, thin over a diffusers pipeline.

    B batch   C latent channels   H, W latent size   L tokens   D context width   P pooled width

A `Conditioning` is what a prompt has become: "context" (B, L, D) and, in families that have one, "pooled" (B, P), all
float32 and batch first, so that it can be indexed, concatenated and stored.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..equations.prediction import x0_from_prediction
from ..equations.schedule import Schedule, scaled_linear_betas, vp_schedule
from ..equations.segments import NUM_TIMES
from ..equations.solver import guided
from ..recipe import Teacher
from ..storage import finite
from ..training import autocast
from .files import MEMORY_FORMATS

Conditioning = dict[str, Tensor]

ENCODED_TOGETHER = 32  # prompts, where all are encoded ahead
TARGET_TIME_WIDTH = 256  # sinusoids that a student conditioned on its target time is given

# The modules that the published TLCM adapter changes (its inference code; the list of LCM-LoRA).
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


class Base(ABC):
    """A frozen teacher: encode prompts, denoise, decode. Subclassed once a family."""

    family: ClassVar[str]
    pipeline_class: ClassVar[type[DiffusionPipeline]]
    lora_targets: ClassVar[list[str]] = LORA_TARGETS
    in_stability_blocks: ClassVar[bool] = False  # other tools know its blocks by Stability AI's names, not diffusers'

    def __init__(self, teacher: Teacher, device: torch.device, pipeline: DiffusionPipeline):
        self.teacher, self.device, self.dtype = teacher, device, getattr(torch, teacher.dtype)
        self.pipeline = pipeline
        self.memory_format = MEMORY_FORMATS[teacher.memory_format]
        self._ahead: dict[str, Conditioning] | None = None  # (L, D) and (P,) a prompt, once text encoders are gone
        self.denoiser: UNet2DConditionModel = self.pipeline.unet
        self.vae = self.pipeline.vae
        scheduler = self.pipeline.scheduler.config
        self.prediction_type: str = scheduler["prediction_type"]
        self.schedule = schedule_of(scheduler).to(device)
        if self.schedule.num_times != NUM_TIMES:
            raise ValueError(
                f"teacher {teacher.path}: its scheduler has {self.schedule.num_times} times; only one of {NUM_TIMES}, "
                "on which segments and samplers stand, can be distilled"
            )
        self.resolution, self.latent_shape = _sizes(self.pipeline, teacher)
        logging.getLogger(self.pipeline_class.__module__).setLevel(logging.ERROR)  # it warns of every long prompt

    @property
    @abstractmethod
    def kohya_version(self) -> str:
        """What kohya's sd-scripts calls models of this shape, in the header of a LoRA file."""

    # Prompts

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """What the family's stock pipeline makes of `prompts` (B of them), under no gradient.

        Once prompts have been encoded ahead, those alone are known.
        """
        with autocast.own(self.device):
            if self._ahead is None:
                return self._encode(prompts)
            rows = [self._ahead[prompt] for prompt in prompts]
            return {name: torch.stack([row[name] for row in rows]).to(self.device).float() for name in rows[0]}

    def encode_ahead(self, prompts: Iterable[str]) -> None:
        """Encode all `prompts` that will be asked for, each once, and let the text encoders leave memory.

        What became of them is kept on the CPU, in the teacher's precision, which is the text encoders' own.
        """
        texts, kept = list(dict.fromkeys(prompts)), {}
        for part in (texts[i : i + ENCODED_TOGETHER] for i in range(0, len(texts), ENCODED_TOGETHER)):
            encoded = {name: value.to("cpu", self.dtype) for name, value in self._encode(part).items()}
            finite.refuse_encoded(encoded, part, self.dtype)
            kept |= {text: {name: value[i] for name, value in encoded.items()} for i, text in enumerate(part)}
        for name in self.pipeline.components:
            if name.startswith("text_encoder"):
                setattr(self.pipeline, name, None)
        self._ahead = kept

    @abstractmethod
    def _encode(self, prompts: list[str]) -> Conditioning:
        """What the text encoders make of `prompts`."""

    @property
    def _tokenizers(self) -> list[Any]:
        parts = self.pipeline.components.items()
        return [part for name, part in parts if name.startswith("tokenizer") and part is not None]

    @property
    def num_tokens(self) -> int:
        """How many tokens of a prompt are read, marks of start and end too."""
        return min(tokenizer.model_max_length for tokenizer in self._tokenizers)

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """How many tokens each prompt is, marks of start and end too; what is beyond `num_tokens` is never seen."""
        counts = [map(len, tokenizer(list(prompts))["input_ids"]) for tokenizer in self._tokenizers]
        return [max(each) for each in zip(*counts, strict=True)]

    def unconditional(self, batch_size: int) -> Conditioning:
        """What the stock pipeline guides away from, `batch_size` times."""
        with autocast.own(self.device):
            dropped = self._dropped_prompt
        return {name: value.repeat(batch_size, *[1] * (value.ndim - 1)) for name, value in dropped.items()}

    @property
    @abstractmethod
    def _dropped_prompt(self) -> Conditioning:
        """What the stock pipeline guides away from, once (1, ...)."""

    def _added_conditions(self, conditioning: Conditioning, dtype: torch.dtype) -> dict[str, Tensor] | None:
        """The denoiser's `added_cond_kwargs`, for families that have them."""
        return None

    # Denoising

    def forget_denoiser(self) -> None:
        """Let the teacher's denoiser go where no step will ask it; its configuration stays.

        What an adapter shares with it stays with the student, and an engine may then hold that in parts too.
        """
        for parameter in self.denoiser.parameters():
            parameter.data = parameter.data.new_empty(0)

    def predict(
        self, denoiser: torch.nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, s: Tensor | None = None
    ) -> Tensor:
        """What `denoiser` says at (x_t (B, C, H, W), t (B,)): (B, C, H, W) float32, in its own prediction type.

        `s` (B,) is the time that a conditioned student is to jump to; the teacher takes none.
        """
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

    def x0(
        self, denoiser: torch.nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, s: Tensor | None = None
    ) -> Tensor:
        """The clean latents (B, C, H, W) float32 that `denoiser` sees in x_t: f of the paper."""
        prediction = self.predict(denoiser, x_t, t, conditioning, s)
        return x0_from_prediction(prediction, x_t, t, self.schedule, self.prediction_type)

    @torch.no_grad()
    def guided_x0(
        self, x_t: Tensor, t: Tensor, conditional: Conditioning, unconditional: Conditioning, guidance_scale: float
    ) -> Tensor:
        """The teacher's x0 (B, C, H, W) under classifier-free guidance: both passes in one batch, or one at scale 1.

        In the teacher's own precision, under autocast too.
        """
        with autocast.own(self.device):
            if guidance_scale == 1.0:
                return self.x0(self.denoiser, x_t, t, conditional)
            both = {name: torch.cat([unconditional[name], conditional[name]]) for name in conditional}
            without, given = self.predict(self.denoiser, torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
            prediction = guided(given, without, guidance_scale)
        return x0_from_prediction(prediction, x_t, t, self.schedule, self.prediction_type)

    # Pictures

    def decode(self, latents: Tensor, small: torch.nn.Module | None = None) -> Tensor:
        """Pictures (B, 3, H', W') float32 in [0, 1] of clean latents (B, C, H, W), differentiable where grad is on.

        By a `small` decoder where one is given, which reads latents as the denoiser has them.
        """
        scale, mean = self._latent_scale
        decoded = self.vae.decode(latents.float() * scale + mean) if small is None else small.decode(latents.float())
        return (decoded.sample.float() / 2 + 0.5).clamp(0, 1)

    def use_tiles(self, size: int, recompute: Callable[..., Any] = partial(checkpoint, use_reentrant=False)) -> None:
        """Let the autoencoder work in tiles of `size` pixels a side from now on: less memory, and seams are blended.

        They overlap by a quarter. A tile is computed again in the backward pass, by `recompute`: all tiles kept would
        be more than the whole picture. Raises ValueError for a size that is no whole number of quarters.
        """
        quarter = 4 * self.pipeline.vae_scale_factor
        if size % quarter:
            raise ValueError(
                f"autoencoder_tiles: {size} is not a multiple of {quarter}: tiles of {self.teacher.path} overlap by a "
                "quarter, which must be whole latents"
            )
        self.vae.enable_tiling()
        self.vae.tile_sample_min_size, self.vae.tile_latent_min_size = size, 4 * size // quarter
        self.vae.decoder.forward = partial(recompute, self.vae.decoder.forward)

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents (B, C, H, W) of pictures (B, 3, H', W') in [0, 1]: the posterior's mean, or drawn by `generator`."""
        posterior = self.vae.encode(images.float() * 2 - 1).latent_dist
        scale, mean = self._latent_scale
        return ((posterior.mode() if generator is None else posterior.sample(generator)) - mean) / scale

    @cached_property
    def _latent_scale(self) -> tuple[Tensor, Tensor]:
        """Scale and mean (1, C or 1, 1, 1): what the autoencoder decodes is scale z + mean."""
        settings = self.vae.config
        std, mean = settings.latents_std or [1.0], settings.latents_mean or [0.0]
        shape = {"dtype": torch.float32, "device": self.device}
        scale = torch.tensor(std, **shape) / settings.scaling_factor
        return scale.reshape(1, -1, 1, 1), torch.tensor(mean, **shape).reshape(1, -1, 1, 1)

    def noise(self, generator: torch.Generator | Sequence[torch.Generator], batch_size: int) -> Tensor:
        """Standard normal (B, C, H, W) float32, drawn on the CPU so that it is the same whatever the device.

        One generator draws for the whole batch; with a list, each sample has its own and does not depend on the others.
        """
        if isinstance(generator, torch.Generator):
            return torch.randn(batch_size, *self.latent_shape, generator=generator).to(self.device)
        if len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators for a batch of {batch_size}")
        return torch.stack([torch.randn(*self.latent_shape, generator=one) for one in generator]).to(self.device)


def schedule_of(scheduler: dict[str, Any]) -> Schedule:
    """The noise schedule (T,) that a diffusers scheduler's configuration describes.

    Raises ValueError for one without betas (rectified flow has no family yet) or of a form not known here, and for zero
    terminal SNR with epsilon prediction: at alpha = 0 the noise says nothing about x0.
    """
    form, num_times = scheduler.get("beta_schedule"), scheduler["num_train_timesteps"]
    start, end = scheduler.get("beta_start"), scheduler.get("beta_end")
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


def _sizes(pipeline: DiffusionPipeline, teacher: Teacher) -> tuple[int, tuple[int, int, int]]:
    """Pixels a side, and the latents' (C, H, W). Raises ValueError where denoiser and autoencoder do not fit."""
    unet, factor = pipeline.unet.config, pipeline.vae_scale_factor
    channels = pipeline.vae.config.latent_channels
    if (unet.in_channels, unet.out_channels) != (channels, channels):
        raise ValueError(
            f"teacher {teacher.path}: the denoiser maps {unet.in_channels} channels to {unet.out_channels} and the "
            f"autoencoder has {channels}; only plain text-to-image teachers can be distilled"
        )
    if unet.time_cond_proj_dim is not None:
        raise ValueError(
            f"teacher {teacher.path}: the denoiser has time_cond_proj_dim {unet.time_cond_proj_dim}, an embedding of "
            "the guidance scale: it is distilled already; name the model that it was made from"
        )
    resolution = teacher.resolution or unet.sample_size * factor
    smallest = factor * 2 ** (len(unet.block_out_channels) - 1)
    if resolution % smallest:
        raise ValueError(f"teacher.resolution {resolution} is not a multiple of {smallest}, as {teacher.path} needs")
    return resolution, (channels, resolution // factor, resolution // factor)
