"""Put the scenes' autoencoder, text towers and denoiser together as a stock `StableDiffusion3Pipeline` without T5."""

import mlcm_rl  # noqa: F401  (it quiets what the libraries below import)

# isort: split
import argparse
import shutil

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

import drawings  # noqa: F401  puts the emoji teacher's programs on the path
from assemble_teacher import write_teacher
from scenes import SUBJECT
from sources import cache_folder, whole_folder
from train_denoiser import SHIFT, build_denoiser


def build_pipeline(denoiser: SD3Transformer2DModel) -> StableDiffusion3Pipeline:
    """Return the pipeline in float32: the cache's autoencoder and towers, and a denoiser."""
    cache = cache_folder()
    towers = [
        CLIPTextModelWithProjection.from_pretrained(cache / "scene_towers" / name, dtype=torch.float32)
        for name in ("text_encoder", "text_encoder_2")
    ]
    vae = AutoencoderKL.from_pretrained(cache / "scene_autoencoder")
    vae.register_to_config(shift_factor=0.0)  # the stock pipeline adds it, and has no default
    tokenizers = [CLIPTokenizer.from_pretrained(cache / "scene_towers" / "tokenizer") for _ in towers]
    return StableDiffusion3Pipeline(
        transformer=denoiser,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
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


def unpack() -> None:
    """Write the shipped autoencoder and towers to the cache, for a machine that did not train them."""
    with whole_folder(cache_folder() / "scene_autoencoder") as partial:
        shutil.copytree(SUBJECT / "teacher" / "vae", partial)
    with whole_folder(cache_folder() / "scene_towers") as partial:
        for name in ("tokenizer", "text_encoder", "text_encoder_2"):
            shutil.copytree(SUBJECT / "teacher" / name, partial / name)


def main() -> None:
    """Assemble `teacher/` from the cache, or put its finished parts there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="scene_denoiser", help="the denoiser's folder in the cache")
    parser.add_argument("--fresh-denoiser", action="store_true", help="a random denoiser")
    parser.add_argument("--unpack", action="store_true", help="the other way: autoencoder and towers into the cache")
    arguments = parser.parse_args()
    if arguments.unpack:
        return unpack()
    denoiser = build_denoiser() if arguments.fresh_denoiser else trained_denoiser(arguments.name)
    num_bytes = write_teacher(build_pipeline(denoiser), SUBJECT / "teacher")
    print(f"{num_bytes / 1e6:.1f} MB, denoiser: {'random' if arguments.fresh_denoiser else arguments.name}")


if __name__ == "__main__":
    main()
