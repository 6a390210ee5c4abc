"""The files of a teacher's folder: its JSON, read and checked; weights and tokenizers that must be there. No torch.

Every problem is a line that names the file, says what is wrong with it, and what to do.
"""

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from ..storage.untrusted import brief, parse_json, read_bytes
from .families import Layout, layout_of
from .teacher_types import CONFIGURATIONS, Configuration, Index, TextEncoder

MAX_BYTES = 2**22  # of a configuration: far above any real one
MAX_BYTES_OF_WORDS = 2**26  # of a tokenizer's file
WORDS = ("vocab.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json")  # of a tokenizer, all objects
PAIRS = (("vocab.json", "merges.txt"), ("tokenizer.json",))
VOCABULARIES: dict[str, tuple[tuple[str, ...], ...]] = {  # by class, without "Fast": any of these is a vocabulary
    "CLIPTokenizer": PAIRS,
    "Qwen2Tokenizer": PAIRS,
    "T5Tokenizer": (("spiece.model",), ("tokenizer.json",)),
    "GemmaTokenizer": (("tokenizer.model",), ("tokenizer.json",)),
    "BertTokenizer": (("vocab.txt",), ("tokenizer.json",)),
    "ChatGLMTokenizer": (("tokenizer.model",),),
}
ANY_VOCABULARY = (*PAIRS, ("spiece.model",), ("tokenizer.model",), ("vocab.txt",))
CHAT_TEMPLATE = "chat_template.jinja"
AnyConfiguration = TypeVar("AnyConfiguration", bound=Configuration)


class TeacherFileError(ValueError):
    """A file of a teacher cannot be read or has wrong values; the message has a line for each key."""


def read(path: Path, kind: type[AnyConfiguration]) -> AnyConfiguration:
    """Return the configuration in a file. Raise TeacherFileError with a line for each wrong key."""
    return validated(json_object(path, MAX_BYTES), kind, display_name(path))


def validated(content: dict[str, Any], kind: type[AnyConfiguration], file: str) -> AnyConfiguration:
    """Return the content of a configuration `file` as `kind`. Raise TeacherFileError with a line for each wrong key."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise TeacherFileError("\n".join(dict.fromkeys(f"{file}: {line}" for line in _lines(error)))) from error


def display_name(path: Path) -> str:
    """Return the name of a teacher's file in messages."""
    return path.name if path.name == "model_index.json" else f"{path.parent.name}/{path.name}"


def json_object(path: Path, limit: int) -> dict[str, Any]:
    """Return the JSON object in a file. Raise TeacherFileError if it has none, or over `limit` bytes."""
    try:
        content = parse_json(read_bytes(path, limit).decode("utf-8"))
    except FileNotFoundError:
        raise TeacherFileError(f"{display_name(path)}: missing: download it too") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).removeprefix(f"{path}: ")
        raise TeacherFileError(f"{display_name(path)}: {reason}") from error
    if not isinstance(content, dict):
        raise TeacherFileError(f"{display_name(path)}: expected an object in braces")
    return content


def _lines(error: ValidationError) -> Iterator[str]:
    """Yield a line for each of pydantic's errors."""
    for one in error.errors():
        if one["type"] == "value_error":
            yield str(one["ctx"]["error"])
            continue
        keys = [str(part) for part in one["loc"][:1]] + [f"[{part}]" for part in one["loc"][1:] if type(part) is int]
        if one["type"] == "missing":
            yield f"{''.join(keys)}: missing"
            continue
        value = repr(one["input"])
        text = value if len(value) < 50 else f"{value[:40]}..."
        message = one["msg"].replace("Input should be", "expected")
        if keys == ["prediction_type"]:
            text += "; no other prediction can be distilled: name a teacher with one of these"
        yield f"{''.join(keys)}: {message}, found {text}"


def has_weights(folder: Path) -> bool:
    """Return whether the folder has weights; without them it has only shapes, to plan with."""
    return any(path.suffix in (".safetensors", ".bin") for path in folder.glob("*/*"))


def faults_of_weights(folder: Path, networks: list[str], variant: str | None) -> Iterator[str]:
    """Yield a line for each network without readable weights. A folder without any weights is for planning alone."""
    if not has_weights(folder):
        return
    for part in networks:
        stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
        names = {path.name for path in (folder / part).glob("*")}
        for ending in dict.fromkeys([f".{variant}" if variant else "", ""]):
            whole, index = f"{stem}{ending}.safetensors", f"{stem}.safetensors.index{ending}.json"
            shards = {one for one in names if re.fullmatch(rf"{stem}{re.escape(ending)}-\d+-of-\d+\.safetensors", one)}
            if index in names:
                yield from _of_shards(folder / part / index, names, shards)
            elif shards and whole not in names:
                yield f"{part}/{index}: missing, which names the {len(shards)} files of the weights: download it too"
            if names & {whole, index, *shards}:
                break
        else:
            yield _of_no_weights(part, stem, names)


