"""The judge of scenes in an evaluation: which questions count, shares by hand, a whole report, and what is refused."""

import json
import math
from unittest.mock import Mock, patch

import pytest
import torch

import evaluation_case
from mlcm_rl.data.prompts import Prompt
from mlcm_rl.data.scenes import QUESTIONS, STYLES, Reading, read_code
from mlcm_rl.evaluation import instruments, scene_judge
from mlcm_rl.recipe import Evaluate
from mlcm_rl.storage.files import CheckpointError, write_json

A, B = "1F43C", "1F34E"
LINES = [
    {"prompt": "a panda left of an apple", "language": "en", "concept": f"beside {A} {B} 2 noto -"},
    {"prompt": "两只熊猫", "language": "zh", "concept": f"count {A} 2 - blue"},
    {"prompt": "anything", "language": "en"},
]
PANDA, APPLE = (A, "noto"), (B, "noto")
AS_ASKED = Reading((None, None, PANDA, APPLE), "pink")


class Planted(scene_judge.SceneJudge):
    """Sees on every picture what it is told, whatever is on it."""

    def __init__(self, reading: Reading):
        torch.nn.Module.__init__(self)
        self.concepts, self.reading = [A, B], reading

    def read(self, images):
        return [self.reading] * len(images)


def verdicts_of(reading: Reading, code: str | None) -> dict[str, float]:
    request = read_code(code) if code else None
    (row,) = Planted(reading).verdicts(torch.zeros(1, 3, 128, 128), [request]).tolist()
    return dict(zip(scene_judge.VERDICTS, row, strict=True))


def test_a_question_counts_where_the_prompt_asks_it():
    verdicts = verdicts_of(AS_ASKED, f"beside {A} {B} 2 noto -")
    assert math.isnan(verdicts.pop("background"))
    assert set(verdicts.values()) == {1.0}
    verdicts = verdicts_of(AS_ASKED, f"count {A} 2 - blue")
    assert {name for name, value in verdicts.items() if math.isnan(value)} == {"relation", "style"}
    assert (verdicts["all"], verdicts["objects"], verdicts["count"], verdicts["background"]) == (0.0, 0.0, 1.0, 0.0)
    assert all(map(math.isnan, verdicts_of(AS_ASKED, None).values()))


def test_shares_are_over_pictures_and_relations_over_their_prompts():
    requests = [read_code(LINES[0]["concept"]), read_code(LINES[1]["concept"]), None]
    nan = math.nan
    verdicts = torch.tensor(
        [
            [[1, 1, 1, 1, 1, nan], [0, 1, 1, 0, 1, nan]],
            [[0, 1, 0, nan, nan, 1], [0, 0, 0, nan, nan, 1]],
            [[nan] * 6] * 2,
        ]
    )
    metrics = scene_judge.metrics(verdicts, requests)
    expected = {
        "all": [0.5, 0, nan],
        "objects": [1, 0.5, nan],
        "relation": [0.5, nan, nan],
        "background": [nan, 1, nan],
        "in_beside": [0.5, nan, nan],
        "in_count": [nan, 0, nan],
        "in_single": [nan] * 3,
    }
    for name, values in expected.items():
        torch.testing.assert_close(metrics[f"right@{name}"], torch.tensor(values).float(), equal_nan=True)
    assert len(metrics) == 1 + len(QUESTIONS) + 4


