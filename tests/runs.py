"""Small recipes over a tiny teacher, for tests of stages and of the pipeline."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from mlcm_rl.data.training_points import Draw
from mlcm_rl.recipe import (
    Distill,
    Dpo,
    Evaluate,
    Feedback,
    Policy,
    Recipe,
    Samples,
    Teacher,
    TrainTeacher,
    Trajectories,
)
from mlcm_rl.storage import files
from mlcm_rl.training.loop import Runtime

PROMPTS = ["a cat", "a dog", "红苹果", "a red car", "熊猫", "a snowman"]


@contextmanager
def crashing_at(update: int) -> Iterator[None]:
    """Let the update numbered `update`, of whichever network, end what is inside, which has to reach it."""
    original, updates = Runtime.backward, iter(range(10_000))

    def backward(self, *arguments, **named):
        if next(updates) == update:
            raise SystemExit("crash")
        return original(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Runtime, "backward", backward)
        with pytest.raises(SystemExit):
            yield


def outside_training() -> Any:
    """What a guard asks of a stage's runtime, in float32 and with seed 0."""
    return SimpleNamespace(recipe=SimpleNamespace(seed=0), autocast=nullcontext)


def parts_of(draw: Draw, size: int) -> list[Draw]:
    """The draw of a step in parts of `size` samples."""
    return [draw.rows(slice(i, i + size)) for i in range(0, len(draw.t), size)]


def write_prompts(folder: Path) -> str:
    path = folder / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return str(path)


def write_pairs(folder: Path) -> str:
    """A pair table of one pair a prompt: a lighter picture is preferred to a darker one, of two sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, prompt in enumerate(PROMPTS):
        row = {"prompt": prompt, "chosen": f"{i}-light.png", "rejected": f"{i}-dark.png"}
        Image.new("RGB", (16, 16), (200 + 5 * i, 220, 210)).save(folder / row["chosen"])
        Image.new("RGB", (24, 20), (30, 10 + 5 * i, 20)).save(folder / row["rejected"])
        rows.append(row)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return str(folder)


def write_images(folder: Path) -> str:
    """A captioned folder of four pictures."""
    images = folder / "images"
    images.mkdir()
    rows = [{"file_name": f"{i}.png", "prompts": [PROMPTS[i]]} for i in range(4)]
    for i, row in enumerate(rows):
        Image.new("RGB", (16, 16), (60 * i, 200 - 40 * i, 30)).save(images / row["file_name"])
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (images / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return str(images)


def trajectories(prompts: str, **changes: Any) -> Trajectories:
    settings = {"num_trajectories": 6, "num_held_out": 2, "solver_steps": 8, "batch_size": 4, "shard_size": 4}
    return Trajectories(prompts=prompts, **(settings | changes))


def distill(**changes: Any) -> Distill:
    settings = {
        "num_segments": [8, 4, 2, 1],
        "batch_size": 4,
        "num_steps": 2,
        "log_every": 1,
        "save_every": 1,
        "sample_every": 100,
        "learning_rate": 1e-3,
    }
    return Distill(**(settings | changes))


def recipe(
    teacher: Path,
    folder: Path,
    stages: list,
    family: str = "sdxl",
    resolution: int | None = None,
    quantise: str | None = None,
    **changes: Any,
) -> Recipe:
    settings = {"name": "small", "runs": str(folder / "runs"), "device": "cpu", "trackers": []}
    guided = Teacher(path=str(teacher), family=family, guidance_scale=3.0, resolution=resolution, quantise=quantise)
    return Recipe(teacher=guided, stages=stages, **(settings | changes))


def whole(teacher: Path, folder: Path, family: str = "sdxl", **changes: Any) -> Recipe:
    """Trajectories, distillation and evaluation."""
    prompts = write_prompts(folder)
    evaluate = Evaluate(prompts=prompts, num_prompts=4, sampling_steps=[1, 2], teacher_steps=[3, 4], batch_size=4)
    stages = [trajectories(prompts), distill(**changes), evaluate]
    samples = Samples(prompts=["a cat", "熊猫"], sampling_steps=[1, 2])
    return recipe(teacher, folder, stages, family, samples=samples)


TUNING = {"feedback": Feedback, "dpo": Dpo, "policy": Policy}


def tuning(kind: str, prompts: str, **changes: Any) -> Feedback | Dpo | Policy:
    """A stage of preference learning: brightness is trained on, colourfulness is held out."""
    settings: dict[str, Any] = {
        "prompts": prompts,
        "batch_size": 4,
        "num_steps": 2,
        "sampling_steps": 2,
        "learning_rate": 1e-3,
        "adapter": {"rank": 2, "alpha": 2.0},
        "rewards": [{"name": "brightness"}],
        "guard": {"rewards": [{"name": "colourfulness"}], "num_prompts": 4, "every": 1, "patience": 100},
        "log_every": 1,
        "save_every": 1,
    }
    if kind == "policy":
        settings |= {"num_generations": 2, "gamma": 1.0}
    return TUNING[kind](**(settings | changes))


def write_inputs(folder: Path) -> dict[str, str]:
    """Where a setting's name leads: the prompts, the pictures and the pairs that runs read, in one folder of runs."""
    return {
        "prompts": write_prompts(folder),
        "images": write_images(folder),
        "pairs": write_pairs(folder / "pairs"),
    }


KINDS = ("train_teacher", "trajectories", "distill", "feedback", "dpo", "policy", "evaluate")


def of_kinds(teacher: Path, folder: Path, kinds: tuple[str, ...]) -> Recipe:
    """A recipe of small stages of `kinds`, each of several checkpoints, shards or batches."""
    prompts = write_prompts(folder)
    stages = {
        "train_teacher": TrainTeacher(images=write_images(folder), num_steps=3, batch_size=2, save_every=1),
        "trajectories": trajectories(prompts, batch_size=2, shard_size=2),
        "distill": distill(num_segments=[2, 1], adapter={"kind": "full"}, target="consistency", target_ema=0.9),
        **{kind: tuning(kind, prompts, num_steps=3) for kind in TUNING},
        "evaluate": Evaluate(
            prompts=prompts, num_prompts=4, sampling_steps=[1], gammas=[0.0], teacher_steps=[2], batch_size=2
        ),
    }
    return recipe(teacher, folder, [stages[kind] for kind in kinds])


# Times, dates and folders stand in these; what else the JSON says is compared.
NOT_COMPARED = (
    "*/manifest.json",
    "*/.lock",
    "*/student.json",
    "*/config.json",
    "*/report.json",
    "*/report.md",
    "*/report.html",
)


def results(recipe: Recipe) -> dict[str, object]:
    """Checksums of all that the stages left; what students say of themselves, wherever the run is; the figures of the
    report but for latency."""
    stages = Path(recipe.runs) / "stages"
    found: dict[str, object] = dict(files.checksums(stages, NOT_COMPARED))
    for path in [*stages.glob("**/student.json"), *stages.glob("**/config.json")]:
        found[str(path.relative_to(stages))] = path.read_text().replace(recipe.runs, "")
    for path in stages.glob("*/report.json"):
        report = json.loads(path.read_text())
        timed = ("latency_ms", "latency_ms_se")
        rows = [{name: value for name, value in row.items() if name not in timed} for row in report["rows"]]
        found[str(path.relative_to(stages))] = [rows, report["curves"], report["comparisons"], report["tuned"]]
    return found


def records(folder: Path) -> list[dict]:
    """The records of steps in the log of a training stage in `folder`, without those of held-out data alone."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "loss" in line]
