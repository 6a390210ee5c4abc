"""In which languages the prompts of a recipe are, and who does not read them: its teacher, its rewards. No torch.

A reward that does not read what it is to be trained on stops the run, so that is a problem; the rest can be meant.
"""

import json
from collections import Counter
from collections.abc import Iterator

from ..storage.files import CheckpointError, read_json
from ..storage.untrusted import read_bytes
from . import reward_package
from .adapt_text import AdaptText
from .evaluation import Evaluate
from .experiment import Recipe, Stage
from .families import FAMILIES, adaptable, layout_of, tokenizer_of
from .languages import EAST_ASIAN, prompts_in
from .paths import Folders, rewards_in
from .preference import Dpo, Tuning
from .reads import reads_of
from .reward_settings import languages_read
from .teacher_stages import TrainTeacher
from .tree import Key, Problem
from .types import Reward, Teacher

VOCABULARY = "vocab.json"  # of a byte-level tokenizer, as CLIP's
TEXT_ADAPTER = "text_adapter.json"  # in the folder that an adapt_text stage leaves
Prompts = dict[str, list[str]]  # texts by language


def problems(recipe: Recipe, folders: Folders) -> Iterator[Problem]:
    """Yield the rewards of tuning stages that do not read the languages of the prompts that they are to score."""
    for i, stage in enumerate(recipe.stages):
        if not isinstance(stage, Tuning):
            continue
        trained_on, watched = (_drawn(("stages", i), stage, name, folders) for name in ("prompts", "guard_prompts"))
        for key, reward in rewards_in(("stages", i), stage):
            lists = [watched] if "guard" in key else [trained_on, watched]
            for path, prompts in lists:
                if message := _unread(reward, path, prompts):
                    can_choose = "; or choose others by the stage's `languages`" if len(prompts) > 1 else ""
                    yield Problem(key, f"{message}: use a reward that does ({_readers(prompts)}){can_choose}")
                    break


def warnings(recipe: Recipe, folders: Folders) -> Iterator[Problem]:
    """Yield what of the prompts' languages is without effect or without use, and may be meant."""
    yield from _unread_by_teacher(recipe, folders)
    for i, stage in enumerate(recipe.stages):
        key = ("stages", i)
        if isinstance(stage, Evaluate):
            for place, reward in rewards_in(key, stage):
                path, prompts = _drawn(key, stage, "prompts", folders)
                if prompts and not set(prompts) & set(languages_read(reward) or prompts):
                    yield Problem(place, f"{_unread(reward, path, prompts)}: its column will be empty")
        if isinstance(stage, Tuning):
            for name in ("prompts", "guard_prompts")[: 1 + bool(stage.guard_prompts)]:
                path, prompts = _drawn(key, stage, name, folders)
                for language, weight in stage.languages.items():
                    if weight and prompts and language not in prompts and path:
                        message = f"{path} has no prompt in {language}: the weight of this language has no effect there"
                        yield Problem((*key, "languages", language), message)


def _drawn(key: Key, stage: Stage, name: str, folders: Folders) -> tuple[str, Prompts]:
    """Return the path of the prompts that `stage` has under `name`, and those of them that it uses, by language."""
    entry = name if getattr(stage, name, None) or name != "guard_prompts" else "prompts"
    path = getattr(stage, entry, None)
    if not path or (isinstance(stage, Dpo) and stage.pairs and name == "prompts"):  # whose pictures no reward scores
        return "", {}
    drawn = list(prompts_in(folders.place((*key, entry), path)))
    if isinstance(stage, Tuning) and stage.languages:
        drawn = [one for one in drawn if stage.languages.get(one[0])]
    if isinstance(stage, Evaluate):
        drawn = drawn[: stage.num_prompts]
    if isinstance(stage, Tuning) and name == "guard_prompts":
        drawn = drawn[: stage.guard.num_prompts]
    prompts: Prompts = {}
    for language, text in drawn:
        prompts.setdefault(language, []).append(text)
    return path, prompts


def _unread(reward: Reward, path: str, prompts: Prompts) -> str:
    """Return how many of `prompts` the `reward` does not read; "" where it reads all, or no one knows."""
    languages = languages_read(reward)
    unread = {name: len(texts) for name, texts in prompts.items() if name not in languages} if languages else {}
    if not unread:
        return ""
    counts = ", ".join(f"{count} in {name}" for name, count in unread.items())
    total = sum(map(len, prompts.values()))
    return f"{reward.name} reads prompts in {', '.join(languages)}, and of the {total} of {path} there are {counts}"


