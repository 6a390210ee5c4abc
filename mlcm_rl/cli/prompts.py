"""The command on prompt files: what is in them, and a file of the lines that are kept."""

import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from ..recipe.languages import code_meant
from .console import console, error_console, line

if TYPE_CHECKING:
    from ..data.prompt_selection import Line

Files = Annotated[
    list[Path],
    typer.Argument(metavar="FILE", exists=True, dir_okay=False, show_default=False, help="prompts (.txt, .jsonl)"),
]

OPTIONS = {  # by the reason for which a line is left out
    "other language": "--language",
    "length": "--min-length or --max-length",
    "wording": "--matching or --not-matching",
    "in another file": "--not-in",
}


def _pattern(text: str | None) -> str | None:
    """Return `text`. Raises BadParameter where it is not a regular expression."""
    try:
        re.compile(text or "")
    except re.error as error:
        raise typer.BadParameter(f"{text!r} is not a regular expression: {error}") from error
    return text


def prompts(
    files: Files,
    out: Annotated[
        Path | None,
        typer.Option(dir_okay=False, show_default=False, help="new file (.txt, .jsonl) for the prompts that are kept"),
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option(show_default=False, help="keep this language (en, zh); may be repeated")
    ] = None,
    min_length: Annotated[int, typer.Option(min=1, help="characters of the shortest prompt that is kept")] = 1,
    max_length: Annotated[
        int | None, typer.Option(min=1, show_default=False, help="characters of the longest; default: any")
    ] = None,
    matching: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX", callback=_pattern, show_default=False, help="keep what has this in it, in any case"
        ),
    ] = None,
    not_matching: Annotated[
        str | None,
        typer.Option(metavar="REGEX", callback=_pattern, show_default=False, help="leave out what has this in it"),
    ] = None,
    not_in: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", exists=True, dir_okay=False, show_default=False, help="leave out what is in this file too"
        ),
    ] = None,
    omitted: Annotated[
        bool, typer.Option("--omitted", help="list every line that is left out, with the reason")
    ] = False,
) -> None:
    """Count the prompts of files by language, and write those that are kept.

    The language of a line is its `language` in a .jsonl file, else that of most of its East Asian characters: zh for
    Chinese ones, ja for kana, ko for hangul, and en without any. Of prompts with the same words, whatever their
    punctuation, width and case of letters, the first is kept. If none is left, the exit status is 1.
    """
    from ..data import prompt_selection

    searched = [re.compile(one, re.IGNORECASE) if one else None for one in (matching, not_matching)]
    wanted = prompt_selection.Filter(language or (), min_length, max_length, *searched)
    try:
        lines = prompt_selection.select(files, wanted, not_in or ())
        kept = [one.prompt for one in lines if not one.reason]
        if kept and out is not None:
            prompt_selection.write(kept, out)
    except (OSError, ValueError) as error:
        error_console.print(Text.assemble(("bad", "bold red"), f"  {error}"), soft_wrap=True)
        raise typer.Exit(2) from None
    spoken = {one.prompt.language for one in lines}
    for name in language or ():
        if name not in spoken:
            meant = f"; did you mean {code}?" if (code := code_meant(name)) else ""
            there = ", ".join(map(_printable, sorted(spoken)))
            message = f"  --language {name}: no prompt is in it, they are in {there}{meant}"
            error_console.print(Text.assemble(("note", "yellow"), message), soft_wrap=True)
    if omitted:
        for one in lines:
            if one.reason:
                reason = f"{one.reason} {one.first}".strip()
                line(Text(f"{one.place}  {reason}  {_printable(one.prompt.prompt)}"))
    console.print(_counts(lines, prompt_selection.REASONS), crop=False)
    if not kept:
        counts = Counter(one.reason for one in lines)
        causes = "; ".join(f"{OPTIONS[reason]} left out {count} ({reason})" for reason, count in counts.most_common())
        message = f"  none of {len(lines)} lines is left, and nothing is written: {causes}"
        error_console.print(Text.assemble(("bad", "bold red"), message), soft_wrap=True)
        raise typer.Exit(1)
    if out is not None:
        line(Text.assemble(("ok", "green"), f"  {out}"))


def _printable(text: str) -> str:
    """Return `text` in one line, with escapes for what would move the cursor or colour the terminal."""
    moves = ("Cc", "Zl", "Zp")  # Unicode's controls and separators of lines
    return "".join(repr(one)[1:-1] if unicodedata.category(one) in moves else one for one in text)


def _counts(lines: "list[Line]", reasons: tuple[str, ...]) -> Table:
    """Return the table of the lines by language: how many were read, left out for each reason, and kept."""
    used = [reason for reason in reasons if any(one.reason == reason for one in lines)]
    table = Table("language", box=None, header_style="bold")
    for head in ("prompts", *used, "kept", "longest"):
        table.add_column(head, justify="right")
    languages = sorted({one.prompt.language for one in lines})
    for language in [*languages, *(["all"] if len(languages) > 1 else [])]:
        part = [one for one in lines if language in ("all", one.prompt.language)]
        counts = Counter(one.reason for one in part)
        longest = max((len(one.prompt.prompt) for one in part if not one.reason), default=0)
        table.add_row(
            _printable(language), *map(str, (len(part), *(counts[reason] for reason in used), counts[""], longest))
        )
    return table
