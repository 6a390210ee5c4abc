"""GenEval's rules on boxes by hand, and its prompt file, line by line."""

import json

import pytest

from mlcm_rl.data.geneval import MAX_OBJECTS, Detection, Task, Wanted, read_tasks, relations
from mlcm_rl.data.prompts import read_prompts


def seen(*objects):
    return [Detection(name, confidence, box) for name, confidence, box in objects]


def none(name, boxes):
    raise AssertionError("no colour is asked for")


CAT, DOG = ("cat", 0.8, (0, 0, 10, 10)), ("dog", 0.7, (50, 0, 60, 10))


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        # Sizes 10 each: 2 are taken off an offset; centres are 5, 5 and those of the box.
        ((50, 0, 60, 10), {"left of"}),  # 50 to the left, 48 / 50
        ((-50, 0, -40, 10), {"right of"}),
        ((0, 50, 10, 60), {"above"}),
        ((0, -50, 10, -40), {"below"}),
        ((30, 30, 40, 40), {"left of", "above"}),  # 28 / 42.4 = 0.66 each
        ((2, 0, 12, 10), set()),  # 2 off: nothing is left
        ((3, 0, 13, 10), set()),  # 3 off: 1 / 3 is less than a half
        ((4, 0, 14, 10), set()),  # 4 off: 2 / 4 is not more than a half
        ((5, 0, 15, 10), {"left of"}),  # 3 / 5
        ((20, 50, 30, 60), {"above"}),  # 18 / 53.9 = 0.33 across, 48 / 53.9 down
        ((0, 0, 10, 10), set()),
    ],
)
def test_relations_of_a_box_are_by_hand(box, expected):
    assert relations((0, 0, 10, 10), box) == expected


def test_objects_are_counted_above_their_confidence_and_the_most_confident_first():
    two = Task("counting", (Wanted("cat", 2),), (("cat", 3),))
    cats = [("cat", confidence, (0, 0, 1, 1)) for confidence in (0.95, 0.92, 0.5)]
    assert two.is_right(seen(*cats), 0.9, none)
    assert not two.is_right(seen(*cats), 0.3, none)  # there are three then
    assert not two.is_right(seen(*cats[1:]), 0.9, none)
    assert not two.is_right(seen(("cat", 0.9, (0, 0, 1, 1)), cats[0]), 0.9, none)  # not above it
    many = Task("counting", (Wanted("cat", 1),), (("cat", MAX_OBJECTS + 1),))
    assert many.is_right(seen(*[cats[0]] * 30), 0.9, none)  # of a class so many are looked at


def test_two_objects_are_both_there():
    both = Task("two_object", (Wanted("cat", 1), Wanted("dog", 1)))
    assert both.is_right(seen(CAT, DOG), 0.3, none)
    assert not both.is_right(seen(CAT, CAT), 0.3, none)
    assert not both.is_right([], 0.3, none)


def test_colours_are_those_of_the_most_confident_objects():
    attribute = Task("color_attr", (Wanted("cat", 1, "red"), Wanted("dog", 1, "blue")))
    colours = {CAT[2]: "red", DOG[2]: "blue", (7, 7, 8, 8): "green"}

    def of(name, boxes):
        return [colours[box] for box in boxes]

    assert attribute.is_right(seen(CAT, DOG), 0.3, of)
    assert not attribute.is_right(seen(CAT, DOG, ("cat", 0.9, (7, 7, 8, 8))), 0.3, of)
    assert attribute.is_right(seen(CAT, DOG, ("cat", 0.7, (7, 7, 8, 8))), 0.3, of)
    assert not Task("colors", (Wanted("cat", 2, "red"),)).is_right(seen(CAT, ("cat", 0.7, (7, 7, 8, 8))), 0.3, of)


def test_a_position_is_to_the_objects_of_an_entry_before():
    left = Task("position", (Wanted("dog", 1), Wanted("cat", 1, relation="left of", other=0)))
    assert left.is_right(seen(CAT, DOG), 0.3, none)
    right = Task("position", (Wanted("dog", 1), Wanted("cat", 1, relation="right of", other=0)))
    assert not right.is_right(seen(CAT, DOG), 0.3, none)
    assert not left.is_right(seen(CAT), 0.3, none)  # there is no dog to be left of


LINES = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "cat", "count": 2}],
        "exclude": [{"class": "cat", "count": 3}],
        "prompt": "a photo of two cats",
    },
    {
        "tag": "position",
        "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a cat left of a dog",
    },
    {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}], "prompt": "a photo of a red cat"},
]


def test_a_file_in_genevals_layout_is_read_as_prompts_and_as_tasks(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)), encoding="utf-8")
    assert [prompt.prompt for prompt in read_prompts(path)] == [line["prompt"] for line in LINES]
    tasks = read_tasks(path, 4)
    assert tasks[1] == Task("counting", (Wanted("cat", 2),), (("cat", 3),))
    assert tasks[2].included[1] == Wanted("cat", 1, None, "left of", 0)
    assert tasks[3].has_colours
    assert not tasks[2].has_colours
    assert tasks[2].names == {"cat", "dog"}
    assert len(read_tasks(path, 2)) == 2


ONE_CAT = {"class": "cat", "count": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tag": None}, "1: tag must be the name of a task"),
        ({"include": []}, "1: include is empty"),
        ({"include": {"class": "cat"}}, "1: include must be a list of objects"),
        ({"include": [{"count": 1}]}, r"1: include\[0\]: class must be the name"),
        ({"include": [{"class": "cat", "count": True}]}, r"1: include\[0\]: count must be a whole number from 1"),
        ({"include": [{"class": "cat", "count": 1, "color": "teal"}]}, r"include\[0\]: color must be one of red"),
        ({"include": [{"class": "cat", "count": 1, "position": ["above", 0]}]}, r"include\[0\]: position must be"),
        ({"include": [{"class": "cat", "count": 17}]}, r"include\[0\]: count must be a whole number from 1 to 16"),
        ({"include": [ONE_CAT, ONE_CAT | {"position": ["above", 0.0]}]}, r"include\[1\]: position must be"),
        ({"exclude": [{"class": "cat", "count": 0}]}, r"1: exclude\[0\]: count must be"),
        (
            {"include": [ONE_CAT, {"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 2}]},
            r"1: exclude\[0\]: no picture is right: 2 of dog and fewer than 2",
        ),
    ],
)
def test_a_line_that_is_not_in_the_layout_is_refused_with_its_place(tmp_path, change, message):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(LINES[0] | change), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_tasks(path, 1)


def test_a_file_of_plain_prompts_has_no_tasks(tmp_path):
    with pytest.raises(ValueError, match=r"p\.txt: detector needs a \.jsonl file of prompts with the keys tag"):
        read_tasks(tmp_path / "p.txt", 1)
