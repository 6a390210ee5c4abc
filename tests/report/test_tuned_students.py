"""What a report says of preference learning: by hand on planted rows, and on a small evaluation from end to end."""

import json
import math
import re

import pytest
import torch

import runs
from evaluation_case import PICTURES, PROMPTS
from mlcm_rl import pipeline
from mlcm_rl.models import students
from mlcm_rl.recipe import Evaluate
from mlcm_rl.report import assembly, comparisons, figures, page, tables, tuned_students
from mlcm_rl.report.types import Comparison, Measurements, Prompt, Report, Row, Summary, TunedComparison, TunedStudent

LANGUAGES = ["en", "zh", "en", "zh"]


def planted(name, num_steps=4, gamma=0.0, default=True, samples=None, **values):
    row = {
        "id": f"{name}-{num_steps}-{gamma:g}", "role": "student", "name": name, "sampler": "gamma 0",
        "num_steps": num_steps, "num_evaluations": num_steps, "times": list(range(num_steps)), "gamma": gamma,
        "default": default,
    }  # fmt: skip
    tensors = {key.replace("_", "/", 1): torch.tensor(one) for key, one in values.items()}
    return assembly.record(row, tensors, LANGUAGES, 1.0, math.nan, samples)


def entry(**changes):
    settings = {
        "name": "dpo", "reference": "student", "rewards": {"style": "trained on", "judge": "held out"},
        "num_steps": 60, "guard": {"kept_step": 40, "warnings": [], "stopped": False}, "curves": {},
    }  # fmt: skip
    return TunedStudent.model_validate(settings | changes)


PLANTED_PROMPTS = [Prompt(prompt="a cat", language=language) for language in LANGUAGES]


SCORES = {"reward_style": [1.0, 2.0, 3.0, 4.0], "reward_judge": [0.0, 0.0, 0.0, 0.0], "distance": [1.0, 2.0, 3.0, 4.0]}
TUNED = {"reward_style": [2.0, 2.0, 5.0, 3.0], "reward_judge": [1.0, 1.0, 1.0, 1.0], "distance": [1.5, 2.0, 3.5, 4.0]}


def compared(*rows):
    return tuned_students.compare(list(rows), PLANTED_PROMPTS, entry())


def test_differences_are_paired_and_a_tie_is_half_a_win():
    (one,) = compared(planted("student", **SCORES), planted("dpo", **TUNED))
    assert (one.row, one.reference, one.num_steps) == ("dpo-4-0", "student-4-0", 4)
    spread = math.sqrt((0.5**2 + 0.5**2 + 1.5**2 + 1.5**2) / 3)  # of 1, 0, 2, -1 around 0.5
    assert one.differences["reward/style"].as_json() == {"mean": 0.5, "se": pytest.approx(spread / 2, rel=1e-5), "n": 4}
    assert one.differences["distance"].mean == 0.25
    assert one.win_rates["reward/style"].mean == (1 + 0.5 + 1 + 0) / 4
    assert one.win_rates["reward/style"].se == pytest.approx(math.sqrt(0.6875 / 3) / 2, rel=1e-5)
    assert one.win_rates["reward/style/en"].mean == 1.0
    assert one.win_rates["reward/style/zh"].mean == 0.25
    assert one.differences["reward/style/zh"].mean == -0.5
    assert one.win_rates["reward/judge"].as_json() == {"mean": 1.0, "se": 0.0, "n": 4}
    assert "distance/en" not in one.differences
    assert "distance" not in one.win_rates


def test_a_prompt_that_a_reward_does_not_read_is_no_win_and_no_loss():
    before, after = ([1.0, math.nan, 1.0, math.nan], [2.0, math.nan, 0.0, math.nan])
    rows = planted("student", reward_style=before), planted("dpo", reward_style=after)
    (one,) = compared(*rows)
    assert one.win_rates["reward/style"].as_json() == {"mean": 0.5, "se": 0.5, "n": 2}
    assert one.win_rates["reward/style/zh"].as_json() == {"mean": None, "se": None, "n": 0}


def test_a_constraint_on_a_reward_of_one_language_is_measured_on_its_prompts():
    """Of 1 and 3, a deviation of sqrt(2) apart, to 0 and 2."""
    before, after = [1.0, math.nan, 3.0, math.nan], [0.0, math.nan, 2.0, math.nan]
    rows = planted("student", reward_style=before), planted("dpo", reward_style=after)
    (one,) = tuned_students.compare(list(rows), PLANTED_PROMPTS, entry(max_drops={"style": 0.1}))
    assert one.drops["style"].as_json() == {"mean": pytest.approx(math.sqrt(0.5)), "se": 0.0, "n": 2}


