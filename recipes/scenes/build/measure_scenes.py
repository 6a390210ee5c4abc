"""How often the teacher draws what a prompt asks for: the judge's answers by relation, language and wording.

    python recipes/scenes/build/measure_scenes.py --prompts 160 [--file test frames synonyms] [--steps 50 4]

Euler steps of the guided flow at evenly spaced times before the shift, as the stock pipeline's scheduler takes them.
Writes `measured/teacher.json` and, of the first file at the first number of steps, `samples.png`.
"""

import mlcm_rl  # noqa: F401  (it quiets what the libraries below import)

# isort: split
import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor

import drawings  # noqa: F401  puts the emoji teacher's programs on the path
from assemble_scenes import trained_denoiser
from mlcm_rl.data.prompts import Prompt, read_prompts
from mlcm_rl.data.scenes import answers, read_code
from mlcm_rl.equations.statistics import mean_and_error
from mlcm_rl.evaluation.scene_judge import load
from mlcm_rl.models import pictures
from mlcm_rl.models.families.sd3 import merge_equal_tokens
from mlcm_rl.training.seeding import generator
from scene_judge import JUDGE, read_in_parts
from scenes import MEASURED, SUBJECT
from sources import cache_folder, write_text
from train_denoiser import LATENT, SHIFT, Encoder

BATCH = 32


class Sampler:
    """Draws pictures of prompts with a guided denoiser, which computes T5's zeros as one token."""

    def __init__(self, denoiser: SD3Transformer2DModel, vae: AutoencoderKL, encoder: Encoder) -> None:
        self.denoiser, self.vae, self.encoder = merge_equal_tokens(denoiser).eval(), vae.eval(), encoder

    @staticmethod
    def noise(seed: int, place: int) -> Tensor:
        """Return the noise (C, H, W) that the prompt at a place of its list starts from."""
        return torch.randn(8, LATENT, LATENT, generator=generator(seed, "card", place))

    @torch.no_grad()
    def draw(self, prompts: list[str], num_steps: int, guidance_scale: float, shift: float, seed: int = 0) -> Tensor:
        """Return pictures (N, 3, H, W) in [0, 1], sampled in batches; the noise of a prompt depends on its place."""
        parts = []
        for start in range(0, len(prompts), BATCH):
            texts = prompts[start : start + BATCH]
            x = torch.stack([self.noise(seed, start + i) for i in range(len(texts))])
            u = torch.linspace(1, 0, num_steps + 1)
            context, pooled = self.encoder.encode([*texts, *[""] * len(texts)])
            sigmas = shift * u / (1 + (shift - 1) * u)
            for sigma, after in zip(sigmas[:-1], sigmas[1:], strict=True):
                velocity = self.denoiser(
                    hidden_states=torch.cat([x, x]),
                    encoder_hidden_states=context,
                    pooled_projections=pooled,
                    timestep=(1000 * sigma).expand(2 * len(x)),
                    return_dict=False,
                )[0]
                asked, dropped = velocity.chunk(2)
                x = x + (after - sigma) * (dropped + guidance_scale * (asked - dropped))
            parts.append(self.vae.decode(x / self.vae.config.scaling_factor).sample)
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


def summary(prompts: list[Prompt], results: list[dict[str, bool]]) -> dict[str, list[float]]:
    """Return mean and standard error of the share that is right: over all, by language, relation and question."""
    rows: dict[str, list[float]] = defaultdict(list)
    for prompt, result in zip(prompts, results, strict=True):
        for key in ("over all", prompt.language, str(prompt.concept).split(" ")[0]):
            rows[key].append(float(result["all"]))
        for question, right in result.items():
            if question != "all":
                rows[f"question {question}"].append(float(right))
    return {key: [round(v, 3) for v in mean_and_error(torch.tensor(values))] for key, values in rows.items()}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=160)
    parser.add_argument("--file", nargs="+", default=["test"])
    parser.add_argument("--steps", type=int, nargs="+", default=[50])
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--shift", type=float, default=SHIFT)
    parser.add_argument("--cache", help="a training's folder in the cache instead of the shipped teacher")
    parser.add_argument("--png", type=Path, help="where the samples go [samples.png, only for the shipped teacher]")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    teacher, judge, report = SUBJECT / "teacher", load(JUDGE), {"guidance_scale": arguments.guidance}
    if arguments.cache:
        vae, encoder = cache_folder() / "scene_autoencoder", Encoder(cache_folder() / "scene_towers")
        sampler = Sampler(trained_denoiser(arguments.cache), AutoencoderKL.from_pretrained(vae), encoder)
    else:
        denoiser = SD3Transformer2DModel.from_pretrained(teacher / "transformer", torch_dtype=torch.float32)
        sampler = Sampler(denoiser, AutoencoderKL.from_pretrained(teacher / "vae"), Encoder(teacher))
    sheet = arguments.png or (None if arguments.cache else SUBJECT / "samples.png")
    for name in arguments.file:
        prompts = read_prompts(SUBJECT / "prompts" / f"{name}.jsonl")[: arguments.prompts]
        for steps in arguments.steps:
            images = sampler.draw([p.prompt for p in prompts], steps, arguments.guidance, arguments.shift)
            readings = read_in_parts(judge, images)
            results = [answers(read_code(str(p.concept)), r) for p, r in zip(prompts, readings, strict=True)]
            report[f"{name}, {steps} steps"] = summary(prompts, results)
            print(f"{name}, {steps} steps: {json.dumps(summary(prompts, results))}", flush=True)
            if sheet:
                pictures.save_png(pictures.grid(images[:32], 8).quantize(200), sheet)
                sheet = None
    if not arguments.cache:
        write_text(MEASURED / "teacher.json", json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
