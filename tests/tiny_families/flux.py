"""FLUX.1-dev, and FLUX.1-schnell, which is refused."""

from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextModel, T5EncoderModel

import tiny
from mlcm_rl.models.base import Base
from mlcm_rl.models.conditioning import Conditioning
from tiny_families.case import Case

CHANNELS = 6


def flux(folder: Path | str, is_dev: bool = True, seed: int = 0) -> Path:
    """Write a FluxPipeline in the layout of FLUX.1-dev, or of FLUX.1-schnell; returns `folder`."""
    with tiny._seeded(seed):
        pipeline = FluxPipeline(
            transformer=FluxTransformer2DModel(
                patch_size=1,
                in_channels=4 * CHANNELS,
                num_layers=2,
                num_single_layers=3,
                attention_head_dim=10,
                num_attention_heads=3,
                joint_attention_dim=44,
                pooled_projection_dim=28,
                guidance_embeds=is_dev,
                axes_dims_rope=(2, 4, 4),
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if is_dev else 1.0, use_dynamic_shifting=is_dev),
            vae=tiny._autoencoder(
                CHANNELS, 0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
            ),
            text_encoder=CLIPTextModel(tiny._text_config(width=28, layers=2)),
            tokenizer=tiny.tokenizer(),
            text_encoder_2=T5EncoderModel(tiny._t5_config(width=44)),
            tokenizer_2=tiny.t5_tokenizer(),
        )
    return tiny._save(pipeline, Path(folder))


def encoded(stock: FluxPipeline, prompts: list[str]) -> tuple[Conditioning, Conditioning]:
    pairs = (stock.encode_prompt(texts, None, device="cpu") for texts in (prompts, [""] * len(prompts)))
    conditional, unconditional = ({"context": context, "pooled": pooled} for context, pooled, _ in pairs)
    return conditional, unconditional


def to_stock(base: Base, latents: Tensor) -> Tensor:
    return FluxPipeline._pack_latents(latents, *latents.shape)


def from_stock(base: Base, tokens: Tensor) -> Tensor:
    return FluxPipeline._unpack_latents(tokens, base.resolution, base.resolution, base.geometry.downscale)


CASE = Case(
    family="flux",
    write=flux,
    encoded=encoded,
    guidance={"guidance_scale": 5.0},
    resolution=tiny.LATENT_SIZE * tiny.DOWNSCALE,
    to_stock=to_stock,
    from_stock=from_stock,
    renoises=False,  # it draws noise of tokens
)
