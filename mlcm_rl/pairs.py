"""Preference pairs as a table in TRL's columns: a prompt, the picture chosen, the picture rejected."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import torch
from PIL import UnidentifiedImageError
from torch import Tensor

from .data import Prompt, guess_language, records_of, square

COLUMNS = ("prompt", "chosen", "rejected")
INDEX = "metadata.jsonl"
READ_AT_A_TIME = 32


class PairTable:
    """The N pairs of a Parquet file or of a folder, their pictures read when they are asked for.

    A Parquet file (`Dataset.to_parquet` writes one, hubs keep them) has pictures in its columns `chosen` and
    `rejected`. A folder has `metadata.jsonl`, one {"prompt": ..., "chosen": file, "rejected": file} a pair, beside the
    pictures; `mlcm pairs` writes one. Both may have a column `language`, which is else guessed from the script; further
    columns are left to whoever needs them.

    prompts: N of them, in the table's order.
    Raises ValueError with file and row for what cannot be read, FileNotFoundError where there is no such table.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.rows, self.places = _from_folder(self.path) if self.path.is_dir() else _from_parquet(self.path)
        if not len(self.rows):
            raise ValueError(f"{self.path}: holds no pairs")
        languages = self.rows["language"] if "language" in self.rows.column_names else [None] * len(self)
        self.prompts = list(map(_prompt, self.rows["prompt"], languages, self.places))
        for name in COLUMNS[1:]:  # undecoded, so that a picture that is none is told with its row
            self.rows = self.rows.cast_column(name, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.rows)

    def pictures(self, index: int, resolution: int) -> Tensor:
        """Chosen and rejected (2, 3, H, W) uint8 of a pair: central squares, H = W = `resolution`, laid on white."""
        row = self.rows[index]
        return torch.stack([self._picture(row[name], name, index, resolution) for name in COLUMNS[1:]])

    def batches(self, resolution: int) -> Iterator[Tensor]:
        """All pairs in order, chosen and rejected (b, 2, 3, H, W) in [0, 1], a few at a time."""
        for first in range(0, len(self), READ_AT_A_TIME):
            part = range(first, min(first + READ_AT_A_TIME, len(self)))
            yield torch.stack([self.pictures(i, resolution) for i in part]) / 255

    def _picture(self, stored: dict[str, Any] | None, name: str, index: int, resolution: int) -> Tensor:
        if stored is None:
            raise ValueError(f"{self.places[index]}: there is no {name} picture")
        try:
            return square(datasets.Image().decode_example(stored), resolution)
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{self.places[index]}: {name} is not a readable picture ({error})") from error


def _from_folder(folder: Path) -> tuple[datasets.Dataset, list[str]]:
    """One row a line of the index, pictures by path; and each row's "file:line"."""
    columns: dict[str, list[Any]] = {name: [] for name in (*COLUMNS, "language")}
    places = []
    for where, record in records_of(folder / INDEX):
        for name in COLUMNS:
            if not isinstance(record.get(name), str):
                raise ValueError(f"{where}: {name} must be text, got {record.get(name)!r}")
        for name in COLUMNS[1:]:
            if not (folder / record[name]).is_file():
                raise ValueError(f"{where}: there is no picture {folder / record[name]}")
            columns[name].append(str(folder / record[name]))
        columns["prompt"].append(record["prompt"])
        columns["language"].append(record.get("language"))
        places.append(where)
    return datasets.Dataset.from_dict(columns), places


def _from_parquet(path: Path) -> tuple[datasets.Dataset, list[str]]:
    """The table of a file, undecoded; and each row's "file: row", counted from 0 as `datasets` does."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    try:
        rows = datasets.Dataset(datasets.table.InMemoryTable(pyarrow.parquet.read_table(path)))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: pairs are read from a Parquet file or a folder with {INDEX}: {error}") from error
    for name in COLUMNS:
        if name not in rows.column_names:
            raise ValueError(f"{path}: there is no column {name}; it has {', '.join(rows.column_names)}")
    for name in COLUMNS[1:]:
        feature = rows.features[name]
        if not isinstance(feature, datasets.Image) and feature != datasets.Value("binary"):
            raise ValueError(f"{path}: the column {name} holds {feature}, not pictures")
    return rows, [f"{path}: row {i}" for i in range(len(rows))]


def _prompt(text: object, language: object, where: str) -> Prompt:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: prompt must be text that is not empty, got {text!r}")
    if language is not None and not isinstance(language, str):
        raise ValueError(f"{where}: language must be text, got {language!r}")
    return Prompt(text, language or guess_language(text))
