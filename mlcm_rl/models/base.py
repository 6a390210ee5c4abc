"""Teachers. One file a family holds what is its own; `Base` is what the families share, thin over a diffusers pipeline.

    B batch   C latent channels   H, W latent size   L tokens   D context width   P pooled width

A `Conditioning` is what a prompt has become: "context" (B, L, D) and, in families that have one, "pooled" (B, P), all
float32 and batch first, so that it can be indexed, concatenated and stored.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from torch import Tensor, nn

from ..equations.prediction import x0_from_prediction
from ..equations.schedule import Schedule
from ..equations.segments import NUM_TIMES
from ..equations.solver import guided
from ..recipe import Teacher
from ..storage import finite
from ..training import autocast
from .autoencoder import Autoencoder
from .files import MEMORY_FORMATS

Conditioning = dict[str, Tensor]

ENCODED_TOGETHER = 32  # prompts, where all are encoded ahead
TARGET_TIME_WIDTH = 256  # sinusoids that a student conditioned on its target time is given


class TargetTimeProjection(nn.Linear):
    """Projects the target time's sinusoids to where those of t go: float32 weights, its input's precision out."""

    def forward(self, sinusoids: Tensor) -> Tensor:
        return super().forward(sinusoids.to(self.weight.dtype)).to(sinusoids.dtype)


class Base(ABC):
    """A frozen teacher: encode prompts, denoise, decode. Subclassed once a family, which says, and nothing else does:

    how prompts become a `Conditioning` and what is guided away from; what the denoiser is given and what comes back
    (`predict`); where the target time enters; the modules that an adapter changes; what its schedule is; and how a
    finished student is sampled by stock diffusers.
    """

    family: ClassVar[str]  # its name in recipes, and in mlcm_rl/recipe/families.py
    pipeline_class: ClassVar[type[DiffusionPipeline]]
    denoiser_class: ClassVar[type[ModelMixin]]
    denoiser_part: ClassVar[str]  # the pipeline's component that denoises
    lora_targets: ClassVar[Sequence[str]]
    card_tag: ClassVar[str]  # on the card of an exported student
    has_target_time_pipeline: ClassVar[bool] = False  # `exported_pipeline` tells its students their target times
    in_stability_blocks: ClassVar[bool] = False  # other tools know its blocks by Stability AI's names, not diffusers'
    time_layer: ClassVar[str]  # the denoiser's TimestepEmbedding, beside whose sinusoids the target time enters

    def __init__(self, teacher: Teacher, device: torch.device, pipeline: DiffusionPipeline):
        self.teacher, self.device, self.dtype = teacher, device, getattr(torch, teacher.dtype)
        self.pipeline = pipeline
        self.memory_format = MEMORY_FORMATS[teacher.memory_format]
        self._ahead: dict[str, Conditioning] | None = None  # (L, D) and (P,) a prompt, once text encoders are gone
        self.denoiser: ModelMixin = getattr(pipeline, self.denoiser_part)
        self.autoencoder = Autoencoder(pipeline.vae, pipeline.vae_scale_factor, teacher.path, device)
        self.resolution, self.latent_shape = self._sizes()
        self.prediction_type, schedule = self._schedule()
        self.schedule = schedule.to(device)
        if self.schedule.num_times != NUM_TIMES:
            raise ValueError(
                f"teacher {teacher.path}: its scheduler has {self.schedule.num_times} times; only one of {NUM_TIMES}, "
                "on which segments and samplers stand, can be distilled"
            )
        logging.getLogger(self.pipeline_class.__module__).setLevel(logging.ERROR)  # it warns of every long prompt

    # What the family is

    @property
    def kohya_version(self) -> str | None:
        """What kohya's sd-scripts calls models of this shape, in the header of a LoRA file; None for no name."""
        return None

    @property
    @abstractmethod
    def _multiple(self) -> int:
        """Of how many latents a side is a multiple: those of a patch, or of the coarsest level."""

    def _sizes(self) -> tuple[int, tuple[int, int, int]]:
        """Pixels a side, and the latents' (C, H, W). Raises ValueError where denoiser and autoencoder do not fit."""
        path, denoiser, factor = self.teacher.path, self.denoiser.config, self.pipeline.vae_scale_factor
        channels = self.autoencoder.vae.config.latent_channels
        if (denoiser.in_channels, denoiser.out_channels) != (channels, channels):
            raise ValueError(
                f"teacher {path}: the denoiser maps {denoiser.in_channels} channels to {denoiser.out_channels} and the "
                f"autoencoder has {channels}; only plain text-to-image teachers can be distilled"
            )
        resolution, smallest = self.teacher.resolution or denoiser.sample_size * factor, factor * self._multiple
        if resolution % smallest:
            raise ValueError(f"teacher.resolution {resolution} is not a multiple of {smallest}, as {path} needs")
        return resolution, (channels, resolution // factor, resolution // factor)

    @abstractmethod
    def _schedule(self) -> tuple[str, Schedule]:
        """What the denoiser predicts (a kind of `equations.prediction`), and its noise schedule (T,).

        Raises ValueError for a schedule that cannot be distilled.
        """

    @abstractmethod
    def schedule_record(self) -> dict[str, Any]:
        """What the schedule is made of, as JSON, for a store of trajectories to say."""

    @abstractmethod
    def stock_scheduler(self, gamma: float) -> SchedulerMixin:
        """diffusers' scheduler that walks the sampler's default grid under `gamma`, for an exported student."""

    def stock_call(self, times: list[int]) -> dict[str, Any]:
        """What a stock pipeline with that scheduler is told, so that it visits these `times` of the default grid."""
        return {"num_inference_steps": len(times)}

    def empty_denoiser(self, config: Mapping[str, Any], condition: bool) -> ModelMixin:
        """A denoiser of this `config` on the device that is set, with a target time's projection where `condition`."""
        denoiser = self.denoiser_class.from_config(config)
        return self.with_target_time(denoiser) if condition else denoiser

    def with_target_time(self, denoiser: ModelMixin) -> ModelMixin:
        """`denoiser` with a projection of the target time's sinusoids, which enters beside those of t."""
        embedding = denoiser.get_submodule(self.time_layer)
        embedding.cond_proj = TargetTimeProjection(TARGET_TIME_WIDTH, embedding.linear_1.in_features, bias=False)
        return denoiser

    @abstractmethod
    def time_sinusoids(self, denoiser: ModelMixin, t: Tensor) -> Tensor:
        """The sinusoids (B, D) of the times t (B,), as `time_layer` of `denoiser` is given them."""

    def empty_conditioning(self, count: int, num_tokens: int) -> Conditioning:
        """A `Conditioning` (count, ...) without values on this device, as prompts of `num_tokens` tokens become."""
        shapes = self.conditioning_shapes(self.denoiser.config, num_tokens)
        return {name: torch.empty(count, *shape, device=self.device) for name, shape in shapes.items()}

    @staticmethod
    @abstractmethod
    def conditioning_shapes(config: Mapping[str, Any], num_tokens: int) -> dict[str, tuple[int, ...]]:
        """What a prompt of `num_tokens` tokens becomes, by the denoiser's `config`: the shape of each tensor."""

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
        texts = list(dict.fromkeys(prompts))
        ahead: dict[str, Conditioning] = {}
        for part in (texts[i : i + ENCODED_TOGETHER] for i in range(0, len(texts), ENCODED_TOGETHER)):
            encoded = {name: value.to("cpu", self.dtype) for name, value in self._encode(part).items()}
            finite.refuse_encoded(encoded, part, self.dtype)
            ahead |= {text: {name: value[i] for name, value in encoded.items()} for i, text in enumerate(part)}
        for name in self.pipeline.components:
            if name.startswith("text_encoder"):
                setattr(self.pipeline, name, None)
        self._ahead = ahead

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

    # Denoising

    def forget_denoiser(self) -> None:
        """Let the teacher's denoiser go where no step will ask it; its configuration stays.

        What an adapter shares with it stays with the student, and an engine may then hold that in parts too.
        """
        for parameter in self.denoiser.parameters():
            parameter.data = parameter.data.new_empty(0)

    @abstractmethod
    def predict(
        self, denoiser: torch.nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, s: Tensor | None = None
    ) -> Tensor:
        """What `denoiser` says at (x_t (B, C, H, W), t (B,)): (B, C, H, W) float32, in its own prediction type.

        `s` (B,) is the time that a conditioned student is to jump to; the teacher takes none.
        """

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

    def noise(self, generator: torch.Generator | Sequence[torch.Generator], batch_size: int) -> Tensor:
        """Standard normal (B, C, H, W) float32, drawn on the CPU so that it is the same whatever the device.

        One generator draws for the whole batch; with a list, each sample has its own and does not depend on the others.
        """
        if isinstance(generator, torch.Generator):
            return torch.randn(batch_size, *self.latent_shape, generator=generator).to(self.device)
        if len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators for a batch of {batch_size}")
        return torch.stack([torch.randn(*self.latent_shape, generator=one) for one in generator]).to(self.device)
