"""Errors of a run, in words for people."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..storage.files import CheckpointError
from ..training.loop import NonFiniteLoss

PEOPLES_ERRORS = (CheckpointError, NonFiniteLoss, OSError, ValueError)  # their messages say what to do


class RunError(Exception):
    """A run failed; the message says which stage, where and why, for people."""

    exit_code = 1


class ProcessLost(RunError):
    """Another process of the run has ended, and this one cannot go on without it."""

    exit_code = 3


class BadArgument(RunError):
    """What a command was asked for cannot be: nothing was loaded, nothing written."""

    exit_code = 2


@contextmanager
def worded(what: str, kind: type[RunError] = RunError) -> Iterator[None]:
    """What people can mend raises an error of this `kind` that begins with `what`, a command or an argument."""
    try:
        yield
    except PEOPLES_ERRORS as error:
        raise kind(f"{what}: {said(error)}") from error


def said(error: Exception) -> str:
    """What `error` says, for people: of the system's errors the file and the reason, not the number."""
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(filter(None, (error.filename and str(error.filename), error.strerror.lower())))
    return str(error)


def way_out(trains: bool) -> str:
    """What makes a stage smaller, one that trains a denoiser or one that does not."""
    if trains:
        return "smaller micro-batches (gradient_accumulation), gradient_checkpointing, or another --launch"
    return "a smaller batch_size"
