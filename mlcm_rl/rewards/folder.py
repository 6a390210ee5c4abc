"""Score the pictures of a folder by a reward, for `mlcm score`."""

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
from .contract import RewardError, RewardModel, reads, score

MAX_BATCH_PIXELS = 2**22  # pixels of all pictures: 4 megapixels are 50 MB in float32; a larger picture is a batch alone


@dataclass(frozen=True)
class Scored:
    """One picture's score; None if the reward does not read the prompt's language."""

    file: str
    prompt: str
    score: float | None


@dataclass(frozen=True)
class Unscored:
    """A picture without a score, damaged or refused by the reward, and the reason."""

    file: str
    why: str


@dataclass(frozen=True)
class Entry:
    """One picture of a batch: its pixels (3, H, W) uint8, or its result where the reward is not needed for it."""

    file: str
    prompt: str
    pixels: Tensor | None = None
    result: Scored | Unscored | None = None


def picture_files(folder: Path, at_least: int = 1) -> list[Path]:
    """Return the pictures in `folder`, sorted by name. Raise ValueError if there are fewer than `at_least`."""
    files = pictures_of(folder)
    if len(files) < at_least:
        raise ValueError(f"{folder}: holds {len(files)} pictures ({', '.join(SUFFIXES)}) and must hold {at_least}")
    return files


def read_pictures(files: list[Path], size: int) -> Tensor:
    """Read pictures (N, 3, size, size) float32 in [0, 1]. Raise ValueError for a file that is not a picture."""
    return torch.stack([square(read_picture(path, str(path)), size) for path in files]) / 255


def prompts_of(files: list[Path], prompts: list[Prompt]) -> list[Prompt]:
    """Return a prompt per file: the i-th for the i-th by name, or one for all.

    Raise ValueError if the numbers differ.
    """
    if len(prompts) == 1:
        return prompts * len(files)
    if len(prompts) != len(files):
        raise ValueError(
            f"{len(prompts)} prompts for {len(files)} pictures: there must be one per picture, in the order of the "
            "pictures' names, or one for all"
        )
    return prompts


@torch.no_grad()
def score_files(
    reward: RewardModel, name: str, files: list[Path], prompts: list[Prompt], batch_size: int
) -> Iterator[Scored | Unscored]:
    """Yield the result of every picture, in order: its score at its own size, or why there is none.

    Consecutive pictures of equal size are one batch, up to `batch_size` pictures and MAX_BATCH_PIXELS.
    """
    for batch in _batches((_entry(reward, *pair) for pair in zip(files, prompts, strict=True)), batch_size):
        results = iter(_results(reward, name, [entry for entry in batch if entry.result is None]))
        yield from (entry.result or next(results) for entry in batch)


def _entry(reward: RewardModel, path: Path, prompt: Prompt) -> Entry:
    if not reads(reward, prompt.language):
        return Entry(path.name, prompt.prompt, result=Scored(path.name, prompt.prompt, None))
    try:
        return Entry(path.name, prompt.prompt, pixels(read_picture(path, str(path))))
    except ValueError as error:
        return Entry(path.name, prompt.prompt, result=Unscored(path.name, str(error)))


def _batches(entries: Iterable[Entry], batch_size: int) -> Iterator[list[Entry]]:
    """Yield batches of consecutive entries; those with pixels have one size."""
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


def _results(reward: RewardModel, name: str, batch: list[Entry]) -> list[Scored | Unscored]:
    """Return the result of each picture. If `reward` fails for a batch, its pictures are scored one by one."""
    if not batch:
        return []
    try:
        images = torch.stack([one.pixels for one in batch if one.pixels is not None]).float().div_(255)
        scores = score(reward, name, images, [one.prompt for one in batch]).tolist()
    except RewardError as error:
        if len(batch) == 1:
            return [Unscored(batch[0].file, f"{batch[0].file}: {error}")]
        return [result for entry in batch for result in _results(reward, name, [entry])]
    return [Scored(entry.file, entry.prompt, value) for entry, value in zip(batch, scores, strict=True)]


def write_scores(path: Path, rows: list[Scored]) -> None:
    """Write `rows` as .jsonl or .csv, by the suffix of `path`; a score that is None is null, or an empty field.

    Bytes of a file's name that are not UTF-8 are escaped: \\udcff, which is JSON's escape and Python's too.
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
    """Return `row` as a line of JSON; with `ascii_only`, other characters are escaped."""
    return json.dumps(asdict(row), ensure_ascii=ascii_only)
