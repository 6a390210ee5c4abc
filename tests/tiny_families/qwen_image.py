"""Qwen-Image."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import tiny
from mlcm_rl.models.base import Base
from mlcm_rl.models.conditioning import LENGTHS, Conditioning
from tiny_families import qwen
from tiny_families.case import Case

CHANNELS = 6


def qwen_image(folder: Path | str, seed: int = 0, guidance_embeds: bool = False) -> Path:
    """Write a QwenImagePipeline and return `folder`."""
    words = qwen.tokenizer()
    with tiny._seeded(seed):
        pipeline = QwenImagePipeline(
            transformer=QwenImageTransformer2DModel(
                patch_size=2,
                in_channels=4 * CHANNELS,
                out_channels=CHANNELS,
                num_layers=2,
                attention_head_dim=12,
                num_attention_heads=3,
                joint_attention_dim=28,
                guidance_embeds=guidance_embeds,
                axes_dims_rope=(4, 4, 4),
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(
                base_image_seq_len=256,
                base_shift=0.5,
                max_image_seq_len=8192,
                max_shift=0.9,
                shift_terminal=0.02,
                use_dynamic_shifting=True,
            ),
            vae=AutoencoderKLQwenImage(
                base_dim=8,
                z_dim=CHANNELS,
                dim_mult=[1, 2],
                num_res_blocks=1,
                temperal_downsample=[True],
                latents_mean=[0.1 * i for i in range(CHANNELS)],
                latents_std=[1.0 + 0.2 * i for i in range(CHANNELS)],
            ),
            text_encoder=Qwen2_5_VLForConditionalGeneration(_text_config(len(words))),
            tokenizer=words,
        )
    pipeline.save_pretrained(folder)
    return Path(folder)


def _text_config(num_words: int) -> Qwen2_5_VLConfig:
    text = {
        "hidden_size": 28,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": num_words + 5,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 3, 3], "rope_theta": 1e6},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_heads": 2,
        "out_hidden_size": 28,
        "fullatt_block_indexes": [0],
    }
    marks = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: num_words + i for i, name in enumerate(marks)}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)


def encoded(stock: QwenImagePipeline, prompts: list[str]) -> tuple[Conditioning, Conditioning]:
    context, mask = stock.encode_prompt(prompts, device="cpu", max_sequence_length=512)
    away, no_mask = stock.encode_prompt([" "] * len(prompts), device="cpu")
    assert no_mask is None  # none is padded
    away_lengths = torch.full((len(prompts),), away.shape[1])
    return {"context": context, LENGTHS: mask.sum(1)}, {"context": away, LENGTHS: away_lengths}


def to_stock(base: Base, latents: Tensor) -> Tensor:
    return QwenImagePipeline._pack_latents(latents, *latents.shape)


def from_stock(base: Base, tokens: Tensor) -> Tensor:
    size = (base.resolution, base.resolution)
    return QwenImagePipeline._unpack_latents(tokens, *size, base.geometry.downscale).squeeze(2)


def schedules(base: Base, stock: QwenImagePipeline, times: list[int]) -> dict:
    """Its own scheduler stretches every grid to end at 0.02, so that no grid has a step of another."""
    stock.scheduler = base.stock_scheduler(0.0)
    return base.stock_call(times)


def _statistics(stock: QwenImagePipeline) -> tuple[Tensor, Tensor]:
    settings = stock.vae.config
    return (torch.tensor(values).reshape(1, -1, 1, 1) for values in (settings.latents_mean, settings.latents_std))


def decoded(stock: QwenImagePipeline, latents: Tensor) -> Tensor:
    mean, std = _statistics(stock)
    frames = stock.vae.decode((latents * std + mean).unsqueeze(2), return_dict=False)[0]
    return stock.image_processor.postprocess(frames[:, :, 0].detach(), output_type="pt")


def encoded_pictures(stock: QwenImagePipeline, images: Tensor) -> Tensor:
    mean, std = _statistics(stock)
    return (stock.vae.encode((images * 2 - 1).unsqueeze(2)).latent_dist.mode()[:, :, 0] - mean) / std


CASE = Case(
    family="qwen_image",
    write=qwen_image,
    encoded=encoded,
    guidance={"true_cfg_scale": 5.0, "negative_prompt": [" "] * len(qwen.PROMPTS)},
    prompts=qwen.PROMPTS,
    resolution=tiny.LATENT_SIZE * tiny.DOWNSCALE,
    to_stock=to_stock,
    from_stock=from_stock,
    schedules=schedules,
    decoded=decoded,
    encoded_pictures=encoded_pictures,
    renoises=False,  # it draws noise of tokens
)
