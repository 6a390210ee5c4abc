"""A small evaluation: a tiny SDXL teacher, its untrained student and one that has moved, a random judge."""

import json
from pathlib import Path
from unittest.mock import patch

import torch
from torch.nn.functional import adaptive_avg_pool2d, normalize

import tiny
from mlcm_rl import adapters, bases, judge
from mlcm_rl.recipe import Evaluate, Lora, Recipe, Teacher
from mlcm_rl.stages import evaluate

CONCEPTS = ["1F34E", "1F433", "1F697", "2600", "1F408", "1F332", "1F511"]
PROMPTS = [
    ("a red apple", "en"),
    ("鲸", "zh"),
    ("a <b>fast</b> car & more", "en"),
    ("太阳", "zh"),
    ("a cat", "en"),
    ("树", "zh"),
]
PICTURES = 2  # of each prompt
DESCRIPTION = {"segments": 1, "family": "sdxl", "prediction_type": "epsilon"}


def write_place(root: Path) -> Path:
    """Fill `root` with a teacher, prompts and distill stages `same` (untrained) and `other`; returns it."""
    tiny.sdxl(root / "teacher")
    records = [
        {"prompt": text, "language": language, "concept": concept}
        for (text, language), concept in zip(PROMPTS, CONCEPTS, strict=False)
    ]
    del records[-1]["concept"]  # one prompt that retrieval does not apply to
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    (root / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    base = bases.load(Teacher(path=str(root / "teacher"), family="sdxl"), "cpu")
    for name, spread in (("same", 0.0), ("other", 0.02)):
        student = adapters.student(base, Lora(rank=2, alpha=2), seed=0)
        for parameter in adapters.trainable_parameters(student):
            parameter.data += spread * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        adapters.save_student(student, root / name / "student", DESCRIPTION)
        (root / name / "manifest.json").write_text(json.dumps({"recipe": {"name": name}}))
    log = [
        {"step": step, "phase": step // 200, "num_segments": (8, 1)[step // 200], "loss": 1.0 / (1 + step % 200)}
        for step in range(400)
    ]
    log[50]["held_out_loss"] = 0.5
    (root / "same" / "log.jsonl").write_text("\n".join(map(json.dumps, log)) + '\n{"step": 9, "seconds": 1.0}\n')
    return root


class PlantedJudge:
    """What the stage asks of a judge, of pictures of any size: fixed random features of their 4 x 4 thumbnails."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        unit = [normalize(torch.randn(count, 12, generator=generator), dim=1) for count in (len(CONCEPTS), 20)]
        self.concepts = CONCEPTS
        self.prototypes, self.reference_features = unit
        self.projection = torch.randn(48, 12, generator=generator)

    def features(self, images):
        thumbnails = adaptive_avg_pool2d(images, 4).flatten(1)
        return normalize((thumbnails - thumbnails.mean(1, keepdim=True)) @ self.projection, dim=1)


def recipe(place: Path, **settings) -> Recipe:
    """The evaluation of `same` beside `other`."""
    stage = {
        "prompts": str(place / "prompts.jsonl"),
        "num_prompts": len(PROMPTS),
        "num_steps": [1, 2, 4],
        "teacher_steps": [2, 3],
        "teacher_solvers": ["ddim", "unipc"],
        "also": [str(place / "other")],
        "judge": "planted",
        "rewards": ["colourfulness"],
        "images_per_prompt": PICTURES,
        "batch_size": 12,
        **settings,
    }
    teacher = Teacher(path=str(place / "teacher"), family="sdxl", guidance_scale=3.0)
    return Recipe(name="tiny", seed=3, device="cpu", teacher=teacher, stages=[Evaluate(**stage)])


def run(place: Path, folder: Path, **settings) -> dict:
    """report.json of an evaluation of `same`, written into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    made = recipe(place, **settings)
    with patch.object(judge, "load", lambda path, device: PlantedJudge()):
        evaluate.run(made.stages[0], made, {"distill": place / "same"}, folder)
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))
