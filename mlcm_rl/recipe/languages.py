"""The language of a prompt, by its script, and the names of languages."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from ..storage.untrusted import parse_json, read_bytes

KANA = re.compile("[\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\uff66-\uff9f]")
HANGUL = re.compile("[\u1100-\u11ff\u3130-\u318f\uac00-\ud7af]")
OTHER_NAMES = {  # of a language, beside its code
    "zh": ("cn", "ch", "chs", "cht", "zho", "chi", "cmn", "zh-cn", "zh-hans", "zh-tw", "zh-hant", "chinese", "中文"),
    "en": ("eng", "us", "uk", "gb", "en-us", "en-gb", "english", "英文"),
    "ja": ("jp", "jpn", "ja-jp", "japanese", "日本語", "日文"),
    "ko": ("kr", "kor", "ko-kr", "korean", "한국어", "韩文"),
}
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
EAST_ASIAN = {"zh": HAN, "ja": KANA, "ko": HANGUL}


def guess_language(text: str) -> str:
    """Return the language of the script that most East Asian characters of a text have, "en" for a text without any.

    It is "zh" for Han characters, "ja" for kana and "ko" for hangul; with as many of another, "zh".
    """
    counts = {name: len(script.findall(text)) for name, script in EAST_ASIAN.items()}
    language = max(counts, key=lambda name: counts[name])
    return language if counts[language] else "en"


def code_meant(name: str) -> str | None:
    """Return the code of the language that a prompt file would have for `name`, if that is another name of one."""
    text = name.strip().casefold().replace("_", "-")
    return next((code for code, names in OTHER_NAMES.items() if text in names or (text == code and name != code)), None)


def says_language(prompts: Path, name: str) -> bool:
    """Return whether a prompt file may state `name` as the language of a line; one that cannot be read may."""
    try:
        text = read_bytes(prompts).decode()
    except (OSError, ValueError):  # reported where the stage's files are
        return True
    return prompts.suffix == ".jsonl" and json.dumps(name, ensure_ascii=False) in text


def prompts_in(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (language, text) of the prompts of a file, less lines that cannot be read: a stage reports these."""
    try:
        lines = read_bytes(path).decode("utf-8-sig").splitlines() if path.is_file() else []
    except (OSError, ValueError):
        return
    for line in filter(None, map(str.strip, lines)):
        record = {"prompt": line}
        if path.suffix == ".jsonl":
            try:
                record = parse_json(line)
            except ValueError:
                continue
        if isinstance(record, dict) and isinstance(text := record.get("prompt"), str):
            yield str(record.get("language") or guess_language(text)), text
