"""Z-Image, and Z-Image-Turbo, which is refused."""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

import tiny
from mlcm_rl.models.conditioning import LENGTHS, Conditioning, stacked
from tiny_families import qwen
from tiny_families.case import Case


def z_image(folder: Path | str, shift: float = 6.0, seed: int = 0) -> Path:
    """Write a ZImagePipeline and return `folder`; `shift` is Z-Image's, and 3 is Turbo's."""
    words = qwen.tokenizer()
    with tiny._seeded(seed):
        transformer = ZImageTransformer2DModel(
            in_channels=6,
            dim=36,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=3,
            n_kv_heads=3,
            cap_feat_dim=28,
            axes_dims=[4, 4, 4],
            axes_lens=[600, 20, 20],
        )
        with torch.no_grad():  # zeros until trained, which would hide padding
            transformer.x_pad_token.normal_()
            transformer.cap_pad_token.normal_()
        pipeline = ZImagePipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
            vae=tiny._autoencoder(6, scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=Qwen3Model(
                Qwen3Config(
                    vocab_size=len(words),
                    hidden_size=28,
                    intermediate_size=44,
                    num_hidden_layers=3,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    head_dim=10,
                    max_position_embeddings=4096,
                    pad_token_id=words.pad_token_id,
                )
            ),
            tokenizer=words,
        )
    pipeline.save_pretrained(folder)
    return Path(folder)


def encoded(stock: ZImagePipeline, prompts: list[str]) -> tuple[Conditioning, Conditioning]:
    conditional, unconditional = (
        stacked([{"context": one, LENGTHS: torch.tensor(len(one))} for one in captions])
        for captions in stock.encode_prompt(prompts, device="cpu")
    )
    return conditional, unconditional


CASE = Case(
    family="z_image",
    write=z_image,
    encoded=encoded,
    guidance={"guidance_scale": 4.0},  # of 5.0: it adds 4 times the difference to the conditional velocity
    prompts=qwen.PROMPTS,
    resolution=tiny.LATENT_SIZE * tiny.DOWNSCALE,
)