def _readers(prompts: Prompts) -> str:
    """Return the names of the rewards that read the languages of all `prompts`."""
    names = sorted(reward_package.names_of_files())
    readers = [name for name in names if set(prompts) <= set(languages_read(Reward(name=name)))]
    return ", ".join(readers) or "none here reads all of them"


# ---- the teacher ----


def _unread_by_teacher(recipe: Recipe, folders: Folders) -> Iterator[Problem]:
    """Yield the prompts in languages that the teacher is not known to read; one that is trained here learns to."""
    reads = set(layout_of(recipe.teacher.family).languages)
    if not reads or any(isinstance(stage, TrainTeacher) for stage in recipe.stages):
        return
    reads |= _languages_of_adapter(recipe.teacher, folders)
    vocabulary = _characters(recipe.teacher, folders)
    paths: set[str] = set()
    for i, stage in enumerate(recipe.stages):
        reads |= set(stage.languages) if isinstance(stage, AdaptText) else set()
        for name in [name for name, mark in reads_of(stage).items() if mark.of_prompts]:
            path, prompts = _drawn(("stages", i), stage, name, folders)
            unread = {
                one: texts for one, texts in prompts.items() if one not in reads and _is_foreign(texts, vocabulary)
            }
            if unread and path not in paths:
                paths.add(path)
                yield Problem(("stages", i, name), _advice(recipe.teacher, path, prompts, unread))


def _advice(teacher: Teacher, path: str, prompts: Prompts, unread: Prompts) -> str:
    """Return the message for prompts that are not read, with what to do."""
    counts = " and ".join(f"{len(texts)} are in {name}" for name, texts in unread.items())
    bases = [name for name, layout in FAMILIES.items() if set(unread) <= set(layout.languages)]
    ways = ["an adapt_text stage gives it an encoder that does (docs/text_adapter.md)"] * (
        teacher.family in adaptable() and bool(set(unread) & set(EAST_ASIAN))
    )
    ways += [f"these families do: {', '.join(bases)}"] * bool(bases)
    return (
        f"of the {sum(map(len, prompts.values()))} prompts of {path} {counts}, which a teacher of the family "
        f"{teacher.family} is not known to read (docs/chinese.md): {'; '.join(ways) or 'look at what it draws'}"
    )


def _is_foreign(texts: list[str], vocabulary: set[str]) -> bool:
    """Return whether most East Asian characters of `texts` are no token of a `vocabulary`, if there are any.

    Of those of prompts in Chinese CLIP's vocabulary has 2 in 100, one that is made for Chinese nearly all.
    """
    counts = Counter(
        character for text in texts for script in EAST_ASIAN.values() for character in script.findall(text)
    )
    return sum(count for one, count in counts.items() if one in vocabulary) < 0.5 * sum(counts.values())


def _characters(teacher: Teacher, folders: Folders) -> set[str]:
    """Return the East Asian characters that are tokens of a teacher's byte-level tokenizers, if its folder is here."""
    folder = folders.place(("teacher", "path"), teacher.path)
    layout = layout_of(teacher.family)
    characters: set[str] = set()
    for part in map(tokenizer_of, [*layout.text, *layout.optional]):
        try:
            tokens = json.loads(read_bytes(folder / part / VOCABULARY)) if teacher.revision is None else {}
        except (OSError, ValueError):  # another kind of tokenizer; a damaged one is reported where it is loaded
            continue
        for text in map(_text_of_token, tokens):
            characters |= {one for script in EAST_ASIAN.values() for one in script.findall(text)}
    return characters


def _text_of_token(token: str) -> str:
    """Return the text of a byte-level token, whose characters stand for bytes; "" for a part of a character."""
    try:
        return bytes(BYTES[one] for one in token.removesuffix("</w>")).decode()
    except (KeyError, UnicodeDecodeError):
        return ""


def _bytes_by_character() -> dict[str, int]:
    """Return the byte that each character of a byte-level token stands for: its own if printable, else from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = _bytes_by_character()


def _languages_of_adapter(teacher: Teacher, folders: Folders) -> set[str]:
    """Return the languages of a teacher's text adapter; a damaged one is reported where it is loaded."""
    if teacher.text_adapter is None:
        return set()
    try:
        record = read_json(
            folders.place(("teacher", "text_adapter"), teacher.text_adapter) / TEXT_ADAPTER, languages=list
        )
    except (CheckpointError, OSError, ValueError):
        return set()
    return set(map(str, record["languages"]))
