"""A gallery of planted evaluations: which pictures it has, in which places, and what its files are."""

import base64
import io
import json
import re

import pytest
from PIL import Image

import planted_evaluations
from mlcm_rl.models.pictures import save_png
from mlcm_rl.report import assembly, drawn_pictures, gallery
from mlcm_rl.report.drawn_pictures import Drawn
from mlcm_rl.report.gallery import Evaluation, Place
from mlcm_rl.storage.files import CheckpointError
from planted_evaluations import HOSTILE, PROMPTS, colour

ONE, TWO = {"student": [0.1, 0.2, 0.3, 0.4]}, {"student": [0.4, 0.2, 0.0, 0.1]}


def evaluation(name, folder):
    return Evaluation(name, folder, assembly.read(folder / "report.json"))


@pytest.fixture
def both(tmp_path):
    """Two evaluations of the same teacher: of the first and of the second student."""
    folders = [planted_evaluations.write(tmp_path / name, scores) for name, scores in (("one", ONE), ("two", TWO))]
    return [evaluation(folder.name, folder) for folder in folders]


def data_of(text):
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, flags=re.DOTALL)
    return json.loads(found)


def test_columns_are_default_students_then_the_teacher_which_two_runs_share(both):
    names = [column.name for column in gallery.gather(both).columns]
    shared = ["one:teacher@4, DDIM, unguided", "one:teacher@50"]
    assert names == ["one:student@2", "one:student@4", *shared, "two:student@2", "two:student@4"]
    shown = [column.name for column in gallery.gather(both).columns if column.is_shown]
    assert shown == [name for name in names if "unguided" not in name]
    names = [column.name for column in gallery.gather(both, with_all=True).columns]
    assert "one:student@4, gamma 1" in names
    assert len(names) == 4 + 2 + 4
    names = [column.name for column in gallery.gather(both, steps=[4]).columns]
    assert names == ["one:student@4", *shared, "two:student@4"]


def test_a_cell_has_the_picture_and_the_scores_of_its_place(both):
    found = gallery.gather(both)
    column = found.column("two:student@4")
    assert list(column.cells) == found.places == [Place(HOSTILE, "en", 0), Place("红苹果", "zh", 0)]
    cell = column.cells[found.places[0]]
    assert cell.scores == pytest.approx({"distance": 0.0, "reward/brightness": 0.4})
    with Image.open(cell.path) as image:
        assert image.getpixel((0, 0)) == colour("student-4-0", 0, 0)
    assert found.num_pictures == 2 * 6
    assert found.column("two:student@3") is None


def test_all_pictures_are_there_where_they_were_kept_each_with_its_own_score(tmp_path):
    folder = planted_evaluations.write(tmp_path / "kept", ONE, keeps=True, images=2)
    found = gallery.gather([evaluation("kept", folder)])
    assert found.places == [Place(text, language, j) for text, language in PROMPTS for j in range(2)]
    cell = found.column("kept:student@2").cells[Place("a cat", "en", 1)]
    assert cell.scores["reward/brightness"] == pytest.approx(1.3)
    assert cell.scores["distance"] == 2.0  # of the prompt: its pictures' mean
    with Image.open(cell.path) as image:
        assert image.getpixel((0, 0)) == colour("student-2-0", 2, 1)


def test_what_is_a_prompts_mean_under_each_of_its_pictures_is_labelled_so(tmp_path, both):
    folder = planted_evaluations.write(tmp_path / "kept", ONE, keeps=True, images=2)
    gallery.write_page(gallery.gather([evaluation("kept", folder)]), "kept", tmp_path / "kept.html")
    data = data_of((tmp_path / "kept.html").read_text("utf-8"))
    assert data["columns"][0]["means"] == [0]  # the distance, and not the reward
    gallery.write_page(gallery.gather(both), "both", tmp_path / "both.html")
    assert not any(one["means"] for one in data_of((tmp_path / "both.html").read_text("utf-8"))["columns"])


def drawn(folder, number, prompt, steps, gamma="1.0", seed=7, student="distill-0123"):
    folder.mkdir(exist_ok=True)
    text = {"prompt": prompt, "number": number, "seed": seed, "steps": steps, "gamma": gamma, "student": student}
    return save_png(
        Image.new("RGB", (8, 8), (number, steps, 0)), folder / f"00{number}-seed{seed}-steps{steps}.png", text
    )


def test_pictures_of_sample_are_columns_of_student_steps_gamma_and_seed(tmp_path, both):
    folder = tmp_path / "pictures"
    for number, prompt in enumerate(["红苹果", "a cat", "a cat"]):
        for steps in (2, 4):
            drawn(folder, number, prompt, steps)
    save_png(Image.new("RGB", (8, 8)), folder / "sheet-000-seed7.png")
    drawn(folder, 3, "a cat", 4, gamma="0.0")
    columns = drawn_pictures.columns_of(Drawn("pictures", folder), set())
    assert [(column.name, len(column.cells)) for column in columns] == [
        ("pictures:distill-0123@2, gamma 1.0", 3),
        ("pictures:distill-0123@4, gamma 1.0", 3),
        ("pictures:distill-0123@4, gamma 0.0", 1),
    ]
    assert list(columns[0].cells) == [Place("红苹果", "zh", 0), Place("a cat", "en", 0), Place("a cat", "en", 1)]
    assert [column.row.num_steps for column in drawn_pictures.columns_of(Drawn("pictures", folder), {2})] == [2]
    found = gallery.joined([gallery.columns_of(both[0]), columns])
    gallery.write_page(found, "both", tmp_path / "out.html")
    data = data_of((tmp_path / "out.html").read_text("utf-8"))
    assert [column["label"] for column in data["columns"]][-3:] == [
        *("distill-0123, 2 steps", "distill-0123, 4 steps", "distill-0123, 4 steps"),
    ]
    assert data["columns"][-1]["detail"] == "gamma 0, seed 7"
    row = data["cells"][found.places.index(Place("红苹果", "zh", 0))]
    assert row[0][2] != row[-3][2]  # an evaluation's noise is no noise of `mlcm sample`
    assert row[-3][2] == row[-2][2]


