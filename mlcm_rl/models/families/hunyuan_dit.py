"""Hunyuan-DiT 1.2: a transformer that predicts v and a variance; BERT and mT5, which read Chinese and English."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cached_property, partial
from typing import Any

import torch
from diffusers import DiffusionPipeline, HunyuanDiT2DModel, HunyuanDiTPipeline
from diffusers.models.embeddings import (
    HunyuanCombinedTimestepTextSizeStyleEmbedding,
    get_2d_rotary_pos_embed,
    get_timestep_embedding,
)
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid
from torch import Tensor

from ...recipe import Teacher
from ..autoencoder import RECOMPUTE
from ..base import TARGET_TIME_WIDTH, precision_of
from ..conditioning import Conditioning
from ..cross_attention import prompts_attended_once
from ..vp import VPBase

BASE_SIDE = 512  # pixels a side of the pictures whose positions all others are stretched to


class TimesAndTexts(HunyuanCombinedTimestepTextSizeStyleEmbedding):
    """The stock embedding of time and pooled text. In place of sizes, which version 1.2 has none of, a target time.

    Sinusoids are those of exact times; the stock pipeline rounds them first to the precision of the latents, and
    bfloat16 has only every fourth of the last times.
    """

    def forward(
        self, timestep: Tensor, t5: Tensor, target_time: Tensor | None, style: None, hidden_dtype: torch.dtype
    ) -> Tensor:
        """Return (B, width) of times (B,), T5's states (B, L, D) and the target time's sinusoids (B, 256)."""
        embedded = self.timestep_embedder(self.time_proj(timestep).to(t5.dtype), target_time)
        return embedded + self.extra_embedder(self.pooler(t5))


class Family(VPBase):
    """Hunyuan-DiT 1.2, and models of the same structure at any width.

    Tokens after a prompt's own cannot be left out: T5's are pooled with the others, BERT's are a learned embedding.
    """

    family = "hunyuan_dit"
    card_tag = "hunyuan-dit"
    pipeline_class = HunyuanDiTPipeline
    denoiser_class = HunyuanDiT2DModel
    denoiser_part = "transformer"
    time_layer = "time_extra_emb.timestep_embedder"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def __init__(self, teacher: Teacher, device: torch.device, pipeline: DiffusionPipeline):
        super().__init__(teacher, device, pipeline)
        self.denoiser.time_extra_emb.__class__ = TimesAndTexts  # the same weights, another forward pass

    @property
    def _predicted_channels(self) -> int:
        """Return half of what the denoiser gives: the other half is a variance, which no sampler here needs."""
        return self.denoiser.out_channels // 2

    @staticmethod
    def conditioning_shapes(config: Mapping[str, Any], num_tokens: int) -> dict[str, tuple[int, ...]]:
        length, t5_length = config["text_len"], config["text_len_t5"]
        return {
            "context": (length, config["cross_attention_dim"]),
            "mask": (length,),
            "t5_context": (t5_length, config["cross_attention_dim_t5"]),
            "t5_mask": (t5_length,),
        }

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Conditioning:
        """Return the states of BERT and of T5 (B, L, D), and which tokens are the prompt's, 1 or 0 (B, L)."""
        config = self.denoiser.config
        encoded = []
        for index, length in enumerate((config.text_len, config.text_len_t5)):
            context, _, mask, _ = self.pipeline.encode_prompt(
                prompts,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=length,
                text_encoder_index=index,
            )
            encoded += [context.float(), mask.float()]
        return dict(zip(("context", "mask", "t5_context", "t5_mask"), encoded, strict=True))

    @property
    def _tokenizers(self) -> list[Any]:
        """Return T5's tokenizer, which has the most tokens."""
        return [self.pipeline.tokenizer_2]

    @property
    def num_tokens(self) -> int:
        return min(super().num_tokens, self.denoiser.config.text_len_t5)

    def checkpoint_blocks(self, denoiser: HunyuanDiT2DModel, recompute: Callable[..., Any] = RECOMPUTE) -> None:
        """Let each block compute itself again; diffusers' class has no checkpoints of its own."""
        for block in denoiser.blocks:
            block.forward = partial(recompute, block.forward)

    def same_prompts(self, denoiser: torch.nn.Module) -> AbstractContextManager[None]:
        return prompts_attended_once(denoiser)

    def empty_denoiser(self, config: Mapping[str, Any], condition: bool) -> HunyuanDiT2DModel:
        denoiser = super().empty_denoiser(config, condition=False)
        denoiser.time_extra_emb.__class__ = TimesAndTexts
        return self.with_target_time(denoiser) if condition else denoiser

    def time_sinusoids(self, denoiser: HunyuanDiT2DModel, t: Tensor, precision: torch.dtype) -> Tensor:
        return denoiser.time_extra_emb.time_proj(self.schedule.network_time[t].to(precision))

    def predict(
        self, denoiser: torch.nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, s: Tensor | None = None
    ) -> Tensor:
        dtype = precision_of(denoiser)
        prediction = denoiser(
            x_t.to(dtype),
            self.schedule.network_time[t].float(),
            encoder_hidden_states=conditioning["context"].to(dtype),
            text_embedding_mask=conditioning["mask"],
            encoder_hidden_states_t5=conditioning["t5_context"].to(dtype),
            text_embedding_mask_t5=conditioning["t5_mask"],
            image_meta_size=None if s is None else get_timestep_embedding(s, TARGET_TIME_WIDTH).to(dtype),
            image_rotary_emb=self._positions,
            return_dict=False,
        )[0]
        return prediction[:, : self.latent_shape[0]].float()

    @cached_property
    def _positions(self) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (patches, width of a head) of the rotary embedding of this resolution's patches."""
        config, patch = self.denoiser.config, self.geometry.pixels
        side = self.resolution // patch
        region = get_resize_crop_region_for_grid((side, side), BASE_SIDE // patch)
        width = config.attention_head_dim
        return get_2d_rotary_pos_embed(width, region, (side, side), device=self.device, output_type="pt")
