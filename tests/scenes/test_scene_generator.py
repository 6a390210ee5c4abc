"""What a prompt says is what is on the canvas; held-out pairs, frames and words are in no training."""

import random

import numpy as np
import pytest

from drawings import MARGIN, Drawings
from mlcm_rl.data.prompts import read_prompts
from mlcm_rl.data.scenes import BACKGROUNDS, CELL, NUM_CELLS, RELATIONS, STYLES, Reading, Request, answers, read_code
from scene_latents import NUM_IN_PART, scenes_of_part
from scene_prompts import FILES
from scenes import LANGUAGES, SUBJECT, Object, Scene, draw_scene, is_held_out, read_concepts
from wordings import BODIES, COLOUR_WORDS, COLOURED, STYLE_WORDS, STYLED, WORDINGS, Writer, held_out_shares, plural

CONCEPTS = [concept.codepoint for concept in read_concepts()]
A, B = CONCEPTS[:2]


def drawn(count: int, held_out: bool = False, concepts: list[str] = CONCEPTS) -> list[Scene]:
    draw = random.Random(3)
    relations = RELATIONS[1:] if held_out else RELATIONS
    return [draw_scene(draw, concepts, relations[i % len(relations)], held_out) for i in range(count)]


def test_every_scene_is_as_its_own_request_asks():
    for scene in drawn(400):
        for request in (scene.request(True, True), scene.request(False, False)):
            assert answers(request, scene.reading())["all"]


def test_objects_have_cells_of_their_own_and_one_style():
    for scene in drawn(400):
        cells = [o.cell for o in scene.objects]
        assert len(set(cells)) == len(cells) <= NUM_CELLS
        assert len({o.style for o in scene.objects}) == 1


@pytest.mark.parametrize(
    ("request_", "wrong"),
    [
        (Request("beside", (A, B), 2), "relation"),
        (Request("above", (A, B), 2), "relation"),
        (Request("beside", (A, CONCEPTS[2]), 2), "objects"),
        (Request("count", (A,), 2), "objects"),
        (Request("count", (A,), 3), "count"),
        (Request("beside", (B, A), 2, "noto"), "style"),
        (Request("beside", (B, A), 2, None, "blue"), "background"),
    ],
)
def test_a_wrong_picture_is_wrong_in_what_was_asked(request_, wrong):
    reading = Scene("beside", (Object(B, "fluent", 2), Object(A, "fluent", 3)), "pink").reading()
    assert not answers(request_, reading)[wrong]
    assert not answers(request_, reading)["all"]


def test_objects_side_by_side_stand_in_one_row():
    reading = Scene("beside", (Object(A, "noto", 0), Object(B, "noto", 3)), "white").reading()
    assert not answers(Request("beside", (A, B), 2), reading)["relation"]


def test_a_style_that_is_left_open_is_never_wrong():
    reading = Reading((None, (A, "noto"), None, (A, "fluent")), "white")
    assert answers(Request("count", (A,), 2), reading)["all"]
    assert not answers(Request("count", (A,), 2, "noto"), reading)["style"]


def test_a_canvas_without_objects_is_wrong_and_no_error():
    assert not answers(Request("single", (A,), 1), Reading((None,) * 4, "white"))["all"]


def test_a_code_is_read_back():
    for scene in drawn(100):
        for request in (scene.request(True, False), scene.request(False, True)):
            assert read_code(request.code) == request
    with pytest.raises(ValueError, match="not a request's code"):
        read_code("panda")


@pytest.mark.parametrize(
    "code",
    [
        "single A 3 - -",
        "beside A B 3 - -",
        "above A A 2 - -",
        "single  1 - -",
        "single - 1 - -",
        "count A 5 - -",
        "count A 01 - -",
        "count A \uff12 - -",
        f"count A {'1' * 5000} - -",
    ],
)
def test_a_request_that_no_picture_can_fulfil_is_refused(code):
    with pytest.raises(ValueError, match=r"objects, not|a concept is missing, or named twice"):
        read_code(code)


def test_the_canvas_has_each_drawing_in_its_cell_and_the_background_elsewhere():
    pixels = np.random.default_rng(0).integers(0, 255, (2, len(STYLES), 60, 60, 4), np.uint8)
    pixels[..., 3] = 255
    scene = Scene("beside", (Object(B, "twemoji", 2), Object(A, "twemoji", 3)), "green")
    canvas = Drawings(pixels, [A, B]).paint(scene)
    assert (canvas[:CELL] == BACKGROUNDS["green"]).all()
    assert (canvas[CELL + MARGIN : -MARGIN, MARGIN : CELL - MARGIN] == pixels[1, 1, ..., :3]).all()
    assert (canvas[CELL + MARGIN : -MARGIN, CELL + MARGIN : -MARGIN] == pixels[0, 1, ..., :3]).all()


