"""A pipeline in SDXL's shape and a reward in BLIP-large's, with random weights: speed and memory do not depend on them.

`tiny` is a small shape for a CPU, whose numbers mean nothing.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import BlipVisionConfig, BlipVisionModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the tests' own tokenizer

import tiny
from mlcm_rl.models.base import Base
from mlcm_rl.models.families.sdxl import Family
from mlcm_rl.recipe import Teacher


class Transformer(NamedTuple):
    """The sizes of a transformer."""

    width: int
    inner_width: int
    num_layers: int
    num_heads: int


@dataclass(frozen=True)
class Shape:
    """The sizes of the networks, and of the product of matrices that rates are compared with."""

    widths: list[int]
    num_layers: int
    num_heads: list[int]
    num_transformers: list[int]
    autoencoder: list[int]
    latent_side: int
    norm_groups: int
    towers: tuple[Transformer, Transformer]
    reward: Transformer
    reward_side: int
    time_width: int
    product: int


SHAPES = {
    "sdxl": Shape(
        widths=[320, 640, 1280],
        num_layers=2,
        num_heads=[5, 10, 20],
        num_transformers=[1, 2, 10],
        autoencoder=[128, 256, 512, 512],
        latent_side=128,
        norm_groups=32,
        towers=(Transformer(768, 3072, 12, 12), Transformer(1280, 5120, 32, 20)),
        reward=Transformer(1024, 4096, 24, 16),
        reward_side=224,
        time_width=256,
        product=8192,
    ),
    "tiny": Shape(
        widths=[16, 16, 32],
        num_layers=1,
        num_heads=[2, 2, 2],
        num_transformers=[1, 1, 1],
        autoencoder=[8, 8, 8, 8],
        latent_side=8,
        norm_groups=4,
        towers=(Transformer(16, 32, 1, 2), Transformer(24, 32, 1, 2)),
        reward=Transformer(16, 32, 1, 2),
        reward_side=32,
        time_width=8,
        product=256,
    ),
}


def random_base(shape: Shape, device: torch.device) -> Base:
    """Return a pipeline of that shape with random weights, bfloat16 but for its autoencoder."""
    towers = [_tower(sizes) for sizes in shape.towers]
    down = ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=shape.latent_side,
            down_block_types=down,
            up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
            block_out_channels=shape.widths,
            layers_per_block=shape.num_layers,
            attention_head_dim=shape.num_heads,
            norm_num_groups=shape.norm_groups,
            cross_attention_dim=sum(sizes.width for sizes in shape.towers),
            transformer_layers_per_block=shape.num_transformers,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=shape.time_width,
            projection_class_embeddings_input_dim=shape.towers[1].width + 6 * shape.time_width,
        )
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=shape.autoencoder,
            layers_per_block=shape.num_layers,
            latent_channels=4,
            norm_num_groups=shape.norm_groups,
            scaling_factor=0.13025,
        )
        text = (CLIPTextModel(towers[0]), CLIPTextModelWithProjection(towers[1]))
    for part in (unet, *text):
        nn.Module.to(part, torch.bfloat16)
    words = tiny.tokenizer()
    scheduler = EulerDiscreteScheduler(**tiny.BETAS, prediction_type="epsilon")
    pipeline = StableDiffusionXLPipeline(vae, *text, words, words, unet, scheduler, add_watermarker=False)
    for part in (unet, vae, *text):
        part.requires_grad_(False).eval()
    teacher = Teacher(path="random", family="sdxl", guidance_scale=8.0, dtype="bfloat16")
    return Family(teacher, device, pipeline)


def _tower(sizes: Transformer) -> CLIPTextConfig:
    words = tiny.tokenizer()
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=sizes.width,
        intermediate_size=sizes.inner_width,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        max_position_embeddings=tiny.NUM_TOKENS,
        projection_dim=sizes.width,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


class Reward(nn.Module):
    """A vision transformer of BLIP's kind with a number at its end."""

    def __init__(self, shape: Shape, device: torch.device):
        super().__init__()
        sizes, self.side = shape.reward, shape.reward_side
        config = BlipVisionConfig(
            hidden_size=sizes.width,
            intermediate_size=sizes.inner_width,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_heads,
            image_size=self.side,
            patch_size=16,
        )
        with torch.device(device):
            self.vision = BlipVisionModel(config).bfloat16()
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return a score (B,) of `images` (B, 3, H, W)."""
        pixels = nn.functional.interpolate(images.float(), (self.side, self.side), mode="bicubic", antialias=True)
        return self.vision(pixels.bfloat16()).last_hidden_state[:, 0].float().mean(1)
