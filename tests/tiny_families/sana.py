"""Sana."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from tokenizers.processors import TemplateProcessing
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

import tiny
from mlcm_rl.models.base import Base
from mlcm_rl.models.conditioning import Conditioning
from mlcm_rl.models.families.sana import INSTRUCTION
from tiny_families.case import Case
from tiny_families.pixart_sigma import trimmed

CHANNELS, SCALE, SHIFT = 8, 0.41407, 3.0


def write(folder: Path, seed: int = 0, **changes: object) -> Path:
    """Write a SanaPipeline at 32 x 32 pixels, the fewest that the stock one takes; returns `folder`."""
    words = gemma_tokenizer()
    settings = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 12,
        "cross_attention_dim": 24,
        "caption_channels": 20,
        "sample_size": 16,
    }
    with tiny._seeded(seed):
        pipeline = SanaPipeline(
            tokenizer=words,
            text_encoder=Gemma2Model(
                Gemma2Config(
                    vocab_size=len(words),
                    hidden_size=20,
                    intermediate_size=30,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    head_dim=6,
                    query_pre_attn_scalar=6,
                    max_position_embeddings=8192,
                )
            ),
            vae=AutoencoderDC(
                in_channels=3,
                latent_channels=CHANNELS,
                attention_head_dim=2,
                encoder_block_types=("ResBlock", "EfficientViTBlock"),
                decoder_block_types=("ResBlock", "EfficientViTBlock"),
                encoder_block_out_channels=(16, 32),
                decoder_block_out_channels=(16, 32),
                encoder_qkv_multiscales=((), (5,)),
                decoder_qkv_multiscales=((), (5,)),
                encoder_layers_per_block=(1, 1),
                decoder_layers_per_block=(1, 1),
                downsample_block_type="conv",
                upsample_block_type="interpolate",
                decoder_norm_types="rms_norm",
                decoder_act_fns="silu",
                scaling_factor=SCALE,
            ),
            transformer=SanaTransformer2DModel(**settings | changes),
            scheduler=DPMSolverMultistepScheduler(
                flow_shift=SHIFT, use_flow_sigmas=True, prediction_type="flow_prediction"
            ),
        )
    pipeline.save_pretrained(folder)
    return Path(folder)


def gemma_tokenizer() -> GemmaTokenizer:
    """A Gemma tokenizer whose words are characters."""
    letters = sorted(set("\n▁" + tiny.CHINESE + "".join(map(chr, range(33, 127)))))
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters]
    words = GemmaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=8192)
    start = [("<bos>", words.bos_token_id)]
    words.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=start)
    return words


def encoded(stock: DiffusionPipeline, prompts: list[str]) -> tuple[Conditioning, Conditioning]:
    context, mask, no_context, no_mask = stock.encode_prompt(
        prompts, device="cpu", complex_human_instruction=INSTRUCTION
    )
    return trimmed(context, mask), trimmed(no_context, no_mask)


def schedules(base: Base, stock: DiffusionPipeline, times: list[int]) -> dict:
    """Set Euler's scheduler: the published one, a solver of second order, takes no sigmas."""
    stock.scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    return base.stock_call(times)


def decoded(stock: DiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
    images = stock.vae.decode(latents / SCALE, return_dict=False)[0].detach()
    return stock.image_processor.postprocess(images, output_type="pt")


CASE = Case(
    family="sana",
    write=write,
    encoded=encoded,
    guidance={"guidance_scale": 4.5},
    guidance_scale=4.5,
    schedules=schedules,
    decoded=decoded,
    encoded_pictures=lambda stock, images: stock.vae.encode(images * 2 - 1).latent * SCALE,
)
