"""Commands on terminals and under locales that are not UTF-8: what is printed is escaped, what is written is UTF-8."""

import json
import os
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from PIL import Image
from rich.cells import cell_len
from rich.console import Console

import runs
from mlcm_rl.cli.console import print_problems
from mlcm_rl.recipe import Recipe
from mlcm_rl.recipe.tree import Problem, RecipeError
from mlcm_rl.training.console import wrapped

LONG = "红苹果" * 40  # more than the teacher reads, which is said with the prompt
PLACES = {  # the second is also the encoding of a file that is opened without one
    "latin-1 output": {"PYTHONIOENCODING": "latin-1"},
    "ascii locale": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
}
PLACE = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)


def mlcm(place: dict[str, str], *arguments: object) -> subprocess.CompletedProcess:
    """What the command prints, as bytes."""
    command = [sys.executable, "-W", "ignore", "-m", "mlcm_rl", *map(str, arguments)]
    return subprocess.run(command, env=os.environ | place, capture_output=True, check=False)


def escaped(text: str) -> bytes:
    return text.encode("ascii", "backslashreplace")


@pytest.fixture
def recipe(tiny_sdxl, tmp_path) -> Recipe:
    """Trajectories of Chinese prompts, one of them too long, a student of them, and what it is like."""
    whole = runs.whole(tiny_sdxl, tmp_path, num_segments=[1], num_steps=1)
    Path(whole.stages[0].prompts).write_text(f"a cat\n{LONG}\n红苹果\n熊猫\n", encoding="utf-8")
    return whole


def written(recipe: Recipe, folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(recipe.model_dump_json(), encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_run_that_quotes_a_chinese_prompt_goes_on_to_its_export(recipe, tmp_path):
    place = PLACES["ascii locale"]
    run = mlcm(place, "run", written(recipe, tmp_path))
    assert run.returncode == 0, run.stderr.decode()
    assert b"longer than" in run.stdout
    assert escaped(LONG[:20]) in run.stdout
    assert json.loads((tmp_path / "runs" / "small" / "02-evaluate" / "report.json").read_text(encoding="utf-8"))
    exported = mlcm(place, "export", tmp_path / "runs" / "small", tmp_path / "exported")
    assert exported.returncode == 0, exported.stderr.decode()


@pytest.mark.parametrize(
    "place", [pytest.param(PLACES["latin-1 output"], marks=pytest.mark.slow), PLACES["ascii locale"]], ids=PLACES
)
def test_a_refusal_that_quotes_a_chinese_prompt_is_said(recipe, tmp_path, place):
    prompts = Path(recipe.stages[0].prompts)
    prompts.write_text('{"prompt": "x", "红": 1}\n', encoding="utf-8")
    prompts = prompts.rename(prompts.with_suffix(".jsonl"))
    stage = recipe.stages[0].model_copy(update={"prompts": str(prompts)})
    run = mlcm(place, "run", written(recipe.model_copy(update={"stages": [stage]}), tmp_path))
    assert run.returncode == 1
    assert b"unknown key '" + escaped("红") in run.stderr
    bad = tmp_path / "bad.yaml"
    bad.write_text("红: 1\n", encoding="utf-8")
    validated = mlcm(place, "validate", bad)
    assert validated.returncode == 2
    assert escaped("红") in validated.stdout


@PLACE
def test_scores_are_json_whatever_the_output_takes(tmp_path, place):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("红苹果 😀\n", encoding="utf-8")
    scored = mlcm(place, "score", "--reward", "brightness", "--images", tmp_path, "--prompts", prompts)
    assert scored.returncode == 0, scored.stderr.decode()
    assert re.fullmatch(rb"[\n -~]+", scored.stdout)
    assert json.loads(scored.stdout) == {"file": "a.png", "prompt": "红苹果 😀", "score": 0.0}


@pytest.mark.parametrize("arguments", [("plan", "--help"), ("rewards", "list")])
def test_help_and_tables_are_printed(arguments):
    printed = mlcm(PLACES["ascii locale"], *arguments)
    assert (printed.returncode, printed.stderr) == (0, b"")
    assert len(printed.stdout) > 500


def test_scores_for_nobody_are_no_fault(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    arguments = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "mlcm_rl",
        "score",
        "--reward",
        "brightness",
        "--images",
        tmp_path,
    ]
    scored = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *arguments], stderr=subprocess.PIPE, check=False)
    assert (scored.returncode, b"Traceback" in scored.stderr) == (0, False)


@pytest.mark.parametrize("arguments", [["rewards", "list"], ["schema"], ["--help"]], ids=str)
def test_an_output_on_a_full_disk_is_told_in_words(arguments):
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "mlcm_rl", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, encoding="utf-8", check=False)
    assert done.returncode == 1
    assert done.stderr == "failed  what it prints could not be written: no space left on device\n"


def test_an_error_in_chinese_is_as_wide_as_the_terminal(tmp_path):
    """Chinese characters take two columns; lines are broken at spaces, and a long word stays whole."""
    words = " ".join(["红苹果在桌子上"] * 20)
    console = Console(file=StringIO(), width=60, force_terminal=True, color_system=None, markup=False, highlight=False)
    print_problems(console, tmp_path / "a.yaml", RecipeError([Problem(("seed",), f"{words} {'/folder' * 20}")]))
    lines = console.file.getvalue().splitlines()[2:]
    assert all(line.startswith(" " * 6) for line in lines)
    assert " ".join("".join(f"{line} " for line in lines).split()) == f"{words} {'/folder' * 20}"
    assert max(cell_len(line.rstrip()) for line in lines[:-1]) <= 60
    assert len(lines) == 8  # three words of 14 columns a line, and the path


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("emoji style judge", ["emoji", "style", "judge"]),
        ("alignment of it", ["alignment", "of it"]),
        ("红苹果在桌子上", ["红苹果在", "桌子上"]),
        ("a红苹果在 桌", ["a红苹果", "在 桌"]),  # never half a character, which takes two columns
    ],
)
def test_lines_are_as_wide_as_a_terminal_draws_them(text, lines):
    assert wrapped(text, 8) == lines
