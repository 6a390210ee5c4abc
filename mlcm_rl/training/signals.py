"""SIGTERM and Ctrl-C: outside a training loop they end a run at once, inside one after the current step is saved.

Whatever they interrupt, files appear whole or not at all, so that the same command goes on. Imports no torch.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STEP_SECONDS = 25.0  # for the current step and its save; clusters kill 30 seconds after SIGTERM
NUMBERS = (signal.SIGTERM, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """A signal ended the run; the process exits with `code`, 128 plus the signal's number, as in a shell."""

    def __init__(self, number: int, text: str = ""):
        super().__init__(text)
        self.code = 128 + number


@contextmanager
def raise_on_sigterm() -> Iterator[None]:
    """Raise Stopped on SIGTERM wherever the program is, as Ctrl-C raises KeyboardInterrupt."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Stopped(number)

    with _handled({signal.SIGTERM: stop}):
        yield


class Pending:
    """The number of a signal that came during a `deferral`, if any."""

    number: int | None = None


@contextmanager
def deferral() -> Iterator[Pending]:
    """Only note SIGTERM and Ctrl-C while the block runs, so that a step can be finished and saved.

    A second signal, or a step that takes STEP_SECONDS longer, raises Stopped where the program is; the last save is
    intact.
    """
    pending = Pending()

    def note(number: int, _frame: FrameType | None) -> None:
        if pending.number is not None:
            raise Stopped(number, "stopped within a step; the last save is intact")
        pending.number = number
        signal.setitimer(signal.ITIMER_REAL, STEP_SECONDS)

    def too_long(_number: int, _frame: FrameType | None) -> None:
        raise Stopped(
            pending.number or signal.SIGTERM,
            f"stopped within a step that took over {STEP_SECONDS:.0f} s; the last save is intact",
        )

    with _handled({**dict.fromkeys(NUMBERS, note), signal.SIGALRM: too_long}):
        try:
            yield pending
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def _handled(handlers: dict) -> Iterator[None]:
    """Install `handlers` for the block, and the old ones after it."""
    old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
