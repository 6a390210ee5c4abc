"""Put the scenes' autoencoder, text towers and denoiser together as a stock `StableDiffusion3Pipeline` without T5."""

import argparse

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

import drawings  # noqa: F401  puts the emoji teacher's programs on the path
from assemble_teacher import write_teacher
from scenes import SUBJECT
from sources import cache_folder
from train_denoiser import SHIFT, build_denoiser


def build_pipeline(denoiser: SD3Transformer2DModel) -> StableDiffusion3Pipeline:
    """Return the pipeline in float32: the cache's autoencoder and towers, and a denoiser."""
    cache = cache_folder()
    towers = [
        CLIPTextModelWithProjection.from_pretrained(cache / "scene_towers" / name, dtype=torch.float32)
        for name in ("text_encoder", "text_encoder_2")
    ]
    tokenizers = [CLIPTokenizer.from_pretrained(cache / "scene_towers" / "tokenizer") for _ in towers]
    return StableDiffusion3Pipeline(
        transformer=denoiser,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=AutoencoderKL.from_pretrained(cache / "scene_autoencoder"),
        text_encoder=towers[0],
        tokenizer=tokenizers[0],
        text_encoder_2=towers[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=None,
        tokenizer_3=None,
    )


def trained_denoiser(name: str) -> SD3Transformer2DModel:
    """Return the averaged denoiser of a training in the cache."""
    denoiser = build_denoiser()
    denoiser.load_state_dict(load_file(cache_folder() / name / "average.safetensors"), strict=False)
    return denoiser


def main() -> None:
    """Assemble `teacher/` from the cache."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="scene_denoiser", help="the denoiser's folder in the cache")
    parser.add_argument("--fresh-denoiser", action="store_true", help="a random denoiser")
    arguments = parser.parse_args()
    denoiser = build_denoiser() if arguments.fresh_denoiser else trained_denoiser(arguments.name)
    num_bytes = write_teacher(build_pipeline(denoiser), SUBJECT / "teacher")
    print(f"{num_bytes / 1e6:.1f} MB, denoiser: {'random' if arguments.fresh_denoiser else arguments.name}")


if __name__ == "__main__":
    main()
