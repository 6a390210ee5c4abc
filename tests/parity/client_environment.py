"""An environment of its own for other people's tools, made once and kept in `build/`."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / "build" / "older-clients"
PYTHON = FOLDER / "bin" / "python"
UNREACHABLE = re.compile(r"connection broken|NewConnectionError|ConnectTimeout|NameResolution|ProxyError")


def install() -> None:
    """Make the environment with what older_clients.txt and clients_alone.txt name, unless it is there.

    Skips the test where it is not and the package registry cannot be reached.
    """
    files = [HERE / "older_clients.txt", HERE / "clients_alone.txt"]
    done, wanted = FOLDER / "installed.txt", "".join(file.read_text() for file in files)
    if done.is_file() and done.read_text() == wanted:
        return
    shutil.rmtree(FOLDER, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True)
    for file, settings in zip(files, ([], ["--no-deps"]), strict=True):
        command = [
            str(PYTHON),
            "-m",
            "pip",
            "--disable-pip-version-check",
            "--retries",
            "1",
            "install",
            "-q",
            *settings,
        ]
        installed = subprocess.run([*command, "-r", str(file)], capture_output=True, text=True)
        if installed.returncode and UNREACHABLE.search(installed.stderr):
            pytest.skip("the package registry cannot be reached, and the other tools are not installed yet")
        assert installed.returncode == 0, installed.stderr
    done.write_text(wanted)


def run(*arguments: Path | str) -> str:
    """Run the environment's interpreter with `arguments`, and nothing of ours to import; returns what it printed."""
    settings = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(FOLDER / "home"), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([str(PYTHON), *map(str, arguments)], env=settings, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def answer(code: str, *arguments: Path | str) -> Any:
    """Return what a line of `code` prints as JSON there."""
    return json.loads(run("-c", code, *arguments))


def package(name: str) -> Path:
    """Return the folder of a package of that environment."""
    return next(FOLDER.glob(f"lib/python*/site-packages/{name}"))
