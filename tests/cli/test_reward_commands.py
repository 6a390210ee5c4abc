"""`mlcm rewards list | fetch | check` and `mlcm score`: what they print and write, and with which code they end."""

import csv
import hashlib
import json
import os
import subprocess
import sys

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from mlcm_rl.cli import reward_commands
from mlcm_rl.cli.app import app
from mlcm_rl.data.prompts import Prompt
from mlcm_rl.rewards.folder import picture_files, score_files

WITH_WEIGHTS = """
from safetensors.torch import load_file
from mlcm_rl.rewards import GivenFile, Weights

HEAD = Weights("head", GivenFile("head.safetensors", "the authors' page"), "{sha256}", "CC-BY-4.0")
TAIL = Weights("tail", GivenFile("tail.safetensors", "the authors' page"), None, "MIT")

class Reward:
    differentiable, needs_prompt, languages, weights = True, False, (), (HEAD, TAIL)

    def __init__(self, device, dtype):
        self.scale = load_file(HEAD.path())["scale"]

    def __call__(self, images, prompts):
        return self.scale * images.mean((1, 2, 3))
"""
LENGTH = """
import torch

class Reward:
    differentiable, needs_prompt, languages = False, True, ("en",)

    def __init__(self, device, dtype, *, factor: float = 1.0, bad: bool = False):
        self.factor, self.bad = factor, bad

    def __call__(self, images, prompts):
        scores = images.mean((1, 2, 3)) + self.factor * torch.tensor([float(len(prompt)) for prompt in prompts])
        return scores / 0 if self.bad else scores
"""


@pytest.fixture
def mlcm(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("MLCM_RL_CACHE", str(tmp_path / "cache"))
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path):
    """Three pictures of grey 0, 51 and 255 (0, 0.2 and 1); the last is wider."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, value, width in (("a.png", 0, 8), ("b.png", 51, 8), ("c.png", 255, 12)):
        Image.new("RGB", (width, 8), (value,) * 3).save(folder / name)
    (folder / "notes.md").write_text("not a picture")
    return folder


def prompt_file(tmp_path, *prompts):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(prompts), encoding="utf-8")
    return path


def flat(text):
    """`text` without the line breaks and the frame of an error message."""
    return " ".join(text.replace("│", " ").split())


# ---- list and fetch ----


def test_show_prints_the_card_and_says_of_others_that_there_is_none(mlcm, installed):
    shown = mlcm("rewards", "show", "emoji_style")
    assert shown.exit_code == 0
    assert shown.output.startswith("# emoji_style")
    assert "| Hacked by |" in shown.output
    other = mlcm("rewards", "show", installed("wordy", LENGTH))
    assert other.exit_code == 2
    assert "wordy does not come with mlcm_rl" in flat(other.output)


def test_list_says_what_each_can_do_and_what_is_missing(mlcm, installed, tmp_path):
    head = tmp_path / "head.safetensors"
    save_file({"scale": torch.tensor(2.0)}, head)
    installed("weighty", WITH_WEIGHTS.format(sha256=hashlib.sha256(head.read_bytes()).hexdigest()))
    installed("wordy", LENGTH)
    installed("broken", "import a_package_that_nobody_has\n")
    lines = {line.split()[0]: line.split()[1:] for line in mlcm("rewards", "list").stdout.splitlines() if line.strip()}
    assert lines["brightness"] == ["yes", "not", "used", "none", "needed", "-"]
    assert lines["wordy"] == ["no", "en", "none", "needed", "-"]
    assert lines["weighty"] == ["yes", "not", "used", "to", "fetch", "CC-BY-4.0", "+", "MIT"]
    assert mlcm("rewards", "fetch", "weighty", "--from", head).exit_code == 0
    result = mlcm("rewards", "list")
    assert result.exit_code == 0
    assert "1 of 2 here" in next(line for line in result.stdout.splitlines() if "weighty" in line)
    assert "broken cannot be used: No module named 'a_package_that_nobody_has'" in result.stdout
    assert "mlcm rewards fetch NAME" in result.stdout


def test_fetch_puts_given_files_where_the_reward_finds_them(mlcm, installed, folder, tmp_path):
    head, tail = tmp_path / "head.safetensors", tmp_path / "tail.safetensors"
    save_file({"scale": torch.tensor(2.0)}, head)
    save_file({"scale": torch.tensor(3.0)}, tail)
    name = installed("weighty", WITH_WEIGHTS.format(sha256=hashlib.sha256(head.read_bytes()).hexdigest()))
    absent = mlcm("score", "--reward", name, "--images", folder)
    assert absent.exit_code == 1
    assert "run `mlcm rewards fetch weighty`" in absent.stderr
    alone = mlcm("rewards", "fetch", name)
    assert alone.exit_code == 1
    assert "no client can fetch head.safetensors from the authors' page" in alone.stderr
    result = mlcm("rewards", "fetch", name, "--from", head)
    saved = tmp_path / "cache" / "rewards" / "head" / "head.safetensors"
    assert (result.exit_code, result.stdout) == (0, f"ok  {saved}\n")
    assert mlcm("rewards", "fetch", name, "--from", tail).exit_code == 0  # not pinned: told by its name
    assert "here" in next(line for line in mlcm("rewards", "list").stdout.splitlines() if name in line)
    rows = [json.loads(line) for line in mlcm("score", "--reward", name, "--images", folder).stdout.splitlines()]
    assert [row["score"] for row in rows] == pytest.approx([0.0, 0.4, 2.0])


def test_fetch_of_a_file_that_is_none_of_the_weights_asks_which(mlcm, installed, tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({"scale": torch.tensor(1.0)}, other)
    name = installed("weighty", WITH_WEIGHTS.format(sha256="0" * 64))
    result = mlcm("rewards", "fetch", name, "--from", other)
    assert result.exit_code == 2
    assert "none of weighty's weights (head, tail) by its checksum: say which by --weights" in flat(result.stderr)
    result = mlcm("rewards", "fetch", name, "--from", other, "--weights", "head")
    assert result.exit_code == 1
    assert "not the pinned 0000" in result.stderr
    assert mlcm("rewards", "fetch", name, "--weights", "hed").exit_code == 2


def test_a_reward_without_weights_has_nothing_to_fetch(mlcm):
    assert mlcm("rewards", "fetch", "brightness").stdout == "brightness needs no weights\n"


def commands_of(name: str, folder) -> list[tuple]:
    """Every command that takes a reward's name."""
    return [("rewards", "check", name), ("rewards", "fetch", name), ("score", "--reward", name, "--images", folder)]


