"""Sana and SANA1.5: a transformer of linear attention over latents of 32 x 32 pixels; Gemma 2."""

from collections.abc import Callable
from functools import cached_property, partial
from inspect import signature
from typing import Any

import torch
from diffusers import SanaPipeline, SanaTransformer2DModel
from torch import Tensor

from ...equations.schedule import Schedule, flow_schedule, in_thousandths
from ..adaln_single import NUM_TOKENS, AdaLNSingleBase
from ..autoencoder import RECOMPUTE, Autoencoder
from ..conditioning import Conditioning
from ..flow import FlowBase

# What the stock pipeline asks Gemma to do with a prompt, which is written after it.
INSTRUCTION = signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


class DeepAutoencoder(Autoencoder):
    """An AutoencoderDC: its latents are not drawn, and it has no checkpoints of its own."""

    def checkpoint_blocks(self, recompute: Callable[..., Any] = RECOMPUTE) -> None:
        for block in self.vae.decoder.up_blocks:
            block.forward = partial(recompute, block.forward)

    def _tile(self, size: int, recompute: Callable[..., Any]) -> None:
        self.vae.enable_tiling(size, size, size - size // 4, size - size // 4)
        self.vae.decoder.forward = partial(recompute, self.vae.decoder.forward)

    def _encoded(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.vae.encode(images).latent


class Family(AdaLNSingleBase, FlowBase):
    """Sana and SANA1.5, and models of the same structure at any width.

    The denoiser is given 1000 sigma. The stock pipeline's own solver rounds it down to a whole number, the schedulers
    of exported students do not.
    """

    family = "sana"
    card_tag = "sana"
    pipeline_class = SanaPipeline
    denoiser_class = SanaTransformer2DModel
    autoencoder_class = DeepAutoencoder
    times = "time_embed.emb"
    time_layer = f"{times}.timestep_embedder"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.conv_inverted", "ff.conv_point")

    def _schedule(self) -> tuple[str, Schedule]:
        scale = self.denoiser.config.timestep_scale
        return "flow", flow_schedule(self.shift, lambda sigma: scale * in_thousandths(sigma))

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Conditioning:
        """Return Gemma's states (B, L, D): of the start and the end of the instruction, and of the prompt."""
        return self._after(INSTRUCTION, prompts)

    @cached_property
    @torch.no_grad()
    def _dropped_prompt(self) -> Conditioning:
        """Return the encoding of the empty prompt without an instruction."""
        return self._after(None, [""])

    def _after(self, instruction: list[str] | None, prompts: list[str]) -> Conditioning:
        context, mask, _, _ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.device,
            complex_human_instruction=instruction,
        )
        return self._without_padding(context, mask)

    @property
    def num_tokens(self) -> int:
        return min(super().num_tokens, NUM_TOKENS - 1)  # one is the end of the instruction
