"""A student composed with what it never saw: edge overlap under a ControlNet, styles by strength and by a LoRA.

    mlcm run recipes/emoji_control.yaml
    mlcm run recipes/emoji_demo.yaml          # whose feedback leaves an adapter: the style LoRA
    python recipes/emoji/build/measure_control.py runs/emoji_control --style runs/emoji_demo

Edges are those of the teacher's drawings in one style; the prompts name another, whose shapes are others. Styles are
measured by `emoji_style_judge`, which nothing was tuned by, and by the judge's R@1. Writes `measured/control.json`,
`docs/compose_edges.png` and `docs/compose_styles.png`.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from mlcm_rl import rewards
from mlcm_rl.data.prompts import Prompt, read_prompts
from mlcm_rl.equations.edges import edge_map, edge_overlap
from mlcm_rl.equations.segments import time_grid
from mlcm_rl.equations.statistics import mean_and_error
from mlcm_rl.evaluation import judge, metrics
from mlcm_rl.models import control, pictures, sampler, students, teachers
from mlcm_rl.models.base import Base
from mlcm_rl.models.composition import Composition, Weighted
from mlcm_rl.models.students import PREFERENCE_FILE, Student
from mlcm_rl.recipe import Reward, Teacher
from mlcm_rl.training import devices, seeding
from sources import EMOJI, MEASURED, write_text

DOCS = EMOJI.parents[1] / "docs"
GUIDANCE, TEACHER_STEPS, SHOWN = 4.0, 25, 8
EDGE_PROMPTS = 512  # of which some thirty are in the one style
FROM_STYLE, TO_STYLE = "twemoji", "fluent"
Controls = list[tuple[torch.nn.Module, Tensor, float]]


def noise_of(base: Base, purpose: str, count: int) -> Tensor:
    """Return noise (N, C, H, W), another for each `purpose`."""
    return base.noise([seeding.generator("control", purpose, i) for i in range(count)], count)


@torch.no_grad()
def by_teacher(base: Base, texts: list[str], noise: Tensor, steps: int, controls: Controls | None = None) -> Tensor:
    """Return the guided teacher's pictures (N, 3, H, W) in [0, 1], with a ControlNet or without."""
    conditioning, dropped = base.encode_prompts(texts), base.unconditional(len(texts))
    times = time_grid(steps)[:-1]
    if not controls:
        return base.autoencoder.decode(sampler.sample_teacher(base, conditioning, dropped, noise, times, GUIDANCE))
    ((network, images, scale),) = controls
    with control.controlled(base.denoiser, network, images.repeat(2, 1, 1, 1), scale):  # guidance is in one batch
        return base.autoencoder.decode(sampler.sample_teacher(base, conditioning, dropped, noise, times, GUIDANCE))


def by_student(base: Base, student: Student, texts: list[str], noise: Tensor, steps: int, **inputs: object) -> Tensor:
    """Return the student's pictures (N, 3, H, W) in [0, 1], composed with `inputs`."""
    composition = Composition(base, student.denoiser, **inputs)  # type: ignore[arg-type]
    times = student.grid.times(steps, composition.strength)
    x0 = composition.sample(base.encode_prompts(texts), noise, times, student.default_gamma, None, student.conditioned)
    return composition.decode(x0)


class Figures:
    """What is measured of pictures (N, 3, H, W): overlap with edges (N, 1, H, W), both style rewards, R@1."""

    def __init__(self) -> None:
        self.assessor = judge.load(EMOJI / "judge")
        names = ("emoji_style", "emoji_style_judge")
        self.styles = {name: rewards.build(Reward(name=name), "cpu") for name in names}

    @torch.no_grad()
    def of(self, images: Tensor, prompts: list[Prompt], edges: Tensor | None = None) -> dict[str, list[float]]:
        """Return each figure with its standard error."""
        places = torch.tensor([self.assessor.concepts.index(str(prompt.concept)) for prompt in prompts])
        ranks = metrics.ranks(self.assessor.features(images), self.assessor.prototypes, places)
        values = {name: style(images, [""] * len(images)) for name, style in self.styles.items()}
        values["R@1"] = metrics.recall(ranks, 1)
        if edges is not None:
            values["edge_overlap"] = edge_overlap(edge_map(images), edges)
        return {name: [round(number, 3) for number in mean_and_error(value)] for name, value in values.items()}


def in_another_style(prompts: list[Prompt]) -> tuple[list[Prompt], list[str]]:
    """Return the prompts in one style, and their texts with another's name: the teacher draws other shapes for them."""
    chosen = [prompt for prompt in prompts if prompt.style == FROM_STYLE and FROM_STYLE in prompt.prompt]
    return chosen, [prompt.prompt.replace(FROM_STYLE, TO_STYLE) for prompt in chosen]