def test_an_unknown_reward_is_a_bad_argument_with_the_nearest_name(mlcm, folder):
    for arguments in commands_of("brightnes", folder):
        result = mlcm(*arguments)
        assert result.exit_code == 2
        assert "no reward model is called brightnes; did you mean brightness?" in flat(result.stderr)


@pytest.mark.parametrize(
    ("source", "message", "line"),
    [
        ("x = 1\nundefined\n", "NameError: name 'undefined' is not defined", 2),
        ("x = 1\nx = = 2\n", "SyntaxError: invalid syntax", 2),
        (b"x = 1\ny = '\xff'\n", "SyntaxError: (unicode error) 'utf-8' codec can't decode byte 0xff", 2),
        ("raise RuntimeError('needs cuda')\n", "RuntimeError: needs cuda", 1),
        ("import a_package_that_nobody_has\n", "No module named 'a_package_that_nobody_has'", 1),
        ("import sys\n\nsys.exit()\n", "it would end the program: SystemExit()", 3),
    ],
)
def test_a_reward_that_does_not_import_is_named_with_its_file_and_line(
    mlcm, installed, folder, tmp_path, source, message, line
):
    installed("odd", source)
    for arguments in commands_of("odd", folder):
        result = mlcm(*arguments)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"failed  reward odd cannot be used: {message}"), result.stderr
        assert result.stderr.endswith(f" ({tmp_path / 'site' / 'odd_reward.py'}, line {line})\n")
    result = mlcm("rewards", "list")
    assert result.exit_code == 0
    assert f"reward odd cannot be used: {message}" in result.stdout
    assert any(row.split()[:1] == ["brightness"] for row in result.stdout.splitlines())


def test_a_file_with_a_null_byte_is_named(mlcm, installed):
    installed("odd", "x = 1\0\n")
    result = mlcm("rewards", "fetch", "odd")
    assert result.exit_code == 1
    assert "reward odd cannot be used: SyntaxError: source code" in result.stderr
    assert "odd_reward.py" in result.stderr or "odd-reward" in result.stderr  # Python 3.11 does not say the file


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("        scores = images", "reward wordy failed: it would end the program: SystemExit(0)"),
        ("        self.factor,", "reward wordy cannot be built: it would end the program: SystemExit(0)"),
    ],
)
def test_a_reward_that_would_end_the_program_is_an_error(mlcm, installed, folder, tmp_path, place, said):
    installed("wordy", LENGTH.replace(place, f"        raise SystemExit(0)\n{place}"))
    result = mlcm("score", "--reward", "wordy", "--images", folder, "--prompts", prompt_file(tmp_path, "a"))
    assert (result.exit_code, said in flat(result.stderr)) == (1, True), result.stderr


