"""What the autoencoder loses: PSNR, the judge's recall and KID of reconstructions beside the real pictures.

Draws `teacher/reconstructions.png`: held-out concepts above their reconstructions.
"""

import mlcm_rl  # noqa: F401  (it quiets what the libraries below import)

# isort: split
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from captions import teacher_concepts
from mlcm_rl.evaluation import judge, metrics
from sources import EMOJI, MEASURED, STYLES, load_pictures, write_text
from train_autoencoder import decode, encode, measure_psnr

COLUMNS = 24


def judge_recall(features: Tensor, prototypes: Tensor) -> dict[str, float]:
    """Return R@1 and R@5 of features (K * S, D), concept by concept, among the prototypes (K, D)."""
    concepts = torch.arange(len(prototypes)).repeat_interleave(len(features) // len(prototypes))
    rank = metrics.ranks(features, prototypes, concepts)
    return {f"R@{k}": round(metrics.recall(rank, k).mean().item(), 4) for k in (1, 5)}


def draw_sheet(wanted: Tensor, found: Tensor, path: Path) -> None:
    """Write rows of pictures (N, 3, H, W) in [0, 1] with their reconstructions right below them."""
    pairs = [half for part in zip(wanted.split(COLUMNS), found.split(COLUMNS), strict=True) for half in part]
    rows = [torch.cat(list(part), dim=-1) for part in pairs if len(part) == COLUMNS]
    sheet = (torch.cat(rows, dim=-2).permute(1, 2, 0) * 255).round().byte().numpy()
    Image.fromarray(sheet).quantize(128).save(path, optimize=True)


def main() -> None:
    """Measure the shipped autoencoder; write `measured/reconstructions.json` and the sheet."""
    vae = AutoencoderKL.from_pretrained(EMOJI / "teacher" / "vae")
    assessor, pictures = judge.load(EMOJI / "judge"), load_pictures(64)
    rows = pictures.rows_by_concept(min_styles=2)
    report: dict[str, dict[str, Any]] = {}
    for name, concepts in zip(("teacher", "held_out"), teacher_concepts(), strict=True):
        pixels = pictures.pixels[[row for concept in concepts for row in rows[concept.codepoint]]]
        real = torch.from_numpy(np.array(pixels))
        latents = encode(vae, real)
        rebuilt = decode(vae, latents)
        report[name] = {"psnr_db": round(measure_psnr(vae, real), 2), "scaled_latent_std": scaled_std(vae, latents)}
        if name == "held_out":
            draw_sheet(
                real[: 4 * COLUMNS].permute(0, 3, 1, 2) / 255,
                rebuilt[: 4 * COLUMNS],
                EMOJI / "teacher" / "reconstructions.png",
            )
            continue
        features = assessor.features(rebuilt)
        report[name] |= {"judge_real": judge_recall(assessor.reference_features, assessor.prototypes)}
        report[name] |= {"judge_reconstructed": judge_recall(features, assessor.prototypes)}
        kid = metrics.kid(features.unflatten(0, (-1, len(STYLES))), assessor.reference_features)
        report[name]["kid_reconstructed"] = round(kid.item(), 5)
    print(json.dumps(report, indent=1))
    write_text(MEASURED / "reconstructions.json", json.dumps(report, indent=1) + "\n")


def scaled_std(vae: AutoencoderKL, latents: Tensor) -> float:
    """Return the standard deviation of the latents as the denoiser sees them; near one."""
    return round((latents * vae.config.scaling_factor).std().item(), 3)


if __name__ == "__main__":
    main()
