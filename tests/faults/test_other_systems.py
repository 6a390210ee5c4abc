"""What the package needs of the system that it runs on."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_system_that_is_not_posix_is_refused_in_words_before_anything_is_imported():
    """A missing fcntl would be the first sign otherwise, and a missing SIGALRM the second, in the first step."""
    program = "import os; os.name = 'nt'; import mlcm_rl"
    told = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert told.returncode == 1
    assert told.stderr.splitlines()[-1] == (
        "ImportError: mlcm_rl runs on Linux and macOS, and this system is nt; on Windows, run it in WSL"
    )


def test_package_indexes_are_told_too():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "Operating System :: POSIX" in project["classifiers"]
