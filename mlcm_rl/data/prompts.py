"""Prompts and captioned pictures, read from plain files. Every error has its file and line."""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from ..recipe.languages import guess_language
from ..storage.untrusted import Faults, brief, parse_json, read_bytes
from .picture_files import picture_in, read_picture, square

GENEVAL_KEYS = ("tag", "include", "exclude")  # of GenEval's prompt files, which geneval.py reads


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file. `concept` is what a judge looks for in the picture, `style` the style of drawing.

    `parallel` says the same as `prompt` in another language.
    """

    prompt: str
    language: str
    concept: str | None = None
    style: str | None = None
    parallel: str | None = None


def read_prompts(path: str | Path) -> list[Prompt]:
    """Return the prompts of a file, in its order: one a line (.txt), or one JSON object a line (.jsonl).

    A line of a .jsonl file is {"prompt": ..., "language": ..., "concept": ..., "style": ..., "parallel": ...}, all
    but the first optional. A missing language is guessed from the script; empty lines are skipped, and so are the keys
    of GenEval's tasks (geneval.py).
    Raise ValueError with file and line for what cannot be read, and for a file without prompts.
    """
    return [prompt for _, prompt in prompts_with_lines(path)]


def prompts_with_lines(path: str | Path) -> list[tuple[str, Prompt]]:
    """Return ("file:number", prompt) of every prompt of a file. Raise what `read_prompts` raises."""
    path = Path(path)
    if path.suffix == ".txt":
        prompts = [(where, _plain_prompt(line, where)) for where, line in _lines(path)]
    elif path.suffix == ".jsonl":
        prompts = [(where, _prompt(record, where)) for where, record in records_of(path)]
    else:
        raise ValueError(f"{path}: prompts are read from a .txt or a .jsonl file, not {path.suffix or 'a bare name'!r}")
    if not prompts:
        raise ValueError(f"{path}: holds no prompts")
    return prompts


def parallel_prompts(path: str | Path, languages: Sequence[str]) -> list[Prompt]:
    """Return the prompts of a file whose lines each have a `parallel` in one of `languages`, by its script.

    Raise as `read_prompts`, and ValueError with file and line for a line without one.
    """
    faults, lines = Faults(), prompts_with_lines(path)
    for where, prompt in lines:
        with faults.collect():
            if prompt.parallel is None:
                raise ValueError(
                    f"{where}: no parallel: write the same prompt in {' or '.join(languages)} under that key"
                )
            if (language := guess_language(prompt.parallel)) not in languages:
                spoken = "prompt without East Asian characters" if language == "en" else f"prompt in {language}"
                raise ValueError(f"{where}: parallel is a {spoken}, and languages are {', '.join(languages)}")
    faults.raise_all()
    return [prompt for _, prompt in lines]


def texts_of(path: str | Path) -> list[str]:
    """Return the texts of a prompt file, or all captions of a folder of pictures without reading the pictures.

    Raise as `read_prompts` and `CaptionedImages`.
    """
    if not Path(path).is_dir():
        return [prompt.prompt for prompt in read_prompts(path)]
    return [text for where, record in records_of(Path(path) / "metadata.jsonl") for text in _captions(record, where)]


def first_prompts(path: str | Path, count: int) -> list[Prompt]:
    """Return the first `count` prompts of a file. Raise as `read_prompts`, and ValueError if it has fewer."""
    prompts = read_prompts(path)
    if len(prompts) < count:
        raise ValueError(f"{path} holds {len(prompts)} prompts, num_prompts is {count}")
    return prompts[:count]


class CaptionedImages:
    """A folder of pictures with their captions.

    `metadata.jsonl` in the folder has one {"file_name": ..., "prompts": [...]} a picture; `records` has its other keys
    too. Pictures are cropped to their central square and resized (Lanczos) to `resolution`; transparent ones are laid
    on white. They are read one by one, since those of a training set need not fit into memory.

    prompts: N lists of at least one caption each.
    Raises ValueError with file and line for a record, or the name of a picture, that cannot be read.
    """

    def __init__(self, folder: str | Path, resolution: int):
        self.folder, self.resolution = Path(folder), resolution
        lines = list(records_of(self.folder / "metadata.jsonl"))
        if not lines:
            raise ValueError(f"{self.folder / 'metadata.jsonl'}: holds no pictures")
        self.records = [record for _, record in lines]
        self.prompts = [_captions(record, where) for where, record in lines]
        self._files: list[tuple[str, Path]] = []  # place of the record, path
        faults = Faults()
        for where, record in lines:
            with faults.collect():
                self._files.append((where, picture_in(self.folder, record["file_name"], where)))
        faults.raise_all()

    def __len__(self) -> int:
        return len(self.records)

    def pictures(self) -> Iterator[torch.Tensor]:
        """Yield the pictures (3, H, W) uint8.

        Raise ValueError with file and line for those that cannot be read: after the first one none is yielded, and the
        rest is read to name them all.
        """
        faults = Faults()
        for where, path in self._files:
            with faults.collect():
                picture = square(read_picture(path, f"{where}: {path}"), self.resolution)
            if not faults.texts:
                yield picture
        faults.raise_all()

    def parts(self, size: int) -> Iterator[torch.Tensor]:
        """Yield the pictures (size, 3, H, W) uint8, `size` at a time. Raise as `pictures`."""
        left = self.pictures()
        while part := list(islice(left, size)):
            yield torch.stack(part)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield ("file:number", stripped text) of every line that is not blank."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    for number, line in enumerate(_as_utf8(path).splitlines(), start=1):
        where = f"{path}:{number}"
        if b"\0" in line:
            raise ValueError(f"{where}: a NUL byte, so that it is not UTF-8 text (UTF-16, perhaps): save it as UTF-8")
        try:
            text = line.decode().lstrip("\ufeff").strip()  # a byte-order mark, which joined files have inside too
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{where}: not UTF-8 ({error.reason} at byte {error.start}): save the file as UTF-8; "
                "Chinese text is often in GB18030"
            ) from error
        if text:
            yield where, text


def _as_utf8(path: Path) -> bytes:
    """Return the content of a text file; UTF-16 with a byte-order mark, as Windows writes it, is converted."""
    content = read_bytes(path)
    if not content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content
    try:
        return content.decode("utf-16").encode()
    except UnicodeError as error:
        raise ValueError(f"{path}: begins with the mark of UTF-16 but is not UTF-16: save it as UTF-8") from error


def records_of(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield ("file:number", object) of every line of a .jsonl file. Raise ValueError with that place if not JSON."""
    for where, text in _lines(path):
        try:
            record = parse_json(text)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected an object in braces, got {type(record).__name__}")
        yield where, record


