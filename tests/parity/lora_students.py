"""LoRA students of every kind, and their exports: what tests of other tools open."""

import json
from pathlib import Path

from torch import Tensor

import tiny
from mlcm_rl.models import published_teachers, students
from mlcm_rl.models.base import Base
from mlcm_rl.models.export import export
from mlcm_rl.models.lora_files import read_lora
from mlcm_rl.recipe import Lora

LORA, PREFERENCE = Lora(rank=8, alpha=2.0), Lora(rank=2, alpha=8.0)  # a scale that is lost or doubled shows
WHOLE, CONDITIONED = ["plain", "tuned"], ["conditioned", "conditioned-tuned"]
SEED = 1


def published_unet(name: str) -> dict:
    """The configuration of a published teacher's denoiser."""
    return json.loads((published_teachers.FOLDER / name / "unet" / "config.json").read_text())


SDXL, SD15 = published_unet("stable-diffusion-xl-base-1.0"), published_unet("stable-diffusion-v1-5")
SD21 = SD15 | {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}


def description(base: Base) -> dict:
    return {"num_segments": 1, "family": base.family, "prediction_type": base.prediction_type}


def make(base: Base, root: Path, name: str, kind: str, scale: float = 0.05) -> None:
    """Write a student of `base` to `root`/students/`name` and its export to `root`/exports/`name`."""
    distilled, student = root / "distilled" / name, root / "students" / name
    denoiser = students.student(base, LORA, 0, condition_on_target=kind in CONDITIONED)
    tiny.perturb(students.trainable_parameters(denoiser), SEED, scale)
    is_tuned = kind.endswith("tuned")
    students.save_student(denoiser, distilled if is_tuned else student, description(base))
    if is_tuned:
        tuned = students.for_preference(base, PREFERENCE, SEED, distilled)
        tiny.perturb(students.trainable_parameters(tuned), SEED + 1, scale)
        students.save_tuned(tuned, distilled, student, tuned_steps=1)
    export(student, base, root / "exports" / name)


def updates_in(*files: Path) -> dict[str, Tensor]:
    """What adapters in PEFT's names add to each weight, together."""
    found: dict[str, Tensor] = {}
    for file in files:
        settings, tensors = read_lora(file)
        for key, down in tensors.items():
            if key.endswith(".lora_A.weight"):
                module, up = key.removesuffix(".lora_A.weight"), tensors[key.replace("lora_A", "lora_B")].double()
                update = (up.flatten(1) @ down.double().flatten(1)).reshape(len(up), *down.shape[1:])
                found[module] = found.get(module, 0) + settings.lora_alpha / settings.r * update
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()
