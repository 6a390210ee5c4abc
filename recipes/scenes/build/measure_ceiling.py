"""The most that any denoiser can reach: what the judge says of real scenes after the autoencoder, and its PSNR."""

import mlcm_rl  # noqa: F401  (it quiets what the libraries below import)

# isort: split
import argparse
import json

import torch
from diffusers import AutoencoderKL

from drawings import load_drawings
from mlcm_rl.evaluation.scene_judge import load
from scene_judge import JUDGE, accuracy, paint_all, read_in_parts, real_scenes
from scenes import MEASURED, read_concepts
from sources import cache_folder, write_text


def main() -> None:
    """Measure the cache's autoencoder on scenes of the teacher's concepts; write `measured/ceiling.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concepts", type=int, default=32, help="the first so many of concepts.json")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--noise", type=float, default=0.1, help="added to the latents, in units of their spread")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    vae, judge = AutoencoderKL.from_pretrained(cache_folder() / "scene_autoencoder").eval(), load(JUDGE)
    concepts = [concept.codepoint for concept in read_concepts()][: arguments.concepts]
    scenes = real_scenes(concepts, arguments.scenes, "ceiling")
    real, generator = paint_all(load_drawings(), scenes), torch.Generator().manual_seed(0)
    report: dict[str, object] = {"concepts": arguments.concepts, "scenes": len(scenes)}
    with torch.no_grad():
        latents = torch.cat([vae.encode(part * 2 - 1).latent_dist.mean for part in real.split(25)])
        for name, scale in (("latents", 0.0), (f"latents with noise {arguments.noise}", arguments.noise)):
            noise = torch.randn(latents.shape, generator=generator) * scale / vae.config.scaling_factor
            rebuilt = torch.cat([vae.decode(part).sample for part in (latents + noise).split(25)]) / 2 + 0.5
            error = (rebuilt.clamp(0, 1) - real).square().mean()
            right = accuracy(scenes, read_in_parts(judge, rebuilt.clamp(0, 1)))["over all"]
            report[name] = {"psnr_db": round(-10 * error.log10().item(), 2), "judge": right}
    print(json.dumps(report, indent=1))
    write_text(MEASURED / "ceiling.json", json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
