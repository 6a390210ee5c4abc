"""A small evaluation: a tiny SDXL teacher, its untrained student and one that has moved, random measuring networks."""

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d, normalize
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

import runs
import tiny
from mlcm_rl.evaluation import judge
from mlcm_rl.models import students, teachers
from mlcm_rl.models.base import Base
from mlcm_rl.recipe import Evaluate, Lora, Recipe, Teacher
from mlcm_rl.stages import evaluate
from mlcm_rl.storage.files import write_json
from mlcm_rl.storage.tensors import write_tensors

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
DESCRIPTION = {"num_segments": 1, "family": "sdxl", "prediction_type": "epsilon"}
MEAN, DEVIATION = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]  # of CLIP's pictures


def write_place(root: Path) -> Path:
    """Fill `root` with a teacher, prompts and distill stages `same` (untrained) and `other`; returns it."""
    tiny.sdxl(root / "teacher")
    write_json(root / "judge" / "config.json", {"planted": True})
    records = [
        {"prompt": text, "language": language, "concept": concept}
        for (text, language), concept in zip(PROMPTS, CONCEPTS, strict=False)
    ]
    del records[-1]["concept"]  # one prompt that retrieval does not apply to
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    (root / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    base = teachers.load(Teacher(path=str(root / "teacher"), family="sdxl"), "cpu")
    for name, spread in (("same", 0.0), ("other", 0.02)):
        student = students.student(base, Lora(rank=2, alpha=2), seed=0)
        for parameter in students.trainable_parameters(student):
            parameter.data += spread * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        students.save_student(student, root / name / "student", DESCRIPTION)
        (root / name / "manifest.json").write_text(json.dumps(manifest(name, root)))
    log = [
        {"step": step, "phase": step // 200, "num_segments": (8, 1)[step // 200], "loss": 1.0 / (1 + step % 200)}
        for step in range(400)
    ]
    log[50]["held_out_loss"] = 0.5
    (root / "same" / "log.jsonl").write_text("\n".join(map(json.dumps, log)) + '\n{"step": 9, "seconds": 1.0}\n')
    write_tuned(root, base)
    return root


def write_tuned(root: Path, base: Base) -> None:
    """`feedback`: what a stage of preference learning would leave that has tuned `same` and was stopped."""
    start, folder = root / "same" / "student", root / "feedback"
    denoiser = students.for_preference(base, Lora(rank=2, alpha=2), 0, start)
    tiny.perturb([value for value in denoiser.parameters() if value.requires_grad])
    students.save_tuned(denoiser, start, folder / "student", 2)
    stages = [runs.trajectories("p.txt"), runs.distill(), runs.tuning("feedback", "p.txt", num_steps=40)]
    made = runs.recipe(root / "teacher", root, stages, name="taste").model_dump(mode="json")
    described = {"kind": "feedback", "recipe": made, "stage": made["stages"][2], "parents": {"distill": "same"}}
    (folder / "manifest.json").write_text(json.dumps(described))
    verdict = {"kept_step": 10, "warnings": ["step 30: the trained reward rose & the held-out one fell"]}
    (folder / "guard.json").write_text(json.dumps({"stopped": True, **verdict}))
    log = [{"step": step, "reward/brightness": 0.5 + step / 100} for step in range(5, 31, 5)]
    for record, held_out in zip(log[1::2], (0.4, 0.2, -0.3), strict=True):
        record |= {"guard/trained_gain": record["step"] / 10, "guard/held_out_gain": held_out}
        record |= {"guard/reward/brightness": 0.6, "guard/reward/colourfulness": held_out}
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, log)))


def manifest(name: str, root: Path) -> dict:
    """What the pipeline would have said of a distill stage on a store of eight trajectories, ten steps of four."""
    stages = [runs.trajectories(str(root / "prompts.jsonl")), runs.distill(num_segments=[8, 1], num_steps=[6, 4])]
    made = runs.recipe(root / "teacher", root, stages, name=name).model_dump(mode="json")
    parents = {"trajectories": "trajectories-0123456789abcdef"}
    return {"kind": "distill", "recipe": made, "stage": made["stages"][1], "parents": parents}


