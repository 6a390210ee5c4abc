"""PixArt-Sigma."""

import json
from pathlib import Path

import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from transformers import T5EncoderModel

import tiny
from mlcm_rl.models.base import Base
from mlcm_rl.models.conditioning import Conditioning
from tiny_families.case import Case

OLDER = "Transformer2DModel"  # the denoiser's class in the published files
OLDER_KEYS = {"dropout": 0.0, "num_vector_embeds": None, "use_linear_projection": False, "double_self_attention": False}


def write(folder: Path, seed: int = 0, **changes: object) -> Path:
    """Write a PixArtSigmaPipeline at 16 x 16 pixels with the names of the published files; returns `folder`."""
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 14,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 3,
        "sample_size": 8,
        "patch_size": 2,
        "cross_attention_dim": 28,
        "caption_channels": 44,
        "use_additional_conditions": False,
    }
    with tiny._seeded(seed):
        pipeline = PixArtSigmaPipeline(
            tokenizer=tiny.t5_tokenizer(),
            text_encoder=T5EncoderModel(tiny._t5_config(width=44)),
            vae=tiny._autoencoder(4, scaling_factor=0.13025),
            transformer=PixArtTransformer2DModel(**settings | changes),
            scheduler=DPMSolverMultistepScheduler(),
        )
    tiny._save(pipeline, Path(folder))
    _edit(Path(folder) / "model_index.json", transformer=["diffusers", OLDER])
    _edit(Path(folder) / "transformer" / "config.json", _class_name=OLDER, **OLDER_KEYS)
    return Path(folder)


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def trimmed(context: torch.Tensor, mask: torch.Tensor) -> Conditioning:
    """Return a conditioning whose context is as long as the longest prompt."""
    lengths = mask.sum(1)
    longest = int(lengths.max())
    return {"context": (context * mask[..., None])[:, :longest], "lengths": lengths}


def encoded(stock: DiffusionPipeline, prompts: list[str]) -> tuple[Conditioning, Conditioning]:
    context, mask, no_context, no_mask = stock.encode_prompt(prompts, device="cpu")
    return trimmed(context, mask), trimmed(no_context, no_mask)


def schedules(base: Base, stock: DiffusionPipeline, times: list[int]) -> dict:
    """Set the pipeline's own solver at first order, which is DDIM, and its times."""
    stock.scheduler = DPMSolverMultistepScheduler.from_config(stock.scheduler.config, solver_order=1)
    return {"timesteps": times}


CASE = Case(
    family="pixart_sigma",
    write=write,
    encoded=encoded,
    guidance={"guidance_scale": 4.5},
    guidance_scale=4.5,
    schedules=schedules,
    loads_lora=False,
)
