"""Pair tables: read from a folder or a Parquet file alike, errors with their row, written from a run's samples."""

import json
import os
import re
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from typer.testing import CliRunner

import runs
from mlcm_rl import pipeline, rewards
from mlcm_rl.cli.app import app
from mlcm_rl.cost import evaluations
from mlcm_rl.data.pairs import PairTable
from mlcm_rl.data.picture_files import pixels, read_picture, square
from mlcm_rl.data.prompts import Prompt
from mlcm_rl.models import pictures
from mlcm_rl.pipeline import finished_runs
from mlcm_rl.pipeline.fingerprint import locate
from mlcm_rl.preference import labels, ranking
from mlcm_rl.recipe import Reward
from mlcm_rl.storage import files

FEATURES = datasets.Features(
    {"prompt": datasets.Value("string"), "chosen": datasets.Image(), "rejected": datasets.Image()}
)


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(runs.write_pairs(tmp_path / "pairs"))


@pytest.fixture(scope="module")
def run(tiny_sdxl, tmp_path_factory) -> Path:
    """The folder of a run that has a distilled student."""
    folder = tmp_path_factory.mktemp("run")
    recipe = runs.recipe(
        tiny_sdxl, folder, [runs.trajectories(runs.write_prompts(folder)), runs.distill(num_segments=[2])]
    )
    pipeline.run(recipe)
    return Path(recipe.runs, recipe.name)


def image(path: Path) -> torch.Tensor:
    """(3, H, W) in [0, 1]."""
    return pixels(read_picture(path, str(path))) / 255


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]


def rewrite(folder: Path, rows: list) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


# ---- read ----


def test_a_folder_is_read_in_its_order_and_pictures_come_at_the_size_that_is_asked_for(folder):
    table = PairTable(folder)
    assert [prompt.prompt for prompt in table.prompts] == runs.PROMPTS
    assert [prompt.language for prompt in table.prompts] == ["en", "en", "zh", "en", "zh", "en"]
    chosen, rejected = table.pictures(2, resolution=8)
    assert torch.equal(chosen, torch.tensor([210, 220, 210], dtype=torch.uint8).view(3, 1, 1).expand(3, 8, 8))
    assert torch.equal(rejected, torch.tensor([30, 20, 20], dtype=torch.uint8).view(3, 1, 1).expand(3, 8, 8))


def test_a_parquet_file_with_trls_columns_is_the_same_table(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where `datasets` looks for relative names as it writes
    rows = rows_of(folder)
    columns = {name: [row[name] for row in rows] for name in ("prompt", "chosen", "rejected")}
    for name in ("chosen", "rejected"):
        columns[name] = [f"{folder.name}/{file}" for file in columns[name]]
    datasets.Dataset.from_dict(columns, features=FEATURES).to_parquet(str(tmp_path / "pairs.parquet"))
    bare = {"prompt": columns["prompt"]}  # as another program writes it: encoded pictures and no metadata
    bare |= {name: [(tmp_path / path).read_bytes() for path in columns[name]] for name in ("chosen", "rejected")}
    pyarrow.parquet.write_table(pyarrow.table(bare), tmp_path / "bare.parquet")
    table = PairTable(folder)
    for file in ("pairs.parquet", "bare.parquet"):
        again = PairTable(tmp_path / file)
        assert again.prompts == table.prompts
        assert all(torch.equal(again.pictures(i, 16), table.pictures(i, 16)) for i in range(len(table)))


def test_a_language_that_a_table_gives_is_not_guessed(folder):
    rewrite(folder, [row | {"language": "de"} for row in rows_of(folder)])
    assert {prompt.language for prompt in PairTable(folder).prompts} == {"de"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": " "}, r"metadata\.jsonl:2: prompt must be text that is not empty"),
        ({"chosen": None}, r"metadata\.jsonl:2: chosen must be text, got None"),
        ({"rejected": "none.png"}, r"metadata\.jsonl:2: there is no picture .*none\.png"),
        ({"language": 3}, r"metadata\.jsonl:2: language must be text, got 3"),
    ],
)
def test_a_wrong_row_of_a_folder_is_told_with_its_line(folder, change, message):
    first, second, *rest = rows_of(folder)
    rewrite(folder, [first, second | change, *rest])
    with pytest.raises(ValueError, match=message):
        PairTable(folder)


