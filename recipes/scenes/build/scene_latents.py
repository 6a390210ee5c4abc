"""The denoiser's training set: scenes drawn from a seed, painted and encoded once, in parts of NUM_IN_PART."""

import mlcm_rl  # noqa: F401  (it quiets what the libraries below import)

# isort: split
import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from drawings import load_drawings
from mlcm_rl.data.scenes import RELATIONS
from scenes import Scene, draw_scene, read_concepts
from sources import cache_folder
from train_autoencoder import as_images

NUM_IN_PART = 1000
SHARES = (0.15, 0.25, 0.3, 0.3)  # of RELATIONS


def scenes_of_part(part: int, concepts: Sequence[str]) -> list[Scene]:
    """Return the scenes of a part; none of a held-out combination."""
    draw = random.Random(f"training scenes {part}")
    relations = draw.choices(RELATIONS, SHARES, k=NUM_IN_PART)
    return [draw_scene(draw, concepts, relation, held_out=False) for relation in relations]


def part_path(part: int, num_concepts: int) -> Path:
    """Return the file of a part: scaled latents, float16 (NUM_IN_PART, C, H, W)."""
    return cache_folder() / f"scene_latents_{num_concepts}" / f"{part:03d}.safetensors"


def load_parts(num_concepts: int) -> tuple[list[Scene], torch.Tensor]:
    """Return the scenes and latents of every part that is there. Raise FileNotFoundError if none is."""
    concepts = [c.codepoint for c in read_concepts()][:num_concepts]
    scenes: list[Scene] = []
    latents: list[torch.Tensor] = []
    while (path := part_path(len(latents), num_concepts)).exists():
        scenes += scenes_of_part(len(latents), concepts)
        latents.append(load_file(path)["latents"])
    if not latents:
        raise FileNotFoundError(f"{path} is not there: run scene_latents.py with --concepts {num_concepts}")
    return scenes, torch.cat(latents)


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: np.ndarray, batch_size: int = 25) -> torch.Tensor:
    """Return scaled posterior means (N, C, H, W) of uint8 pictures (N, H, W, 3)."""
    parts = torch.from_numpy(pictures).split(batch_size)
    return torch.cat([vae.encode(as_images(part)).latent_dist.mean for part in parts]) * vae.config.scaling_factor


def main() -> None:
    """Write the parts that are missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concepts", type=int, default=32, help="the first so many of concepts.json")
    parser.add_argument("--parts", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    vae = AutoencoderKL.from_pretrained(cache_folder() / "scene_autoencoder").eval()
    drawings, concepts = load_drawings(), [c.codepoint for c in read_concepts()][: arguments.concepts]
    for part in range(arguments.parts):
        path = part_path(part, arguments.concepts)
        if path.exists():
            continue
        pictures = np.stack([drawings.paint(scene) for scene in scenes_of_part(part, concepts)])
        latents = encode_pictures(vae, pictures).half().contiguous()
        path.parent.mkdir(exist_ok=True)
        save_file({"latents": latents}, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)
        print(f"{path.name}: standard deviation {latents.float().std():.3f}", flush=True)


if __name__ == "__main__":
    main()
