"""A small evaluation: a tiny SDXL teacher, its untrained student and one that has moved, a random judge."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

import tiny
from mlcm_rl import adapters, bases
from mlcm_rl.judge import PictureEncoder
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
    """Fill `root` with a teacher, a judge, prompts and distill stages `same` (untrained) and `other`; returns it."""
    tiny.sdxl(root / "teacher")
    write_judge(root / "judge")
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
    log = [
        {"step": step, "phase": step // 200, "num_segments": (8, 1)[step // 200], "loss": 1.0 / (1 + step % 200)}
        for step in range(400)
    ]
    log[50]["held_out_loss"] = 0.5
    (root / "same" / "log.jsonl").write_text("\n".join(map(json.dumps, log)) + '\n{"step": 9, "seconds": 1.0}\n')
    return root


def write_judge(folder: Path) -> None:
    """An untrained judge of CONCEPTS in two styles, in the layout that `judge.load` reads."""
    folder.mkdir()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        encoder = PictureEncoder((8, 16), 12)
        references = torch.nn.functional.normalize(torch.randn(len(CONCEPTS), 2, 12), dim=-1)
    settings = {"widths": [8, 16], "feature_width": 12, "concepts": CONCEPTS, "styles": ["one", "two"]}
    (folder / "config.json").write_text(json.dumps(settings))
    save_file({name: value.half() for name, value in encoder.state_dict().items()}, folder / "judge.safetensors")
    save_file({"references": references.contiguous()}, folder / "references.safetensors")


def recipe(place: Path, **settings) -> Recipe:
    """The evaluation of `same` beside `other`; the judge wants 64 x 64 pictures."""
    stage = {
        "prompts": str(place / "prompts.jsonl"),
        "num_prompts": len(PROMPTS),
        "num_steps": [1, 2, 4],
        "teacher_steps": [2, 3],
        "teacher_solvers": ["ddim", "unipc"],
        "also": [str(place / "other")],
        "judge": str(place / "judge"),
        "rewards": ["colourfulness"],
        "images_per_prompt": PICTURES,
        "batch_size": 12,
        **settings,
    }
    teacher = Teacher(path=str(place / "teacher"), family="sdxl", guidance_scale=3.0, resolution=64)
    return Recipe(name="tiny", seed=3, device="cpu", teacher=teacher, stages=[Evaluate(**stage)])


def run(place: Path, folder: Path, **settings) -> dict:
    """report.json of an evaluation of `same`, written into `folder`."""
    folder.mkdir(parents=True)
    made = recipe(place, **settings)
    evaluate.run(made.stages[0], made, {"distill": place / "same"}, folder)
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))
