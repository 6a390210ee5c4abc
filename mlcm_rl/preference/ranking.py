"""A pair table made of a student's samples: of each prompt's, the best and the worst by a reward. `mlcm pairs`.

What a table made by hand (`labels.py`) shares with it is here too: what was asked for, the samples, the files.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data.prompts import Prompt
from ..equations.segments import sampling_times
from ..models import pictures, sampler
from ..models.base import Base
from ..models.students import Student
from ..rewards import RewardModel, score
from ..storage.files import read_json, remove_partial, remove_partial_of, replacing, write_json
from ..training.progress import progress
from ..training.seeding import generator

INDEX = "metadata.jsonl"  # the table, written when it is whole
PROGRESS_FILE = "progress.json"  # what each prompt has come to so far
BY_HAND = "by hand"  # stands where a reward's name does when a person chooses


@dataclass(frozen=True)
class Asked:
    """Everything that a table depends on; one folder holds one table."""

    student: str  # fingerprint of its stage
    prompts: str  # sha256 of the file
    reward: str  # its name, or BY_HAND
    num_generations: int
    num_steps: int
    gamma: float
    min_margin: float
    seed: int


def make_pairs(
    asked: Asked,
    base: Base,
    student: Student,
    reward: RewardModel,
    prompts: list[Prompt],
    out: Path,
    batch_size: int,
) -> int:
    """Write the pair table of `prompts` into folder `out`; returns how many of them gave a pair.

    A prompt whose best and worst samples differ by no more than `min_margin` in reward gives none. Prompt i depends on
    (seed, i) alone. Interrupted and run again, it goes on after the last prompt that was finished; `batch_size` is how
    many pictures are drawn at a time, in whole prompts.
    Raises ValueError where `out` holds another table.
    """
    rows = finished(asked, out)
    sweep(out)
    todo = range(len(rows), len(prompts))
    size = max(1, batch_size // asked.num_generations)
    with progress(len(prompts), "pairs", min(len(rows), len(prompts))) as bar:
        for first in todo[::size]:
            part = prompts[first : first + size]
            images, scores = ranked(asked, base, student, reward, part, first)
            for i, prompt in enumerate(part):
                rows.append(write_pair(asked, prompt, images[i], scores[i], first + i, out))
            write_json(out / PROGRESS_FILE, {"asked": asdict(asked), "rows": rows})
            bar.advance(len(part), f"{sum(row is not None for row in rows)} kept")
    kept = [row for row in rows[: len(prompts)] if row is not None]
    write_table(kept, out)
    return len(kept)


def sweep(out: Path) -> None:
    """Delete what a command that was killed had not finished writing to the table in `out`."""
    remove_partial(out / "pictures")
    for name in (INDEX, PROGRESS_FILE):
        remove_partial_of(out / name)


def write_table(rows: list[dict], out: Path) -> None:
    """The index of the table in `out`: a line for each of `rows`."""
    with replacing(out / INDEX) as temporary:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text("".join(lines), encoding="utf-8")


def finished(asked: Asked, out: Path) -> list[dict | None]:
    """What the first prompts have come to: a row of the table, or None for those that gave no pair."""
    return progress_of(asked, out, "rows")


def progress_of(asked: Asked, out: Path, part: str) -> list:
    """What the progress file in `out` holds under `part`; nothing for a new folder.

    Raises ValueError for that of another table, CheckpointError for a damaged one.
    """
    if not (out / PROGRESS_FILE).is_file():
        if (out / INDEX).exists():
            raise ValueError(f"{out}: holds a table that was not made by this command; take another folder")
        return []
    kept = read_json(out / PROGRESS_FILE, asked=dict)
    other = [
        f"{name} {kept['asked'].get(name)}, not {value}"
        for name, value in asdict(asked).items()
        if kept["asked"].get(name) != value
    ]
    if other:
        raise ValueError(f"{out}: holds a table of {'; '.join(other)}: take another folder")
    return read_json(out / PROGRESS_FILE, **{part: list})[part]


@torch.no_grad()
def ranked(
    asked: Asked, base: Base, student: Student, reward: RewardModel, prompts: list[Prompt], first: int
) -> tuple[Tensor, Tensor]:
    """Samples (P, n, 3, H, W) of `prompts`, of which the first is number `first`, and their rewards (P, n)."""
    images = samples(asked, base, student, prompts, first)
    repeated = [prompt.prompt for prompt in prompts for _ in range(asked.num_generations)]
    scores = score(reward, asked.reward, images.flatten(0, 1), repeated).cpu()
    return images, scores.unflatten(0, (-1, asked.num_generations))


@torch.no_grad()
def samples(asked: Asked, base: Base, student: Student, prompts: list[Prompt], first: int) -> Tensor:
    """Samples (P, n, 3, H, W) of `prompts`, of which the first is number `first`."""
    count = asked.num_generations
    repeated = [prompt.prompt for prompt in prompts for _ in range(count)]
    generators = [generator(asked.seed, "pairs", first + i // count, i % count) for i in range(len(repeated))]
    times = sampling_times(asked.num_steps, 1 if student.conditioned else student.num_segments)
    x0 = sampler.sample(
        base,
        student.denoiser,
        base.encode_prompts(repeated),
        base.noise(generators, len(repeated)),
        times,
        asked.gamma,
        generators,
        student.conditioned,
    )
    return base.autoencoder.decode(x0).unflatten(0, (-1, count))


def write_pair(asked: Asked, prompt: Prompt, images: Tensor, scores: Tensor, number: int, out: Path) -> dict | None:
    """The row of one prompt, its two pictures written; None where its rewards (n,) are too near each other."""
    best, worst = int(scores.argmax()), int(scores.argmin())
    if not scores[best] - scores[worst] > asked.min_margin:
        return None
    row = {"prompt": prompt.prompt, "language": prompt.language}
    for name, index in ("chosen", best), ("rejected", worst):
        row[name] = f"pictures/{number:06d}-{name}.png"
        pictures.save_png(pictures.to_pil(images[index]), out / row[name])
    return row | {"chosen_score": scores[best].item(), "rejected_score": scores[worst].item()}
