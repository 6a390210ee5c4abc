"""Prompt files sorted out: which lines are kept and why not, and the file that is written of them."""

import json
import re

import pytest

from mlcm_rl.data.prompt_selection import Filter, select, wording, write
from mlcm_rl.data.prompts import Prompt, read_prompts


def text_file(folder, name: str, *lines: str):
    path = folder / name
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a red apple", "A  red Apple."),
        ("红苹果", "红 苹果。"),
        ("红苹果,3D", "红苹果 ３Ｄ"),
        ("ｔｈｅ　ｃａｔ", "the cat!"),
        ("招牌“今日有鱼”", '招牌"今日有鱼"'),
        ("the sign «Open»", 'The sign "open".'),
        ("「福」字", "＂福＂ 字"),
        ("don’t", "don't"),
        ("cafe\u0301", "caf\u00e9"),
        ("a\u200bcat", "a cat"),
    ],
)
def test_texts_of_the_same_words_have_one_wording(one, other):
    assert wording(one) == wording(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a red apple", "a redapple"),
        ("C++", "C"),
        ("红苹果", "紅蘋果"),
        ("a cat 😀", "a cat"),
        ("!!!", "???"),
        ("“福”字", "福字"),
        ('a sign that says "open"', "a sign that says open"),
        ("“红”苹果", "“红苹果”"),
    ],
)
def test_texts_of_other_words_have_two(one, other):
    assert wording(one) != wording(other)


def test_every_line_is_kept_or_has_its_reason_and_the_place_of_the_same_before(tmp_path):
    first = text_file(tmp_path, "a.txt", "a red apple", "A RED APPLE!", "红苹果", "a cat on a very long sofa")
    second = text_file(tmp_path, "b.txt", "红 苹果。", "a snowman", "a dog")
    held_out = text_file(tmp_path, "held_out.txt", "A snowman.")
    wanted = Filter(max_length=11, not_matching=re.compile("DOG", re.IGNORECASE))
    lines = select([first, second], wanted, [held_out])
    assert [(line.reason, line.first) for line in lines] == [
        ("", ""),
        ("length", ""),
        ("", ""),
        ("length", ""),
        ("duplicate", f"{first}:3"),
        ("in another file", f"{held_out}:1"),
        ("wording", ""),
    ]
    assert [line.place for line in lines] == [
        *(f"{first}:{n}" for n in range(1, 5)),
        *(f"{second}:{n}" for n in (1, 2, 3)),
    ]


def test_a_line_that_is_left_out_stands_for_no_other(tmp_path):
    """The first of two is too long; the second is kept."""
    path = text_file(tmp_path, "a.txt", "a  red,   apple", "a red apple")
    assert [line.reason for line in select([path], Filter(max_length=11))] == ["length", ""]


def test_filters_of_language_and_wording(tmp_path):
    path = text_file(tmp_path, "a.txt", "a red apple", "红苹果", "赤いりんごです", "a cat")
    reasons = [
        line.reason for line in select([path], Filter(languages=["zh", "en"], matching=re.compile("apple|苹果")))
    ]
    assert reasons == ["", "", "other language", "wording"]


def test_what_is_written_is_read_back(tmp_path):
    prompts = [Prompt("红苹果", "zh"), Prompt("a whale", "en", "1F433", "noto"), Prompt("two\nlines", "en")]
    write(prompts, tmp_path / "kept.jsonl")
    assert read_prompts(tmp_path / "kept.jsonl") == prompts
    assert json.loads((tmp_path / "kept.jsonl").read_text(encoding="utf-8").splitlines()[0])["prompt"] == "红苹果"
    write(prompts[:1], tmp_path / "kept.txt")
    assert read_prompts(tmp_path / "kept.txt") == prompts[:1]


@pytest.mark.parametrize(
    ("name", "prompts", "error", "message"),
    [
        ("kept.txt", [Prompt("a whale", "en", "1F433")], ValueError, "name the file .jsonl"),
        ("kept.txt", [Prompt("pomme", "fr")], ValueError, "its language fr"),
        ("kept.txt", [Prompt("two\u2028lines", "en")], ValueError, "a second line"),
        ("kept.txt", [Prompt(" a", "en")], ValueError, "or space around it"),
        ("kept.txt", [Prompt("\ufeffa", "en")], ValueError, "or space around it"),
        ("kept.txt", [Prompt('{"prompt": "a"}', "en")], ValueError, "is a JSON object: name the file .jsonl"),
        ("kept.csv", [Prompt("a", "en")], ValueError, r"kept.csv: prompts are written to a .txt or a .jsonl file, not"),
        ("kept.txt", [], ValueError, "none is kept"),
        ("there.txt", [Prompt("a", "en")], FileExistsError, "there already; name a new file"),
    ],
)
def test_what_a_file_cannot_take_is_refused_and_nothing_is_written(tmp_path, name, prompts, error, message):
    (tmp_path / "there.txt").write_text("mine")
    with pytest.raises(error, match=message):
        write(prompts, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["there.txt"]
    assert (tmp_path / "there.txt").read_text() == "mine"
