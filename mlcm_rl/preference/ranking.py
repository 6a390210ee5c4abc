"""A pair table of a student's samples: of each prompt the best and the worst by a reward. `mlcm pairs`.

The settings, samples and files that a table by hand (`labels.py`) shares with it are here too.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data.prompts import Prompt
from ..models import pictures, sampler
from ..models.base import Base
from ..models.students import Student
from ..rewards import RewardModel, score
from ..storage.files import read_json, remove_partial, remove_partial_of, replacing, write_json
from ..training.progress import progress
from ..training.seeding import generator

INDEX = "metadata.jsonl"  # the table, written when it is complete
PROGRESS_FILE = "progress.json"  # the results of the prompts so far
BY_HAND = "by hand"  # in place of a reward's name, where a person chooses


@dataclass(frozen=True)
class PairSettings:
    """Everything that a table depends on; one folder holds one table."""

    student: str  # fingerprint of its stage
    prompts: str  # sha256 of the file
    reward: str  # its name, or BY_HAND
    num_generations: int
    num_steps: int
    gamma: float
    min_margin: float
    seed: int


@dataclass(frozen=True)
class BlindSettings:
    """Everything that a table of a person's choices between two columns of a gallery depends on."""

    first: str  # name of the column
    second: str
    pictures: str  # hash of theirs
    seed: int


def make_pairs(
    settings: PairSettings,
    base: Base,
    student: Student,
    reward: RewardModel,
    prompts: list[Prompt],
    out: Path,
    batch_size: int,
) -> int:
    """Write the pair table of `prompts` into folder `out`; return how many of them have a pair.

    A prompt whose best and worst samples differ by no more than `min_margin` in reward has none. Prompt i depends on
    (seed, i) alone. Interrupted and run again, it continues after the last finished prompt; `batch_size` pictures are
    drawn at a time, in whole prompts.
    Raises ValueError where `out` holds another table.
    """
    rows = finished_rows(settings, out)
    sweep(out)
    todo = range(len(rows), len(prompts))
    size = max(1, batch_size // settings.num_generations)
    with progress(len(prompts), "pairs", min(len(rows), len(prompts))) as bar:
        for first in todo[::size]:
            part = prompts[first : first + size]
            images, scores = rank_samples(settings, base, student, reward, part, first)
            for i, prompt in enumerate(part):
                rows.append(write_pair(settings, prompt, images[i], scores[i], first + i, out))
            write_json(out / PROGRESS_FILE, {"asked": asdict(settings), "rows": rows})
            bar.advance(len(part), f"{sum(row is not None for row in rows)} kept")
    pairs = [row for row in rows[: len(prompts)] if row is not None]
    write_table(pairs, out)
    return len(pairs)


def sweep(out: Path) -> None:
    """Delete the unfinished files of a command that was killed while it wrote the table in `out`."""
    remove_partial(out / "pictures")
    for name in (INDEX, PROGRESS_FILE):
        remove_partial_of(out / name)


def write_table(rows: list[dict], out: Path) -> None:
    """Write the index of the table in `out`, a line for each of `rows`."""
    with replacing(out / INDEX) as temporary:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text("".join(lines), encoding="utf-8")


def finished_rows(settings: PairSettings, out: Path) -> list[dict | None]:
    """Return the results of the first prompts: a row of the table each, or None for those without a pair."""
    return progress_of(settings, out, "rows")


def progress_of(settings: PairSettings | BlindSettings, out: Path, part: str) -> list:
    """Return the list `part` of the progress file in `out`; an empty one for a new folder.

    Raises ValueError for the file of another table, CheckpointError for a damaged one.
    """
    if not (out / PROGRESS_FILE).is_file():
        if (out / INDEX).exists():
            raise ValueError(f"{out}: holds a table that was not made by this command; take another folder")
        return []
    recorded = read_json(out / PROGRESS_FILE, asked=dict)["asked"]
    other = [
        f"{name} {recorded.get(name)}, not {value}"
        for name, value in asdict(settings).items()
        if recorded.get(name) != value
    ]
    if other:
        raise ValueError(f"{out}: holds a table of {'; '.join(other)}: take another folder")
    return read_json(out / PROGRESS_FILE, **{part: list})[part]


@torch.no_grad()
def rank_samples(
    settings: PairSettings, base: Base, student: Student, reward: RewardModel, prompts: list[Prompt], first: int
) -> tuple[Tensor, Tensor]:
    """Return samples (P, n, 3, H, W) of `prompts`, the first of which has number `first`, and their rewards (P, n)."""
    images = samples(settings, base, student, prompts, first)
    repeated = [prompt.prompt for prompt in prompts for _ in range(settings.num_generations)]
    scores = score(reward, settings.reward, images.flatten(0, 1), repeated).cpu()
    return images, scores.unflatten(0, (-1, settings.num_generations))


@torch.no_grad()
def samples(settings: PairSettings, base: Base, student: Student, prompts: list[Prompt], first: int) -> Tensor:
    """Return samples (P, n, 3, H, W) of `prompts`, the first of which has number `first`."""
    count = settings.num_generations
    repeated = [prompt.prompt for prompt in prompts for _ in range(count)]
    generators = [generator(settings.seed, "pairs", first + i // count, i % count) for i in range(len(repeated))]
    times = student.grid.times(settings.num_steps)
    x0 = sampler.sample(
        base,
        student.denoiser,
        base.encode_prompts(repeated),
        base.noise(generators, len(repeated)),
        times,
        settings.gamma,
        generators,
        student.conditioned,
    )
    return base.autoencoder.decode(x0).unflatten(0, (-1, count))


def write_pair(
    settings: PairSettings, prompt: Prompt, images: Tensor, scores: Tensor, number: int, out: Path
) -> dict | None:
    """Write the two pictures of one prompt and return its row; None where its rewards (n,) are too near each other."""
    best, worst = int(scores.argmax()), int(scores.argmin())
    if not scores[best] - scores[worst] > settings.min_margin:
        return None
    row = {"prompt": prompt.prompt, "language": prompt.language}
    for name, index in ("chosen", best), ("rejected", worst):
        row[name] = f"pictures/{number:06d}-{name}.png"
        pictures.save_png(pictures.to_pil(images[index]), out / row[name])
    return row | {"chosen_score": scores[best].item(), "rejected_score": scores[worst].item()}
