"""Prompts in a language that a reward or the teacher does not read are reported when a recipe is read."""

import json
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from mlcm_rl.recipe import Reward, reward_package, shipped
from mlcm_rl.recipe.families import FAMILIES
from mlcm_rl.recipe.file import HUB_NAME, load
from mlcm_rl.recipe.languages import prompts_in
from mlcm_rl.recipe.prompt_languages import BYTES
from mlcm_rl.recipe.reward_settings import attributes_in, attributes_of, languages_read
from mlcm_rl.recipe.tree import RecipeError
from mlcm_rl.rewards import class_of

TUNE = """  - kind: feedback
    prompts: data/prompts.txt
    num_steps: 1
    batch_size: 1
    rewards: [image_reward]
    guard: {rewards: [colourfulness]}
"""


@pytest.fixture
def notes(root):
    """What is reported of the good recipe with `stage` in it and these prompts."""

    def notes(prompts: str, stage: str = "") -> list[str]:
        (root / "data" / "prompts.txt").write_text(prompts, encoding="utf-8")
        text = (root / "good.yaml").read_text("utf-8").replace("  - kind: evaluate\n", stage + "  - kind: evaluate\n")
        (root / "recipe.yaml").write_text(text, encoding="utf-8")
        lines: list[str] = []
        load(root / "recipe.yaml", root=root, tell=lines.append)
        return lines

    return notes


def test_a_reward_that_does_not_read_the_prompts_is_refused_before_its_weights_are_needed(notes):
    with pytest.raises(RecipeError) as raised:
        notes("a cat\n一只猫\n一只狗\n", TUNE)
    (problem,) = raised.value.problems
    assert problem.key == ("stages", 2, "rewards", 0, "name")
    assert "image_reward reads prompts in en, and of the 3 of data/prompts.txt there are 2 in zh" in problem.text
    assert "siglip2" in problem.text
    assert "chinese_clip" not in problem.text  # which reads no English
    assert "`languages`" in problem.text
    assert problem.place.line == 25


def test_a_reward_is_compared_with_the_prompts_that_are_drawn(notes):
    notes("a cat\na dog\n一只猫\n", TUNE + "    languages: {en: 1}\n")
    notes(
        "a cat\na dog\n一只猫\n",
        TUNE.replace("image_reward", "colourfulness").replace("[colourfulness]}", "[image_reward], num_prompts: 2}"),
    )  # the guard watches the first two alone
    with pytest.raises(RecipeError, match=r"guard.*rewards.*image_reward reads prompts in en"):
        notes("a cat\n一只猫\n", TUNE.replace("image_reward", "brightness").replace("colourfulness", "image_reward"))


def test_a_weight_of_a_language_that_no_prompt_has_is_reported(notes):
    (note,) = notes("a cat\na dog\n", TUNE + "    languages: {en: 1, zh: 2, ko: 0}\n")
    assert "recipe.yaml:27:24: stages[2].languages.zh: data/prompts.txt has no prompt in zh: the weight" in note


def test_an_english_teacher_of_chinese_prompts_is_reported_with_what_to_do(notes, root):
    (note,) = notes("a cat\n一只猫\n一只狗\n")
    assert "stages[0].prompts: of the 3 prompts of data/prompts.txt 2 are in zh" in note
    assert "adapt_text" in note
    assert "kolors, hunyuan_dit, z_image, qwen_image" in note
    assert notes("a cat\nun chat\n") == []


def test_a_teacher_whose_vocabulary_has_the_characters_is_not(notes, root):
    characters = {value: key for key, value in BYTES.items()}
    tokens = ["".join(characters[byte] for byte in text.encode()) for text in ("一", "只", "狗")]
    tokens[-1] += "</w>"
    vocabulary = root / "teacher" / "tokenizer_2" / "vocab.json"
    vocabulary.write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    assert notes("一只狗\n") == []
    assert len(notes("红苹果在桌上\n")) == 1


def test_an_evaluation_whose_reward_reads_no_prompt_is_reported(notes, root):
    (root / "data" / "eval.jsonl").write_text('{"prompt": "一只猫"}\n' * 8, encoding="utf-8")
    text = (root / "good.yaml").read_text("utf-8").replace("[colourfulness]", "[clip_score]")
    (root / "good.yaml").write_text(text, encoding="utf-8")
    of_reward = [note for note in notes("a cat\n") if "clip_score" in note]
    assert len(of_reward) == 1
    assert "its column will be empty" in of_reward[0]


@pytest.mark.parametrize("file", sorted(reward_package.OURS.glob("[a-z]*.py")), ids=lambda file: file.stem)
def test_a_file_says_what_its_class_reads_and_whether_it_has_a_gradient(file):
    reward, said = class_of(file.stem), Reward(name=file.stem)
    assert languages_read(said) == (reward.languages if reward.needs_prompt else ())
    assert attributes_of(said)["differentiable"] is reward.differentiable


@pytest.mark.parametrize("code", ["languages = ()", "class A:\n    languages = names()\n    needs_prompt = True"])
def test_a_file_that_does_not_say_its_languages_plainly_is_of_none(code):
    assert "languages" not in attributes_in(code.encode())


def test_prompts_are_read_with_their_languages(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "猫"}\n{"prompt": "chat", "language": "fr"}\n{\n[]\n\n', encoding="utf-8")
    assert list(prompts_in(file)) == [("zh", "猫"), ("fr", "chat")]
    assert list(prompts_in(tmp_path / "none.txt")) == []


@pytest.mark.parametrize("name", ["emoji_demo", "emoji_chinese", "scenes_demo", "kolors_chinese"])
def test_recipes_that_come_along_have_prompts_that_are_read(name, monkeypatch):
    monkeypatch.chdir(shipped.CHECKOUT)
    lines: list[str] = []
    load(shipped.folder("recipes") / f"{name}.yaml", root=Path.cwd(), tell=lines.append)
    assert lines == []


def test_every_family_of_ours_says_what_it_reads():
    assert all("en" in layout.languages for layout in FAMILIES.values())


def of_english_teachers():
    """Yield (name, plain recipe) of the shipped recipes of published teachers that read English alone."""
    for file in shipped.recipes():
        plain = YAML(typ="safe").load(file.read_text(encoding="utf-8"))
        path, family = plain["teacher"]["path"], plain["teacher"]["family"]
        is_adapted = any(stage["kind"] == "adapt_text" for stage in plain["stages"])
        is_published = HUB_NAME.fullmatch(path) and not (file.parent / path).exists()
        if is_published and not is_adapted and FAMILIES[family].languages == ("en",):
            yield file.stem, plain


def test_recipes_of_teachers_that_read_english_alone_name_prompts_in_english_alone():
    names = []
    for name, plain in of_english_teachers():
        names.append(name)
        for stage in plain["stages"]:
            if path := stage.get("prompts"):
                languages = {language for language, _ in prompts_in(shipped.folder("recipes") / path)}
                assert languages <= {"en"}, (name, stage["kind"], path)
    assert {"sdxl_mlcm", "sdxl_feedback", "flux_mlcm", "sana_mlcm", "tune_published_student"} <= set(names)


def test_the_english_prompts_to_evaluate_on_are_those_of_the_pairs():
    folder = shipped.folder("recipes") / "prompts"
    english = [one for one in prompts_in(folder / "evaluation.jsonl") if one[0] == "en"]
    assert list(prompts_in(folder / "evaluation_english.jsonl")) == english
