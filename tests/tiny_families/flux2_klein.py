"""FLUX.2-klein-base, and the distilled klein, which is refused."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

import tiny
from mlcm_rl.models.base import Base
from mlcm_rl.models.conditioning import Conditioning
from tiny_families import qwen
from tiny_families.case import Case

CHANNELS, WIDTH = 5, 20  # of the autoencoder's latents; of the text encoder


def flux2_klein(folder: Path | str, is_distilled: bool = False, seed: int = 0) -> Path:
    """Write a Flux2KleinPipeline and return `folder`. Its text encoder has the layers that the pipeline reads."""
    words = qwen.tokenizer()
    with tiny._seeded(seed):
        pipeline = Flux2KleinPipeline(
            transformer=Flux2Transformer2DModel(
                in_channels=4 * CHANNELS,
                num_layers=2,
                num_single_layers=3,
                attention_head_dim=8,
                num_attention_heads=3,
                joint_attention_dim=3 * WIDTH,
                axes_dims_rope=(2, 2, 2, 2),
                guidance_embeds=False,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=_autoencoder(),
            text_encoder=Qwen3ForCausalLM(
                Qwen3Config(
                    vocab_size=len(words),
                    hidden_size=WIDTH,
                    intermediate_size=28,
                    num_hidden_layers=28,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    head_dim=6,
                    max_position_embeddings=4096,
                    pad_token_id=words.pad_token_id,
                    tie_word_embeddings=True,
                )
            ),
            tokenizer=words,
            is_distilled=is_distilled,
        )
    pipeline.save_pretrained(folder)
    return Path(folder)


def _autoencoder() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 12),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        sample_size=32,
    )
    vae.bn.running_mean.normal_(std=0.3)  # zeros and ones as it is made, which would hide them
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def encoded(stock: Flux2KleinPipeline, prompts: list[str]) -> tuple[Conditioning, Conditioning]:
    conditional, unconditional = (
        {"context": stock.encode_prompt(texts, device="cpu")[0]} for texts in (prompts, [""] * len(prompts))
    )
    return conditional, unconditional


def statistics(stock: Flux2KleinPipeline) -> tuple[Tensor, Tensor]:
    """Return deviation and mean (1, C, 1, 1) of the stock pipeline's latents."""
    norm = stock.vae.bn
    deviation = torch.sqrt(norm.running_var.view(1, -1, 1, 1) + stock.vae.config.batch_norm_eps)
    return deviation, norm.running_mean.view(1, -1, 1, 1)


def from_stock(base: Base, latents: Tensor) -> Tensor:
    """Return what the pipeline had before it gave the autoencoder's latents."""
    deviation, mean = statistics(base.pipeline)
    return (Flux2KleinPipeline._patchify_latents(latents) - mean) / deviation


def decoded(stock: Flux2KleinPipeline, latents: Tensor) -> Tensor:
    deviation, mean = statistics(stock)
    own = Flux2KleinPipeline._unpatchify_latents(latents * deviation + mean)
    return stock.image_processor.postprocess(stock.vae.decode(own, return_dict=False)[0].detach(), output_type="pt")


def encoded_pictures(stock: Flux2KleinPipeline, images: Tensor) -> Tensor:
    return stock._encode_vae_image(images * 2 - 1, None).detach()


def schedules(base: Base, stock: Flux2KleinPipeline, times: list[int]) -> dict:
    """Set the shift of the teacher's grid: the stock pipeline's own depends on the number of steps."""
    stock.scheduler = base.stock_scheduler(0.0)
    return base.stock_call(times)


CASE = Case(
    family="flux2_klein",
    write=flux2_klein,
    encoded=encoded,
    guidance={"guidance_scale": 5.0},
    prompts=qwen.PROMPTS,
    resolution=24,
    from_stock=from_stock,
    schedules=schedules,
    decoded=decoded,
    encoded_pictures=encoded_pictures,
    renoises=False,  # it draws noise of tokens
)
