"""Stage `evaluate`: students beside their teacher on fixed prompts and noise, every row measured alike.

The guided teacher at its most steps is drawn first: distances are taken to its samples. Picture j of prompt i starts
from the same noise in every row, so that rows can be compared prompt by prompt.
"""

import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from .. import adapters, bases, judge, metrics, page, pictures, report, rewards, runtime, sampler, undistilled
from ..bases import Base, Conditioning
from ..checkpoint import read_json, remove, write_json, write_tensors
from ..data import Prompt, read_prompts
from ..recipe import Evaluate, Recipe
from ..rows import Row, student_folders, student_rows, teacher_rows

NUM_SUBSETS = 10  # of the prompts, for the standard error of KID
SHOWN_PER_LANGUAGE = 4  # prompts whose pictures are kept for the page


@dataclass(frozen=True)
class Scene:
    """What every row is drawn from and judged by. P prompts, I pictures of each, N = P I samples, prompt by prompt."""

    prompts: list[Prompt]
    conditioning: Conditioning  # (P, ...)
    images_per_prompt: int
    batch_size: int
    seed: int
    judge: judge.Judge | None
    concepts: Tensor  # (P,) index among the judge's concepts, -1 where there is none
    rewards: dict[str, rewards.RewardModel]
    shown: list[int]  # prompts whose first picture is kept

    def batches(self) -> list[list[tuple[int, int]]]:
        """(prompt, picture) of every sample, in batches."""
        samples = [(i, j) for i in range(len(self.prompts)) for j in range(self.images_per_prompt)]
        return [samples[k : k + self.batch_size] for k in range(0, len(samples), self.batch_size)]


@dataclass
class Drawn:
    """What a row has made, batch by batch."""

    latents: list[Tensor]  # (B, C, H, W) on the CPU
    features: list[Tensor]  # (B, D) of the judge, where there is one
    rewards: dict[str, list[Tensor]]  # (B,), nan for a prompt in a language that the reward does not read
    pictures: dict[int, Tensor]  # shown prompt -> (3, H, W) in [0, 1]
    latencies_ms: list[float]  # of each batch, a picture: sampling and decoding, the text already encoded


def run(stage: Evaluate, recipe: Recipe, parents: dict[str, Path], folder: Path) -> None:
    """Measure every row; write report.json, report.md, report.html and the pictures they show into `folder`.

    `parents` maps a kind of stage to its latest finished folder. Without "distill" only `also` brings students, and
    without either the table is the teacher's. Raises ValueError for prompts that the file or the judge does not have.
    """
    base = bases.load(recipe.teacher, runtime.device_of(recipe.device))
    scene = prepare(stage, recipe.seed, base)
    students = {name: adapters.load_student(base, path) for name, path in student_folders(stage, parents).items()}
    rows = teacher_rows(stage, recipe.teacher.guidance_scale)
    for index, (name, student) in enumerate(students.items()):
        rows += student_rows(stage, index, name, student)
    records = []
    with runtime.progress(len(scene.batches()) * sum(row.num_evaluations for row in rows), "evaluate") as bar:
        for row in rows:
            kept = folder / "rows" / f"{row.id}.json"  # a row done is not done again when the stage is resumed
            if not kept.is_file():
                write_json(kept, made(base, scene, row, students, folder, bar))
            else:
                bar.advance(row.num_evaluations * len(scene.batches()), row.id)
            records.append(read_json(kept))
    prompts = [asdict(prompt) | {"shown": i in scene.shown} for i, prompt in enumerate(scene.prompts)]
    curves = report.read_curves(parents.get("distill"))
    result = report.assemble(recipe, stage, prompts, records, base.device, curves)
    report.write(result, folder)
    page.write(result, folder)
    remove(folder / "rows")
    runtime.console.print(report.table(result))
    runtime.console.print(f"{result['headline']['text']}\n{(folder / 'report.html').resolve()}", soft_wrap=True)


# ---- what everything is drawn from and judged by ----


def prepare(stage: Evaluate, seed: int, base: Base) -> Scene:
    """The scene of `stage`: its first prompts, encoded; its judge and its rewards, loaded."""
    prompts = read_prompts(stage.prompts)
    if len(prompts) < stage.num_prompts:
        raise ValueError(f"{stage.prompts} holds {len(prompts)} prompts, num_prompts asks for {stage.num_prompts}")
    prompts = prompts[: stage.num_prompts]
    texts = [prompt.prompt for prompt in prompts]
    encoded = [base.encode_prompts(texts[i : i + stage.batch_size]) for i in range(0, len(texts), stage.batch_size)]
    found = judge.load(Path(stage.judge), base.device) if stage.judge else None
    return Scene(
        prompts=prompts,
        conditioning={name: torch.cat([part[name] for part in encoded]) for name in encoded[0]},
        images_per_prompt=stage.images_per_prompt,
        batch_size=stage.batch_size,
        seed=seed,
        judge=found,
        concepts=concept_indices(prompts, found.concepts if found else [], stage.prompts),
        rewards={name: rewards.find(name)(base.device, torch.float32) for name in stage.rewards},
        shown=shown_prompts(prompts),
    )


def concept_indices(prompts: list[Prompt], concepts: list[str], path: str) -> Tensor:
    """Index (P,) of each prompt's concept in `concepts`, -1 for a prompt without one, or for all without `concepts`.

    Raises ValueError for a concept that is not there: the prompts are not the judge's.
    """
    places = {concept: i for i, concept in enumerate(concepts)}
    unknown = sorted({prompt.concept for prompt in prompts if prompt.concept is not None} - set(places))
    if concepts and unknown:
        raise ValueError(f"{path}: the judge has no prototype of {len(unknown)} concepts, for example {unknown[0]!r}")
    return torch.tensor([places.get(prompt.concept, -1) for prompt in prompts])


