"""FLUX.1-dev: a joint transformer over picture and text, one of whose inputs is the guidance scale; CLIP and T5."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.models.embeddings import CombinedTimestepGuidanceTextProjEmbeddings, get_timestep_embedding
from torch import Tensor

from ...equations.prediction import x0_from_prediction
from ...training import autocast
from ..base import TARGET_TIME_WIDTH, precision_of
from ..client_keys import FLUX
from ..comfyui import Nodes
from ..conditioning import Conditioning
from ..flow import FlowBase
from ..packing import as_latents, as_tokens, patchified, unpatchified

T5_TOKENS = 512  # to which every prompt is padded; the padding is attended to


class TimesGuidanceAndText(CombinedTimestepGuidanceTextProjEmbeddings):
    """The stock embedding of time, guidance and pooled text, after which a target time's sinusoids may stand.

    The transformer rounds its times to the precision of its weights; sinusoids of a rounded time would be others.
    """

    def forward(self, timestep: Tensor, guidance: Tensor, pooled: Tensor) -> Tensor:
        """Return (B, width) of times and scales (B,), and pooled text (B, P) or (B, P + 256) with a target time."""
        text, target_time = pooled.tensor_split([self.text_embedder.linear_1.in_features], dim=1)
        t, scale = (self.time_proj(one).to(text.dtype) for one in (timestep, guidance))
        embedded = self.timestep_embedder(t, target_time if target_time.shape[1] else None)
        return embedded + self.guidance_embedder(scale) + self.text_embedder(text)


class Family(FlowBase):
    """FLUX.1-dev, and models of the same structure at any width.

    The teacher's guided pass is one pass with the scale as an input: nothing is guided away from, and scale 1 is a
    scale like others. A student is always given the teacher's scale, and so it is when it is sampled.
    """

    family = "flux"
    card_tag = "flux"
    comfyui = Nodes(
        text_encoders=("clip_l.safetensors", "t5xxl_fp16.safetensors"),
        text_type="flux",
        autoencoder="ae.safetensors",
        latent="EmptySD3LatentImage",
        shift="ModelSamplingFlux",
    )
    kohya_module = "networks.lora_flux"
    pipeline_class = FluxPipeline
    denoiser_class = FluxTransformer2DModel
    time_layer = "time_text_embed.timestep_embedder"
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
        *("proj_mlp", "proj_out"),  # of the blocks of one stream, whose attention has the names above
    )

    @property
    def kohya_version(self) -> str:
        return "flux1"

    def kohya_layers(self, modules: Sequence[str]) -> dict[str, tuple[str, ...]]:
        return FLUX.kohya_layers(self.denoiser, modules)

    @property
    def _predicted_channels(self) -> int:
        return self.denoiser.out_channels // self.geometry.multiple**2

    @property
    def stock_guidance(self) -> dict[str, float]:
        """Return the scale that the student learned to be given."""
        return {"guidance_scale": self.teacher.guidance_scale}

    @staticmethod
    def conditioning_shapes(config: Mapping[str, Any], num_tokens: int) -> dict[str, tuple[int, ...]]:
        return {"context": (T5_TOKENS, config["joint_attention_dim"]), "pooled": (config["pooled_projection_dim"],)}

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Conditioning:
        """Return T5's states (B, 512, D) and CLIP's pooled vectors (B, P)."""
        context, pooled, _ = self.pipeline.encode_prompt(
            prompts, prompt_2=None, device=self.device, max_sequence_length=T5_TOKENS
        )
        return {"context": context.float(), "pooled": pooled.float()}

    @property
    def _tokenizers(self) -> list[Any]:
        """Return T5's tokenizer; CLIP's states are not read, but for the pooled one."""
        return [self.pipeline.tokenizer_2]

    @property
    def num_tokens(self) -> int:
        return T5_TOKENS

    def empty_denoiser(self, config: Mapping[str, Any], condition: bool) -> FluxTransformer2DModel:
        denoiser = super().empty_denoiser(config, condition=False)
        if not condition:
            return denoiser
        width, pooled = denoiser.inner_dim, denoiser.config.pooled_projection_dim
        denoiser.time_text_embed = TimesGuidanceAndText(embedding_dim=width, pooled_projection_dim=pooled)
        return self.with_target_time(denoiser)

    def time_sinusoids(self, denoiser: FluxTransformer2DModel, t: Tensor, precision: torch.dtype) -> Tensor:
        return denoiser.time_text_embed.time_proj(self.divided_times(t, precision) * self.schedule.num_times)

    def predict(
        self, denoiser: torch.nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, s: Tensor | None = None
    ) -> Tensor:
        return self._predict(denoiser, x_t, t, conditioning, self.teacher.guidance_scale, s)

    @torch.no_grad()
    def guided_x0(
        self, x_t: Tensor, t: Tensor, conditional: Conditioning, unconditional: Conditioning, guidance_scale: float
    ) -> Tensor:
        """Return the teacher's x0 (B, C, H, W) with this scale as an input; `unconditional` has no part in it."""
        with autocast.own(self.device):
            prediction = self._predict(self.denoiser, x_t, t, conditional, guidance_scale)
        return x0_from_prediction(prediction, x_t, t, self.schedule, self.prediction_type)

    def _predict(
        self,
        denoiser: torch.nn.Module,
        x_t: Tensor,
        t: Tensor,
        conditioning: Conditioning,
        guidance_scale: float,
        s: Tensor | None = None,
    ) -> Tensor:
        dtype, patch = precision_of(denoiser), self.geometry.multiple
        pooled = conditioning["pooled"].to(dtype)
        if s is not None:
            pooled = torch.cat([pooled, get_timestep_embedding(s, TARGET_TIME_WIDTH).to(dtype)], dim=1)
        context = conditioning["context"].to(dtype)
        tokens = denoiser(
            hidden_states=as_tokens(patchified(x_t.to(dtype), patch)),
            encoder_hidden_states=context,
            pooled_projections=pooled,
            timestep=self.divided_times(t, dtype),
            guidance=torch.full((len(x_t),), guidance_scale, device=x_t.device),
            txt_ids=torch.zeros(context.shape[1], 3, device=x_t.device),
            img_ids=self._positions,
            return_dict=False,
        )[0]
        return unpatchified(as_latents(tokens, x_t.shape[-1] // patch), patch).float()

    @cached_property
    def _positions(self) -> Tensor:
        """Return the positions (H W / 4, 3) of the picture's tokens: 0, row, column."""
        height, width = (side // self.geometry.multiple for side in self.latent_shape[1:])
        return self.pipeline._prepare_latent_image_ids(1, height, width, self.device, torch.float32)
