"""Stable Diffusion 1.5 (epsilon) and 2.1 (v): one text tower, its last states."""

import torch
from diffusers import StableDiffusionPipeline

from ..comfyui import Nodes
from ..conditioning import Conditioning
from ..unet import UNetBase


class Family(UNetBase):
    """Stable Diffusion 1 and 2, and models of the same structure at any width."""

    family = "sd"
    card_tag = "stable-diffusion"
    comfyui = Nodes(reads_adapters=False)
    pipeline_class = StableDiffusionPipeline

    @property
    def kohya_version(self) -> str:
        """Return `sd_v1`, or `sd_v2` for linear projections, with `_v` appended for v prediction."""
        version = "sd_v2" if self.denoiser.config.use_linear_projection else "sd_v1"
        return f"{version}_v" if self.prediction_type == "v_prediction" else version

    @property
    def original_texts(self) -> dict[str, str]:
        """Return the one of Stable Diffusion 1: diffusers' text encoder of 2 lacks the last layer of the original."""
        return {} if self.denoiser.config.use_linear_projection else {"text_encoder": "cond_stage_model.transformer."}

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Conditioning:
        """Return the text tower's last states (B, L, D), after its final norm."""
        context, _ = self.pipeline.encode_prompt(prompts, self.device, 1, do_classifier_free_guidance=False)
        return {"context": context.float()}