def shown_prompts(prompts: list[Prompt]) -> list[int]:
    """The first few prompts of each language."""
    languages = dict.fromkeys(prompt.language for prompt in prompts)
    spoken = {name: [i for i, prompt in enumerate(prompts) if prompt.language == name] for name in languages}
    return [i for indices in spoken.values() for i in indices[:SHOWN_PER_LANGUAGE]]


# ---- a row ----


def made(
    base: Base, scene: Scene, row: Row, students: dict[str, adapters.Student], folder: Path, bar: runtime.Bar
) -> dict:
    """The record of `row`, drawn and measured; its shown pictures are left in `folder`, and the reference's latents."""
    drawn = draw(base, scene, row, students, bar)
    for i, image in drawn.pictures.items():
        pictures.save_png(pictures.to_pil(image), page.picture_path(folder, row.id, i))
    reference = folder / "rows" / "reference.safetensors"
    if not reference.is_file():  # the first row is the reference
        write_tensors(reference, {"latents": torch.cat(drawn.latents)})
    values = measure(scene, drawn, load_file(reference)["latents"])
    languages = [prompt.language for prompt in scene.prompts]
    return report.record(asdict(row), values, languages, statistics.median(drawn.latencies_ms))


@torch.no_grad()
def draw(base: Base, scene: Scene, row: Row, students: dict[str, adapters.Student], bar: runtime.Bar) -> Drawn:
    """Every sample of `row`, with what the judge and the rewards see in it."""
    drawn = Drawn([], [], {name: [] for name in scene.rewards}, {}, [])
    for batch in scene.batches():
        started = time.perf_counter()
        latents = sample(base, scene, row, students, batch)
        images = base.decode(latents)
        if base.device.type != "cpu":
            torch.accelerator.synchronize()
        drawn.latencies_ms.append(1e3 * (time.perf_counter() - started) / len(batch))
        if not latents.isfinite().all():
            raise ValueError(f"row {row.id}: its samples are not finite numbers, so that nothing can be said of them")
        drawn.latents.append(latents.cpu())
        if scene.judge is not None:
            drawn.features.append(scene.judge.features(images).cpu())
        for name, reward in scene.rewards.items():
            drawn.rewards[name].append(score(reward, name, images, [scene.prompts[i] for i, _ in batch]))
        drawn.pictures |= {
            i: image.cpu() for (i, j), image in zip(batch, images, strict=True) if j == 0 and i in scene.shown
        }
        bar.advance(row.num_evaluations, row.id)
    return drawn


def sample(
    base: Base, scene: Scene, row: Row, students: dict[str, adapters.Student], batch: list[tuple[int, int]]
) -> Tensor:
    """Latents (B, C, H, W) of `row` for the samples of `batch`; each has its own generator, whatever the batch."""
    generators = [runtime.generator(scene.seed, "evaluate", i, j) for i, j in batch]
    noise = base.noise(generators, len(batch))
    conditioning = {name: value[[i for i, _ in batch]] for name, value in scene.conditioning.items()}
    if row.role == "student":
        student = students[row.name]
        return sampler.sample(
            base, student.denoiser, conditioning, noise, row.times, row.gamma, generators, row.conditioned
        )
    unconditional = base.unconditional(len(batch))
    return undistilled.sample(base, conditioning, unconditional, noise, row.solver, row.num_steps, row.guidance_scale)


def score(reward: rewards.RewardModel, name: str, images: Tensor, prompts: list[Prompt]) -> Tensor:
    """`reward` of each picture (B,), nan where the prompt is in a language that it does not read."""
    read = torch.tensor([not reward.needs_prompt or prompt.language in reward.languages for prompt in prompts])
    scores = torch.full((len(prompts),), math.nan)
    if read.any():
        texts = [prompt.prompt for prompt, readable in zip(prompts, read, strict=True) if readable]
        scores[read] = rewards.score(reward, name, images[read.to(images.device)], texts).cpu()
    return scores


def measure(scene: Scene, drawn: Drawn, reference: Tensor) -> dict[str, Tensor]:
    """One value a prompt (P,) of every metric, by its key; of KID one a subset of the prompts."""

    def by_prompt(values: Tensor) -> Tensor:
        return values.unflatten(0, (len(scene.prompts), scene.images_per_prompt)).mean(1)

    values = {"distance": by_prompt(metrics.squared_distance(torch.cat(drawn.latents), reference))}
    if scene.judge is not None:
        features = torch.cat(drawn.features)
        of_prompts = features.unflatten(0, (len(scene.prompts), scene.images_per_prompt))
        num_subsets = max(1, min(NUM_SUBSETS, len(scene.prompts) // 2))
        values["kid"] = metrics.kid(of_prompts, scene.judge.reference_features.cpu(), num_subsets, gamma=1.0)
        rank = metrics.ranks(
            features,
            scene.judge.prototypes.cpu(),
            scene.concepts.repeat_interleave(scene.images_per_prompt).clamp(min=0),
        )
        for k in (1, 5):
            hits = by_prompt(metrics.recall(rank, k))
            values[f"r@{k}"] = torch.where(scene.concepts >= 0, hits, math.nan)
        if scene.images_per_prompt > 1:
            values["diversity"] = metrics.diversity(of_prompts)
    return values | {f"reward/{name}": by_prompt(torch.cat(parts)) for name, parts in drawn.rewards.items()}
