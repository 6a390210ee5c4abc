"""Base of the transformers whose blocks share one modulation by time, "adaLN-single" (PixArt-alpha, arXiv 2310.00426).

They attend to at most 300 tokens of one text encoder. PixArt and Sana have this in common, and not their noise.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from diffusers import ModelMixin
from diffusers.models.embeddings import PixArtAlphaCombinedTimestepSizeEmbeddings, get_timestep_embedding
from torch import Tensor

from .base import TARGET_TIME_WIDTH, Base, precision_of
from .conditioning import CONTEXT, LENGTHS, Conditioning, mask_of
from .cross_attention import prompts_attended_once

NUM_TOKENS = 300  # of a prompt, in the stock pipelines


class TimesAlone(PixArtAlphaCombinedTimestepSizeEmbeddings):
    """The stock embedding without sizes, of times (B,), or (B, 2): t and the target time."""

    def forward(
        self, times: Tensor, resolution: None, aspect_ratio: None, batch_size: int, hidden_dtype: torch.dtype
    ) -> Tensor:
        """Return (B, width). The projected sinusoids of the target time are added to those of t."""
        t, s = (times, None) if times.ndim == 1 else times.unbind(1)
        target_time = None if s is None else get_timestep_embedding(s, TARGET_TIME_WIDTH).to(hidden_dtype)
        return self.timestep_embedder(self.time_proj(t).to(hidden_dtype), target_time)


class AdaLNSingleBase(Base):
    """A teacher whose denoiser is such a transformer; another base has the noise.

    Positions are computed from the configuration's sample_size, which therefore stays as it is in an export.
    """

    denoiser_part = "transformer"
    times: ClassVar[str]  # the denoiser's embedding of times

    @staticmethod
    def _without_padding(context: Tensor, mask: Tensor) -> Conditioning:
        """Return the states (B, L, D) of the tokens in `mask` (B, 300), which come first, and their numbers."""
        lengths = mask.sum(1)
        longest = int(lengths.max())
        own = mask[:, :longest, None] == 1
        return {CONTEXT: context[:, :longest].float() * own, LENGTHS: lengths}

    @property
    def _predicted_channels(self) -> int:
        """Return the latents' channels: as many more, where the denoiser has them, are a variance."""
        outputs, inputs = self.denoiser.config.out_channels, self.denoiser.config.in_channels
        return inputs if outputs == 2 * inputs else outputs

    @staticmethod
    def conditioning_shapes(config: Mapping[str, Any], num_tokens: int) -> dict[str, tuple[int, ...]]:
        return {CONTEXT: (NUM_TOKENS, config["caption_channels"]), LENGTHS: ()}

    @property
    def num_tokens(self) -> int:
        return min(super().num_tokens, NUM_TOKENS)

    def same_prompts(self, denoiser: torch.nn.Module) -> AbstractContextManager[None]:
        return prompts_attended_once(denoiser)

    def empty_denoiser(self, config: Mapping[str, Any], condition: bool) -> ModelMixin:
        denoiser = super().empty_denoiser(config, condition=False)
        denoiser.get_submodule(self.times).__class__ = TimesAlone  # the same weights, another forward pass
        return self.with_target_time(denoiser) if condition else denoiser

    def time_sinusoids(self, denoiser: ModelMixin, t: Tensor, precision: torch.dtype) -> Tensor:
        return denoiser.get_submodule(self.times).time_proj(self.schedule.network_time[t])

    def predict(
        self, denoiser: torch.nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, s: Tensor | None = None
    ) -> Tensor:
        dtype, times = precision_of(denoiser), self.schedule.network_time[t]
        prediction = denoiser(
            x_t.to(dtype),
            encoder_hidden_states=conditioning[CONTEXT].to(dtype),
            encoder_attention_mask=mask_of(conditioning),
            timestep=times if s is None else torch.stack([times, s.to(times)], 1),
            return_dict=False,
        )[0]
        return prediction[:, : self.latent_shape[0]].float()
