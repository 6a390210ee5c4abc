"""Errors of a run, with messages for its users."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..storage.files import CheckpointError
from ..training.loop import NonFiniteLoss

EXPECTED_ERRORS = (
    CheckpointError,
    NonFiniteLoss,
    OSError,
    ValueError,
)  # of users and their files; the messages say what to do


class RunError(Exception):
    """A run failed; the message says which stage, where and why."""

    exit_code = 1


class ProcessLost(RunError):
    """Another process of the run has ended, and this one cannot continue without it."""

    exit_code = 3


class BadArgument(RunError):
    """An argument of a command is wrong; nothing was loaded and nothing written."""

    exit_code = 2


@contextmanager
def prefix_errors(what: str, kind: type[RunError] = RunError) -> Iterator[None]:
    """Turn expected errors inside into errors of `kind`, prefixed by `what`: a command or an argument."""
    try:
        yield
    except EXPECTED_ERRORS as error:
        raise kind(f"{what}: {message_of(error)}") from error


def message_of(error: Exception) -> str:
    """Return the message of `error`; of the system's errors the file and the reason, without the number."""
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(filter(None, (error.filename and str(error.filename), error.strerror.lower())))
    return str(error)


def way_out(trains: bool) -> str:
    """Return advice on how to make a stage need less memory, one that trains a denoiser or one that does not."""
    if trains:
        return "smaller micro-batches (gradient_accumulation), gradient_checkpointing, or another --launch"
    return "a smaller batch_size"
