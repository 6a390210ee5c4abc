"""Which lines of prompt files to keep: by language, length and wording, each prompt once, none of other files."""

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..recipe.languages import HAN
from ..storage.files import replacing
from .prompts import Prompt, is_plain, prompts_with_lines

BESIDE_HAN = re.compile(f"(?<={HAN.pattern}) | (?={HAN.pattern})")
QUOTATION_MARKS = str.maketrans(dict.fromkeys("“”„‟«»「」『』〝〞〟", '"'))  # one mark: how it looks says nothing
REASONS = ("other language", "length", "wording", "in another file", "duplicate")  # why a line is left out


@dataclass(frozen=True)
class Filter:
    """What a prompt must be to be kept; an empty or absent setting asks for nothing.

    Lengths are in characters, of which a Chinese text has fewer than an English one of the same meaning. The patterns
    are regular expressions, searched for in any case of letters.
    """

    languages: Sequence[str] = ()
    min_length: int = 1
    max_length: int | None = None
    matching: re.Pattern[str] | None = None
    not_matching: re.Pattern[str] | None = None

    def reason(self, prompt: Prompt) -> str:
        """Return the one of REASONS for which `prompt` is left out, "" if it is not."""
        text = prompt.prompt
        if self.languages and prompt.language not in self.languages:
            return "other language"
        if len(text) < self.min_length or (self.max_length is not None and len(text) > self.max_length):
            return "length"
        lacks = self.matching is not None and not self.matching.search(text)
        return "wording" if lacks or (self.not_matching is not None and self.not_matching.search(text)) else ""


@dataclass(frozen=True)
class Line:
    """One line of a prompt file: its place as file:number, and why it is left out ("" if it is kept).

    `first` is the place of the same prompt before it.
    """

    place: str
    prompt: Prompt
    reason: str
    first: str = ""


def select(files: Sequence[Path], wanted: Filter, others: Sequence[Path] = ()) -> list[Line]:
    """Return every line of the prompt `files` in their order, and whether it is kept.

    Of prompts with the same `wording` the first that passes the filter is kept, and none that is in one of the
    `others` (a held-out set, say). Raise as `read_prompts` does.
    """
    before = {wording(prompt.prompt): place for path in others for place, prompt in prompts_with_lines(path)}
    kept: dict[str, str] = {}
    lines = []
    for path in files:
        for place, prompt in prompts_with_lines(path):
            key, first = wording(prompt.prompt), ""
            reason = wanted.reason(prompt)
            if not reason and key in before:
                reason, first = "in another file", before[key]
            elif not reason and key in kept:
                reason, first = "duplicate", kept[key]
            elif not reason:
                kept[key] = place
            lines.append(Line(place, prompt, reason, first))
    return lines


def wording(text: str) -> str:
    """Return what two texts of the same words have in common.

    Letters are in one case and one width (NFKC), punctuation and repeated spaces are gone, and so are all spaces beside
    Chinese characters. Quotation marks stay, as one mark of any kind: what stands between them is a text to be written
    on the picture, “福”字 and not 福字. Simplified and traditional characters differ. A text of punctuation alone is
    itself.
    """
    letters = unicodedata.normalize("NFKC", text).casefold().translate(QUOTATION_MARKS).replace('"', ' " ')
    dropped = (one != '"' and unicodedata.category(one)[0] in "PZC" for one in letters)
    words = "".join(" " if drops else one for one, drops in zip(letters, dropped, strict=True)).split()
    return BESIDE_HAN.sub("", " ".join(words)) or text


def write(prompts: Sequence[Prompt], path: Path) -> None:
    """Write a prompt file in one rename: a line each, or for a .jsonl file an object each with all that is known.

    Raise FileExistsError if it is there, ValueError without prompts, for another ending, and for a .txt file where a
    prompt is not `is_plain`: it would be read back as another.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(
            f"{path}: prompts are written to a .txt or a .jsonl file, not {path.suffix or 'a bare name'!r}"
        )
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} is there already; name a new file")
    if not prompts:
        raise ValueError(f"{path} would have no prompt: none is kept")
    if path.suffix == ".txt":
        for one in prompts:
            if not is_plain(one):
                raise ValueError(
                    f"{path}: a .txt file has room for the text alone, and {one.prompt[:40]!r} has more (its language "
                    f"{one.language}, a concept, a style, a second line, or space around it) or is a JSON object: name "
                    "the file .jsonl"
                )
        lines = [one.prompt for one in prompts]
    else:
        records = [{key: value for key, value in asdict(one).items() if value is not None} for one in prompts]
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
    with replacing(path) as partial:
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
