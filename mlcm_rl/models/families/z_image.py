"""Z-Image: one transformer over picture and caption, which Qwen3 encodes; English and Chinese."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.transformers.transformer_z_image import TimestepEmbedder
from torch import Tensor

from ...equations.schedule import Schedule, flow_schedule
from ..base import TARGET_TIME_WIDTH, precision_of
from ..comfyui import Nodes
from ..conditioning import CONTEXT, LENGTHS, Conditioning, stacked
from ..flow import FlowBase

CAPTION_TOKENS = 512  # of a prompt in its chat template, in the stock pipeline


class Times(TimestepEmbedder):
    """The stock embedding of times (B,), or (B, 2): t and the target time."""

    def __init__(self, *widths: int):
        super().__init__(*widths)
        self.register_module("cond_proj", None)

    def forward(self, times: Tensor) -> Tensor:
        """Return (B, width). The projected sinusoids of the target time are added to those of t."""
        if times.ndim == 1:
            return super().forward(times)
        t, s = times.unbind(1)
        sinusoids = self.timestep_embedding(t, self.frequency_embedding_size).to(self.mlp[0].weight.dtype)
        target_time = get_timestep_embedding(s.round(), TARGET_TIME_WIDTH).to(sinusoids.dtype)  # s was divided before
        return self.mlp(sinusoids + self.cond_proj(target_time))


class Family(FlowBase):
    """Z-Image, and models of the same structure at any width.

    The denoiser is given 1 - sigma and predicts x0 - eps. Its captions are a list without padding: a caption that is
    padded here would be another one, since the padding of its own is a learned token, and a picture's positions begin
    where the caption ends.
    """

    family = "z_image"
    card_tag = "z-image"
    comfyui = Nodes(
        text_encoders=("qwen_3_4b.safetensors",),
        text_type="lumina2",
        autoencoder="ae.safetensors",
        latent="EmptySD3LatentImage",
        shift="ModelSamplingAuraFlow",
    )
    pipeline_class = ZImagePipeline
    denoiser_class = ZImageTransformer2DModel
    time_layer = "t_embedder"
    time_input = "mlp.0"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")

    @property
    def _predicted_channels(self) -> int:
        return self.denoiser.config.in_channels

    def blocks(self, denoiser: Any) -> list[torch.nn.Module]:
        """Return the blocks of the picture alone, then those of picture and caption, but not those of the caption."""
        return [*denoiser.noise_refiner, *denoiser.layers]

    def _schedule(self) -> tuple[str, Schedule]:
        return "flow", flow_schedule(self.shift, network_time=lambda sigma: 1.0 - sigma)

    @staticmethod
    def conditioning_shapes(config: Mapping[str, Any], num_tokens: int) -> dict[str, tuple[int, ...]]:
        return {CONTEXT: (min(num_tokens, CAPTION_TOKENS), config["cap_feat_dim"]), LENGTHS: ()}

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Conditioning:
        """Return Qwen3's last but one states (B, L, D) of the prompts as chats. The pipeline writes to its list."""
        states, _ = self.pipeline.encode_prompt(
            list(prompts),
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=CAPTION_TOKENS,
        )
        return stacked([{CONTEXT: one.float(), LENGTHS: torch.tensor(len(one), device=one.device)} for one in states])

    @property
    def num_tokens(self) -> int:
        return min(super().num_tokens, CAPTION_TOKENS)

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Return the tokens of each prompt with those of its chat template; those beyond `num_tokens` are cut off."""
        template = self.pipeline.tokenizer.apply_chat_template
        settings = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
        return super().count_tokens([template([{"role": "user", "content": one}], **settings) for one in prompts])

    def empty_denoiser(self, config: Mapping[str, Any], condition: bool) -> ZImageTransformer2DModel:
        denoiser = super().empty_denoiser(config, condition=False)
        first, _, last = denoiser.t_embedder.mlp
        denoiser.t_embedder = Times(last.out_features, first.out_features, first.in_features)
        return self.with_target_time(denoiser) if condition else denoiser

    def time_sinusoids(self, denoiser: ZImageTransformer2DModel, t: Tensor, precision: torch.dtype) -> Tensor:
        times = self.schedule.network_time[t] * denoiser.t_scale
        return denoiser.t_embedder.timestep_embedding(times, denoiser.t_embedder.frequency_embedding_size)

    def predict(
        self, denoiser: torch.nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, s: Tensor | None = None
    ) -> Tensor:
        dtype, context = precision_of(denoiser), conditioning[CONTEXT]
        lengths = [context.shape[1]] * len(context) if x_t.is_meta else conditioning[LENGTHS].tolist()
        captions = [one[:length] for one, length in zip(context.to(dtype), lengths, strict=True)]
        times = self.schedule.network_time[t]
        if s is not None:
            times = torch.stack([times, s / self.denoiser.config.t_scale], 1)  # the denoiser multiplies all times by it
        states = list(x_t.to(dtype).unsqueeze(2).unbind(0))
        velocities = denoiser(states, times, captions, return_dict=False)[0]
        return -torch.stack(velocities).squeeze(2).float()
