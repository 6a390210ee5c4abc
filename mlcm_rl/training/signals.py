"""SIGTERM and Ctrl-C: outside a training loop they end the work where it is, inside one after a step that is saved.

Whatever they interrupt, files appear whole or not at all, so that the same command goes on. Imports no torch.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STEP_SECONDS = 25.0  # that a step may still take; clusters kill 30 seconds after SIGTERM
NUMBERS = (signal.SIGTERM, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """A signal asked for the end; the process ends with `code`, which is 128 and the signal's number, as in a shell."""

    def __init__(self, number: int, text: str = ""):
        super().__init__(text)
        self.code = 128 + number


@contextmanager
def raise_on_sigterm() -> Iterator[None]:
    """SIGTERM raises Stopped wherever the program is, as Ctrl-C raises KeyboardInterrupt."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Stopped(number)

    with _handled({signal.SIGTERM: stop}):
        yield


class Pending:
    """The signal that has come while it is kept back, if any."""

    number: int | None = None


@contextmanager
def deferral() -> Iterator[Pending]:
    """SIGTERM and Ctrl-C are only noted, so that a step can be finished and saved.

    A second one, or a step that takes STEP_SECONDS longer, raises Stopped where the program is: what was saved last
    then stands.
    """
    pending = Pending()

    def note(number: int, _frame: FrameType | None) -> None:
        if pending.number is not None:
            raise Stopped(number, "stopped within a step; what was saved before it stands")
        pending.number = number
        signal.setitimer(signal.ITIMER_REAL, STEP_SECONDS)

    def too_long(_number: int, _frame: FrameType | None) -> None:
        raise Stopped(
            pending.number or signal.SIGTERM,
            f"stopped within a step that took over {STEP_SECONDS:.0f} s; what was saved before it stands",
        )

    with _handled({**dict.fromkeys(NUMBERS, note), signal.SIGALRM: too_long}):
        try:
            yield pending
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def _handled(handlers: dict) -> Iterator[None]:
    """These handlers for the block, the old ones after it."""
    old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
