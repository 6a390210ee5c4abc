"""Prompt files and captioned pictures: what is read, and the errors of a wrong file."""

import json

import pytest
import torch
from PIL import Image

from mlcm_rl.data import prompts
from mlcm_rl.data.prompts import CaptionedImages, Prompt, read_prompts
from mlcm_rl.evaluation import instruments
from mlcm_rl.recipe import Evaluate
from mlcm_rl.recipe.languages import guess_language


def jsonl(path, *records):
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    return path


def test_text_file_is_one_prompt_a_line_with_its_language_guessed(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa red apple\n\n  红苹果  \r\ncafe\u0301\n", encoding="utf-8")
    assert read_prompts(path) == [Prompt("a red apple", "en"), Prompt("红苹果", "zh"), Prompt("cafe\u0301", "en")]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_a_text_file_is_read_by_its_mark(tmp_path, encoding):
    path = tmp_path / "prompts.txt"
    mark = "" if encoding in ("utf-8-sig", "utf-16") else "\ufeff"
    path.write_bytes(f"{mark}a red apple\r\n红苹果\r\n😀\n".encode(encoding))
    assert [prompt.prompt for prompt in read_prompts(path)] == ["a red apple", "红苹果", "😀"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a red apple\r\n红苹果".encode("utf-16-le"), r"prompts\.txt:1: a NUL byte.*save it as UTF-8"),
        (b"a cat\na\0dog\n", r"prompts\.txt:2: a NUL byte"),
        (b"\xff\xfea\0b", r"prompts\.txt: begins with the mark of UTF-16 but is not UTF-16"),
        ("a cat".encode("utf-32"), r"prompts\.txt:1: a NUL byte"),
    ],
)
def test_what_is_no_utf8_text_is_refused_in_words(tmp_path, content, message):
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "prompts.txt")


def test_files_put_together_leave_no_mark_in_a_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa cat\n\ufeffa dog\n\ufeff\n", encoding="utf-8")
    assert read_prompts(path) == [Prompt("a cat", "en"), Prompt("a dog", "en")]


def test_objects_of_json_are_no_prompts_and_braces_are(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text('{artist} draws a cat\n{"prompt": "a cat"}\n')
    with pytest.raises(ValueError, match=r"prompts\.txt:2: a JSON object.*name the file \.jsonl"):
        read_prompts(path)
    path.write_text('{artist} draws a cat\n"{a}"\n[1]\n')
    assert [prompt.prompt for prompt in read_prompts(path)] == ["{artist} draws a cat", '"{a}"', "[1]"]


def test_a_value_that_is_wrong_is_quoted_short(tmp_path):
    long = ["x" * 10**6] * 3
    for record in ({"prompt": long}, {"prompt": "a", "style": dict.fromkeys("ab", long)}, {"x" * 10**6: 1}):
        with pytest.raises(ValueError) as error:
            read_prompts(jsonl(tmp_path / "p.jsonl", record))
        assert len(str(error.value)) < 800


def test_jsonl_keeps_what_it_says_and_guesses_the_language_it_does_not(tmp_path):
    whole = {"prompt": "a whale", "language": "en", "concept": "1F433", "style": "noto"}
    path = jsonl(tmp_path / "p.jsonl", whole, {"prompt": "鲸", "concept": None})
    assert read_prompts(path) == [Prompt("a whale", "en", "1F433", "noto"), Prompt("鲸", "zh")]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        *(("苹果 apple", "zh"), ("\U00020000", "zh"), ("", "en"), ("красное яблоко", "en")),
        *(
            ("りんごが赤い", "ja"),
            ("リンゴ", "ja"),
            ("奈良の鹿", "zh"),
            ("の山", "zh"),
            ("빨간 사과", "ko"),
            ("대한 大韓", "zh"),
        ),
    ],
)
def test_most_east_asian_characters_say_the_language_of_a_prompt(text, language):
    assert guess_language(text) == language


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", ":2: not JSON: Expecting property name"),
        (b"[1]", ":2: expected an object in braces, got list"),
        (b'{"promt": "x"}', ":2: unknown key 'promt'"),
        (b'{"language": "en"}', ":2: there is no key 'prompt'"),
        (b'{"prompt": "  "}', ":2: prompt must be text that is not empty"),
        (b'{"prompt": "x", "style": 3}', ":2: style must be text"),
        (b'{"prompt": null}', ":2: prompt must be text"),
        (b"\xff\xfe", ":2: not UTF-8"),
        (b'{"prompt": "a\\u0000cat"}', ":2: prompt holds the character NUL"),
        ('{"prompt": "x"}'.encode("utf-16-le"), ":2: a NUL byte, so that it is not UTF-8 text (UTF-16, perhaps)"),
    ],
)
def test_a_bad_line_is_reported_with_file_and_number(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "good"}\n' + line + b"\n")
    with pytest.raises(ValueError) as error:
        read_prompts(path)
    assert str(path) + message in str(error.value)


