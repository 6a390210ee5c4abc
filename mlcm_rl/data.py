"""Prompts and captioned pictures, read from plain files. Whatever is wrong is reported with its file and line."""

import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from .untrusted import held, parse_json, read_bytes

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # decoded in this process; Pillow has Ghostscript open others
MAX_PICTURE_BYTES = 2**28
MAX_PIXELS = 2**26  # 8192 x 8192; 200 MB as RGB
# What Pillow's decoders raise for damaged files: UnidentifiedImageError is an OSError, a PNG's chunks SyntaxError.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file. `concept` is what a judge looks for in the picture, `style` how it is drawn."""

    prompt: str
    language: str
    concept: str | None = None
    style: str | None = None


def guess_language(text: str) -> str:
    """ "zh" for a text that holds a Han character, else "en"."""
    return "zh" if HAN.search(text) else "en"


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file, in its order: one a line (.txt), or one JSON object a line (.jsonl).

    A line of a .jsonl file is {"prompt": ..., "language": ..., "concept": ..., "style": ...}, all but the first
    optional. A language not given is guessed from the script; empty lines are passed over.
    Raises ValueError with file and line for what cannot be read, and for a file without prompts.
    """
    path = Path(path)
    if path.suffix == ".txt":
        prompts = [Prompt(line, guess_language(line)) for _, line in _lines(path)]
    elif path.suffix == ".jsonl":
        prompts = [_prompt(record, where) for where, record in records_of(path)]
    else:
        raise ValueError(f"{path}: prompts are read from a .txt or a .jsonl file, not {path.suffix or 'a bare name'!r}")
    if not prompts:
        raise ValueError(f"{path}: holds no prompts")
    return prompts


def first_prompts(path: str | Path, count: int) -> list[Prompt]:
    """The first `count` prompts of a file. Raises what `read_prompts` raises, and ValueError where it holds fewer."""
    prompts = read_prompts(path)
    if len(prompts) < count:
        raise ValueError(f"{path} holds {len(prompts)} prompts, num_prompts asks for {count}")
    return prompts[:count]


class CaptionedImages:
    """A folder of pictures with their captions, held in memory.

    `metadata.jsonl` in the folder has one {"file_name": ..., "prompts": [...]} a picture; further keys are for people
    and programs that need them (`records` keeps them). Pictures are cropped to a square about their centre and resized
    (Lanczos) to `resolution`; transparent ones are laid on white.

    images: (N, 3, H, W) uint8; prompts: N lists of at least one caption each.
    Raises ValueError with file and line for a record or a picture that cannot be read.
    """

    def __init__(self, folder: str | Path, resolution: int):
        self.folder = Path(folder)
        lines = list(records_of(self.folder / "metadata.jsonl"))
        if not lines:
            raise ValueError(f"{self.folder / 'metadata.jsonl'}: holds no pictures")
        self.records = [record for _, record in lines]
        self.prompts = [_captions(record, where) for where, record in lines]
        self.images = torch.stack([self._load(record, where, resolution) for where, record in lines])

    def __len__(self) -> int:
        return len(self.records)

    def _load(self, record: dict, where: str, resolution: int) -> torch.Tensor:
        path = picture_in(self.folder, record["file_name"], where)
        return square(read_image(path, f"{where}: {path}"), resolution)


def picture_in(folder: Path, name: str, where: str) -> Path:
    """The picture that a record at `where` names. Raises ValueError where it is not a file in `folder`."""
    path = held(folder, name, where)
    if not os.path.isfile(path):  # unlike Path.is_file, False for a name too long for the file system
        raise ValueError(f"{where}: there is no picture {path}")
    return path


def read_image(source: Path | bytes, what: str, upright: bool = False) -> Image.Image:
    """A picture from a file or from its bytes, decoded; `upright` turns it as its EXIF says.

    Raises ValueError that begins with `what` for one that cannot be read, of another format than FORMATS, of more than
    MAX_PICTURE_BYTES or MAX_PIXELS: a file of a few bytes may ask for all the memory there is.
    """
    try:
        data = source if isinstance(source, bytes) else read_bytes(source, MAX_PICTURE_BYTES)
        with warnings.catch_warnings(
            action="ignore", category=Image.DecompressionBombWarning
        ):  # the limit here is lower
            image = Image.open(BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, over {MAX_PIXELS:,}")
        image.load()
        return ImageOps.exif_transpose(image) if upright else image
    except Image.DecompressionBombError as error:
        raise ValueError(f"{what} is not read: over {MAX_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:  # its own words are the address of an object
        raise ValueError(f"{what} is not a readable picture (none of {', '.join(FORMATS)}, or damaged)") from error
    except DECODING_ERRORS as error:
        raise ValueError(f"{what} is not a readable picture ({error})") from error


def square(image: Image.Image, resolution: int) -> torch.Tensor:
    """`image` as (3, H, W) uint8, H = W = `resolution`."""
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = ImageOps.fit(image.convert("RGB"), (resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(numpy.asarray(image).copy()).permute(2, 0, 1)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """("file:number", stripped text) of every line with something on it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    for number, line in enumerate(read_bytes(path).splitlines(), start=1):
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
        if text:
            yield where, text


def records_of(path: Path) -> Iterator[tuple[str, dict]]:
    """("file:number", object) of every line of a .jsonl file. ValueError with that place for what is not JSON."""
    for where, text in _lines(path):
        try:
            record = parse_json(text)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected an object in braces, got {type(record).__name__}")
        yield where, record


def _prompt(record: dict, where: str) -> Prompt:
    fields = ("prompt", "language", "concept", "style")
    for name, value in record.items():
        if name not in fields:
            raise ValueError(f"{where}: unknown key {name!r}; a prompt has {', '.join(fields)}")
        if value is None and name != "prompt":
            continue
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where}: {name} must be text that is not empty, got {value!r}")
    if "prompt" not in record:
        raise ValueError(f"{where}: there is no key 'prompt'")
    return Prompt(**{**record, "language": record.get("language") or guess_language(record["prompt"])})


def _captions(record: dict, where: str) -> list[str]:
    """The captions of a picture; also checks its `file_name`."""
    if not isinstance(record.get("file_name"), str):
        raise ValueError(f"{where}: file_name must be text, got {record.get('file_name')!r}")
    prompts = record.get("prompts")
    if (
        not isinstance(prompts, list)
        or not prompts
        or not all(isinstance(text, str) and text.strip() for text in prompts)
    ):
        raise ValueError(f"{where}: prompts must be a list of at least one caption, got {prompts!r}")
    return prompts