@pytest.mark.parametrize(
    ("drop", "error", "outcome"),
    [
        (0.05, 0.01, "met."),
        (-0.30, 0.01, "met."),
        (0.20, 0.01, "not met."),
        (0.09, 0.02, "met, within two standard errors of the limit."),
        (0.12, 0.02, "not met, within two standard errors of the limit."),
        (0.10, 0.00, "met, within two standard errors of the limit."),
    ],
)
def test_a_constraint_is_met_below_its_limit_and_clearly_so_from_two_errors(drop, error, outcome):
    """At most 0.1 deviations below the student before."""
    compared = TunedComparison(
        num_steps=4, row="dpo-4-0", reference="student-4-0", differences={}, win_rates={},
        drops={"style": Summary(mean=drop, se=error, n=4)},
    )  # fmt: skip
    (text,) = tuned_students.constraints(entry(max_drops={"style": 0.1}, comparisons=[compared]))
    fell = f"it fell by {figures.plus_minus(drop, error)} deviations, at most 0.1 was allowed: {outcome}"
    assert text == f"Constraint on style: {fell}"


def test_a_win_is_a_pictures_and_not_that_of_a_prompts_mean():
    """Means 1, 1, 1, 1 against 0: of two pictures each, one wins and one loses."""
    key = "reward/style"
    before = planted("student", reward_style=[0.0] * 4, samples={key: torch.tensor([[0.0, 0.0]] * 4)})
    after = planted("dpo", reward_style=[1.0] * 4, samples={key: torch.tensor([[3.0, -1.0]] * 4)})
    assert tuned_students.wins_of(after, before, key).tolist() == [0.5] * 4


def test_every_default_row_is_compared_at_its_own_sampler():
    """The other gamma and the other grid of the reference are not what a default row stands against."""
    rows = [planted(name, n, **SCORES) for name in ("student", "dpo") for n in (1, 2, 8)]
    rows += [planted(name, 2, gamma=1.0, default=False, **SCORES) for name in ("student", "dpo")]
    found = compared(*rows)
    assert [(one.row, one.reference) for one in found] == [(f"dpo-{n}-0", f"student-{n}-0") for n in (1, 2, 8)]
    assert tuned_students.nearest(entry(comparisons=found)).num_steps == 2


def test_a_student_tuned_at_another_gamma_is_compared_at_that_one_and_in_a_single_step_at_none():
    rows = [planted("student", 1, 0.0, **SCORES), planted("dpo", 1, 0.3, **SCORES)]
    rows += [planted("student", 2, 0.0, **SCORES), planted("student", 2, 0.3, default=False, **SCORES)]
    rows += [planted("dpo", 2, 0.3, **SCORES), planted("dpo", 2, 0.0, default=False, **SCORES)]
    found = compared(*rows)
    assert [(one.row, one.reference) for one in found] == [
        ("dpo-1-0.3", "student-1-0"),
        ("dpo-2-0.3", "student-2-0.3"),
    ]


def test_a_tuned_student_is_summed_up_in_a_line():
    student = entry(comparisons=compared(planted("student", **SCORES), planted("dpo", **TUNED)))
    assert tuned_students.sentence(student) == (
        "dpo at 4 steps: style win rate 0.62 \u00b1 0.24 (trained on), judge 1 (n = 4, 95 %: 0.51 to 1) (held out)"
    )
    assert tuned_students.verdict(student) == (
        "Trained on style, held out judge. By the held-out gain, kept is the student of step 40; "
        "the run went on to its end, step 60."
    )
    nothing = {"kept_step": 0, "warnings": [], "stopped": True}
    assert "no look was better, so kept is the distilled student; it stopped" in tuned_students.verdict(
        entry(guard=nothing)
    )
    assert tuned_students.sentence(entry(comparisons=[])).startswith("dpo: no win rate")


# ---- from end to end ----


@pytest.fixture(scope="module")
def result(tuned):
    return assembly.read(tuned / "report.json")


@pytest.fixture(scope="module")
def student(result):
    (found,) = result.tuned
    return found


def test_a_tuned_student_stands_in_the_report_with_what_its_stage_left(student):
    assert (student.name, student.reference) == ("feedback", "student")
    assert student.rewards == {"brightness": "trained on", "colourfulness": "held out"}
    assert (student.guard.kept_step, student.guard.stopped, student.num_steps) == (10, True, 40)
    assert student.curves["guard/trained_gain"] == [(0, 0.0), (10, 1.0), (20, 2.0), (30, 3.0)]
    assert student.curves["guard/held_out_gain"] == [(0, 0.0), (10, 0.4), (20, 0.2), (30, -0.3)]
    assert [step for step, _ in student.curves["reward/brightness"]] == [5, 10, 15, 20, 25, 30]
    assert student.curves["guard/reward/colourfulness"] == [(10, 0.4), (20, 0.2), (30, -0.3)]