# ---- check ----


def test_check_of_a_folder_of_too_few_pictures_is_refused(mlcm, tmp_path):
    refused = mlcm("rewards", "check", "brightness", "--images", str(tmp_path))
    assert refused.exit_code == 2
    assert "holds 0 pictures (" in flat(refused.stderr)
    assert "must hold 2" in flat(refused.stderr)


def test_check_prints_a_line_a_check_and_ends_with_0(mlcm):
    result = mlcm("rewards", "check", "brightness")
    assert result.exit_code == 0
    for name in ("contract", "determinism", "batch invariance", "sizes", "prompt", "gradient", "range"):
        assert any(line.split(name)[-1].split()[:1] == ["ok"] for line in result.stdout.splitlines() if name in line)
    assert "brightness on 6 drawn pictures" in result.stdout
    assert "--prompts" not in result.stdout  # it reads none


def test_check_ends_with_1_when_one_fails(mlcm, installed):
    installed("wordy", LENGTH)
    result = mlcm("rewards", "check", "wordy", "--setting", "factor=0")
    assert result.exit_code == 1
    assert "declares needs_prompt, and other prompts change nothing" in flat(result.stdout)


def test_a_reward_that_refuses_the_example_prompts_is_checked_with_others(mlcm, installed, tmp_path):
    place = "        scores = images"
    installed("wordy", LENGTH.replace(place, f"        assert 'cat' in prompts[0], 'no cat'\n{place}"))
    result = mlcm("rewards", "check", "wordy")
    assert (result.exit_code, "no cat" in flat(result.stdout)) == (1, True)
    assert "example prompts; --prompts FILE takes others" in flat(result.stdout)
    result = mlcm("rewards", "check", "wordy", "--prompts", prompt_file(tmp_path, "a cat"))
    assert "example prompts" not in flat(result.stdout)


def test_check_looks_at_real_pictures_and_prompts(mlcm, installed, folder, tmp_path):
    installed("wordy", LENGTH)
    prompts = prompt_file(tmp_path, "a", "猫", "bbb")  # the middle one is in a language that it does not read
    result = mlcm("rewards", "check", "wordy", "--images", folder, "--prompts", prompts)
    assert result.exit_code == 0, result.stdout
    assert "1 to 3.2, mean 2.067" in result.stdout  # 0 + 1, 0.2 + 3, 1 + 1
    assert f"wordy on 3 pictures of {folder}, 256 x 256" in result.stdout
    chinese = prompt_file(tmp_path, "猫")
    result = mlcm("rewards", "check", "wordy", "--images", folder, "--prompts", chinese)
    assert result.exit_code == 2
    assert "holds no prompt in en" in flat(result.stderr)


# ---- score ----


def test_score_prints_a_line_a_picture_and_sums_up_on_the_other_stream(mlcm, folder):
    result = mlcm("score", "--reward", "brightness", "--images", folder)
    assert result.exit_code == 0
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["file"], row["prompt"]) for row in rows] == [("a.png", ""), ("b.png", ""), ("c.png", "")]
    assert [row["score"] for row in rows] == pytest.approx([0.0, 0.2, 1.0])
    assert "brightness: 3 pictures, mean 0.4, deviation 0.529, 0 to 1" in result.stderr


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_score_writes_prompts_and_scores_in_the_order_of_the_names(mlcm, installed, folder, tmp_path, suffix):
    installed("wordy", LENGTH)
    out = tmp_path / f"scores{suffix}"
    prompts = prompt_file(tmp_path, "a", "猫", 'three, "quoted"')
    arguments = ("--prompts", prompts, "--out", out, "--setting", "factor=10")
    result = mlcm("score", "--reward", "wordy", "--images", folder, *arguments)
    assert (result.exit_code, result.stdout) == (0, f"{out}\n")
    assert "2 pictures, mean 80.5" in result.stderr
    assert "1 prompts in a language that it does not read" in result.stderr
    if suffix == ".csv":
        with out.open(encoding="utf-8", newline="") as file:
            rows = [{**row, "score": float(row["score"]) if row["score"] else None} for row in csv.DictReader(file)]
    else:
        rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert rows == [
        {"file": "a.png", "prompt": "a", "score": 10.0},
        {"file": "b.png", "prompt": "猫", "score": None},
        {"file": "c.png", "prompt": 'three, "quoted"', "score": 151.0},
    ]


