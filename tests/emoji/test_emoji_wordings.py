"""Prompts in wordings that the teacher was not trained on, and what the cards say of them."""

import json

import pytest
import torch

import captions
import measure_teacher
import measure_wordings as program
import rebuild

SENTENCES = ("frames", "descriptions")


@pytest.fixture(scope="module")
def concepts() -> dict[str, captions.Concept]:
    return {concept.codepoint: concept for concept in captions.teacher_concepts()[0]}


@pytest.mark.parametrize("name", program.SETS)
def test_a_set_has_forty_known_concepts_in_each_language(name, concepts):
    prompts = program.prompts_of(name)
    for language in captions.LANGUAGES:
        asked = [prompt.concept for prompt in prompts if prompt.language == language]
        assert len(asked) == len(set(asked)) == 40
        assert set(asked) <= set(concepts)
    assert {prompt.concept for prompt in prompts} == {prompt.concept for prompt in program.prompts_of("frames")}


@pytest.mark.parametrize("name", SENTENCES)
def test_a_sentence_is_no_caption_and_holds_the_name_or_does_not(name, concepts):
    for prompt in program.prompts_of(name):
        concept = concepts[prompt.concept]
        label = captions.label_and_tags(concept, prompt.language)[0]
        assert (label.lower() in prompt.prompt.lower()) == (name == "frames"), prompt
        styles = (None, *captions.STYLES)
        assert all(prompt.prompt not in captions.captions_of(concept, style, prompt.language) for style in styles)


def test_the_cards_say_what_was_measured(emoji_folder):
    results = json.loads(program.RESULTS.read_text(encoding="utf-8"))
    assert tuple(results) == program.SETS
    assert program.table(results) in (emoji_folder / "README.md").read_text(encoding="utf-8")
    page = (emoji_folder.parents[1] / "docs" / "results.md").read_text(encoding="utf-8")
    frames, described = (results[name] for name in SENTENCES)
    for mean, error in (frames["R@5 en"], frames["R@5 zh"], described["R@5 en"]):
        assert f"{mean:.3f} +- {error:.3f}" in page
    assert described["R@5 zh"] == [0.0, 0.0]


def test_recalls_are_by_language():
    class Judge:
        concepts = ("A", "B")
        prototypes = torch.eye(2)

    prompts = [program.Prompt("a", "en", "A"), program.Prompt("b", "en", "B"), program.Prompt("甲", "zh", "B")]
    found = measure_teacher.recalls(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), prompts, Judge())
    assert (found["R@1 en"][0], found["R@1 zh"][0], found["R@5 en"][0]) == (0.5, 1.0, 1.0)


def test_the_wordings_are_measured_with_the_new_weights():
    steps = list(rebuild.STEPS)
    assert steps.index("wordings") > steps.index("teacher")
    assert rebuild.STEPS["wordings"] == ("recipes/emoji/build/measure_wordings.py",)
