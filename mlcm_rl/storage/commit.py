"""The commit of this checkout, for the record."""

import re
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryFile

GIT_SECONDS = 10.0  # time limit for git
COMMIT = re.compile(rb"[0-9a-f]{40}|[0-9a-f]{64}")


def commit() -> str | None:
    """Return the commit of this checkout; None outside a checkout.

    None too if git is not installed, refuses a checkout that another user owns, or does not answer in time.
    """
    git, checkout = shutil.which("git"), Path(__file__).parents[2]
    if git is None or not (checkout / ".git").exists():  # an installed package may lie within another checkout
        return None
    command = [git, "-C", str(checkout), "rev-parse", "HEAD"]
    with TemporaryFile() as answer:  # not a pipe: a process that git starts could keep it open after git's end
        try:
            subprocess.run(command, stdin=subprocess.DEVNULL, stdout=answer, stderr=answer, timeout=GIT_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            return None
        answer.seek(0)
        output = answer.read(100).strip()
    return output.decode() if COMMIT.fullmatch(output) else None
