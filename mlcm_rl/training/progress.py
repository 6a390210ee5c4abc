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

transformers.utils.logging.set_verbosity_error()  # it warns that torchvision is missing, which is intended
diffusers.utils.logging.disable_progress_bar()  # a bar for every load is noise here
transformers.utils.logging.disable_progress_bar()

console = plain_console(quiet=processes.rank() > 0)  # only rank 0 prints
PLAIN_SECONDS = 10.0  # between progress lines without a terminal, which could redraw a bar


@contextmanager
def progress(total: int, description: str, num_finished: int = 0) -> Iterator["Bar"]:
    """Show a progress bar with ETA on a terminal; elsewhere print a line every ten seconds."""
    bar = Bar(total, description, num_finished)
    with bar.rich if console.is_terminal else _nothing():
        yield bar
    bar.close()


class Bar:
    """A bar up to `total`; `advance(n, note)` moves it and shows `note` (such as the loss) beside the ETA."""

    def __init__(self, total: int, description: str, num_finished: int):
        self.total, self.description, self.num_finished = total, description, num_finished
        self.first = num_finished
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
        self.task = self.rich.add_task(description, total=total, completed=num_finished, note="")

    def advance(self, count: int = 1, note: str = "") -> None:
        self.num_finished += count
        self.rich.update(self.task, advance=count, note=note)
        now = time.monotonic()
        if not console.is_terminal and now - self.printed > PLAIN_SECONDS:
            self.printed = now
            seconds_a_step = (now - self.started) / (self.num_finished - self.first)
            seconds_left = seconds_a_step * (self.total - self.num_finished)
            console.print(
                f"{self.description} {self.num_finished}/{self.total} eta {seconds_left:.0f} s {note}", soft_wrap=True
            )

    def close(self) -> None:
        if not console.is_terminal:
            seconds = time.monotonic() - self.started
            console.print(
                f"{self.description} {self.num_finished}/{self.total} done in {seconds:.0f} s", soft_wrap=True
            )


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def tell(label: str, text: str, style: str = "dim") -> None:
    """Print a line that begins with a `label` in `style`. Brackets and colons in it are not markup."""
    console.print(Text.assemble((label, style), f" {text}"), soft_wrap=True)


@cache
def say_once(text: str) -> None:
    """Print a line once a process: several stages of a run would repeat it."""
    console.print(Text(text), soft_wrap=True)
