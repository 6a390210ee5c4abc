"""The prompts in Chinese and English: pairs are whole, nothing stands twice, languages and lengths are as stated."""

import re
from collections import Counter
from pathlib import Path

import pytest

from mlcm_rl.data.prompt_selection import Filter, select
from mlcm_rl.data.prompts import guess_language, read_prompts
from reward_models.chinese_clip import LENGTH
from reward_models.ocr import QUOTED, asked_text

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "prompts"
EVALUATION, TRAIN, TEST = (FOLDER / f"{name}.jsonl" for name in ("evaluation", "written_train", "written_test"))
CATEGORIES = ["objects", "counts", "relations", "colours", "text", "people", "culture", "landscape", "style", "long"]
FILES = pytest.mark.parametrize("path", [EVALUATION, TRAIN, TEST], ids=lambda path: path.stem)


@FILES
def test_each_english_prompt_is_followed_by_its_chinese_one(path):
    prompts = read_prompts(path)
    assert [prompt.language for prompt in prompts] == ["en", "zh"] * (len(prompts) // 2)
    concepts = [prompt.concept for prompt in prompts]
    assert concepts[::2] == concepts[1::2]
    assert len(set(concepts)) == len(prompts) // 2
    assert None not in concepts


@FILES
def test_the_language_is_that_of_the_words_outside_quotation_marks(path):
    for prompt in read_prompts(path):
        assert guess_language(re.sub(QUOTED, "", prompt.prompt)) == prompt.language, prompt


def test_no_prompt_stands_twice_or_is_among_those_trained_on():
    shipped = [FOLDER.parent / "prompts.txt", TRAIN]
    lines = select([EVALUATION, TEST], Filter(), shipped)
    assert [(line.place, line.reason, line.first) for line in lines if line.reason] == []
    assert not {prompt.concept for prompt in read_prompts(TRAIN)} & {prompt.concept for prompt in read_prompts(TEST)}


@FILES
def test_chinese_clip_cuts_no_chinese_prompt_and_english_ones_have_forty_words_at_most(path):
    for prompt in read_prompts(path):
        length, most = (len(prompt.prompt), LENGTH - 2) if prompt.language == "zh" else (len(prompt.prompt.split()), 40)
        assert 0 < length <= most, prompt


def test_any_part_of_the_evaluation_has_as_many_pairs_of_each_category():
    categories = [prompt.concept.rpartition("-")[0] for prompt in read_prompts(EVALUATION)]
    assert categories == [name for name in CATEGORIES for _ in range(2)] * 20
    assert Counter(categories) == dict.fromkeys(CATEGORIES, 40)


def test_both_prompts_of_a_pair_ask_for_the_same_text():
    pattern = re.compile(QUOTED)
    texts = [asked_text(one.prompt, pattern) for one in read_prompts(EVALUATION) if one.concept.startswith("text-")]
    assert texts[::2] == texts[1::2]
    assert sum(text.isascii() for text in texts[::2]) == 10
    for prompt in [*read_prompts(TRAIN), *read_prompts(TEST)]:
        assert f"written-{asked_text(prompt.prompt, pattern)}" == prompt.concept