def write_clip(folder: Path) -> Path:
    """A CLIP of random weights for pictures of 20 x 20, in transformers' format; returns `folder`."""
    words = tiny.tokenizer()
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=len(words), max_position_embeddings=24, projection_dim=12, **sizes, **ends)
    vision = CLIPVisionConfig(image_size=20, patch_size=5, projection_dim=12, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(2)  # whose scores are not all clamped to 0
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": DEVIATION}))
    return folder


def write_real_images(folder: Path, count: int = 9) -> Path:
    """Photographs, as it were: noisy pictures of several sizes and formats; returns `folder`."""
    folder.mkdir()
    for i in range(count):
        picture = Image.effect_noise((24 + 3 * i, 40 - 2 * i), 60).convert("RGB")
        picture.save(folder / (f"{i:012d}" + (".png" if i % 2 else ".jpg")))
    return folder


class PlantedInception(torch.nn.Module):
    """What FID asks of a network, of pictures of any size: the means of their quarters."""

    num_features = 12

    def forward(self, pictures):
        assert pictures.dtype == torch.uint8
        return adaptive_avg_pool2d(pictures.float(), 2).flatten(1) / 64.0


def write_inception(path: Path) -> Path:
    """A file for the planted Inception, which reads nothing from it; returns `path`."""
    write_tensors(path, {"nothing": torch.zeros(1)})
    return path


class PlantedJudge:
    """What the stage asks of a judge, of pictures of any size: fixed random features of their 4 x 4 thumbnails."""

    picture_size = 16  # that of the tiny teachers

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        unit = [normalize(torch.randn(count, 12, generator=generator), dim=1) for count in (len(CONCEPTS), 20)]
        self.concepts = CONCEPTS
        self.prototypes, self.reference_features = unit
        self.projection = torch.randn(48, 12, generator=generator)

    def features(self, images):
        thumbnails = adaptive_avg_pool2d(images, 4).flatten(1)
        projection = self.projection.to(images.device)
        return normalize((thumbnails - thumbnails.mean(1, keepdim=True)) @ projection, dim=1)

    patch_features = features


def recipe(place: Path, runs: Path, seed: int = 3, **settings) -> Recipe:
    """The evaluation of `same` beside `other`, among the runs in a folder."""
    stage = {
        "prompts": str(place / "prompts.jsonl"),
        "num_prompts": len(PROMPTS),
        "sampling_steps": [1, 2, 4],
        "teacher_steps": [2, 3],
        "teacher_solvers": ["ddim", "unipc"],
        "also": [str(place / "other")],
        "judge": str(place / "judge"),
        "rewards": ["colourfulness"],
        "images_per_prompt": PICTURES,
        "batch_size": 12,
        **settings,
    }
    teacher = Teacher(path=str(place / "teacher"), family="sdxl", guidance_scale=3.0)
    return Recipe(name="tiny", seed=seed, device="cpu", runs=str(runs), teacher=teacher, stages=[Evaluate(**stage)])


def run(place: Path, folder: Path, kinds: tuple[str, ...] = ("distill",), runs: Path | None = None, **settings) -> dict:
    """report.json of an evaluation of `same`, and of `feedback` where `kinds` has it, written into `folder`.

    It is among the runs in `runs`; without, it is alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = recipe(place, runs or folder, **settings)
    with patch.object(judge, "load", lambda path, device: PlantedJudge()):
        parents = {"distill": place / "same", "feedback": place / "feedback"}
        evaluate.run(made.stages[0], made, {kind: parents[kind] for kind in kinds}, folder)
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


# ---- fixtures, which tests/conftest.py hands to every folder: the small evaluations run once ----

BRIGHTNESS = {"name": "brightness", "chunk_size": 5}  # an entry as tuning stages have them, beside names


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    return write_place(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="session")
def finished(place) -> Path:
    """The folder of the finished evaluation."""
    run(place, place / "evaluate")
    return place / "evaluate"


@pytest.fixture(scope="session")
def tuned(place) -> Path:
    """The folder of a finished evaluation of a student and of what preference learning made of it."""
    settings = {"also": [], "teacher_solvers": ["ddim"], "rewards": ["colourfulness", BRIGHTNESS, "sharpness"]}
    run(place, place / "tuned", ("distill", "feedback"), **settings)
    return place / "tuned"


@pytest.fixture(scope="session")
def report(finished) -> dict:
    return json.loads((finished / "report.json").read_text(encoding="utf-8"))