def test_it_is_compared_in_every_metric_at_every_number_of_steps(result, student):
    rows = comparisons.by_id(result.rows)
    assert [one.num_steps for one in student.comparisons] == [1, 2, 4]
    for one in student.comparisons:
        before, after = rows[one.reference], rows[one.row]
        assert (before.times, before.gamma) == (after.times, after.gamma)
        assert set(after.metrics) <= set(one.differences)
        for key in ("distance", "r@5/zh", "reward/brightness"):
            expected = after.metrics[key].mean - before.metrics[key].mean
            assert one.differences[key].mean == pytest.approx(expected, abs=1e-4)
        assert one.differences["distance"].mean != 0.0
        assert one.win_rates["reward/brightness"].n == len(PROMPTS)
        assert len(after.metrics["reward/brightness"].samples[0]) == PICTURES
    assert rows[result.reference].metrics["reward/brightness"].samples == []


def test_an_untuned_student_ties_with_itself(result):
    untuned = entry(name="student", rewards={})
    for one in tuned_students.compare(result.rows, result.prompts, untuned):
        assert {rate.mean for rate in one.win_rates.values()} == {0.5}
        assert {gap.mean for gap in one.differences.values()} <= {0.0, None}


def test_the_headline_is_of_what_the_run_made_and_the_distilled_one_can_still_be_asked_for(result):
    rows = comparisons.by_id(result.rows)
    assert result.product == "feedback"
    of_distilled = comparisons.headline_of(result, "student")
    for headline, name in ((result.headline, "feedback"), (of_distilled, "student")):
        assert {rows[check.student].name for check in headline.checks} == {name}
    assert "Tuned by feedback, it is" in result.headline.text
    assert "Tuned by" not in of_distilled.text


def test_the_page_says_whose_verdict_it_is(tuned):
    text = (tuned / "report.html").read_text(encoding="utf-8")
    assert "the student tuned by feedback is" in text
    assert "Tuned by feedback, it is" in text


def headline_of(values, kept_step=40):
    """The headline where the distilled student is far ahead of the teacher, and the tuned one as near as that."""
    far = {"reward_style": [0.0] * 4, "reward_judge": [0.0] * 4, "distance": [9.0, 9.1, 9.2, 9.0]}
    teacher = planted("teacher", **far).model_copy(update={"role": "undistilled", "default": False})
    reference = planted("reference", 50, **SCORES).model_copy(update={"role": "reference"})
    rows = [reference, teacher, planted("student", **SCORES), planted("dpo", **values)]
    guard = {"kept_step": kept_step, "warnings": [], "stopped": False}
    measurements = Measurements.model_construct(rows=rows, reference=reference.id, prompts=PLANTED_PROMPTS)
    return comparisons.headline(measurements, [entry(guard=guard, comparisons=compared(*rows))], "dpo")


def test_a_reward_that_tuning_lost_is_in_the_verdict_with_its_error():
    worse = headline_of(SCORES | {"reward_style": [2.0, 3.0, 4.0, 5.0], "reward_judge": [-1.0, -1.0, -1.0, -1.0]})
    assert not worse.passed
    all_won, none_won = "1 (n = 4, 95 %: 0.51 to 1)", "0 (n = 4, 95 %: 0 to 0.49)"
    message = (
        f"Tuned by dpo, it is ahead in style (win rate {all_won}) and behind in judge (win rate {none_won}) beside"
    )
    assert message in worse.text
    won = headline_of(SCORES | {"reward_style": [2.0, 3.0, 4.0, 5.0]})
    assert won.passed
    assert "ahead in style (win rate 1 (n = 4, 95 %: 0.51 to 1)) beside" in won.text
    assert "for the student tuned by dpo, " in won.text
    half = headline_of(SCORES | {"reward_judge": [-1.0, -1.0, -1.0, 1.0]})
    assert "level in every reward" in half.text  # 0.25 +- 0.25
    behind = headline_of(SCORES | {"reward_judge": [-1.0, -1.0, -1.0, 0.0]})
    assert "behind in judge (win rate 0.12 \u00b1 0.12)" in behind.text


def test_a_guard_that_kept_step_0_is_in_the_verdict():
    text = headline_of(SCORES, kept_step=0).text
    assert "It is the student as it was distilled: the guard of dpo kept step 0." in text


def test_a_tuned_student_whose_reference_is_elsewhere_is_left_out(place):
    folders = {"tuned": place / "feedback" / "student"}
    assert tuned_students.read(folders) == []
    (found,) = tuned_students.read({**folders, "lcm": place / "same" / "student"})
    assert (found.name, found.reference) == ("tuned", "lcm")
    assert students.describe(folders["tuned"])["preference"]