def follow_edges(base: Base, student: Student, network: torch.nn.Module, prompts: list[Prompt]) -> tuple[dict, Tensor]:
    """Return figures of teacher and student along the edges of drawings in another style, and rows of pictures.

    Along edges of the same prompt's drawings there is nothing to see: the teacher draws them again without a ControlNet
    (overlap 0.99).
    """
    chosen, texts = in_another_style(prompts)
    count, figures = len(chosen), Figures()
    own = [prompt.prompt for prompt in chosen]
    drawings = by_teacher(base, own, noise_of(base, "drawings", count), TEACHER_STEPS)
    edges, noise = edge_map(drawings), noise_of(base, "others", count)
    controls: Controls = [(network, edges.expand(-1, 3, -1, -1), 1.0)]
    images = {
        "teacher": by_teacher(base, texts, noise, TEACHER_STEPS, controls),
        "teacher, without": by_teacher(base, texts, noise, TEACHER_STEPS),
        "student, 4 steps, without": by_student(base, student, texts, noise, 4),
    }
    for steps in (2, 4, 8):
        images[f"student, {steps} steps"] = by_student(base, student, texts, noise, steps, controls=controls)
    report = {name: figures.of(one, chosen, edges) for name, one in images.items()}
    shown = [drawings, edges.expand(-1, 3, -1, -1), *(images[name] for name in ("teacher, without", "teacher"))]
    shown += [images[f"student, 4 steps{end}"] for end in (", without", "")]
    return {"drawings": count} | report, torch.cat([row[:SHOWN] for row in shown])


def restyle(base: Base, student: Student, prompts: list[Prompt]) -> tuple[dict, Tensor]:
    """Return figures of drawings in one style that are drawn over in another's words, by strength, and pictures."""
    (chosen, texts), figures = in_another_style(prompts), Figures()
    noise = noise_of(base, "styles", len(chosen))
    drawings = by_student(base, student, [prompt.prompt for prompt in chosen], noise, 4)
    edges, images = edge_map(drawings), {"the drawing": drawings}
    noise = noise_of(base, "others", len(chosen))
    for strength in (0.25, 0.5, 0.75, 1.0):
        drawn = by_student(base, student, texts, noise, 4, image=drawings, strength=strength)
        images[f"strength {strength:g}"] = drawn
    report = {name: figures.of(one, chosen, edges) for name, one in images.items()}
    return {"drawings": len(chosen)} | report, torch.cat([one[:SHOWN] for one in images.values()])


def add_style(teacher: Teacher, folder: Path, style: Path, prompts: list[Prompt]) -> tuple[dict, Tensor]:
    """Return figures of the student with a style LoRA at several weights, and pictures."""
    texts, figures, report, rows = [prompt.prompt for prompt in prompts], Figures(), {}, []
    for weight in (0.0, 1.0, 2.0, 4.0):
        base = teachers.load(teacher, devices.device_of("auto"))  # a style changes its weights
        student = students.load_student(base, folder)
        loras = [Weighted(style, weight)]
        images = by_student(base, student, texts, noise_of(base, "others", len(texts)), 4, loras=loras)
        report[f"weight {weight:g}"] = figures.of(images, prompts)
        rows.append(images[:SHOWN])
    return report, torch.cat(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="of emoji_control.yaml")
    parser.add_argument("--style", type=Path, required=True, help="run of emoji_demo.yaml")
    parser.add_argument("--prompts", type=int, default=64)
    arguments = parser.parse_args()
    teacher = Teacher(path=str(EMOJI / "teacher"), family="sdxl", guidance_scale=GUIDANCE)
    base = teachers.load(teacher, devices.device_of("auto"))
    folder = arguments.run / "01-distill" / "student"
    student = students.load_student(base, folder)
    network = control.load_control(base, arguments.run / "02-train_control" / "control", torch.float32)
    prompts = read_prompts(EMOJI / "prompts" / "test.jsonl")
    style = arguments.style / "02-feedback" / "student" / PREFERENCE_FILE
    report = {"prompts": arguments.prompts}
    report["edges"], along_edges = follow_edges(base, student, network, prompts[:EDGE_PROMPTS])
    report["strength"], by_strength = restyle(base, student, prompts)
    report["style_lora"], by_weight = add_style(teacher, folder, style, prompts[: arguments.prompts])
    print(json.dumps(report, indent=1))
    write_text(MEASURED / "control.json", json.dumps(report, indent=1) + "\n")
    pictures.save_png(pictures.grid(along_edges, SHOWN).quantize(200), DOCS / "compose_edges.png")
    styles = torch.cat([by_strength, by_weight])
    pictures.save_png(pictures.grid(styles, SHOWN).quantize(200), DOCS / "compose_styles.png")


if __name__ == "__main__":
    main()