def test_a_picture_that_is_none_is_told_with_its_row(folder, tmp_path):
    (folder / "1-dark.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"metadata\.jsonl:2: rejected is not a readable picture"):
        PairTable(folder).pictures(1, 8)
    columns = {"prompt": ["a cat"], "chosen": [None], "rejected": [None]}
    datasets.Dataset.from_dict(columns, features=FEATURES).to_parquet(str(tmp_path / "none.parquet"))
    with pytest.raises(ValueError, match=r"none\.parquet: row 0: there is no chosen picture"):
        PairTable(tmp_path / "none.parquet").pictures(0, 8)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": ["a"], "chosen": [b""]}, "there is no column rejected; it has prompt, chosen"),
        ({"prompt": ["a"], "chosen": ["a.png"], "rejected": ["b.png"]}, "the column chosen holds .*, not pictures"),
        ({"prompt": [None], "chosen": [b""], "rejected": [b""]}, "row 0: prompt must be text that is not empty"),
        ({"prompt": [], "chosen": [], "rejected": []}, "holds no pairs|not pictures"),
    ],
)
def test_a_parquet_file_that_is_no_pair_table_is_told(tmp_path, columns, message):
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "table.parquet")
    with pytest.raises(ValueError, match=message):
        PairTable(tmp_path / "table.parquet")


@pytest.mark.parametrize("name", ["prompt", "chosen", "language"])
def test_a_column_that_a_table_has_twice_is_told(tmp_path, name):
    columns = {"prompt": ["a"], "chosen": [b"a"], "rejected": [b"b"], "language": ["en"]}
    values = [pyarrow.array(columns[one]) for one in (*columns, name)]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(values, [*columns, name]), tmp_path / "table.parquet")
    with pytest.raises(ValueError, match=rf"table\.parquet: .*there are several columns {name}: leave one"):
        PairTable(tmp_path / "table.parquet")


def test_a_long_name_of_a_picture_is_quoted_short(folder):
    first, *rest = rows_of(folder)
    rewrite(folder, [first | {"chosen": "x" * 10**6}, *rest])
    with pytest.raises(ValueError, match="there is no picture 'x") as error:
        PairTable(folder)
    assert len(str(error.value)) < 500