def _of_no_weights(part: str, stem: str, names: set[str]) -> str:
    """Return what is wrong with a network whose files have these `names`, none of which would be read."""
    of_variants = rf"{stem}\.(\w+)(-\d+-of-\d+)?\.safetensors"
    variants = {match[1] for one in names if (match := re.fullmatch(of_variants, one))}
    if variants:
        return f"{part}: its weights are the variant {min(variants)}: write teacher.variant: {min(variants)}"
    if any(name.endswith(".bin") for name in names):
        return (
            f"{part}: its weights are .bin files, which can run code and are not read: download the .safetensors "
            "files, or open the teacher with diffusers and save_pretrained(safe_serialization=True)"
        )
    return f"{part}/{stem}.safetensors: missing, and other parts have their weights: download it too"


def _of_shards(path: Path, names: set[str], shards: set[str]) -> Iterator[str]:
    """Yield a line if the index `path` does not list exactly the `shards` among the files beside it, of these `names`.

    Weights in files that it does not list would stay randomly initialised.
    """
    try:
        listed = json_object(path, MAX_BYTES).get("weight_map")
    except TeacherFileError as error:
        yield str(error)
        return
    entries = list(listed.values()) if isinstance(listed, dict) else [listed]
    files = {name for name in entries if isinstance(name, str) and Path(name).name == name}
    if outside := [name for name in entries if name not in files]:
        yield f"{display_name(path)}: weight_map: {brief(outside[0])} is not a file beside it"
    elif missing := sorted(files - names):
        yield f"{path.parent.name}/{missing[0]}: missing, and {path.name} names it: download it too"
    elif not files or shards - files:
        yield f"{display_name(path)}: lists {', '.join(sorted(files)) or 'no file'} and not all weights beside it"


def faults_of_tokenizers(folder: Path, family: str) -> list[str]:
    """Return a line for each tokenizer of a good teacher's folder without its files, or with wrong values in them."""
    index, layout = read(folder / "model_index.json", Index), layout_of(family)
    parts = [name for name in [*layout.required, *layout.possible] if index.component(name) is not None]
    faults = list[str]()
    for part in [name for name in parts if name.startswith("tokenizer")]:
        kind = str((index.component(part) or [])[-1]).removesuffix("Fast")
        faults += _of_tokenizer(folder / part, kind, layout)
    return faults


def _of_tokenizer(folder: Path, kind: str, layout: Layout) -> Iterator[str]:
    """Yield a line for each file that a tokenizer of the class `kind` lacks, and for wrong values in its files."""
    part, names = folder.name, {path.name for path in folder.glob("*")}
    tower = part.replace("tokenizer", "text_encoder")
    absent = [[name for name in one if name not in names] for one in VOCABULARIES.get(kind, ANY_VOCABULARY)]
    first, *others = sorted(absent, key=len)
    if first:
        instead = "".join(f", or {' and '.join(other)}" for other in others)
        yield f"{part}/{' and '.join(first)}: missing: download {'it' if len(first) == 1 else 'them'} too{instead}"
    models = sorted(name for name in names if name.endswith(".model"))
    if models and "tokenizer.json" not in names and find_spec("sentencepiece") is None:
        yield f"{part}/{models[0]}: read by sentencepiece, which is not installed: pip install sentencepiece"
    if layout.reads_chats and CHAT_TEMPLATE not in names:
        config = json_object(folder / "tokenizer_config.json", MAX_BYTES)
        if not config.get("chat_template"):
            yield (
                f"{part}/{CHAT_TEMPLATE}: missing, and tokenizer_config.json has no chat_template, in which prompts "
                "are written: download it too"
            )
    for path in [folder / name for name in WORDS if name in names]:
        try:
            words = json_object(path, MAX_BYTES_OF_WORDS)
            if path.name == "vocab.json" and CONFIGURATIONS.get(layout.classes[tower]) is TextEncoder:
                _refuse_unknown(path, words, folder.parent / tower / "config.json")
        except TeacherFileError as error:
            yield str(error)


def _refuse_unknown(path: Path, words: dict[str, Any], config: Path) -> None:
    """Raise TeacherFileError if one of a vocabulary's `words` has a number beyond its text encoder's vocabulary."""
    size = read(config, TextEncoder).vocab_size
    for word, number in words.items():
        if type(number) is not int or not 0 <= number < size:
            raise TeacherFileError(
                f"{display_name(path)}: {brief(word)}: expected a whole number below {size}, the vocab_size of "
                f"{config.parent.name}, found {brief(number)}"
            )
