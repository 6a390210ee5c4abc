"""README.md and README.zh.md say the same: their headings, code, tables, links and numbers are held to each other."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGLISH, CHINESE = "README.md", "README.zh.md"
HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)
BLOCK = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"(?:^|(?<=\s))#.*", re.MULTILINE)  # in a block of code: those of one language
TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)
SPAN = re.compile(r"`[^`]+`")
LINK = re.compile(r"\]\(([^)]+)\)")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:e-?\d+)?")
CELL = re.compile(r"(?<!\\)\|")


class Readme:
    """The parts of a page in Markdown: blocks of code without their comments, and text, tables and links by section."""

    def __init__(self, text: str):
        self.blocks = [COMMENT.sub("", block) for block in BLOCK.findall(text)]
        text = BLOCK.sub("", text)
        self.titles = [title for _, title in HEADING.findall(text)]
        self.levels = [level for level, _ in HEADING.findall(text)]
        sections = re.split(r"^#+ .+$", text, flags=re.MULTILINE)
        self.tables = [[rows.splitlines() for rows in TABLE.findall(section)] for section in sections]
        self.texts = [TABLE.sub("", section) for section in sections]
        self.links = [LINK.findall(section) for section in sections]


def spans(text: str) -> Counter[str]:
    """Return how often each piece of code stands in a text."""
    return Counter(" ".join(span.split()) for span in SPAN.findall(text))


def numbers(text: str) -> Counter[str]:
    """Return how often each number stands in a text outside its code and its links."""
    return Counter(NUMBER.findall(LINK.sub("", SPAN.sub("", text))))


def differences(one: Readme, other: Readme) -> list[str]:
    """Return what the two pages do not have in common, a line each."""
    found = []
    if one.levels != other.levels:
        return [f"headings: {one.titles} and {other.titles}"]
    if one.blocks != other.blocks:
        pairs = zip(one.blocks, other.blocks, strict=False)
        first = next((block for block, same in pairs if block != same), "their number")
        found.append(f"blocks of code differ, the first in {first!r}")
    for title, *sections in zip(["(head)", *one.titles], one.texts, other.texts, strict=True):
        for count in (spans, numbers):
            here, there = map(count, sections)
            found += [
                f"{title}: {count.__name__} of one page only: {rest}" for rest in (here - there, there - here) if rest
            ]
    for title, *tables in zip(["(head)", *one.titles], one.tables, other.tables, strict=True):
        found += [f"{title}: {line}" for line in _of_tables(*tables)]
    for title, *links in zip(["(head)", *one.titles], one.links, other.links, strict=True):
        here, there = ([link for link in part if not link.startswith(("#", "README"))] for part in links)
        if here != there:
            found.append(f"{title}: links {here} and {there}")
    return found


def _of_tables(tables: list[list[str]], others: list[list[str]]) -> list[str]:
    if [len(rows) for rows in tables] != [len(rows) for rows in others]:
        return [f"tables of {[len(rows) for rows in tables]} and {[len(rows) for rows in others]} lines"]
    found = []
    for rows, other_rows in zip(tables, others, strict=True):
        for row, other in zip(rows, other_rows, strict=True):
            parts = [(len(CELL.findall(line)), spans(line), numbers(line)) for line in (row, other)]
            if parts[0] != parts[1]:
                found.append(f"a row of a table: {row} and {other}")
    return found


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_both_say_the_same_in_code_tables_links_and_numbers():
    assert differences(Readme(read(ENGLISH)), Readme(read(CHINESE))) == []


def test_each_links_the_other_and_its_own_sections():
    for name, other in ((ENGLISH, CHINESE), (CHINESE, ENGLISH)):
        page = Readme(read(name))
        assert other in page.links[1]
        anchors = {"#" + title.lower().replace(" ", "-") for title in page.titles}
        inside = [link for links in page.links for link in links if link.startswith("#")]
        assert inside
        assert set(inside) <= anchors


@pytest.mark.parametrize(
    ("line", "changed", "what"),
    [
        ("| a | 0.5 |\n", "", "tables of"),
        ("| a | 0.5 |\n", "| a | 0.6 |\n", "a row of a table"),
        ("| a | 0.5 |\n", "| a | 0.5 | |\n", "a row of a table"),
        ("three `x`\n", "three `y`\n", "spans of one page only"),
        ("12 steps\n", "13 steps\n", "numbers of one page only"),
        ("mlcm run\n", "mlcm plan\n", "blocks of code differ"),
        ("## B\n", "# B\n", "headings"),
        ("(docs/a.md)", "(docs/b.md)", "links"),
    ],
)
def test_a_page_that_was_changed_alone_is_told(line, changed, what):
    table, text = "| h | k |\n|---|---|\n| a | 0.5 |\n", "three `x`\n12 steps\n[a](docs/a.md)\n"
    page = f"# A\n\n{table}\n## B\n\n{text}\n```\nmlcm run\n```\n"
    assert differences(Readme(page), Readme(page)) == []
    assert line in page
    assert what in differences(Readme(page), Readme(page.replace(line, changed)))[0]