def test_what_is_no_table_at_all_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        PairTable(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(ValueError, match="read from a Parquet file or a folder"):
        PairTable(tmp_path / "text.parquet")
    (tmp_path / "metadata.jsonl").touch()
    with pytest.raises(ValueError, match="holds no pairs"):
        PairTable(tmp_path)


def test_rows_whose_two_pictures_are_the_same_are_left_out_and_named(folder, tmp_path, capsys):
    rows = rows_of(folder)
    rows[1]["rejected"] = rows[1]["chosen"]
    (folder / rows[4]["rejected"]).write_bytes((folder / rows[4]["chosen"]).read_bytes())
    rewrite(folder, rows)
    columns = {"prompt": [row["prompt"] for row in rows]}
    columns |= {name: [(folder / row[name]).read_bytes() for row in rows] for name in ("chosen", "rejected")}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    for path, places in ((folder, "jsonl:2; .*jsonl:5"), (tmp_path / "t.parquet", "row 1; .*row 4")):
        table = PairTable(path)
        assert [prompt.prompt for prompt in table.prompts] == [runs.PROMPTS[i] for i in (0, 2, 3, 5)]
        assert torch.equal(table.pictures(1, 8)[0], square(read_picture(folder / rows[2]["chosen"], ""), 8))
        message = rf"2 of 6 pairs are left out, where the chosen picture is the rejected one: .*{places}\n"
        assert re.search(message, capsys.readouterr().out)
    rewrite(folder, [rows[1]])
    with pytest.raises(ValueError, match=r"holds no pairs of two pictures; .*jsonl:1"):
        PairTable(folder)


def test_every_missing_picture_is_told(folder):
    for name in ("1-dark.png", "2-light.png"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"jsonl:2: there is no picture .*1-dark\.png; .*jsonl:3: .*2-light\.png$"):
        PairTable(folder)


def test_bytes_where_a_prompt_belongs_are_not_printed_whole(tmp_path):
    columns = {"prompt": [b"\x89PNG" * 10**6], "chosen": [b"a"], "rejected": [b"b"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="row 0: prompt must be text that is not empty, got b'") as error:
        PairTable(tmp_path / "t.parquet")
    assert len(str(error.value)) < 500


# ---- what a stage on a table is and costs ----


def test_a_stage_is_found_by_the_content_of_its_table_and_takes_no_samples(tiny_sdxl, tmp_path, folder):
    prompts = runs.write_prompts(tmp_path)
    stage = runs.tuning("dpo", prompts, pairs=str(folder))
    recipe = runs.recipe(tiny_sdxl, tmp_path, [runs.trajectories(prompts), runs.distill(), stage])
    before = locate(stage, recipe, []).fingerprint
    new_folder = folder.rename(tmp_path / "moved")
    stage = stage.model_copy(update={"pairs": str(new_folder)})
    assert locate(stage, recipe, []).fingerprint == before
    rewrite(new_folder, rows_of(new_folder)[:-1])
    assert locate(stage, recipe, []).fingerprint != before
    own = runs.tuning("dpo", prompts)
    assert evaluations.evaluations_of(stage.step(1, 1)) == 2 * 2 * 2  # two times; pair; student, reference
    assert evaluations.evaluations_of(own.step(1, 1)) == 2 * 2 * 2 + 4 * 2


# ---- made ----


def make(run: Path, out: Path, **changes) -> tuple[int, int]:
    prompts = runs.write_prompts(run)
    settings = {"num_prompts": 5, "num_generations": 3, "num_steps": 2, "min_margin": 0.0, "seed": 0, "batch_size": 6}
    return finished_runs.pairs(run, Path(prompts), out=out, **({"reward": "brightness"} | settings | changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_best_of_a_prompts_samples_is_chosen_and_the_worst_rejected(tmp_path):
    images = torch.tensor([0.0, 0.2, 0.4, 0.6]).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    settings = ranking.Asked("", "", "taste", num_generations=4, num_steps=1, gamma=1.0, min_margin=0.75, seed=0)
    scores = torch.tensor([0.25, 1.0, 0.0, 0.5])
    row = ranking.write_pair(settings, Prompt("a cat", "en"), images, scores, 7, tmp_path)
    assert row == {
        "prompt": "a cat",
        "language": "en",
        "chosen": "pictures/000007-chosen.png",
        "rejected": "pictures/000007-rejected.png",
        "chosen_score": 1.0,
        "rejected_score": 0.0,
    }
    assert image(tmp_path / row["chosen"]).unique().item() == pytest.approx(0.2)
    assert image(tmp_path / row["rejected"]).unique().item() == pytest.approx(0.4)
    assert (
        ranking.write_pair(settings, Prompt("a cat", "en"), images, 0.75 * scores, 8, tmp_path) is None
    )  # not beyond it
    assert not (tmp_path / "pictures" / "000008-chosen.png").exists()


def test_a_table_has_the_scores_of_its_pictures(run, tmp_path):
    assert make(run, tmp_path) == (5, 5)
    rows = rows_of(tmp_path)
    assert [row["prompt"] for row in rows] == runs.PROMPTS[:5]
    reward = rewards.build(Reward(name="brightness"), "cpu")
    for row in rows:
        both = torch.stack([image(tmp_path / row[name]) for name in ("chosen", "rejected")])
        expected = reward(both, [row["prompt"]] * 2).tolist()  # but for the rounding to 8 bits
        assert [row["chosen_score"], row["rejected_score"]] == pytest.approx(expected, abs=1 / 255)
        assert row["chosen_score"] > row["rejected_score"]
    assert len(PairTable(tmp_path)) == 5


def test_a_margin_leaves_out_the_nearer_pairs(run, tmp_path):
    make(run, tmp_path / "all")
    gaps = [row["chosen_score"] - row["rejected_score"] for row in rows_of(tmp_path / "all")]
    median = sorted(gaps)[2]
    assert make(run, tmp_path / "wide", min_margin=median) == (2, 5)
    prompts = [row["prompt"] for row in rows_of(tmp_path / "wide")]
    assert prompts == [prompt for prompt, gap in zip(runs.PROMPTS, gaps, strict=False) if gap > median]


def test_an_interrupted_table_goes_on_and_ends_as_an_uninterrupted_one(run, tmp_path, monkeypatch):
    make(run, tmp_path / "whole")
    sampled_prompts, original = [], ranking.ranked
    save_png, saved = pictures.save_png, iter(range(100))

    def save(image, path):
        if next(saved) == 5:  # in the middle of the third prompt, which is the second batch
            raise KeyboardInterrupt
        return save_png(image, path)

    with monkeypatch.context() as patched:
        patched.setattr(pictures, "save_png", save)
        with pytest.raises(KeyboardInterrupt):
            make(run, tmp_path / "cut")
    assert not (tmp_path / "cut" / "metadata.jsonl").exists()

    def ranked(*arguments):
        sampled_prompts.extend(prompt.prompt for prompt in arguments[4])
        return original(*arguments)

    monkeypatch.setattr(ranking, "ranked", ranked)
    make(run, tmp_path / "cut")
    assert sampled_prompts == runs.PROMPTS[2:5]
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    make(run, tmp_path / "cut", num_prompts=6)  # and a finished one takes more prompts
    assert sampled_prompts == runs.PROMPTS[2:6]
    assert len(rows_of(tmp_path / "cut")) == 6


def test_one_folder_holds_one_table(run, tmp_path):
    make(run, tmp_path / "made", num_prompts=1)
    with pytest.raises(pipeline.RunError, match="holds a table of num_steps 2, not 1; seed 0, not 3: take another"):
        make(run, tmp_path / "made", num_steps=1, seed=3)
    with pytest.raises(pipeline.RunError, match="not made by this command"):
        make(run, Path(runs.write_pairs(tmp_path / "given")))


def test_a_reward_that_does_not_read_a_prompt_is_refused_before_anything_is_drawn(run, tmp_path, monkeypatch):
    monkeypatch.setattr("reward_models.brightness.Brightness.needs_prompt", True)
    monkeypatch.setattr("reward_models.brightness.Brightness.languages", ("en",))
    with pytest.raises(pipeline.RunError, match="brightness reads prompts in en, not in zh"):
        make(run, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_prompt_that_the_reward_cannot_score_is_refused_before_anything_is_drawn(run, tmp_path, monkeypatch):
    def refuse_prompt(self, prompt, aspect):
        if prompt == "a dog":
            raise ValueError("no dogs")

    monkeypatch.setattr("reward_models.brightness.Brightness.refuse_prompt", refuse_prompt, raising=False)
    with pytest.raises(pipeline.RunError, match=r"brightness cannot score 1 of the prompts: .*prompts\.txt:2: no dogs"):
        make(run, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_command_says_how_many_pairs_were_kept_and_where(run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "table"
    arguments = ["--prompts", runs.write_prompts(tmp_path), "--out", str(out), "--num-prompts", "2", "--steps", "1"]
    result = CliRunner().invoke(app, ["pairs", str(run), *arguments, "--reward", "brightness"])
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, f"{out}  2 pairs of 2 prompts")
    result = CliRunner().invoke(app, ["pairs", str(run), *arguments, "--reward", "brightnes"])
    assert result.exit_code == 2
    assert "did you mean brightness?" in " ".join(result.stderr.replace("│", " ").split())


# ---- made by hand: the choices themselves and the page are in test_labels.py ----


def by_hand(run: Path, out: Path, judge, **changes) -> tuple[int, int]:
    """The command, with `judge(choices)` as the person at the page."""
    settings = {"num_prompts": 5, "num_steps": 2, "seed": 0, "batch_size": 4, "serve": judge}
    return finished_runs.pairs_by_hand(run, Path(runs.write_prompts(run)), out, **(settings | changes))


def prefer_left(choices) -> None:
    for number in range(len(choices.made()), len(choices)):
        choices.choose(number, "neither" if number == 1 else "left")


def test_a_table_made_by_hand_has_the_samples_of_the_student(run, tmp_path, monkeypatch):
    assert by_hand(run, tmp_path / "hand", prefer_left) == (4, 5)
    make(run, tmp_path / "reward", num_generations=2)  # of the same seeds
    table, same = PairTable(tmp_path / "hand"), PairTable(tmp_path / "reward")
    assert [prompt.prompt for prompt in table.prompts] == [runs.PROMPTS[i] for i in (0, 2, 3, 4)]
    for row, of_reward in enumerate((0, 2, 3, 4)):
        either = [same.pictures(of_reward, 16), same.pictures(of_reward, 16).flip(0)]
        assert any(torch.equal(table.pictures(row, 16), both) for both in either)


def test_choosing_goes_on_where_it_was_stopped_and_draws_nothing_again(run, tmp_path, monkeypatch):
    def stop(choices):
        choices.choose(0, "right")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        by_hand(run, tmp_path, stop)
    before = contents(tmp_path / "pictures")
    assert len(rows_of(tmp_path)) == 1
    with monkeypatch.context() as patched:
        patched.setattr(finished_runs.teachers, "load", None)  # the student is not even loaded
        assert by_hand(run, tmp_path, prefer_left) == (4, 5)
        assert by_hand(run, tmp_path, None) == (4, 5)  # all are judged: no page
    assert contents(tmp_path / "pictures") == before
    assert by_hand(run, tmp_path, prefer_left, num_prompts=6) == (5, 6)
    with pytest.raises(pipeline.RunError, match=r"holds a table of reward by hand, not brightness; .*take another"):
        make(run, tmp_path)


@pytest.mark.parametrize(
    ("progress", "message"),
    [
        ({}, "asked must be of type dict, is None"),
        ({"asked": 3}, "asked must be of type dict, is 3"),
        ({"asked": "ours"}, "rows must be of type list, is None"),
        ({"asked": "ours", "rows": {}}, "rows must be of type list, is {}"),
    ],
)
def test_a_damaged_progress_file_is_told_with_its_key(tmp_path, progress, message):
    settings = ranking.Asked("student", "prompts", "brightness", 2, 1, 1.0, 0.0, 0)
    content = progress | {"asked": asdict(settings)} if progress.get("asked") == "ours" else progress
    (tmp_path / "progress.json").write_text(json.dumps(content))
    with pytest.raises(files.CheckpointError, match=rf"progress\.json is damaged: {message}"):
        ranking.finished(settings, tmp_path)
    (tmp_path / "progress.json").write_text(json.dumps(content | {"choices": 3}))
    with pytest.raises(files.CheckpointError, match=r"progress\.json is damaged: (asked|choices) must be"):
        labels.Choices(settings, [], tmp_path)


def test_ctrl_c_ends_the_page_and_is_told_as_everywhere(run, tmp_path, monkeypatch):
    page = pytest.importorskip("mlcm_rl.cli.label_page", reason="the extra `label` is not installed")
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread only")

    def press(address):
        if "at http://127.0.0.1:" in address:  # the page is announced: the person gives up a second later
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()

    monkeypatch.setattr(page.console, "print", lambda text, **_: press(str(text)))
    arguments = ["--prompts", runs.write_prompts(tmp_path), "--out", str(tmp_path / "out"), "--num-prompts", "1"]
    result = CliRunner().invoke(app, ["pairs", str(run), *arguments, "--steps", "1", "--by-hand"])
    assert (result.exit_code, result.stderr) == (130, "\nInterrupted. The same command goes on where it was stopped.\n")


def test_without_the_extra_the_command_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "mlcm_rl.cli.label_page", raising=False)
    monkeypatch.delattr("mlcm_rl.cli.label_page", raising=False)
    arguments = ["--prompts", runs.write_prompts(run), "--out", str(tmp_path / "out"), "--by-hand"]
    result = CliRunner().invoke(app, ["pairs", str(run), *arguments])
    assert result.exit_code == 1
    assert "the page needs uvicorn, which is not installed: pip install 'mlcm-rl[label]'" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say who chooses: --reward NAME, or --by-hand for yourself"),
        (["--by-hand", "--reward", "brightness"], "--reward means nothing beside --by-hand"),
        (["--by-hand", "--min-margin", "0.1"], "--min-margin means nothing beside --by-hand"),
        (["--by-hand", "--num-generations", "3"], "--num-generations means nothing beside --by-hand"),
        (["--reward", "brightness", "--port", "8000"], "--port means nothing beside --reward"),
    ],
)
def test_who_chooses_is_said_once(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("COLUMNS", "200")
    options = ["--prompts", runs.write_prompts(tmp_path), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["pairs", str(tmp_path), *options, *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_a_made_table_trains_a_student(run, tmp_path):
    make(run, tmp_path / "pairs")
    recipe = finished_runs.recipe_of(finished_runs.find_stage(run, ("distill",)))
    stage = runs.tuning("dpo", recipe.stages[0].prompts, pairs=str(tmp_path / "pairs"))
    *_, tuned = pipeline.run(recipe.model_copy(update={"stages": [*recipe.stages, stage]}))
    log = [json.loads(line) for line in (tuned.folder / "log.jsonl").read_text().splitlines()]
    assert all(record["grad_norm"] > 0 for record in log)
    assert "guard/reward/brightness" in log[-1]
