"""`mlcm gallery` on planted runs: what they are called, what is refused, and a person's blind choices as a table."""

import json
from pathlib import Path

import pytest
from PIL import Image

import planted_evaluations
from mlcm_rl.data.pairs import PairTable
from mlcm_rl.pipeline import galleries
from mlcm_rl.pipeline.errors import BadArgument, RunError
from planted_evaluations import PROMPTS, colour

COLUMNS = ("one:student@2", "two:tuned@4")


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """The folders of two runs, each with a link to an evaluation that kept its pictures."""
    folders = []
    for name, scores in (("one", {"student": [0.1] * 4}), ("two", {"tuned": [0.2] * 4})):
        stage = planted_evaluations.write(tmp_path / "stages" / f"evaluate-{name}", scores, keeps=True)
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        (folders[-1] / "02-evaluate").symlink_to(stage)
    return folders


def test_runs_are_called_by_their_folders_and_stages_with_their_runs(runs, tmp_path):
    assert galleries.names_of([runs[0], runs[1] / "02-evaluate"]) == ["one", "two/02-evaluate"]
    assert galleries.names_of([Path("a/run"), Path("b/run")]) == ["a/run", "b/run"]
    found = galleries.gather([runs[0], runs[1] / "02-evaluate"], [], False)
    assert [column.name for column in found.columns if column.row.role == "student"] == [
        *("one:student@2", "one:student@4"),
        *("two/02-evaluate:tuned@2", "two/02-evaluate:tuned@4"),
    ]


def test_a_run_without_an_evaluation_and_steps_that_none_has_are_refused(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="empty holds no finished evaluate stage"):
        galleries.gather([tmp_path / "empty"], [], False)
    with pytest.raises(BadArgument, match="--steps: no student of these evaluations is at 7 or 9 steps"):
        galleries.gather(runs, [7, 9], False)
    with pytest.raises(BadArgument, match="one is named twice: name each run once"):
        galleries.gather([*runs, runs[0]], [], False)


def test_a_page_or_a_folder_is_written_and_nothing_but_a_gallery_is_replaced(runs, tmp_path):
    found = galleries.gather(runs, [], False)
    page, size = galleries.write(found, "title", tmp_path / "out.html", 64)
    assert (page, size) == (tmp_path / "out.html", page.stat().st_size)
    for _ in range(2):  # again, over the first
        page, size = galleries.write(found, "title", tmp_path / "out", 64)
        assert page == tmp_path / "out" / "index.html"
        assert size == sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.*"))
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(BadArgument, match="holds other things than a gallery"):
        galleries.write(found, "title", tmp_path / "out", 64)
    assert (tmp_path / "out" / "mine.txt").exists()
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(BadArgument, match=r"--out: .*folder.html is a folder; name a new file"):
        galleries.write(found, "title", tmp_path / "folder.html", 64)


def test_blind_choices_are_a_table_of_pairs_with_the_pictures_that_were_chosen(runs, tmp_path):
    found, out = galleries.gather(runs, [], False), tmp_path / "table"

    def serve(choices):
        for number in range(3):  # the first column's picture twice, then the second's; the last is left
            wanted = int(number == 2)
            side = next(side for side in ("left", "right") if choices.sample_at(number, side) == wanted)
            choices.choose(number, side)

    choices = galleries.choose_blindly(found, COLUMNS, out, 0, serve)
    assert choices.counts() == (2, 1, 0)
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text("utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == [text for text, _ in PROMPTS[:3]]
    expected = [("student-2-0", "tuned-4-0"), ("student-2-0", "tuned-4-0"), ("tuned-4-0", "student-2-0")]
    for number, (row, names) in enumerate(zip(rows, expected, strict=True)):
        for key, name in zip(("chosen", "rejected"), names, strict=True):
            with Image.open(out / row[key]) as image:
                assert image.getpixel((0, 0)) == colour(name, number, 0)
    assert len(PairTable(out)) == 3
    assert galleries.verdict(choices, COLUMNS) == (
        "one:student@2 was preferred 2 times, two:tuned@4 1 time, neither 0 times; two-sided sign test: p = 1."
    )
    again = galleries.choose_blindly(found, COLUMNS, out, 0, lambda choices: choices.choose(3, "neither"))
    assert again.counts() == (2, 1, 1)
    galleries.choose_blindly(found, COLUMNS, out, 0, lambda choices: pytest.fail("all are judged"))
    with pytest.raises(RunError, match="holds a table of first one:student@2, not one:student@4"):
        galleries.choose_blindly(found, ("one:student@4", COLUMNS[1]), out, 0, serve)


def test_columns_that_are_not_there_or_have_nothing_to_choose_between_are_refused(runs, tmp_path):
    found = galleries.gather(runs, [], False)
    for names, message in (
        (("one:student@2", "two:tuned@5"), "there is no column 'two:tuned@5'; the nearest are 'two:tuned@4', "),
        (("one:student@2", "one:student@2"), "are not two columns with pictures of one prompt"),
    ):
        with pytest.raises(BadArgument, match=message):
            galleries.choose_blindly(found, names, tmp_path / "table", 0, lambda choices: None)
    for column in found.columns[:2]:
        for cell in column.cells.values():
            Image.new("RGB", (8, 8)).save(cell.path)
    with pytest.raises(BadArgument, match=r"the pictures of one:student@2 and one:student@4 are equal"):
        galleries.choose_blindly(found, ("one:student@2", "one:student@4"), tmp_path / "table", 0, lambda choices: None)
    assert not (tmp_path / "table").exists()
