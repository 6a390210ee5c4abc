"""Evaluations planted by hand: folders of finished stages, with pictures whose colours say whose they are."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from mlcm_rl.report import assembly, comparisons, page, types
from mlcm_rl.storage import manifest
from mlcm_rl.storage.files import write_json

HOSTILE = "</script><script>document.title = 'run'</script><b onclick=x> & {{ 7 * 7 }}"
PROMPTS = [(HOSTILE, "en"), ("红苹果", "zh"), ("a cat", "en"), ("熊猫", "zh")]
DESCRIBED = {"gamma 0": True, "gamma 1": False}  # a student's samplers: its default one or not


def colour(row: str, prompt: int, picture: int) -> tuple[int, int, int]:
    """Return the colour of the picture of a row for a prompt."""
    return sum(row.encode()) % 256, 40 * prompt % 256, 100 * picture


def write(
    folder: Path,
    scores: dict[str, Sequence[float]],
    seed: int = 0,
    prompts: Sequence[tuple[str, str]] = PROMPTS,
    keeps: bool = False,
    images: int = 1,
    size: int = 8,
) -> Path:
    """Write a finished evaluation: the teacher's rows, and a student named like each of `scores` at 2 and 4 steps.

    The student's reward brightness of prompt i is its scores[i]; with `keeps`, all pictures are there, else those of
    the first two prompts. Return `folder`.
    """
    languages = [language for _, language in prompts]

    def row(id_: str, role: str, steps: int, values: Sequence[float], **described) -> types.Row:
        given = {"id": id_, "role": role, "num_steps": steps, "num_evaluations": steps, **described}
        rewards, distances = torch.tensor(values), torch.arange(float(len(prompts)))
        samples = {"reward/brightness": rewards[:, None] + torch.arange(images)} if keeps and images > 1 else None
        return assembly.record(
            given, {"distance": distances, "reward/brightness": rewards}, languages, 1.0, 0.1, samples
        )

    zeros, guided = [0.0] * len(prompts), {"name": "teacher", "solver": "ddim", "guidance_scale": 4.0}
    rows = [
        row("teacher-50", "reference", 50, zeros, sampler="DDIM, guided", **guided | {"num_evaluations": 100}),
        row("ddim-unguided-4", "undistilled", 4, zeros, sampler="DDIM, unguided", **guided),
    ]
    for name, values in scores.items():
        for steps in (2, 4):
            for sampler, default in DESCRIBED.items():
                described = {"name": name, "sampler": sampler, "default": default, "num_segments": 1}
                rows.append(row(f"{name}-{steps}-{sampler[-1]}", "student", steps, values, **described))
    for one in rows:
        for i in range(len(prompts)):
            for j in range(images if keeps else i < 2):
                path = (
                    page.sample_path(folder, one.id, i * images + j) if keeps else page.picture_path(folder, one.id, i)
                )
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (size, size), colour(one.id, i, j)).save(path)
    measured = types.Measurements(
        format=assembly.FORMAT,
        name=folder.name,
        created="now",
        environment=types.Environment(device="cpu", platform="here", python="3", versions={}, commit=None),
        teacher={},
        settings={"seed": seed, "images_per_prompt": images, "keep_pictures": keeps},
        reference="teacher-50",
        prompts=[types.Prompt(prompt=text, language=one, shown=i < 2) for i, (text, one) in enumerate(prompts)],
        rows=rows,
        curves=[],
    )
    headline = comparisons.headline(measured, [], None)
    write_json(folder / "report.json", types.Report(**dict(measured), comparisons=[], headline=headline).as_json())
    manifest.finish(folder, json.loads(json.dumps({"kind": "evaluate", "fingerprint": folder.name})))
    return folder