def test_files_without_prompts_and_of_other_kinds_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_prompts(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match=r"not '\.csv'"):
        read_prompts(tmp_path / "prompts.csv")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        read_prompts(tmp_path / "nowhere.txt")


def test_an_evaluation_names_prompts_that_a_reward_cannot_score_before_it_draws(tmp_path, monkeypatch):
    def refuse_prompt(self, prompt, aspect):
        raise ValueError(f"no {prompt}")

    monkeypatch.setattr("reward_models.brightness.Brightness.refuse_prompt", refuse_prompt, raising=False)
    path = tmp_path / "p.txt"
    path.write_text("cat\n\ndog\n")
    stage = Evaluate(prompts=str(path), num_prompts=2, rewards=["brightness"])
    with pytest.raises(ValueError, match=r"cannot score 2 of the prompts: .*p\.txt:1: no cat; .*p\.txt:3: no dog\."):
        instruments.load(stage, read_prompts(path), 8, torch.device("cpu"), 0)


def test_pictures_are_squared_about_their_centre_and_laid_on_white(tmp_path):
    wide = Image.new("RGB", (40, 20), (255, 0, 0))
    wide.paste((0, 0, 255), (10, 0, 30, 20))  # the middle square is blue, the ends that are cropped red
    wide.save(tmp_path / "wide.png")
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    records = [
        {"file_name": "wide.png", "prompts": ["blue", "蓝"], "concept": "x"},
        {"file_name": "clear.png", "prompts": ["air"]},
    ]
    jsonl(tmp_path / "metadata.jsonl", *records)
    data = CaptionedImages(tmp_path, resolution=10)
    assert len(data) == 2
    assert data.prompts == [["blue", "蓝"], ["air"]]
    assert data.records[0]["concept"] == "x"
    (images,) = data.parts(3)
    assert images.shape == (2, 3, 10, 10)
    assert images.dtype == torch.uint8
    assert (images[0, 2] > 230).all()  # the filter reaches a little over the cut
    assert (images[0, 2, :, 2:-2] > 252).all()
    assert (images[1] == 255).all()


def test_pictures_are_read_as_they_are_asked_for(tmp_path, monkeypatch):
    """A training set need not fit into memory; after one that cannot be read none is given, and the rest is named."""
    for name in "abcde":
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    jsonl(tmp_path / "metadata.jsonl", *({"file_name": f"{name}.png", "prompts": [name]} for name in "abcde"))
    read, read_picture = [], prompts.read_picture
    monkeypatch.setattr(prompts, "read_picture", lambda path, what: read.append(path.stem) or read_picture(path, what))
    parts = CaptionedImages(tmp_path, resolution=4).parts(2)
    assert read == []
    assert next(parts).shape == (2, 3, 4, 4)
    assert read == ["a", "b"]
    assert [len(part) for part in parts] == [2, 1]
    for name in "bd":
        (tmp_path / f"{name}.png").write_text("no picture")
    given = []
    with pytest.raises(ValueError, match=r":2: .*b\.png .*:4: .*d\.png"):
        given += CaptionedImages(tmp_path, resolution=4).pictures()
    assert len(given) <= 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"file_name": "gone.png", "prompts": ["x"]}, ":2: there is no picture"),
        ({"file_name": "text.png", "prompts": ["x"]}, ":2: .*text.png is not a readable picture"),
        ({"file_name": "good.png", "prompts": []}, ":2: prompts must be a list of at least one caption"),
        ({"file_name": "good.png", "prompts": "x"}, ":2: prompts must be a list"),
        ({"prompts": ["x"]}, ":2: file_name must be text"),
        ({"file_name": "good.png", "prompts": ["x", "a\0b"]}, ":2: each of prompts holds the character NUL"),
    ],
)
def test_a_bad_picture_is_reported_with_file_and_number(tmp_path, record, message):
    Image.new("RGB", (4, 4)).save(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("no picture")
    jsonl(tmp_path / "metadata.jsonl", {"file_name": "good.png", "prompts": ["x"]}, record)
    with pytest.raises(ValueError, match=f"metadata.jsonl{message}"):
        list(CaptionedImages(tmp_path, resolution=4).pictures())
