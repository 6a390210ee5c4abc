"""Rewards of pictures that lie in a folder: `mlcm score`."""

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from ..data.picture_files import SUFFIXES, pictures_of, pixels, read_picture, square
from ..data.prompts import Prompt
from ..storage.files import remove_partial_of, replacing
from .contract import RewardError, RewardModel, score

MAX_BATCH_PIXELS = 2**22  # pictures of a batch together: 4 megapixels are 50 MB as floats; a larger one goes alone


@dataclass(frozen=True)
class Scored:
    """One picture's line: `score` is None where the reward does not read the prompt's language."""

    file: str
    prompt: str
    score: float | None


@dataclass(frozen=True)
class Unscored:
    """A picture that has no score, damaged or refused by the reward, and why."""

    file: str
    why: str


@dataclass(frozen=True)
class Entry:
    """One picture of a batch: its pixels (3, H, W) uint8, or what is known without asking the reward."""

    file: str
    prompt: str
    pixels: Tensor | None = None
    known: Scored | Unscored | None = None


def picture_files(folder: Path, at_least: int = 1) -> list[Path]:
    """The pictures in `folder`, by name. Raises ValueError where there are fewer than `at_least`."""
    files = pictures_of(folder)
    if len(files) < at_least:
        raise ValueError(f"{folder}: holds {len(files)} pictures ({', '.join(SUFFIXES)}), needed are {at_least}")
    return files


def read_pictures(files: list[Path], size: int) -> Tensor:
    """Pictures (N, 3, size, size) float32 in [0, 1]. Raises ValueError for a file that is not a picture."""
    return torch.stack([square(read_picture(path, str(path)), size) for path in files]) / 255


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
) -> Iterator[Scored | Unscored]:
    """Yield what came of every picture, in order: `reward` of it in its own size, or why there is none.

    Pictures are read one by one; neighbours of one size are asked together, up to MAX_BATCH_PIXELS.
    """
    for batch in _batches((_entry(reward, *one) for one in zip(files, prompts, strict=True)), batch_size):
        answers = iter(_answers(reward, name, [one for one in batch if one.known is None]))
        yield from (one.known or next(answers) for one in batch)


def _entry(reward: RewardModel, path: Path, prompt: Prompt) -> Entry:
    if reward.needs_prompt and prompt.language not in reward.languages:
        return Entry(path.name, prompt.prompt, known=Scored(path.name, prompt.prompt, None))
    try:
        return Entry(path.name, prompt.prompt, pixels(read_picture(path, str(path))))
    except ValueError as error:
        return Entry(path.name, prompt.prompt, known=Unscored(path.name, str(error)))


def _batches(entries: Iterable[Entry], batch_size: int) -> Iterator[list[Entry]]:
    """Yield neighbours of which those with pixels are of one size."""
    batch: list[Entry] = []
    for entry in entries:
        if len(batch) == batch_size or not _fits(entry, [one.pixels for one in batch if one.pixels is not None]):
            yield batch
            batch = []
        batch.append(entry)
    yield batch


def _fits(entry: Entry, others: list[Tensor]) -> bool:
    if entry.pixels is None or not others:
        return True
    num_pixels = (len(others) + 1) * entry.pixels[0].numel()
    return entry.pixels.shape == others[0].shape and num_pixels <= MAX_BATCH_PIXELS


def _answers(reward: RewardModel, name: str, batch: list[Entry]) -> list[Scored | Unscored]:
    """Return what `reward` says of each picture; where it fails for several at once, they are asked one by one."""
    if not batch:
        return []
    try:
        images = torch.stack([one.pixels for one in batch if one.pixels is not None]).float().div_(255)
        scores = score(reward, name, images, [one.prompt for one in batch]).tolist()
    except RewardError as error:
        if len(batch) == 1:
            return [Unscored(batch[0].file, f"{batch[0].file}: {error}")]
        return [answer for one in batch for answer in _answers(reward, name, [one])]
    return [Scored(one.file, one.prompt, value) for one, value in zip(batch, scores, strict=True)]


def write_scores(path: Path, rows: list[Scored]) -> None:
    """Write `rows` as .jsonl or .csv, by the suffix of `path`; a score that is None is null, or an empty field.

    Bytes of a file's name that are no UTF-8 are escaped: \\udcff, which is JSON's escape and Python's too.
    """
    remove_partial_of(path)
    with (
        replacing(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, [field.name for field in fields(Scored)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
        else:
            file.writelines(json_line(row) + "\n" for row in rows)


def json_line(row: Scored, ascii_only: bool = False) -> str:
    """Return `row` as a line of JSON, other characters than ASCII escaped with `ascii_only`."""
    return json.dumps(asdict(row), ensure_ascii=ascii_only)
