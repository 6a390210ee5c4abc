"""PixArt-Sigma: a transformer that predicts the noise and a variance; T5."""

from typing import Any

import torch
from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel

from ..adaln_single import AdaLNSingleBase
from ..comfyui import Nodes
from ..conditioning import Conditioning
from ..vp import VPBase


class Family(AdaLNSingleBase, VPBase):
    """PixArt-Sigma, and models of the same structure at any width.

    Prompts are read in lower case, and otherwise as they are: the stock pipeline's cleaning depends on what is
    installed, and takes Chinese out.
    """

    family = "pixart_sigma"
    card_tag = "pixart-sigma"
    comfyui = Nodes(
        text_encoders=("t5xxl_fp16.safetensors",),
        text_type="pixart",
        autoencoder="sdxl_vae.safetensors",
        betas=("linear", 0.0001, 0.02),
    )
    pipeline_class = PixArtSigmaPipeline
    denoiser_class = PixArtTransformer2DModel
    times = "adaln_single.emb"
    time_layer = f"{times}.timestep_embedder"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def stock_call(self, times: list[int]) -> dict[str, Any]:
        """Return the arguments with which a stock pipeline visits `times`, and reads prompts as `_encode` does."""
        return super().stock_call(times) | {"clean_caption": False}

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Conditioning:
        """Return T5's states (B, L, D) of the prompts' own tokens."""
        context, mask, _, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.device
        )
        return self._without_padding(context, mask)
