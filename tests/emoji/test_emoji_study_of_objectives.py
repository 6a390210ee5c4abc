"""The summary of the preference study: seeds averaged prompt by prompt, wins against the same sampler's reference."""

import json

import pytest

import objective_curves
import objective_summary
import objectives
from mlcm_rl.recipe.file import load

METRICS = ("reward/emoji_style", "reward/emoji_style_judge", "reward/emoji_alignment", "r@1", "r@5", "distance")


def row(name: str, style: list[float], judge: list[float], recall: float = 1.0) -> dict:
    columns = dict.fromkeys(METRICS, [recall] * len(style))
    columns |= {"reward/emoji_style": style, "reward/emoji_style_judge": judge}
    return {"role": "student", "name": name, "metrics": {key: {"values": one} for key, one in columns.items()}}


def report(*rows: dict) -> dict:
    languages = ["en", "zh"] * 2
    tuned = [{"name": one["name"], "guard": {"kept_step": 50}} for one in rows[1:]]
    return {"prompts": [{"language": language} for language in languages], "rows": list(rows), "tuned": tuned}


BEFORE = row("student", [0.0] * 4, [-1.0] * 4)


def test_seeds_are_averaged_prompt_by_prompt_and_a_tie_counts_half():
    both = [row("feedback-0", [1.0, 1.0, -1.0, 0.0], [1.0] * 4), row("feedback-1", [1.0, -1.0, -1.0, 0.0], [-2.0] * 4)]
    student = objective_summary.students(report(BEFORE, *both))["feedback"]
    assert student.wins("reward/emoji_style").tolist() == [1.0, 0.5, 0.0, 0.5]
    assert student.wins("reward/emoji_style", "zh").tolist() == [0.5, 0.5]
    assert student.style_share().tolist() == [0.5] * 4
    assert student.mean("reward/emoji_style_judge").tolist() == [-0.5] * 4


@pytest.mark.parametrize(("style", "verdict"), [(1.0, "1.000, target 0.75 met"), (-1.0, "0.000, target 0.75 missed")])
def test_targets_are_held_against_what_was_measured(style, verdict):
    text = objective_summary.text([report(BEFORE, row("dpo-0", [style] * 4, [1.0] * 4))], [])
    assert f"- dpo, win rate on what it was trained on: {verdict}" in text
    assert "| dpo | 1, 50 |" in text


def test_a_student_that_forgets_its_concepts_misses_the_target_of_recall():
    text = objective_summary.text([report(BEFORE, row("dpo-0", [1.0] * 4, [1.0] * 4, recall=0.9))], [])
    assert "- dpo, judge's R@5 over the distilled student's: 0.900, target 0.97 missed" in text


def test_kid_to_the_teacher_is_that_after_less_that_before_prompt_by_prompt():
    before, after = row("student", [0.0] * 4, [-1.0] * 4), row("dpo-0", [1.0] * 4, [1.0] * 4)
    before["metrics"]["teacher_kid"] = {"values": [0.01, 0.03, 0.01, 0.03]}
    after["metrics"]["teacher_kid"] = {"values": [0.02, 0.04, 0.03, 0.05]}
    text = objective_summary.text([report(before, after)], [])
    assert "| +15.000 +- 2.887 | - |" in text  # of 10, 10, 20 and 20; patches were not measured


def test_every_row_of_the_study_is_a_valid_stage_and_names_a_reward_it_holds_out(monkeypatch):
    base = load(objectives.RECIPES / "emoji_preference.yaml", [])
    monkeypatch.setattr(objectives, "pair_table", lambda recipe: "pairs")
    ran = []
    monkeypatch.setattr(objectives.pipeline, "run", lambda recipe: ran.append(recipe) or [_Done()])
    for name, (kind, _) in objectives.ROWS.items():
        stage, _ = objectives.tune(base, name, seed=3)
        assert isinstance(stage, kind)
        assert stage.seed == 3
        assert [one.kind for one in ran[-1].stages] == ["trajectories", "distill", stage.kind]
    assert ran[-1].stages[-1].guard.num_prompts == 64  # a guard that is changed keeps its other settings


def test_curves_are_means_over_seeds_and_begin_where_nothing_is_won(tmp_path):
    for seed, rate in enumerate((0.6, 0.8)):
        (tmp_path / str(seed)).mkdir()
        look = {"step": 25, "guard/held_out_gain": 0.1, "guard/win_rate/emoji_style": rate}
        (tmp_path / str(seed) / "log.jsonl").write_text(json.dumps(look) + "\n" + json.dumps({"step": 26}) + "\n")
    folders = [tmp_path / "0", tmp_path / "1"]
    assert objective_curves.win_rates(folders, "emoji_style") == {0: [0.5, 0.5], 25: [0.6, 0.8]}


class _Done:
    folder = "folder"
