"""Captions, prompt files and the denoiser's image folder."""

import json
from collections import Counter
from hashlib import sha256

import numpy as np
import pytest
from PIL import Image

import captions
from sources import STYLES, Concept, Pictures
from train_autoencoder import is_held_out

PANDA = Concept("1F43C", "animals-nature", "animal-mammal", "panda", "熊猫", ("bear", "panda", "zoo"), ("可爱", "动物"))
BARE = Concept("0000", "objects", "tool", "thing", "东西", (), ())


@pytest.fixture(scope="module")
def prompts() -> dict[str, list[dict]]:
    folder = captions.EMOJI / "prompts"
    return {s: [json.loads(line) for line in (folder / f"{s}.jsonl").open(encoding="utf-8")] for s in captions.SPLITS}


def test_captions_name_concept_tags_and_style_in_the_asked_language():
    english = captions.captions_of(PANDA, "twemoji", "en")
    assert "twemoji style emoji of panda" in english
    assert "panda, bear, zoo, twitter style" in english, "a tag that the label already says is no tag"
    assert "Noto风格的熊猫表情" in captions.captions_of(PANDA, "noto", "zh")
    assert captions.captions_of(PANDA, None, "zh") == ["熊猫", "熊猫表情", "熊猫的图片", "熊猫，可爱，动物"]


@pytest.mark.parametrize("language", captions.LANGUAGES)
@pytest.mark.parametrize("style", [*STYLES, None])
def test_a_concept_without_tags_still_has_captions(language, style):
    found = captions.captions_of(BARE, style, language)
    assert len(found) >= 3
    assert all("{" not in caption for caption in found)


def test_prompts_of_different_splits_are_disjoint_and_unique(prompts):
    texts = {split: [p["prompt"] for p in part] for split, part in prompts.items()}
    assert all(len(set(part)) == len(part) for part in texts.values())
    assert len(set().union(*texts.values())) == sum(map(len, texts.values()))


def test_prompts_lie_in_the_split_that_their_hash_says(prompts):
    split_of_bucket = ["train"] * 5 + ["validation"] + ["test"] * 2
    for split, part in prompts.items():
        buckets = {int(sha256(p["prompt"].encode()).hexdigest()[:2], 16) % 8 for p in part}
        assert {split_of_bucket[bucket] for bucket in buckets} == {split}


def test_prompts_are_over_teacher_concepts_only_and_cover_all_of_them_in_both_languages(prompts):
    teacher = {concept.codepoint for concept in captions.teacher_concepts()[0]}
    for part in prompts.values():
        assert {p["concept"] for p in part} <= teacher
        assert {(p["concept"], p["language"]) for p in part} == {(c, lang) for c in teacher for lang in ("en", "zh")}


def test_prompt_files_are_large_enough_for_the_study_and_small_enough_for_the_tree(prompts, emoji_folder):
    assert len(prompts["train"]) >= 2048
    assert len(prompts["validation"]) >= 256
    assert len(prompts["test"]) >= 1024
    assert all(path.stat().st_size < 1_000_000 for path in (emoji_folder / "prompts").iterdir())


@pytest.mark.parametrize("length", [64, 256, 1024])
def test_any_prefix_of_the_training_prompts_is_balanced(prompts, length):
    part = prompts["train"][:length]
    languages, styles = (Counter(p[key] for p in part) for key in ("language", "style"))
    assert languages["en"] == languages["zh"]
    # three styles of two sevenths each and one seventh without: five standard deviations of a fair draw
    for style, share in (*((s, 2 / 7) for s in STYLES), (None, 1 / 7)):
        assert abs(styles[style] - share * length) < 5 * (share * (1 - share) * length) ** 0.5


def test_a_prompt_says_the_style_it_is_filed_under(prompts):
    for prompt in prompts["test"]:
        words = captions.STYLE_WORDS[prompt["language"]]
        said = [style for style in STYLES if any(word in prompt["prompt"] for word in words[style])]
        assert prompt["style"] in (said or [None])


def test_the_committed_prompts_are_what_the_program_writes(tmp_path, emoji_folder):
    captions.write_prompts(captions.teacher_concepts()[0], tmp_path)
    for split in captions.SPLITS:
        committed = (emoji_folder / "prompts" / f"{split}.jsonl").read_bytes()
        assert (tmp_path / f"{split}.jsonl").read_bytes() == committed


def test_teacher_and_held_out_concepts_are_disjoint_and_free_of_skin_tones():
    teacher, held_out = captions.teacher_concepts()
    points = [c.codepoint for c in (*teacher, *held_out)]
    assert len(set(points)) == len(points) == 420
    assert not any(tone in point for point in points for tone in ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"))


def test_every_teacher_picture_was_seen_by_the_autoencoder():
    assert not any(is_held_out(concept.codepoint) for concept in captions.teacher_concepts()[0])


def test_the_image_folder_holds_training_captions_beside_their_pictures(tmp_path, monkeypatch):
    pixels = np.stack([np.full((64, 64, 3), value, np.uint8) for value in (10, 200, 99)])
    pictures = Pictures(pixels, ("1F43C", "1F43C", "FFFF"), ("noto", "fluent", "noto"))
    monkeypatch.setattr(captions, "load_pictures", lambda size: pictures)
    assert captions.write_image_folder([PANDA], tmp_path) == 2, "the concept that was not asked for stays out"
    entries = [json.loads(line) for line in (tmp_path / "metadata.jsonl").open(encoding="utf-8")]
    assert [entry["style"] for entry in entries] == ["noto", "fluent"]
    for entry, value in zip(entries, (10, 200), strict=True):
        assert np.asarray(Image.open(tmp_path / entry["file_name"])).mean() == value
        assert all(captions.split_of(caption) == "train" for caption in entry["prompts"])
    assert not any("fluent" in caption.lower() for caption in entries[0]["prompts"])