def test_a_picture_that_does_not_say_what_it_is_is_named(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "000-seed0-steps4.png")
    with pytest.raises(CheckpointError, match=r"000-seed0-steps4.png does not say what it is"):
        drawn_pictures.columns_of(Drawn("mine", tmp_path), set())


def test_a_teacher_with_other_pictures_is_shown_again(tmp_path, both):
    other = planted_evaluations.write(tmp_path / "other", TWO, prompts=[("a cat", "en"), *PROMPTS[1:]])
    found = gallery.gather([*both, evaluation("other", other)])
    assert [column.name for column in found.columns if column.name.endswith("@50")] == [
        "one:teacher@50",
        "other:teacher@50",
    ]
    assert [place.prompt for place in found.places] == [HOSTILE, "红苹果", "a cat"]


def test_the_page_is_one_file_in_which_prompts_are_data(both, tmp_path):
    gallery.write_page(gallery.gather(both), "<one> & two", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<title>&lt;one&gt; &amp; two</title>" in text
    assert "document.title" not in text.replace(r"\u003c/script\u003e\u003cscript\u003edocument.title", "")
    assert not re.search(r"https?://|@import|url\(", text)
    assert text.count("<script") == 2
    data = data_of(text)
    assert data["prompts"] == [[HOSTILE, "en", 0], ["红苹果", "zh", 0]]
    assert data["metrics"] == [
        {"label": "Distance", "lower": True, "main": False},
        {"label": "brightness", "lower": False, "main": True},
    ]
    assert [column["label"] for column in data["columns"]][:2] == ["student, 2 steps", "student, 4 steps"]
    assert data["columns"][3]["detail"] == "DDIM, guided, 100 evaluations"
    address, scores, noise = data["cells"][1][5]
    assert scores == [1.0, 0.2]
    assert noise == data["cells"][1][0][2] != data["cells"][0][0][2]
    content = data["pictures"][address].partition("base64,")[2]
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        assert image.convert("RGB").getpixel((0, 0)) == colour("student-4-0", 1, 0)


def test_the_policy_names_the_very_script_and_style_of_the_page(both, tmp_path):
    gallery.write_page(gallery.gather(both), "title", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    for kind, pattern in (("script", r"<script>(.*?)</script>"), ("style", r"<style>(.*?)</style>")):
        (inside,) = re.findall(pattern, text, flags=re.DOTALL)
        assert f"{kind}-src '{gallery.checksum(inside)}'" in text
    assert "default-src 'none'" in text


def test_a_folder_has_each_picture_once_and_as_large_as_asked(tmp_path):
    folder = planted_evaluations.write(tmp_path / "one", ONE, size=300)
    found = gallery.gather([evaluation("one", folder)])
    for size in (64, 512):
        gallery.write_folder(found, "title", tmp_path / "out", size)
        data = data_of((tmp_path / "out" / "index.html").read_text(encoding="utf-8"))
        files = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.webp"))
        assert sorted(data["pictures"]) == files
        assert len(files) == found.num_pictures  # all of other colours
        with Image.open(tmp_path / "out" / files[0]) as image:
            assert image.size == (min(size, 300), min(size, 300))


def test_a_prompt_that_is_repeated_has_its_pictures_one_after_another(tmp_path):
    prompts = [("a cat", "en"), ("a dog", "en"), ("a cat", "en")]
    folder = planted_evaluations.write(
        tmp_path / "run", {"student": [0.1, 0.2, 0.3]}, prompts=prompts, keeps=True, images=2
    )
    found = gallery.gather([evaluation("run", folder)])
    assert found.places == [Place(*prompts[i], j) for i, j in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 2), (2, 3))]
    last = found.column("run:student@2").cells[Place("a cat", "en", 3)]
    assert last.noise == (0, 2, 1)
    with Image.open(last.path) as image:
        assert image.getpixel((0, 0)) == colour("student-2-0", 2, 1)


def test_pictures_that_are_gone_or_are_none_are_named(tmp_path):
    folder = planted_evaluations.write(tmp_path / "run", ONE)
    found = gallery.gather([evaluation("run", folder)])
    path = found.columns[0].cells[found.places[0]].path
    path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=f"{path} is not a readable picture"):
        gallery.write_page(found, "title", tmp_path / "out.html")
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{path} is missing: delete {folder} to evaluate again"):
        gallery.gather([evaluation("run", folder)])
    assert not (tmp_path / "out.html").exists()
