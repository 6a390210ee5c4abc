"""Preference pairs as a table with TRL's columns: a prompt, the chosen picture, the rejected picture."""

import filecmp
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import torch
from torch import Tensor

from ..recipe.languages import guess_language
from ..storage.untrusted import Faults, brief, first_few
from ..training.progress import say_once
from .picture_files import picture_in, read_picture, square
from .prompts import Prompt, records_of, refuse_no_text

COLUMNS = ("prompt", "chosen", "rejected")
INDEX = "metadata.jsonl"
BATCH_SIZE = 32
MAX_TABLE_BYTES = 2**34  # of a Parquet file, unpacked: it stays in memory


class PairTable:
    """The N pairs of a Parquet file or of a folder; pictures are read when they are used.

    A Parquet file (`Dataset.to_parquet` writes one, hubs hold them) has pictures in its columns `chosen` and
    `rejected`, or the names of files beside it. A folder has `metadata.jsonl`, one {"prompt": ..., "chosen": file,
    "rejected": file} a pair, beside the pictures; `mlcm pairs` writes one. Both may have a column `language`, which is
    else guessed from the script. Other columns are ignored.

    Pairs of two equal pictures carry no preference: they are left out, with a message.

    prompts: N, in the order of the table.
    Raises ValueError with file and row for what cannot be read or is missing, FileNotFoundError if there is no such
    table.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.folder = self.path if self.path.is_dir() else self.path.parent
        self.rows, self.places = _from_folder(self.path) if self.path.is_dir() else _from_parquet(self.path)
        if not len(self.rows):
            raise ValueError(f"{self.path}: holds no pairs")
        languages = self.rows["language"] if "language" in self.rows.column_names else [None] * len(self)
        self.prompts = list(map(_prompt, self.rows["prompt"], languages, self.places))
        for name in COLUMNS[1:]:  # undecoded, so that the error for a broken picture has its row
            self.rows = self.rows.cast_column(name, datasets.Image(decode=False))
        self._leave_out_ties()

    def __len__(self) -> int:
        return len(self.rows)

    def pictures(self, index: int, resolution: int) -> Tensor:
        """Return chosen and rejected (2, 3, H, W) uint8 of a pair: central squares on white, H = W = `resolution`."""
        row = self.rows[index]
        return torch.stack([self._picture(row[name], name, index, resolution) for name in COLUMNS[1:]])

    def batches(self, resolution: int) -> Iterator[Tensor]:
        """Yield all pairs in order, chosen and rejected (b, 2, 3, H, W) in [0, 1], a few at a time."""
        for first in range(0, len(self), BATCH_SIZE):
            part = range(first, min(first + BATCH_SIZE, len(self)))
            yield torch.stack([self.pictures(i, resolution) for i in part]) / 255

    def _leave_out_ties(self) -> None:
        """Leave out the rows whose two pictures have the same bytes. Raise ValueError for pictures that are missing."""
        faults = Faults()
        different: list[int] = []
        ties: list[int] = []
        for i, row in enumerate(self.rows):
            with faults.collect():
                chosen, rejected = (self._source(row[name], name, i) for name in COLUMNS[1:])
                (ties if _same(chosen, rejected) else different).append(i)
        faults.raise_all()
        if not ties:
            return
        message = f"the chosen picture is the rejected one: {first_few([self.places[i] for i in ties])}"
        if not different:
            raise ValueError(f"{self.path}: holds no pairs of two pictures; {message}")
        say_once(f"{len(ties)} of {len(self.rows)} pairs are left out, where {message}")
        self.rows = self.rows.select(different)
        self.prompts = [self.prompts[i] for i in different]
        self.places = [self.places[i] for i in different]

    def _source(self, stored: dict[str, Any] | None, name: str, index: int) -> Path | bytes:
        """Return the bytes in the table, else the path of a file beside it. Files elsewhere are not opened."""
        place = self.places[index]
        if stored is None:
            raise ValueError(f"{place}: there is no {name} picture")
        return picture_in(self.folder, stored["path"], place) if stored["bytes"] is None else stored["bytes"]

    def _picture(self, stored: dict[str, Any] | None, name: str, index: int, resolution: int) -> Tensor:
        source = self._source(stored, name, index)
        return square(read_picture(source, f"{self.places[index]}: {name}"), resolution)


def _same(first: Path | bytes, second: Path | bytes) -> bool:
    """Return whether two pictures have the same bytes."""
    if isinstance(first, Path) and isinstance(second, Path):
        return filecmp.cmp(first, second, shallow=False)
    return first == second


def _from_folder(folder: Path) -> tuple[datasets.Dataset, list[str]]:
    """Return the table of a folder's index, one row a line, pictures by path; and each row's "file:line"."""
    columns: dict[str, list[Any]] = {name: [] for name in (*COLUMNS, "language")}
    places = []
    for where, record in records_of(folder / INDEX):
        for name in COLUMNS:
            if not isinstance(record.get(name), str):
                raise ValueError(f"{where}: {name} must be text, got {brief(record.get(name))}")
        _prompt(record["prompt"], record.get("language"), where)
        for name, values in columns.items():
            values.append(record.get(name))
        places.append(where)
    return datasets.Dataset.from_dict(columns), places


def _from_parquet(path: Path) -> tuple[datasets.Dataset, list[str]]:
    """Return the table of a file, undecoded; and each row's "file: row", counted from 0 as in `datasets`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    try:
        file = pyarrow.parquet.ParquetFile(path)
        size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
        if size > MAX_TABLE_BYTES:
            raise ValueError(f"it unpacks to {size:,} bytes, over {MAX_TABLE_BYTES:,}: split it into smaller tables")
        names = file.schema_arrow.names
        for name in COLUMNS:
            if name not in names:
                raise ValueError(f"there is no column {name}; it has {', '.join(names)}")
        if duplicates := [name for name in (*COLUMNS, "language") if names.count(name) > 1]:
            raise ValueError(f"there are several columns {duplicates[0]}: leave one")
        table = file.read([name for name in names if name in (*COLUMNS, "language")], use_threads=False)
        table.validate(full=True)
        rows = datasets.Dataset(datasets.table.InMemoryTable(table.replace_schema_metadata(None)))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path}: pairs are read from a Parquet file or a folder with {INDEX}: {error}") from error
    for name in COLUMNS[1:]:
        feature = rows.features[name]
        stored = feature.get("bytes") if isinstance(feature, dict) else feature
        kinds = (
            "binary",
            "large_binary",
            *["null"] * isinstance(feature, dict),
        )  # null where all pictures are named by path
        if stored not in map(datasets.Value, kinds):
            raise ValueError(f"{path}: the column {name} holds {feature}, not pictures")
    return rows, [f"{path}: row {i}" for i in range(len(rows))]


def _prompt(text: object, language: object, where: str) -> Prompt:
    """Return the prompt of a row. Raise ValueError that begins with `where` if text or language is not text."""
    refuse_no_text(text, f"{where}: prompt")
    if language is not None and not isinstance(language, str):
        raise ValueError(f"{where}: language must be text, got {brief(language)}")
    assert isinstance(text, str)  # checked by refuse_no_text
    return Prompt(text, language or guess_language(text))
