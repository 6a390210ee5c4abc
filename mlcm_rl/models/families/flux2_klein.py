"""FLUX.2-klein-base: a joint transformer over picture and text, which three layers of Qwen3 encode."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.transformers.transformer_flux2 import Flux2TimestepGuidanceEmbeddings
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor

from ..autoencoder import Autoencoder
from ..base import TARGET_TIME_WIDTH, precision_of
from ..comfyui import Nodes
from ..conditioning import Conditioning
from ..flow import FlowBase
from ..packing import as_latents, as_tokens, patchified, unpatchified

TOKENS = 512  # to which every prompt is padded in its chat template; the padding is attended to
STEPS = 50  # the stock pipeline's default


class Times(Flux2TimestepGuidanceEmbeddings):
    """The stock embedding of times; what it has for guidance, which klein has none of, is the target time's sinusoids.

    The transformer rounds its times to the precision of its weights; sinusoids of a rounded time would be others.
    """

    def forward(self, timestep: Tensor, guidance: Tensor | None) -> Tensor:
        """Return (B, width) of times (B,). Projected sinusoids of the target time (B, 256) are added to those of t."""
        return self.timestep_embedder(self.time_proj(timestep).to(timestep.dtype), guidance)


class PatchAutoencoder(Autoencoder):
    """FLUX.2's: 2 x 2 of its latents are one of the denoiser's, normalised by statistics among its weights."""

    @property
    def latent_channels(self) -> int:
        return self.vae.bn.num_features

    @property
    def _patch(self) -> int:
        return self.vae.config.patch_size[0]

    @cached_property
    def _scale(self) -> tuple[Tensor, Tensor]:
        """Return deviation and mean (1, C, 1, 1) of the patches, by the statistics of the batch norm."""
        norm = self.vae.bn
        variance, mean = (value.reshape(1, -1, 1, 1) for value in (norm.running_var, norm.running_mean))
        return (variance + norm.eps).sqrt(), mean

    def _to_own(self, latents: Tensor) -> Tensor:
        return unpatchified(super()._to_own(latents), self._patch)

    def _from_own(self, latents: Tensor) -> Tensor:
        return super()._from_own(patchified(latents, self._patch))

    def _tile(self, size: int, recompute: Callable[..., Any]) -> None:
        super()._tile(size, recompute)
        self.vae.tile_latent_min_size *= self._patch


class Family(FlowBase):
    """FLUX.2-klein-base, and models of the same structure at any width."""

    family = "flux2_klein"
    card_tag = "flux2"
    comfyui = Nodes(
        text_encoders=("qwen_3_4b.safetensors",),
        text_type="flux2",
        autoencoder="flux2-vae.safetensors",
        latent="EmptyFlux2LatentImage",
        shift="ModelSamplingFlux",
        reads_denoisers=False,
        renamed={"time_guidance_embed.timestep_embedder.linear_1": "diffusion_model.time_in.in_layer"},
    )
    pipeline_class = Flux2KleinPipeline
    denoiser_class = Flux2Transformer2DModel
    autoencoder_class = PatchAutoencoder
    time_layer = "time_guidance_embed.timestep_embedder"
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
        "to_qkv_mlp_proj",  # of the blocks of one stream
    )

    @classmethod
    def adapted_modules(cls, config: Mapping[str, Any]) -> Sequence[str]:
        """Return `lora_targets` and the last layers of the blocks of one stream, whose name alone is that of lists."""
        last = (f"single_transformer_blocks.{i}.attn.to_out" for i in range(config["num_single_layers"]))
        return (*cls.lora_targets, *last)

    @property
    def shift(self) -> float:
        """Return the shift of the time axis towards noise: fixed, or the stock pipeline's at its default of 50 steps.

        The stock pipeline's own depends on the number of steps, from 10 at one to 7.6 at 50 (4096 tokens), and a grid
        has one: that under which the teacher is drawn as it is published.
        """
        if not self.shifts_by_tokens:
            return super().shift
        _, height, width = self.latent_shape
        return math.exp(compute_empirical_mu(height * width, STEPS))

    @property
    def _predicted_channels(self) -> int:
        return self.denoiser.out_channels

    @staticmethod
    def conditioning_shapes(config: Mapping[str, Any], num_tokens: int) -> dict[str, tuple[int, ...]]:
        return {"context": (TOKENS, config["joint_attention_dim"])}

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Conditioning:
        """Return the states (B, 512, D) of three of Qwen3's layers, side by side, of the prompts as chats."""
        context, _ = self.pipeline.encode_prompt(prompts, device=self.device, max_sequence_length=TOKENS)
        return {"context": context.float()}

    @property
    def num_tokens(self) -> int:
        return TOKENS

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Return the tokens of each prompt with those of its chat template; those beyond `num_tokens` are cut off."""
        template = self.pipeline.tokenizer.apply_chat_template
        settings = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        return super().count_tokens([template([{"role": "user", "content": one}], **settings) for one in prompts])

    def empty_denoiser(self, config: Mapping[str, Any], condition: bool) -> Flux2Transformer2DModel:
        denoiser = super().empty_denoiser(config, condition=False)
        if not condition:
            return denoiser
        width = denoiser.config.timestep_guidance_channels
        denoiser.time_guidance_embed = Times(width, denoiser.inner_dim, guidance_embeds=False)
        return self.with_target_time(denoiser)

    def time_sinusoids(self, denoiser: Flux2Transformer2DModel, t: Tensor, precision: torch.dtype) -> Tensor:
        return denoiser.time_guidance_embed.time_proj(self.divided_times(t, precision) * self.schedule.num_times)

    def predict(
        self, denoiser: torch.nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, s: Tensor | None = None
    ) -> Tensor:
        dtype = precision_of(denoiser)
        sinusoids = None if s is None else get_timestep_embedding(s, TARGET_TIME_WIDTH)
        text, picture = self._positions
        tokens = denoiser(
            hidden_states=as_tokens(x_t.to(dtype)),
            encoder_hidden_states=conditioning["context"].to(dtype),
            timestep=self.divided_times(t, dtype),
            guidance=None if sinusoids is None else sinusoids / self.schedule.num_times,  # which multiplies it by T
            txt_ids=text,
            img_ids=picture,
            return_dict=False,
        )[0]
        return as_latents(tokens, x_t.shape[-1]).float()

    @cached_property
    def _positions(self) -> tuple[Tensor, Tensor]:
        """Return the positions (512, 4) of the text's tokens and (H W, 4) of the picture's: 0, row, column, number."""
        text = self.pipeline._prepare_text_ids(torch.empty(1, TOKENS, 0))
        picture = self.pipeline._prepare_latent_ids(torch.empty(1, *self.latent_shape))
        return text[0].to(self.device), picture[0].to(self.device)
