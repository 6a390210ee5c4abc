"""Prompts in any script and of any length, through a whole run: nothing crashes, what is cut is said, pages hold."""

import io
import json
from pathlib import Path

import pytest
import torch

import runs
from mlcm_rl import pipeline
from mlcm_rl.data.prompts import read_prompts
from mlcm_rl.models import teachers
from mlcm_rl.pipeline import RunError, finished_runs
from mlcm_rl.recipe import Evaluate
from mlcm_rl.training import progress
from mlcm_rl.training.console import plain_console

LONG = "a cat " * 16_667  # 100,000 characters
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # joined by zero-width joiners
ODD = [
    "<script>alert(1)</script> & \"quoted\" 'twice'",
    "\x1b[31mred\x07\x08",
    "\u202eright to left\u202c",
    "قطة صغيرة",
    FAMILY,
    "[bold]not markup[/bold]",
    "../../escape.png",
    "e\u0301" * 40,
    "\U0010ffff\ufffe",
    LONG,
]
SECRET = "hf_secretsecretsecret"
PECULIAR = "Peculiar [/x] :cat: [bold]Person"


@pytest.fixture(scope="module")
def heard():
    """What the run says to people."""
    return io.StringIO()


@pytest.fixture(scope="module")
def run(tiny_sdxl, tmp_path_factory, heard) -> Path:
    """A whole run on the odd prompts, from a folder with a peculiar name and with a token in the environment."""
    folder = tmp_path_factory.mktemp("home") / PECULIAR
    folder.mkdir(parents=True)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ODD), encoding="utf-8")
    teacher = folder / "teacher"
    teacher.symlink_to(tiny_sdxl)
    evaluate = Evaluate(prompts=str(prompts), num_prompts=len(ODD), sampling_steps=[1], teacher_steps=[2], batch_size=4)
    stages = [
        runs.trajectories(str(prompts), num_trajectories=len(ODD)),
        runs.distill(num_steps=1, num_segments=[1]),
        evaluate,
    ]
    recipe = runs.recipe(teacher, folder, stages)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HF_TOKEN", SECRET)
        patched.setattr(progress, "console", plain_console(file=heard, width=200))
        progress.say_once.cache_clear()
        pipeline.run(recipe)
        finished_runs.export(Path(recipe.runs, recipe.name), folder / "exported")
    return Path(recipe.runs, recipe.name)


def test_truncation_is_told_once_a_run_with_the_longest_prompt(run, heard):
    told = [line for line in heard.getvalue().splitlines() if "longer than" in line]
    assert len(told) == 1
    assert f"prompts.jsonl: 3 of {len(ODD)} prompts are longer than the 24 tokens that the teacher reads" in told[0]
    assert f"The longest is number {len(ODD)}, of" in told[0]
    assert "'a cat a cat a cat" in told[0]
    assert len(told[0]) < 1000


def test_a_folder_with_brackets_and_colons_in_its_name_is_told_as_it_is(run, heard):
    lines = heard.getvalue().splitlines()
    for kind in ("trajectories", "distill", "evaluate"):
        (line,) = [line for line in lines if line.startswith(f"{kind} -> ")]
        assert Path(line.partition(" -> ")[2]).is_dir()
    assert (Path(line.partition(" -> ")[2]) / "report.html").is_file()


def test_the_page_shows_odd_prompts_as_text(run):
    page = (run / "02-evaluate" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &#34;quoted&#34;" in page


def test_what_is_shared_names_neither_a_folder_nor_a_token_of_this_machine(run):
    home = run.parents[1]
    shared = [run / "02-evaluate" / name for name in ("report.html", "report.json", "report.md")]
    shared += [path for path in (home / "exported").rglob("*") if path.is_file()]
    assert len(shared) > 10
    assert [path.name for path in shared if PECULIAR.encode() in path.read_bytes()] == []
    written = [path for path in home.rglob("*") if path.is_file()]
    assert [path.name for path in written if SECRET.encode() in path.read_bytes()] == []


def test_any_prompt_is_sampled_into_a_file_of_its_number(run, tmp_path):
    texts = ["", *ODD[:4], LONG]
    *made, sheet = finished_runs.sample(run, texts, [1], 0, None, tmp_path / "out")
    assert [path.name for path in made] == [f"{i:03d}-seed0-steps1.png" for i in range(len(texts))]
    assert sorted((tmp_path / "out").glob("[!.]*")) == [*made, sheet]
    with pytest.raises(RunError, match="--prompt: holds bytes that are not UTF-8"):
        finished_runs.sample(run, [b"\xff".decode("utf-8", "surrogateescape")], [1], 0, None, tmp_path / "out")


def test_half_a_surrogate_pair_is_refused_at_the_door_with_its_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a cat"}\n{"prompt": "\\ud83d"}\n{"prompt": "\\ud83d\\ude00"}\n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl:2: not Unicode: it holds half a surrogate pair"):
        read_prompts(path)


def test_a_long_prompt_is_what_its_first_tokens_are(run):
    base = teachers.load(finished_runs.recipe_of(finished_runs.find_stage(run, ("distill",))).teacher, "cpu")
    long, short = base.encode_prompts([LONG])["context"], base.encode_prompts([LONG[:60]])["context"]
    assert torch.equal(long, short)
    assert base.count_tokens(["", "ab"]) == [2, 4]
