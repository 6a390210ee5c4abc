"""What a run prints: a bar with ETA on a terminal, a line every ten seconds elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import diffusers
import transformers
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from . import processes
from .console import plain_console

transformers.utils.logging.set_verbosity_error()  # it warns of torchvision's absence, which is meant
diffusers.utils.logging.disable_progress_bar()  # a bar for every load says nothing here
transformers.utils.logging.disable_progress_bar()

console = plain_console(quiet=processes.rank() > 0)  # of several processes the first one speaks
PLAIN_SECONDS = 10.0  # between progress lines where no terminal can redraw a bar


@contextmanager
def progress(total: int, description: str, done: int = 0) -> Iterator["Bar"]:
    """A progress bar with ETA on a terminal; elsewhere a line every ten seconds."""
    bar = Bar(total, description, done)
    with bar.rich if console.is_terminal else _nothing():
        yield bar
    bar.close()


class Bar:
    """Counts up to `total`; `advance(n, note)` moves it and shows `note` (the loss, say) beside the ETA."""

    def __init__(self, total: int, description: str, done: int):
        self.total, self.description, self.done, self.first = total, description, done, done
        self.started = self.printed = time.monotonic()
        self.rich = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
        )
        self.task = self.rich.add_task(description, total=total, completed=done, note="")

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        self.rich.update(self.task, advance=count, note=note)
        now = time.monotonic()
        if not console.is_terminal and now - self.printed > PLAIN_SECONDS:
            self.printed = now
            left = (now - self.started) / (self.done - self.first) * (self.total - self.done)
            console.print(f"{self.description} {self.done}/{self.total} eta {left:.0f} s {note}", soft_wrap=True)

    def close(self) -> None:
        if not console.is_terminal:
            seconds = time.monotonic() - self.started
            console.print(f"{self.description} {self.done}/{self.total} done in {seconds:.0f} s", soft_wrap=True)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def tell(label: str, text: str, style: str = "dim") -> None:
    """A line that begins with a `label` in `style`. Brackets and colons in it are what they are, no markup."""
    console.print(Text.assemble((label, style), f" {text}"), soft_wrap=True)


@cache
def say_once(text: str) -> None:
    """A line that several stages of a run would repeat."""
    console.print(Text(text), soft_wrap=True)