def test_score_writes_over_no_folder(mlcm, folder, tmp_path):
    kept = tmp_path / "kept.csv"
    kept.mkdir()
    result = mlcm("score", "--reward", "brightness", "--images", folder, "--out", kept)
    assert result.exit_code == 2
    assert kept.is_dir()


def test_one_prompt_is_for_all_pictures_and_the_batch_changes_nothing(mlcm, installed, folder, tmp_path):
    installed("wordy", LENGTH)
    prompts = prompt_file(tmp_path, "four")
    outputs = {
        mlcm("score", "--reward", "wordy", "--images", folder, "--prompts", prompts, "--batch-size", size).stdout
        for size in (1, 2, 16)
    }
    assert len(outputs) == 1
    assert [json.loads(line)["score"] for line in outputs.pop().splitlines()] == pytest.approx([4.0, 4.2, 5.0])


def test_transparent_pictures_are_scored_on_white(mlcm, tmp_path):
    pixels = numpy.zeros((4, 4, 4), dtype=numpy.uint8)
    pixels[:2, :, 3] = 255  # the upper half black, the lower half clear
    Image.fromarray(pixels).save(tmp_path / "half.png")
    result = mlcm("score", "--reward", "brightness", "--images", tmp_path)
    assert json.loads(result.stdout)["score"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--out", "scores.txt"), 2, "must end in .jsonl or .csv"),
        (("--setting", "factor"), 2, "expected KEY=VALUE, found 'factor'"),
        (("--setting", "facto=2"), 2, "unknown setting 'facto'; did you mean factor?"),
        (("--setting", "factor=red"), 2, "the setting 'factor': expected a number, found 'red'"),
        (("--device", "abacus"), 2, "device: abacus is not available here: write device: auto or cpu"),
        (("--device", "meta"), 2, "device: meta is not available here: write device: auto or cpu"),
        (("--device", "cuda:99"), 2, "device: cuda:99 is not available here: write device: auto or cpu"),
        (("--device", "cpu:x"), 2, "device: cpu:x is not available here: write device: auto or cpu"),
        ((), 2, "wordy depends on prompts"),
        (("--prompts", "two.txt"), 2, "2 prompts for 3 pictures"),
        (("--prompts", "one.txt", "--setting", "bad=true"), 1, "reward wordy: returned inf for prompt 'one'"),
    ],
)
def test_what_cannot_be_scored_ends_with_its_reason(mlcm, installed, folder, monkeypatch, arguments, code, said):
    installed("wordy", LENGTH)
    monkeypatch.chdir(folder)
    (folder / "one.txt").write_text("one")
    (folder / "two.txt").write_text("one\ntwo")
    result = mlcm("score", "--reward", "wordy", "--images", folder, *arguments)
    assert (result.exit_code, said in flat(result.stderr)) == (code, True), result.stderr


def test_ctrl_c_ends_with_130(mlcm, installed, folder):
    installed("wordy", LENGTH.replace("scores = images", "raise KeyboardInterrupt\n        scores = images"))
    result = mlcm("score", "--reward", "wordy", "--images", folder, "--prompts", prompt_file(folder, "a"))
    assert (result.exit_code, "Interrupted." in result.stderr) == (130, True)


def test_a_file_that_is_no_picture_and_a_folder_without_any_are_said(mlcm, folder, tmp_path):
    (folder / "aa.png").write_text("text")
    (folder / "._a.png").write_text("what macOS leaves beside a picture")
    result = mlcm("score", "--reward", "brightness", "--images", folder)
    assert result.exit_code == 1
    assert [json.loads(line)["file"] for line in result.stdout.splitlines()] == ["a.png", "b.png", "c.png"]
    assert "brightness: 3 pictures, mean 0.4" in result.stderr
    assert "1 of 4 pictures have no score" in result.stderr
    assert "aa.png is not a readable picture (none of PNG, JPEG, WEBP, GIF, BMP, or damaged)\n" in result.stderr
    (tmp_path / "empty").mkdir()
    result = mlcm("score", "--reward", "brightness", "--images", tmp_path / "empty")
    assert result.exit_code == 2
    assert "holds 0 pictures" in flat(result.stderr)


