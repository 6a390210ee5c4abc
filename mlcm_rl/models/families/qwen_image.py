"""Qwen-Image: a joint transformer over picture and prompt, which Qwen2.5-VL encodes; English and Chinese."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.transformers.transformer_qwenimage import QwenTimestepProjEmbeddings
from torch import Tensor

from ..autoencoder import RECOMPUTE, Autoencoder
from ..base import TARGET_TIME_WIDTH, precision_of
from ..comfyui import Nodes
from ..conditioning import CONTEXT, LENGTHS, Conditioning
from ..flow import FlowBase
from ..packing import as_latents, as_tokens, patchified, unpatchified

PROMPT_TOKENS = 512  # of a prompt and the end of its template, in a call of the stock pipeline
PART = 32  # a target time is PART high + low, both exact in bfloat16


class Times(QwenTimestepProjEmbeddings):
    """The stock embedding of times (B,), or (B, 3): t and the two parts of the target time.

    The transformer rounds its times to the precision of its states, where only whole numbers up to 256 are exact.
    """

    def forward(self, times: Tensor, states: Tensor, addition: Tensor | None = None) -> Tensor:
        """Return (B, width) in the precision of `states`. The target time's sinusoids are projected and added to t's.

        `addition` is the stock embedding's, which text-to-image models do not have.
        """
        if times.ndim == 1:
            return super().forward(times, states, addition)
        t, high, low = times.float().unbind(1)
        target_time = get_timestep_embedding(PART * high + low, TARGET_TIME_WIDTH)
        return self.timestep_embedder(self.time_proj(t).to(states.dtype), target_time.to(states.dtype))


class FrameAutoencoder(Autoencoder):
    """An autoencoder of videos, AutoencoderKLQwenImage; a picture is a video of one frame.

    Its decoder passes a cache of earlier frames from block to block, which a first frame does not read: what is
    computed again in a backward pass is computed without it.
    """

    @property
    def latent_channels(self) -> int:
        return self.vae.config.z_dim

    def checkpoint_blocks(self, recompute: Callable[..., Any] = RECOMPUTE) -> None:
        for block in (self.vae.decoder.mid_block, *self.vae.decoder.up_blocks):
            block.forward = partial(_without_cache, partial(recompute, block.forward))

    def _tile(self, size: int, recompute: Callable[..., Any]) -> None:
        self.vae.enable_tiling(size, size, size - size // 4, size - size // 4)
        self.vae.decoder.forward = partial(_without_cache, partial(recompute, self.vae.decoder.forward))

    def _decoded(self, latents: Tensor) -> Tensor:
        return super()._decoded(latents.unsqueeze(2)).squeeze(2)

    def _encoded(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        return super()._encoded(images.unsqueeze(2), generator).squeeze(2)


def _without_cache(
    function: Callable[[Tensor], Tensor], states: Tensor, feat_cache: Any = None, feat_idx: Any = None
) -> Tensor:
    """Return `function` of `states`; the cache of earlier frames is left as it is."""
    return function(states)


class Family(FlowBase):
    """Qwen-Image, and models of the same structure at any width.

    Guidance keeps the norm that each token of the conditional prediction has. Each block changes the states of the
    prompt by those of the picture, so `same_prompts` has nothing to compute once.
    """

    family = "qwen_image"
    card_tag = "qwen-image"
    comfyui = Nodes(
        text_encoders=("qwen_2.5_vl_7b_fp8_scaled.safetensors",),
        text_type="qwen_image",
        autoencoder="qwen_image_vae.safetensors",
        latent="EmptySD3LatentImage",
        shift="ModelSamplingAuraFlow",
    )
    pipeline_class = QwenImagePipeline
    denoiser_class = QwenImageTransformer2DModel
    autoencoder_class = FrameAutoencoder
    time_layer = "time_text_embed.timestep_embedder"
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    )

    @property
    def kohya_version(self) -> str:
        return "qwen-image"

    @property
    def stock_guidance(self) -> dict[str, float]:
        return {"true_cfg_scale": 1.0}

    @staticmethod
    def conditioning_shapes(config: Mapping[str, Any], num_tokens: int) -> dict[str, tuple[int, ...]]:
        return {CONTEXT: (min(num_tokens, PROMPT_TOKENS), config["joint_attention_dim"]), LENGTHS: ()}

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Conditioning:
        """Return Qwen2.5-VL's last states (B, L, D) of the prompts, without those of the instruction before them."""
        context, mask = self.pipeline.encode_prompt(prompts, device=self.device, max_sequence_length=PROMPT_TOKENS)
        full = torch.full((len(prompts),), context.shape[1], device=self.device)
        return {CONTEXT: context.float(), LENGTHS: full if mask is None else mask.sum(1)}

    @cached_property
    def _dropped_prompt(self) -> Conditioning:
        """Return the encoding of a space, the negative prompt of the model's own examples."""
        return self._encode([" "])

    @property
    def num_tokens(self) -> int:
        return min(super().num_tokens, PROMPT_TOKENS)

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Return the tokens of each prompt and of its template's end; those beyond `num_tokens` are cut off."""
        counts = super().count_tokens([self.pipeline.prompt_template_encode.format(one) for one in prompts])
        return [count - self.pipeline.prompt_template_encode_start_idx for count in counts]

    def empty_denoiser(self, config: Mapping[str, Any], condition: bool) -> QwenImageTransformer2DModel:
        """Return a new denoiser; its tables of positions, which are no buffers, are on the CPU with their content."""
        denoiser = super().empty_denoiser(config, condition=False)
        positions = denoiser.pos_embed
        with torch.device("cpu"):
            denoiser.pos_embed = type(positions)(positions.theta, positions.axes_dim, positions.scale_rope)
        if not condition:
            return denoiser
        denoiser.time_text_embed = Times(denoiser.inner_dim)
        return self.with_target_time(denoiser)

    def time_sinusoids(self, denoiser: QwenImageTransformer2DModel, t: Tensor, precision: torch.dtype) -> Tensor:
        return denoiser.time_text_embed.time_proj(self.divided_times(t, precision))

    def predict(
        self, denoiser: torch.nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, s: Tensor | None = None
    ) -> Tensor:
        dtype, patch = precision_of(denoiser), self.geometry.multiple
        tokens, times = as_tokens(patchified(x_t.to(dtype), patch)), self.divided_times(t, dtype)
        if s is not None:
            times = torch.stack([times, s // PART, s % PART], 1)
        side = x_t.shape[-1] // patch
        velocity = denoiser(
            hidden_states=tokens,
            encoder_hidden_states=conditioning[CONTEXT].to(dtype),
            encoder_hidden_states_mask=None if x_t.is_meta else _mask(conditioning),
            timestep=times,
            img_shapes=[[(1, side, side)]] * len(x_t),
            return_dict=False,
        )[0]
        return unpatchified(as_latents(velocity, side), patch).float()

    def _guided(self, with_prompt: Tensor, without: Tensor, guidance_scale: float) -> Tensor:
        """Return u + w (c - u), of which each token (of 2 x 2 latents) is scaled to the norm of c's."""
        patch = self.geometry.multiple
        combined = patchified(super()._guided(with_prompt, without, guidance_scale), patch)
        norm = patchified(with_prompt, patch).norm(dim=1, keepdim=True)
        return unpatchified(combined * (norm / combined.norm(dim=1, keepdim=True)), patch)


def _mask(conditioning: Conditioning) -> Tensor | None:
    """Return which tokens (B, L) are the prompts' own; None where all are, as in the stock pipeline."""
    positions = torch.arange(conditioning[CONTEXT].shape[1], device=conditioning[CONTEXT].device)
    mask = positions < conditioning[LENGTHS][:, None]
    return None if mask.all() else mask