def test_transparent_parts_show_the_background():
    canvas = Drawings(np.zeros((1, len(STYLES), 60, 60, 4), np.uint8), [A]).paint(
        Scene("single", (Object(A, "noto", 0),), "pink")
    )
    assert (canvas == BACKGROUNDS["pink"]).all()


def test_training_has_no_held_out_combination_and_tests_have_nothing_else():
    training = {(frozenset(s.request(False, False).concepts), len(s.objects)) for s in scenes_of_part(0, CONCEPTS)}
    assert len(scenes_of_part(0, CONCEPTS)) == NUM_IN_PART
    assert not any(is_held_out(tuple(concepts), count) for concepts, count in training)
    for name, (_, held_out, _) in FILES.items():
        for prompt in read_prompts(SUBJECT / "prompts" / f"{name}.jsonl"):
            request = read_code(prompt.concept)
            assert is_held_out(request.concepts, request.count) == (held_out and request.relation != "single")
            assert request.style == prompt.style


def test_a_pair_is_held_out_in_either_order():
    pairs = [(a, b) for i, a in enumerate(CONCEPTS) for b in CONCEPTS[:i]]
    assert all(is_held_out((a, b), 2) == is_held_out((b, a), 2) for a, b in pairs)
    assert 0.07 < sum(is_held_out(pair, 2) for pair in pairs) / len(pairs) < 0.13


def test_files_of_prompts_are_balanced_and_share_no_prompt():
    files = [read_prompts(SUBJECT / "prompts" / f"{name}.jsonl") for name in FILES]
    texts = [prompt.prompt for file in files for prompt in file]
    assert len(set(texts)) == len(texts)
    for file in files:
        for size in (40, len(file)):
            languages = [prompt.language for prompt in file[:size]]
            relations = [read_code(prompt.concept).relation for prompt in file[:size]]
            assert {languages.count(name) for name in LANGUAGES} == {size // 2}
            assert {relations.count(name) for name in RELATIONS} == {size // 4}


def words_in(text: str, words: set[str]) -> set[str]:
    return {word for word in words if word in text}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("wording", WORDINGS)
def test_a_prompt_names_what_its_request_states_and_nothing_else(language, wording):
    writer, draw = Writer(read_concepts()), random.Random(0)
    concepts, new = {c.codepoint: c for c in read_concepts()}, wording == "synonyms"
    for scene in drawn(200):
        for stated in (True, False):
            request = scene.request(stated, stated)
            text = writer.write(request, language, wording, draw)
            for codepoint in request.concepts:
                names = (concepts[codepoint].held_out_names if new else concepts[codepoint].names)[language]
                assert any(name in text or plural(name) in text for name in names)
            styles = {w for s in STYLES for w in STYLE_WORDS[language][s].of(new)}
            own = set(STYLE_WORDS[language][scene.objects[0].style].of(new))
            assert words_in(text, styles) <= own
            assert bool(words_in(text, own)) == stated
            colours = COLOUR_WORDS[language][scene.background].of(new)
            assert not stated or words_in(text, set(colours))
            assert "{" not in text


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_order_of_the_sentence_does_not_change_who_is_left(language):
    request, writer, draw = Request("beside", (A, B), 2), Writer(read_concepts()), random.Random(1)
    texts = {writer.write(request, language, "trained", draw) for _ in range(300)}
    assert {"en": "a panda to the left of an apple", "zh": "一只熊猫在一个苹果的左边"}[language] in texts
    assert {"en": "an apple to the right of a panda", "zh": "一个苹果在一只熊猫的右边"}[language] in texts
    assert {"en": "a panda to the right of an apple", "zh": "一只熊猫在一个苹果的右边"}[language] not in texts


def test_trained_wordings_have_no_held_out_frame_or_word():
    shares = held_out_shares()
    assert all(0.2 < share < 0.35 for share in shares.values()), shares
    for per_language in BODIES.values():
        for choice in per_language.values():
            assert not set(choice.trained) & set(choice.held_out)
    for frames in (STYLED, COLOURED):
        for choice in frames.values():
            assert not set(choice.trained) & set(choice.held_out)
    for concept in read_concepts():
        for language in LANGUAGES:
            assert not set(concept.names[language]) & set(concept.held_out_names[language])


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_two_concepts_share_a_name(language):
    names = [n for c in read_concepts() for n in c.names[language] + c.held_out_names[language]]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("one", "many"),
    [("panda", "pandas"), ("city bus", "city buses"), ("cherries", "cherries"), ("fish", "fish"), ("ruby", "rubies")],
)
def test_plurals(one, many):
    assert plural(one) == many


def test_a_held_out_scene_of_one_object_is_refused():
    with pytest.raises(ValueError, match="no held-out combinations"):
        draw_scene(random.Random(0), CONCEPTS, "single", held_out=True)
