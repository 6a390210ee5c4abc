"""Stable Diffusion XL: two text towers concatenated, a pooled vector, picture sizes as a condition."""

from functools import cached_property
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from ...recipe import Teacher
from ..comfyui import Nodes
from ..conditioning import Conditioning
from ..unet import UNetBase


class Family(UNetBase):
    """SDXL, and models of the same structure at any width."""

    family = "sdxl"
    card_tag = "stable-diffusion-xl"
    comfyui: ClassVar[Nodes | None] = Nodes(knows_sizes=True, reads_adapters=False)
    pipeline_class = StableDiffusionXLPipeline
    in_stability_blocks = True

    def __init__(self, teacher: Teacher, device: torch.device, pipeline: DiffusionPipeline):
        super().__init__(teacher, device, pipeline)
        side = float(self.resolution)  # original size, crop corner, target size: every pass would wait for a copy
        self._time_ids = torch.tensor([[side, side, 0.0, 0.0, side, side]]).to(device)

    @property
    def kohya_version(self) -> str | None:
        return "sdxl_base_v1-0"

    @property
    def original_texts(self) -> dict[str, str]:
        return {
            "text_encoder": "conditioner.embedders.0.transformer.",
            "text_encoder_2": "conditioner.embedders.1.model.",
        }

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Conditioning:
        """Return the towers' penultimate states, concatenated (B, L, D), and the last tower's pooled vector (B, P)."""
        encoded = self.pipeline.encode_prompt(prompts, device=self.device, do_classifier_free_guidance=False)
        context, _, pooled, _ = encoded
        return {"context": context.float(), "pooled": pooled.float()}

    @cached_property
    @torch.no_grad()
    def _dropped_prompt(self) -> Conditioning:
        """Return zeros if the pipeline has `force_zeros_for_empty_prompt`, else the encoding of the empty prompt."""
        _, context, _, pooled = self.pipeline.encode_prompt("", device=self.device)
        return {"context": context.float(), "pooled": pooled.float()}

    def _added_conditions(self, conditioning: Conditioning, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the pooled vector with original size, crop corner and target size: uncropped, the stock default."""
        pooled = conditioning["pooled"].to(dtype)
        return {"text_embeds": pooled, "time_ids": self._time_ids.to(pooled.device, dtype).expand(len(pooled), -1)}
