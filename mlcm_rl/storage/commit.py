"""The commit of this checkout, for the record."""

import re
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryFile

GIT_SECONDS = 10.0  # that git has to name the commit
COMMIT = re.compile(rb"[0-9a-f]{40}|[0-9a-f]{64}")


def commit() -> str | None:
    """Return the commit of this checkout, for the record; None outside one, and where git does not say it: it is not
    there, refuses another user's checkout, or does not answer."""
    git, checkout = shutil.which("git"), Path(__file__).parents[2]
    if git is None or not (checkout / ".git").exists():  # an installed package may lie within another checkout
        return None
    command = [git, "-C", str(checkout), "rev-parse", "HEAD"]
    with TemporaryFile() as answer:  # no pipe: what git has started could keep it open beyond git's end
        try:
            subprocess.run(command, stdin=subprocess.DEVNULL, stdout=answer, stderr=answer, timeout=GIT_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            return None
        answer.seek(0)
        said = answer.read(100).strip()
    return said.decode() if COMMIT.fullmatch(said) else None