def test_a_report_has_what_is_right_by_question_relation_and_language(place, tmp_path):
    folder = tmp_path / "judge"
    write_json(folder / "config.json", {"kind": "scenes", "concepts": [A, B], "styles": list(STYLES)})
    lines = (json.dumps(line, ensure_ascii=False) for line in LINES)
    (tmp_path / "scenes.jsonl").write_text("\n".join(lines), encoding="utf-8")
    settings = {
        "prompts": str(tmp_path / "scenes.jsonl"),
        "num_prompts": len(LINES),
        "judge": str(folder),
        "sampling_steps": [4],
        "teacher_steps": [2],
        "teacher_solvers": ["ddim"],
        "also": [],
        "rewards": [],
    }
    planted = patch.object(scene_judge, "load", lambda path, device: Planted(AS_ASKED))
    with planted, patch.object(instruments, "CANVAS", 16):
        report = evaluation_case.run(place, tmp_path / "evaluate", **settings)
    assert {row["role"] for row in report["rows"]} == {"reference", "undistilled", "student"}
    for row in report["rows"]:
        right = {name: (one["mean"], one["n"]) for name, one in row["metrics"].items() if name.startswith("right@")}
        assert right["right@all"] == (0.5, 2)
        assert (right["right@all/en"], right["right@all/zh"]) == ((1.0, 1), (0.0, 1))
        assert (right["right@background"], right["right@in_beside"]) == ((0.0, 1), (1.0, 1))
        assert right["right@in_above"] == (None, 0)
        assert row["metrics"]["right@all"]["samples"] == [[1.0, 1.0], [0.0, 0.0], [None, None]]
    assert [check["metric"] for check in report["headline"]["checks"]] == ["distance", "right@all"]
    page, text = ((tmp_path / "evaluate" / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    assert (page.count(">right</small>"), page.count(">wrong</small>")) == (3, 3)  # of student, undistilled, teacher
    for title in ("Right pictures, by question and relation", "Right pictures, prompts in zh"):
        assert title in page
        assert f"**{title}**" in text
    assert "| Sampler | Evals | all | objects | count | relation | style | background | in single |" in text
    assert "Right: relation</dt><dd>Share of pictures on which two things stand" in page


def test_a_batch_is_judged_by_the_requests_that_were_read_when_it_was_loaded(monkeypatch):
    prompts = [Prompt(line["prompt"], line["language"], line.get("concept")) for line in LINES]
    judge = Planted(AS_ASKED)
    requests = scene_judge.requests_of(prompts, [A, B], "p.jsonl")
    loaded = instruments.Instruments(
        None, torch.full((3,), -1), judge, requests, None, None, None, None, {}, {}, seed=0
    )
    monkeypatch.setattr(scene_judge, "request_of", None)
    numbers = [2, 0, 0, 1]
    samples = [(i, 0) for i in numbers]
    read = loaded.read(torch.zeros(4, 3, 8, 8), [prompts[i] for i in numbers], samples)["right"]
    expected = judge.verdicts(torch.zeros(4, 3, 8, 8), [requests[i] for i in numbers])
    assert torch.equal(read.nan_to_num(-1), expected.nan_to_num(-1))
    assert read[1, 0] == 1.0  # as asked
    assert read[0].isnan().all()  # it asks nothing


@pytest.mark.parametrize(
    ("concept", "message"),
    [("1F43C", "'1F43C' is not a request's code"), ("single 1F680 1 - -", "does not know '1F680'")],
)
def test_prompts_that_it_cannot_judge_are_refused(concept, message):
    with pytest.raises(ValueError, match=rf"p\.jsonl: the judge of scenes .*{message}"):
        scene_judge.requests_of([Prompt("a panda", "en", concept)], [A, B], "p.jsonl")


def test_a_teacher_of_another_size_is_refused_before_anything_is_drawn(place, tmp_path):
    write_json(tmp_path / "judge" / "config.json", {"kind": "scenes"})
    with pytest.raises(ValueError, match="reads pictures of 128 pixels a side, and the teacher's have 16"):
        evaluation_case.run(place, tmp_path / "evaluate", judge=str(tmp_path / "judge"))


def test_so_it_is_by_a_judge_of_one_drawing_a_picture(tmp_path, monkeypatch):
    write_json(tmp_path / "config.json", {})
    monkeypatch.setattr(instruments.judges, "load", lambda path, device: Mock(picture_size=64))
    stage = Evaluate(prompts="p.txt", judge=str(tmp_path))
    with pytest.raises(ValueError, match="reads pictures of 64 pixels a side, and the teacher's have 16"):
        instruments.load(stage, [], 16, torch.device("cpu"), seed=0)


def test_a_folder_of_other_styles_or_without_weights_is_refused(tmp_path):
    config = {"kind": "scenes", "concepts": [A], "styles": ["oil"]}
    write_json(tmp_path / "config.json", config)
    with pytest.raises(CheckpointError, match="styles are"):
        scene_judge.load(tmp_path)
    write_json(tmp_path / "config.json", config | {"styles": list(STYLES)})
    with pytest.raises(CheckpointError, match=r"judge\.safetensors is missing"):
        scene_judge.load(tmp_path)
    for concepts in ([1], [A, A]):
        write_json(tmp_path / "config.json", config | {"styles": list(STYLES), "concepts": concepts})
        with pytest.raises(CheckpointError, match="concepts must be different texts"):
            scene_judge.load(tmp_path)
