"""Stable Diffusion 3 and 3.5: a joint transformer over picture and text; two CLIP towers, with or without T5."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings, get_timestep_embedding
from torch import Tensor
from torch.nn import functional as F

from ..base import TARGET_TIME_WIDTH, precision_of
from ..client_keys import MMDIT
from ..comfyui import Nodes
from ..conditioning import Conditioning
from ..files import pipeline_index
from ..flow import FlowBase

T5_TOKENS = 256  # T5's tokens in the stock pipeline; without T5 their states are zeros


class TimesAndText(CombinedTimestepTextProjEmbeddings):
    """The stock embedding of time and pooled text, of times (B,), or (B, 2): t and the target time."""

    def forward(self, times: Tensor, pooled: Tensor) -> Tensor:
        """Return (B, width). The projected sinusoids of the target time are added to those of t."""
        t, s = (times, None) if times.ndim == 1 else times.unbind(1)
        target_time = None if s is None else get_timestep_embedding(s, TARGET_TIME_WIDTH).to(pooled.dtype)
        embedded = self.timestep_embedder(self.time_proj(t).to(pooled.dtype), target_time)
        return embedded + self.text_embedder(pooled)


class OneForEqualTokens:
    """The stock joint attention, with the last token of the context standing for T5_TOKENS equal ones.

    Equal keys weigh in a softmax as one key with the logarithm of their number added.
    """

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *_, **__) -> tuple:
        """Return the states of the picture and of the context after one joint attention, as the stock processor."""
        num_picture = hidden_states.shape[1]

        def heads(projected: Tensor, norm: Any) -> Tensor:
            split = projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return split if norm is None else norm(split)

        def joint(of_picture: Tensor, of_context: Tensor, norm: Any = None, context_norm: Any = None) -> Tensor:
            return torch.cat([heads(of_picture, norm), heads(of_context, context_norm)], dim=2)

        x, c = hidden_states, encoder_hidden_states
        query = joint(attn.to_q(x), attn.add_q_proj(c), attn.norm_q, attn.norm_added_q)
        key = joint(attn.to_k(x), attn.add_k_proj(c), attn.norm_k, attn.norm_added_k)
        value = joint(attn.to_v(x), attn.add_v_proj(c))
        bias = query.new_zeros(key.shape[2])
        bias[-1] = math.log(T5_TOKENS)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.expand(1, 1, query.shape[2], -1))
        picture, context = mixed.transpose(1, 2).flatten(2).split([num_picture, mixed.shape[2] - num_picture], dim=1)
        return attn.to_out[0](picture), context if attn.context_pre_only else attn.to_add_out(context)


def merge_equal_tokens(denoiser: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """Let `denoiser` compute the last T5_TOKENS tokens of its context, which must be equal, as one; return it.

    Nothing tells a token of the context its place, so equal ones stay equal through all blocks: the outputs are the
    same up to rounding. Weights and their names are the stock network's. A pass raises ValueError for a context of
    fewer tokens, or after another attention processor was set, which would not weigh the one as many.
    """
    if _is_merged(denoiser):
        return denoiser
    denoiser.register_forward_pre_hook(_refuse_other_processors)
    denoiser.context_embedder.register_forward_pre_hook(_without_copies)
    for block in denoiser.transformer_blocks:
        block.attn.set_processor(OneForEqualTokens())
    return denoiser


def _is_merged(denoiser: Any) -> bool:
    return all(isinstance(block.attn.processor, OneForEqualTokens) for block in denoiser.transformer_blocks)


def _refuse_other_processors(denoiser: torch.nn.Module, arguments: tuple) -> None:
    if not _is_merged(denoiser):
        raise ValueError(
            "the denoiser of a teacher without T5 computes equal tokens as one, and its attention has another "
            "processor now (set_attn_processor, fuse_qkv_projections), which does not: leave its processors as they are"
        )


def _without_copies(module: torch.nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
    if (num_tokens := arguments[0].shape[1]) < T5_TOKENS:
        raise ValueError(f"a context of {num_tokens} tokens, where the last {T5_TOKENS} stand for those of T5")
    return (arguments[0][:, : 1 - T5_TOKENS],)


class Family(FlowBase):
    """Stable Diffusion 3 and 3.5, and models of the same structure at any width.

    Each block changes the states of the prompt by those of the picture, so `same_prompts` has nothing to compute once.
    """

    family = "sd3"
    card_tag = "stable-diffusion-3"
    comfyui = Nodes(
        text_encoders=("clip_l.safetensors", "clip_g.safetensors", "t5xxl_fp16.safetensors"),
        text_type="sd3",
        latent="EmptySD3LatentImage",
        shift="ModelSamplingSD3",
    )
    kohya_module = "networks.lora_sd3"
    pipeline_class = StableDiffusion3Pipeline
    denoiser_class = SD3Transformer2DModel
    time_layer = "time_text_embed.timestep_embedder"
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )

    @property
    def kohya_version(self) -> str:
        """Return sd-scripts' name of the size: `medium` of Stable Diffusion 3, `5-medium` or `5-large` of 3.5."""
        config = self.denoiser.config
        if config.qk_norm is None:
            return "medium"
        return "5-medium" if config.dual_attention_layers else "5-large"

    def kohya_layers(self, modules: Sequence[str]) -> dict[str, tuple[str, ...]]:
        return MMDIT.kohya_layers(self.denoiser, modules)

    def simplify(self, denoiser: SD3Transformer2DModel) -> SD3Transformer2DModel:
        """Compute the zeros of an absent T5 as one token: with CLIP's 77 and a small picture a third of the work."""
        is_without_t5 = pipeline_index(self.teacher).get("text_encoder_3") in (None, [None, None])
        return merge_equal_tokens(denoiser) if is_without_t5 else denoiser

    def _sizes(self) -> tuple[int, tuple[int, int, int]]:
        resolution, latent_shape = super()._sizes()
        most = self.denoiser.config.pos_embed_max_size * self.denoiser.config.patch_size
        if latent_shape[-1] > most:
            largest = most * self.geometry.downscale
            raise ValueError(
                f"teacher.resolution {resolution} is above {largest}, up to which {self.teacher.path} has positions"
            )
        return resolution, latent_shape

    @staticmethod
    def conditioning_shapes(config: Mapping[str, Any], num_tokens: int) -> dict[str, tuple[int, ...]]:
        context = (num_tokens + T5_TOKENS, config["joint_attention_dim"])
        return {"context": context, "pooled": (config["pooled_projection_dim"],)}

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Conditioning:
        """Return CLIP's states, concatenated and padded to T5's width, then T5's (B, L, D); pooled vectors (B, P)."""
        context, _, pooled, _ = self.pipeline.encode_prompt(
            prompts,
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=T5_TOKENS,
        )
        return {"context": context.float(), "pooled": pooled.float()}

    @property
    def _tokenizers(self) -> list[Any]:
        """Return T5's tokenizer, which has the most tokens; without T5, CLIP's."""
        return [self.pipeline.tokenizer_3] if self.pipeline.tokenizer_3 is not None else super()._tokenizers

    @property
    def num_tokens(self) -> int:
        return min(super().num_tokens, T5_TOKENS)

    def empty_denoiser(self, config: Mapping[str, Any], condition: bool) -> SD3Transformer2DModel:
        denoiser = super().empty_denoiser(config, condition=False)
        width, pooled = denoiser.inner_dim, denoiser.config.pooled_projection_dim
        denoiser.time_text_embed = TimesAndText(embedding_dim=width, pooled_projection_dim=pooled)
        return self.with_target_time(denoiser) if condition else denoiser

    def time_sinusoids(self, denoiser: SD3Transformer2DModel, t: Tensor, precision: torch.dtype) -> Tensor:
        return denoiser.time_text_embed.time_proj(self.schedule.network_time[t])

    def predict(
        self, denoiser: torch.nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, s: Tensor | None = None
    ) -> Tensor:
        dtype = precision_of(denoiser)
        times = self.schedule.network_time[t]
        return denoiser(
            hidden_states=x_t.to(dtype),
            encoder_hidden_states=conditioning["context"].to(dtype),
            pooled_projections=conditioning["pooled"].to(dtype),
            timestep=times if s is None else torch.stack([times, s.to(times)], 1),
            return_dict=False,
        )[0].float()
