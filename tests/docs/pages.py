"""The pages of the repository in Markdown, as the site shows them: their links, anchors, and commands."""

import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))

import generated  # noqa: E402

BLOCK = re.compile(r"(?:^<!-- (test: [^>]*|recipe: [^>]*) -->\n)?^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)
PROMPT = re.compile(r"^(?:\w*\$ )")
ENVIRONMENT = re.compile(r"^[A-Z_]+=\S*$")


@dataclass(frozen=True)
class Block:
    """A block of code: its language, its text, and the mark in the comment before it, such as `test: runs`."""

    language: str
    text: str
    mark: str


def pages() -> list[Path]:
    """Return the files of all pages."""
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").glob("*/*.md")]
    return sorted([*files, *(ROOT / "reward_models").glob("*.md")])


@cache
def text_of(page: Path) -> str:
    """Return the text of a page with its generated parts."""
    return generated.whole(page.read_text(encoding="utf-8"))


def blocks(text: str) -> list[Block]:
    """Return the blocks of code of a page."""
    return [Block(language, code, mark) for mark, language, code in BLOCK.findall(text)]


def links(text: str) -> list[str]:
    """Return the targets of the links of a page, those in code left out."""
    return LINK.findall(SPAN.sub("", BLOCK.sub("", text)))


def anchors(text: str) -> set[str]:
    """Return the anchors of the headings of a page."""
    titles = HEADING.findall(BLOCK.sub("", text))
    return {generated.slug(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)) for title in titles}


def dead_links(page: Path, text: str) -> list[str]:
    """Return the relative links of a page whose file or heading is not there."""
    dead = []
    for link in links(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists():
            dead.append(f"{page.name}: {link}: no such file")
        elif anchor and file.suffix == ".md" and anchor not in anchors(text if file == page else text_of(file)):
            dead.append(f"{page.name}: {link}: no such heading")
    return dead


def lines(code: str) -> Iterator[str]:
    """Yield the commands of a block or a span, without prompts, comments and variables before them."""
    for line in code.replace("\\\n", " ").splitlines():
        for part in re.split(r" && |; ", PROMPT.sub("", line.strip())):
            words = shlex.split(part, comments=True) if part.count("'") % 2 == 0 and part.count('"') % 2 == 0 else []
            while words and ENVIRONMENT.match(words[0]):
                words = words[1:]
            if words:
                yield shlex.join(words)


def commands(text: str, start: str) -> list[list[str]]:
    """Return the words of every command of a page that begins with `start`, in blocks and in spans of code."""
    code = [block.text for block in blocks(text) if block.language in ("", "sh")]
    spans = [span for span in SPAN.findall(BLOCK.sub("", text)) if span.startswith(f"{start} ")]
    found = [shlex.split(line) for part in [*code, *spans] for line in lines(part)]
    return [words for words in found if words[0] == start]
