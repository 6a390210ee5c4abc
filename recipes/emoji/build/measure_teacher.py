"""What the teacher draws, for its card: a sheet of 64 samples, the judge's R@1 and R@5 per language, KID.

    python recipes/emoji/build/measure_teacher.py [--teacher FOLDER] [--prompts 512] [--guidance 4.0]

Samples are of the test prompts at 50 guided DDIM steps. Writes `samples.png`, `samples.md` and `measured/teacher.json`,
none of them in the teacher's folder: what lies there is part of its identity.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from mlcm_rl.data.prompts import Prompt, read_prompts
from mlcm_rl.equations import statistics
from mlcm_rl.equations.segments import time_grid
from mlcm_rl.evaluation import judge, metrics
from mlcm_rl.models import pictures, sampler, teachers
from mlcm_rl.models.base import Base
from mlcm_rl.recipe import Teacher
from mlcm_rl.training import devices, progress, seeding
from sources import EMOJI, MEASURED, write_text

NUM_SHOWN, COLUMNS = 64, 8
BATCH = 32


@torch.no_grad()
def draw(base: Base, prompts: list[Prompt], guidance_scale: float, num_steps: int = 50) -> Tensor:
    """Return one picture of each prompt (N, 3, H, W) in [0, 1], at `num_steps` guided DDIM steps."""
    images = []
    with progress.progress(len(prompts), "samples") as bar:
        for start in range(0, len(prompts), BATCH):
            part = prompts[start : start + BATCH]
            conditioning = base.encode_prompts([prompt.prompt for prompt in part])
            noise = base.noise([seeding.generator("card", start + i) for i in range(len(part))], len(part))
            times = time_grid(num_steps)[:-1]
            dropped = base.unconditional(len(part))
            latents = sampler.sample_teacher(base, conditioning, dropped, noise, times, guidance_scale)
            images.append(base.autoencoder.decode(latents))
            bar.advance(len(part))
    return torch.cat(images)


def recalls(features: Tensor, prompts: list[Prompt], assessor: judge.Judge) -> dict[str, list[float]]:
    """Return R@1 and R@5 with standard errors, per language, of pictures whose `features` (N, D) are the judge's."""
    places = {concept: i for i, concept in enumerate(assessor.concepts)}
    rank = metrics.ranks(
        features, assessor.prototypes, torch.tensor([places[str(prompt.concept)] for prompt in prompts])
    )
    report = {}
    for language in sorted({prompt.language for prompt in prompts}):
        mine = torch.tensor([prompt.language == language for prompt in prompts])
        for k in (1, 5):
            mean, error = statistics.mean_and_error(metrics.recall(rank[mine], k))
            report[f"R@{k} {language}"] = [round(mean, 3), round(error, 3)]
    return report


def measure(images: Tensor, prompts: list[Prompt], assessor: judge.Judge) -> dict:
    """Return the recalls, and KID to the real pictures on the judge's features."""
    features = assessor.features(images)
    kid = metrics.kid(features[:, None], assessor.reference_features).item()
    return {"kid": round(kid, 5)} | recalls(features, prompts, assessor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=EMOJI / "teacher")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--guidance", type=float, default=4.0)
    arguments = parser.parse_args()
    base = teachers.load(Teacher(path=str(arguments.teacher), family="sdxl"), devices.device_of("auto"))
    prompts = read_prompts(EMOJI / "prompts" / "test.jsonl")[: arguments.prompts]
    images = draw(base, prompts, arguments.guidance)
    report = {"guidance_scale": arguments.guidance, "prompts": len(prompts)}
    report |= measure(images, prompts, judge.load(EMOJI / "judge"))
    print(json.dumps(report, indent=1))
    write_text(MEASURED / "teacher.json", json.dumps(report, indent=1) + "\n")
    pictures.save_png(pictures.grid(images[:NUM_SHOWN], COLUMNS).quantize(200), EMOJI / "samples.png")
    shown = [prompt.prompt for prompt in prompts[:NUM_SHOWN]]
    rows = [" · ".join(shown[i : i + COLUMNS]) for i in range(0, len(shown), COLUMNS)]
    listed = "\n".join(f"{i}. {row}" for i, row in enumerate(rows, start=1))
    write_text(EMOJI / "samples.md", f"# The prompts of samples.png, row by row\n\n{listed}\n")


if __name__ == "__main__":
    main()
