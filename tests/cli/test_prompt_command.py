"""`mlcm prompts`: the counts that it prints, the lines that it lists, the file that it writes."""

from pathlib import Path

import pytest
from rich.cells import cell_len
from typer.testing import CliRunner

from mlcm_rl.cli.app import app
from mlcm_rl.data.prompts import read_prompts

LINES = ["a red apple", "A red apple.", "红苹果在桌子上", "红苹果 在桌子上。", "a cat", "赤いりんごです"]


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{line}\n" for line in LINES), encoding="utf-8")
    return path


def called(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["prompts", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


def test_prompts_are_counted_by_language(file):
    rows = [line.split() for line in called(file).splitlines()]
    assert rows[0] == ["language", "prompts", "duplicate", "kept", "longest"]
    assert rows[1:] == [
        ["en", "3", "1", "2", "11"],
        ["ja", "1", "0", "1", "7"],
        ["zh", "2", "1", "1", "7"],
        ["all", "6", "2", "4", "11"],
    ]


def test_what_a_file_holds_does_not_move_the_cursor(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a \\u001b[31m cat\\nsecond\u3000猫", "language": "x\\u001b[2J"}\n', encoding="utf-8")
    printed = called(path, "--omitted", "--language", "zh", code=1)
    assert "\x1b" not in printed
    assert "a \\x1b[31m cat\\nsecond\u3000猫" in printed


def test_columns_stand_below_each_other_whatever_the_script(file, tmp_path):
    named = tmp_path / "named.jsonl"
    named.write_text('{"prompt": "a", "language": "中文"}\n{"prompt": "b", "language": "en"}\n', encoding="utf-8")
    assert len({cell_len(line.rstrip(" ")) for line in called(named).splitlines()}) == 1


def test_lines_that_are_left_out_are_listed_with_their_reasons(file):
    listed = called(file, "--omitted", "--language", "en", "--language", "zh").splitlines()
    assert listed[:3] == [
        f"{file}:2  duplicate {file}:1  A red apple.",
        f"{file}:4  duplicate {file}:3  红苹果 在桌子上。",
        f"{file}:6  other language  赤いりんごです",
    ]


def test_what_is_kept_is_written_once(file, tmp_path):
    out = tmp_path / "kept.txt"
    assert f"ok  {out}" in called(file, "--out", out, "--language", "zh", "--min-length", 3, "--matching", "苹果")
    assert [one.prompt for one in read_prompts(out)] == ["红苹果在桌子上"]
    assert "there already; name a new file" in called(file, "--out", out, code=2)
    rest = tmp_path / "rest.jsonl"
    called(file, "--not-in", out, "--not-matching", "CAT", "--max-length", 20, "--out", rest)
    assert [one.prompt for one in read_prompts(rest)] == ["a red apple", "赤いりんごです"]


@pytest.mark.parametrize(
    ("arguments", "causes"),
    [
        (["--language", "ko"], "--language left out 6 (other language)"),
        (["--min-length", 900], "--min-length or --max-length left out 6 (length)"),
        (["--not-matching", "."], "--matching or --not-matching left out 6 (wording)"),
        (
            ["--language", "en", "--matching", "dog"],
            "--matching or --not-matching left out 3 (wording); --language left out 3 ",
        ),
    ],
)
def test_where_no_line_is_left_it_is_said_by_which_filter_and_nothing_is_written(file, tmp_path, arguments, causes):
    out = tmp_path / "kept.txt"
    for more in ([], ["--out", out]):
        text = " ".join(called(file, *arguments, *more, code=1).split())
        assert f"bad none of 6 lines is left, and nothing is written: {causes}" in text
    assert not out.exists()


def test_where_another_file_has_every_line_it_is_said(file):
    assert "left, and nothing is written: --not-in left out 6 (in another file)" in " ".join(
        called(file, "--not-in", file, code=1).split()
    )


def test_wrong_arguments_are_one_line(file, tmp_path):
    assert "is not a regular expression" in " ".join(called(file, "--matching", "(", code=2).split())
    (tmp_path / "bad.jsonl").write_text('{"promt": "x"}\n')
    assert "bad.jsonl:1: unknown key 'promt'" in called(tmp_path / "bad.jsonl", code=2)


def test_another_name_of_a_language_is_answered_with_its_code(file):
    printed = called(file, "--language", "cn", "--language", "en")
    assert "--language cn: no prompt is in it, they are in en, ja, zh; did you mean zh?" in printed
    assert "did you mean" not in called(file, "--language", "fr", "--language", "zh")