def _plain_prompt(line: str, where: str) -> Prompt:
    """Return the prompt of a .txt file's line. Raise ValueError for a JSON object, which would be the prompt itself."""
    if _is_object(line):
        raise ValueError(f"{where}: a JSON object, where a .txt file has a prompt a line: name the file .jsonl")
    return Prompt(line, guess_language(line))


def is_plain(prompt: Prompt) -> bool:
    """Return whether a line of a .txt file is read as `prompt`: its text alone, without space or marks around it."""
    text = prompt.prompt
    is_line = text == text.lstrip("\ufeff").strip() and len(text.splitlines()) == 1
    return is_line and not _is_object(text) and prompt == Prompt(text, guess_language(text))


def _is_object(text: str) -> bool:
    try:
        return text.startswith("{") and isinstance(parse_json(text), dict)
    except ValueError:
        return False


def _prompt(record: dict, where: str) -> Prompt:
    fields = ("prompt", "language", "concept", "style", "parallel")
    record = {name: value for name, value in record.items() if name not in GENEVAL_KEYS}
    for name, value in record.items():
        if name not in fields:
            raise ValueError(f"{where}: unknown key {brief(name)}; a prompt has {', '.join(fields)}")
        if value is None and name != "prompt":
            continue
        refuse_no_text(value, f"{where}: {name}")
    if "prompt" not in record:
        raise ValueError(f"{where}: there is no key 'prompt'")
    return Prompt(**{**record, "language": record.get("language") or guess_language(record["prompt"])})


def _captions(record: dict, where: str) -> list[str]:
    """Return the captions of a picture. Raise ValueError if they or its `file_name` are not right."""
    if not isinstance(record.get("file_name"), str):
        raise ValueError(f"{where}: file_name must be text, got {brief(record.get('file_name'))}")
    prompts = record.get("prompts")
    if not isinstance(prompts, list) or not prompts:
        raise ValueError(f"{where}: prompts must be a list of at least one caption, got {brief(prompts)}")
    for text in prompts:
        refuse_no_text(text, f"{where}: each of prompts")
    return prompts


def refuse_no_text(value: object, what: str) -> None:
    """Raise ValueError that begins with `what` unless `value` is a usable prompt: text, not blank, without NUL."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} must be text that is not empty, got {brief(value)}")
    if "\0" in value:
        raise ValueError(f"{what} holds the character NUL, which no text has: {brief(value)}")
