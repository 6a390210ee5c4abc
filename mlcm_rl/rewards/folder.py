"""Rewards of pictures that lie in a folder: `mlcm score`."""

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..atomic import remove_partial_of, replacing
from ..data import Prompt, read_image
from . import RewardModel, score

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Scored:
    """One picture's line: `score` is None where the reward does not read the prompt's language."""

    file: str
    prompt: str
    score: float | None


def picture_files(folder: Path, at_least: int = 1) -> list[Path]:
    """The pictures in `folder`, by name. Raises ValueError where there are fewer than `at_least`."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if len(files) < at_least:
        raise ValueError(f"{folder}: holds {len(files)} pictures ({', '.join(SUFFIXES)}), needed are {at_least}")
    return files


def read_picture(path: Path, size: int | None = None) -> Tensor:
    """A picture (3, H, W) float32 in [0, 1], transparent ones laid on white; `size` crops and resizes to a square.

    Raises ValueError for a file that is not a picture.
    """
    image = read_image(path, str(path), upright=True)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB")
    if size:
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1).float() / 255


def read_pictures(files: list[Path], size: int) -> Tensor:
    """Pictures (N, 3, size, size) float32 in [0, 1]. Raises ValueError for a file that is not a picture."""
    return torch.stack([read_picture(path, size) for path in files])


def paired(files: list[Path], prompts: list[Prompt]) -> list[Prompt]:
    """A prompt a file: the i-th for the i-th by name, or one for all. Raises ValueError where the numbers differ."""
    if len(prompts) == 1:
        return prompts * len(files)
    if len(prompts) != len(files):
        raise ValueError(
            f"{len(prompts)} prompts for {len(files)} pictures: there must be one a picture, in the order of the "
            "pictures' names, or one for all"
        )
    return prompts


@torch.no_grad()
def score_files(
    reward: RewardModel, name: str, files: list[Path], prompts: list[Prompt], batch_size: int
) -> Iterator[Scored]:
    """`reward` of every picture in its own size, in order; neighbours of one size are asked together."""
    for batch in _batches(files, batch_size):
        texts = prompts[batch[0][0] : batch[-1][0] + 1]
        read = [not reward.needs_prompt or prompt.language in reward.languages for prompt in texts]
        asked = [(image, prompt.prompt) for (_, image), prompt, can in zip(batch, texts, read, strict=True) if can]
        scores = iter(
            score(reward, name, torch.stack([image for image, _ in asked]), [text for _, text in asked]).tolist()
            if asked
            else []
        )
        for (i, _), prompt, can in zip(batch, texts, read, strict=True):
            yield Scored(files[i].name, prompt.prompt, next(scores) if can else None)


def _batches(files: list[Path], batch_size: int) -> Iterator[list[tuple[int, Tensor]]]:
    """Consecutive pictures of one size with their numbers."""
    batch: list[tuple[int, Tensor]] = []
    for i, path in enumerate(files):
        image = read_picture(path)
        if batch and (len(batch) == batch_size or batch[0][1].shape != image.shape):
            yield batch
            batch = []
        batch.append((i, image))
    yield batch


def write_scores(path: Path, rows: list[Scored]) -> None:
    """Write `rows` as .jsonl or .csv, by the suffix of `path`; a score that is None is null, or an empty field."""
    remove_partial_of(path)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, [field.name for field in fields(Scored)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
        else:
            file.writelines(json_line(row) + "\n" for row in rows)


def json_line(row: Scored) -> str:
    return json.dumps(asdict(row), ensure_ascii=False)
