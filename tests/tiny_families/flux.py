"""A tiny FLUX.1: 17 x 17 latents would not pack, 8 x 8 are 16 tokens."""

from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, T5EncoderModel

import tiny

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
            vae=tiny._autoencoder(CHANNELS, 0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=CLIPTextModel(tiny._text_config(width=28, layers=2)),
            tokenizer=tiny.tokenizer(),
            text_encoder_2=T5EncoderModel(tiny._t5_config(width=44)),
            tokenizer_2=tiny.t5_tokenizer(),
        )
    return tiny._save(pipeline, Path(folder))