def test_the_written_report_has_a_line_a_table_and_the_warnings(tuned, result, student):
    text = (tuned / "report.md").read_text(encoding="utf-8")
    assert f"- {tuned_students.sentence(student)}. Trained on brightness, held out colourfulness." in text
    assert "  - Warning: step 30: the trained reward rose & the held-out one fell" in text
    lines = [line for line in text.splitlines() if line.startswith("| feedback | 4 |")]
    assert [line.split(" | ")[2:4] for line in lines[:3]] == [
        ["brightness", "trained on"],
        ["colourfulness", "held out"],
        ["sharpness", "neither"],
    ]
    assert len(lines) == 4  # and what else changed
    widths = {line.count("|") for line in text.splitlines() if re.match(r"\| (feedback|Student) \|", line)}
    assert len(widths) == 2  # of two tables, each with its head
    old = Report(**{**dict(result), "tuned": [], "format": 2})
    assert "## Tuned" not in tables.markdown(old)


def test_the_page_shows_before_and_after_and_the_guards_curves(tuned, result, student):
    text = (tuned / "report.html").read_text(encoding="utf-8")
    assert page.render(result, tuned) == text
    section = text[text.index('<h2 id="tuned">') : text.index('<h2 id="quality">')]
    assert tuned_students.sentence(student) in section
    assert "<li>step 30: the trained reward rose &amp; the held-out one fell</li>" in section
    for alt in ("before: student", "after: feedback"):
        pictures = re.findall(f'<img src="data:image/webp;base64,([^"]+)" alt="{alt}">', section)
        assert len(set(pictures)) == len(PROMPTS)
    for prompt, language in (("a red apple", "en"), ("鲸", "zh")):
        assert f'<span lang="{language}">{prompt}</span>' in section
    assert "Before and after, 4 steps" in section
    (plot,) = re.findall(r"<svg.*?</svg>", section, flags=re.DOTALL)
    for words in ("trained on", "held out", "kept: step 10"):
        assert words in plot
    curves = text[text.index('<h2 id="loss">') :]
    assert "Reward brightness of feedback" in curves
    assert "Reward colourfulness of feedback" in curves


def test_a_page_without_tuned_students_says_nothing_of_them(finished):
    text = (finished / "report.html").read_text(encoding="utf-8")
    assert 'id="tuned"' not in text
    assert "Win rate" not in text


def test_a_recipe_that_tunes_its_student_reports_it(tiny_sdxl, tmp_path):
    """By the stages themselves, so that what they leave and what a report reads stay one."""
    prompts = runs.write_prompts(tmp_path)
    rewards = ["brightness", "colourfulness"]
    evaluate = Evaluate(
        prompts=prompts, num_prompts=2, sampling_steps=[2], teacher_steps=[2], batch_size=4, rewards=rewards
    )
    stages = [runs.trajectories(prompts), runs.distill(), runs.tuning("feedback", prompts), evaluate]
    done = pipeline.run(runs.recipe(tiny_sdxl, tmp_path, stages))
    result = json.loads((done[-1].folder / "report.json").read_text(encoding="utf-8"))
    (student,) = result["tuned"]
    assert (student["name"], student["reference"]) == ("feedback", "student")
    assert student["rewards"] == {"brightness": "trained on", "colourfulness": "held out"}
    assert [step for step, _ in student["curves"]["guard/held_out_gain"]] == [0, 1, 2]
    assert [step for step, _ in student["curves"]["reward/brightness"]] == [1, 2]
    assert set(student["comparisons"][0]["win_rates"]) >= {"reward/brightness", "reward/colourfulness"}
    assert "Tuned to preferences" in (done[-1].folder / "report.html").read_text(encoding="utf-8")


def test_students_compared_in_different_samplers_have_galleries_of_their_own(tmp_path):
    rows = [Row.model_construct(id=name, num_steps=2) for name in ("gamma-0", "gamma-1", "feedback", "policy")]
    references = {"feedback": "gamma-0", "policy": "gamma-1"}
    comparison = {"num_steps": 2, "differences": {}, "win_rates": {}}
    tuned = [
        entry(name=name, comparisons=[TunedComparison(row=name, reference=row, **comparison)])
        for name, row in references.items()
    ]
    galleries = page.before_and_after(Report.model_construct(rows=rows, tuned=tuned, prompts=[]), tmp_path)
    assert [one.columns for one in galleries] == [["before: student", f"after: {name}"] for name in references]


def test_the_page_names_what_the_student_is_ahead_and_behind_in():
    ahead = [Comparison.model_construct(metric=key, verdict="ahead") for key in ("distance", "r@5")]
    behind = ahead[1].model_copy(update={"verdict": "behind"})
    assert page.standing([ahead[0], behind]) == "ahead in Distance, behind in R@5"
    assert page.standing(ahead) == "ahead in Distance and R@5"