def test_the_good_scores_are_written_and_what_has_none_is_named(mlcm, installed, folder, tmp_path):
    source = LENGTH.replace(
        "        scores = images", "        assert images.max() < 1, 'too light'\n        scores = images"
    )
    installed("wordy", source)
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:45])
    out, prompts = tmp_path / "scores.jsonl", prompt_file(tmp_path, "a")
    result = mlcm("score", "--reward", "wordy", "--images", folder, "--prompts", prompts, "--out", out)
    assert result.exit_code == 1
    assert [json.loads(line)["file"] for line in out.read_text("utf-8").splitlines()] == ["a.png"]
    assert "b.png is not a readable picture" in result.stderr
    assert "c.png: reward wordy failed: AssertionError: too light" in result.stderr
    assert "2 of 3 pictures have no score" in result.stderr


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_name_that_is_no_unicode_costs_no_score(mlcm, folder, tmp_path, suffix):
    odd = os.fsdecode(b"odd\xff.png")
    Image.new("RGB", (8, 8)).save(folder / odd)
    out = tmp_path / f"scores{suffix}"
    assert mlcm("score", "--reward", "brightness", "--images", folder, "--out", out).exit_code == 0
    text = out.read_text(encoding="utf-8")
    lines = text.splitlines()[suffix == ".csv" :]
    assert len(lines) == 4
    assert any("odd\\udcff.png" in line for line in lines)
    if suffix == ".jsonl":
        assert odd in [json.loads(line)["file"] for line in lines]


def test_a_picture_that_a_reward_refuses_costs_its_neighbours_nothing(mlcm, installed, tmp_path):
    installed(
        "wordy", LENGTH.replace("        scores = images", "        assert images.max() < 1\n        scores = images")
    )
    for name, value in (("a", 0), ("b", 255), ("c", 51)):
        Image.new("RGB", (8, 8), (value,) * 3).save(tmp_path / f"{name}.png")
    result = mlcm("score", "--reward", "wordy", "--images", tmp_path, "--prompts", prompt_file(tmp_path, "a"))
    scores = {row["file"]: row["score"] for row in map(json.loads, result.stdout.splitlines())}
    assert (result.exit_code, scores) == (1, {"a.png": 1.0, "c.png": pytest.approx(1.2)})


def test_large_pictures_are_asked_one_by_one(tmp_path):
    asked = []

    class Counting:
        differentiable, needs_prompt, languages = False, False, ()

        def __call__(self, images, prompts):
            asked.append(tuple(images.shape))
            return images.mean((1, 2, 3))

    def score_all(size):
        for i in range(4):
            Image.new("RGB", size).save(tmp_path / f"{i}.png", compress_level=1)
        files = picture_files(tmp_path)
        asked.clear()
        return [row.score for row in score_files(Counting(), "c", files, [Prompt("", "")] * 4, 16)]

    assert score_all((2048, 1200)) == [0.0] * 4
    assert asked == [(1, 3, 1200, 2048)] * 4
    assert score_all((1024, 1024)) == [0.0] * 4
    assert asked == [(4, 3, 1024, 1024)]


def test_prompts_that_a_reward_cannot_score_are_named_before_the_first_picture(mlcm, installed, folder, tmp_path):
    refuse = "    def refuse_prompt(self, prompt, aspect):\n        if 'b' in prompt: raise ValueError('has a b')\n\n"
    installed("wordy", LENGTH.replace("    def __call__", f"{refuse}    def __call__"))
    prompts = prompt_file(tmp_path, "a", "bb", "猫 b")
    for command in (("score", "--reward", "wordy"), ("rewards", "check", "wordy")):
        result = mlcm(*command, "--images", folder, "--prompts", prompts)
        assert result.exit_code == 2
        assert "reward wordy cannot score 1 of the prompts:" in flat(result.stderr)
        assert "prompts.txt:2: has a b." in flat(result.stderr)


def test_rewards_run_on_the_best_device_that_is_here(mlcm, folder, monkeypatch):
    asked = []
    monkeypatch.setattr(reward_commands, "device_of", lambda name: asked.append(name) or torch.device("cpu"))
    assert mlcm("score", "--reward", "brightness", "--images", folder).exit_code == 0
    assert mlcm("rewards", "check", "brightness").exit_code == 0
    assert mlcm("rewards", "check", "brightness", "--device", "cpu").exit_code == 0
    assert asked == ["auto", "auto", "cpu"]


def test_help_of_the_reward_commands_imports_no_torch():
    code = (
        "import sys; from mlcm_rl.cli.app import app\n"
        "try: app({arguments}, prog_name='mlcm')\n"
        "except SystemExit: sys.exit('torch' in sys.modules)"
    )
    for arguments in (["rewards", "--help"], ["rewards", "check", "--help"], ["score", "--help"]):
        done = subprocess.run([sys.executable, "-c", code.format(arguments=arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "reward" in done.stdout
