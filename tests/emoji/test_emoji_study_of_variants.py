"""The study's summary: seeds averaged prompt by prompt, pairs picked on other prompts than they are measured on."""

import json
import math

import pytest
import torch

import kept_values
import variant_summary
import variant_table
import variants
from mlcm_rl.recipe.file import load

UNDISTILLED = ("teacher", "DDIM, guided")


def keep(folder, file: str, *rows, of_teacher: bool = False) -> None:
    """Results of `rows`, each (name, sampler, evaluations, distances, r@5, maybe KID and on patches) of one report."""
    made = [
        {
            "role": "undistilled" if of_teacher else "student",
            **dict(zip(("name", "sampler", "num_evaluations"), row, strict=False)),
            "metrics": {"distance": {"values": row[3]}, "r@1": {"values": row[4]}, "r@5": {"values": row[4]}}
            | {name: {"values": values} for values in row[5:] for name in ("teacher_kid", "teacher_patch_kid")},
        }
        for row in rows
    ]
    (folder / "report.json").write_text(json.dumps({"rows": made}), encoding="utf-8")
    kept_values.write(folder / f"{file}.safetensors", [folder / "report.json"], of_teacher, "0123")


def row(values: list[float], n: int = 4, name: str = "student", sampler: str = "gamma 0", hits: float = 1.0) -> tuple:
    return name, sampler, n, values, [hits] * len(values)


def summary(folder) -> str:
    """The summary of the values in `folder`, by way of the table that is kept."""
    variant_table.write(variant_table.of_values(folder), folder / "variants.tsv")
    return variant_summary.text(variant_table.read(folder / "variants.tsv"))


@pytest.fixture
def results(tmp_path):
    """A folder with the teacher's results alone: at 4 evaluations, and the reference's 100."""
    teacher = [row([5.0, 5.0, 5.1, 5.2, 5.3], 4, *UNDISTILLED), row([0.0] * 5, 100, *UNDISTILLED)]
    keep(tmp_path, "teacher", *teacher, of_teacher=True)
    return tmp_path


def test_seeds_are_averaged_and_phases_are_students_of_their_own(results):
    keep(results, "a_b-0", row([1.0] * 5))
    keep(results, "a_b-1", row([3.0] * 5), row([7.0] * 5, name="student phase-0-K8"))
    rows = {(row.student, row.evaluations): row for row in variant_table.of_values(results)}
    assert {key: (row.seeds, row.distance) for key, row in rows.items() if row.evaluations == 4} == {
        ("a_b", 4): (2, 2.0),
        ("a_b phase-0-K8", 4): (1, 7.0),
        ("teacher", 4): (0, pytest.approx(5.15, abs=2e-3)),
    }
    text = summary(results)
    assert "| a_b, gamma 0 | 2 | 71% | 2.0000 +- 0.0000 |" in text  # 1 and 3: sqrt(2) of 2
    assert "| a_b phase-0-K8, gamma 0 | 1 | - | 7.0000" in text


def test_pairs_are_picked_on_the_first_fifth_and_measured_on_the_rest(results):
    """The lucky one is best on the one picking prompt and worse on all others; it is picked all the same."""
    keep(results, "lucky-0", row([0.0, 9.0, 9.125, 9.25, 9.375]))
    keep(results, "steady-0", row([1.0, 2.0, 2.125, 2.25, 2.375]))
    text = summary(results)
    assert "4 evaluations, lucky, gamma 0 against the undistilled teacher (teacher, DDIM, guided): 4.0" in text
    assert "missed" in text
    assert "| steady, gamma 0 | 1 | - | 2.1875 +- 0.0807 |" in text


def test_differences_are_paired_and_errors_are_those_of_the_prompts_left_to_measure(results):
    """Student and rival share what makes a prompt hard: the error of their difference is far below that of either."""
    hard = [0.0, 1.0, 2.0, 3.0, 4.0]
    keep(results, "lcm-0", row([value + 1 for value in hard]))
    keep(results, "single-0", row([value + change for value, change in zip(hard, (0, 0.5, 0, 0.5, 0), strict=True)]))
    (single,) = [one for one in variant_table.of_values(results) if one.student == "single"]
    assert (single.over_lcm, single.over_lcm_error) == pytest.approx((-0.75, 1 / math.sqrt(12) / 2), abs=1e-6)
    assert single.distance_error == pytest.approx(torch.tensor([1.5, 2.0, 3.5, 4.0]).std().item() / 2)
    (teacher,) = [one for one in variant_table.of_values(results) if one.pair == UNDISTILLED and one.evaluations == 4]
    assert (teacher.over_teacher, teacher.over_lcm) == (0.0, pytest.approx(5.15 - 3.5, abs=2e-3))


def test_the_table_for_people_is_what_its_command_prints(emoji_folder):
    root = emoji_folder.parents[1]
    printed = variant_summary.text(variant_table.read(emoji_folder / "study" / "variants-400.tsv")).split("\n\n")[0]
    pages = [root / "README.md", *(root / "docs").rglob("*.md")]
    assert any(printed in page.read_text(encoding="utf-8") for page in pages)


@pytest.mark.parametrize(("single", "verdict"), [(1.046875, "met"), (1.203125, "missed")])
def test_one_student_is_set_against_the_best_dedicated_one_at_every_budget(results, single, verdict):
    for name, value in (("fixed_8-0", 2.0), ("fixed_4_trajectory-0", 1.0), ("budgets-0", single)):
        keep(results, name, *(row([value] * 10, n) for n in (2, 3, 4, 6, 8)))
    keep(results, "teacher", *(row([3.0] * 10, n, *UNDISTILLED) for n in (4, 100)), of_teacher=True)
    text = summary(results)
    assert f"budgets over the best dedicated student: {single:.2f} at 2" in text
    assert f"within 10 % {verdict}" in text


@pytest.mark.parametrize(("hits", "verdict"), [(0.96, "met"), (0.94, "missed")])
def test_the_best_students_recall_is_held_to_the_references(results, hits, verdict):
    keep(results, "near-0", row([1.0] * 5, hits=hits))
    keep(results, "far-0", row([2.0] * 5, hits=1.0))
    (line,) = [line for line in summary(results).splitlines() if "R@5" in line]
    assert "near" in line
    assert line.endswith(verdict)


def test_what_is_kept_is_the_report_to_half_precision_and_knows_what_made_it(results):
    keep(results, "one-0", row([0.03125, None, 0.1, 0.2, 0.3]))
    found = kept_values.read(results / "one-0.safetensors")
    values = found["student", "gamma 0", 4, "distance"].tolist()
    assert values[0] == 0.03125
    assert math.isnan(values[1])
    assert values[2:] == pytest.approx([0.1, 0.2, 0.3], rel=2**-11)
    assert kept_values.is_kept(results / "one-0.safetensors", "0123")
    assert not kept_values.is_kept(results / "two-0.safetensors", "0123")
    with pytest.raises(ValueError, match="holds what evaluation 0123 measured, and this is 4567"):
        kept_values.is_kept(results / "one-0.safetensors", "4567")


def test_a_student_with_results_is_not_trained_again_and_one_without_is(results, monkeypatch):
    base, ran = load(variants.RECIPES / "emoji_mlcm.yaml"), []
    recipe = variants.recipe_of(base, "budgets", 0, 400, 1000)
    path = results / "budgets-0.safetensors"

    class Finished:
        kind, folder = "evaluate", results

    monkeypatch.setattr(kept_values.pipeline, "run", lambda recipe: ran.append(recipe) or [Finished()])
    (results / "teacher.safetensors").unlink()
    keep(results, "other-0", row([1.0] * 5))  # leaves a report.json
    kept_values.keep(recipe, path)
    kept_values.keep(recipe, path)
    assert ran == [recipe]
    assert (results / "teacher.safetensors").is_file()
    assert torch.equal(*(kept_values.read(results / f"{name}-0.safetensors")["student", "gamma 0", 4, "distance"]
                         for name in ("budgets", "other")))  # fmt: skip
    with pytest.raises(ValueError, match="of other settings or code"):
        kept_values.keep(variants.recipe_of(base, "budgets", 0, 800, 1000), path)
    with pytest.raises(ValueError, match=r"teacher\.safetensors holds what evaluation"):  # of 1,000 prompts
        kept_values.keep(variants.recipe_of(base, "single", 0, 400, 500), results / "single-0.safetensors")
    assert ran == [recipe]


@pytest.mark.parametrize("name", [*variants.ROWS, *variants.SECOND_STAGE])
def test_every_row_is_a_recipe_whose_students_are_measured_under_the_samplers_that_suit_them(name):
    recipe = variants.recipe_of(load(variants.RECIPES / "emoji_mlcm.yaml"), name, 1, 400, 1000)
    last, evaluate = recipe.stages[-2:]
    assert last.seed == 1
    renoised = last.num_segments[-1] == 1 and not last.condition_on_target
    assert evaluate.gammas == ([0.0, 1.0] if renoised else [0.0])


def test_kid_stands_beside_the_distance_and_a_disagreement_is_said(results):
    near, far = [1.0, 1.0, 1.25, 1.0, 1.25], [2.0, 2.0, 2.25, 2.0, 2.25]
    keep(results, "near-0", (*row(near), [0.5, 0.5, 0.25, 0.5, 0.25]))
    keep(results, "far-0", (*row(far), [0.125, 0.125, 0.25, 0.125, 0.25]))
    rows = {one.student: one for one in variant_table.of_values(results)}
    assert (rows["near"].kid, rows["near"].kid_over_nearest, rows["near"].over_nearest) == (0.375, 0.0, 0.0)
    assert (rows["far"].kid, rows["far"].kid_picking) == (0.1875, 0.125)
    # 0.125 less each of 0.5, 0.25, 0.5, 0.25 but where it is 0.25 too: -0.375, 0, -0.375, 0
    assert rows["far"].kid_over_nearest == pytest.approx(-0.1875)
    assert rows["far"].kid_over_nearest_error == pytest.approx(0.375 / math.sqrt(12), rel=1e-6)
    assert math.isnan(rows["teacher"].kid)
    text = summary(results)
    assert "| KID to the teacher x 1000: student, sampler | 4 |" in text
    assert "| far, gamma 0 | 187.500 +- 36.084 |" in text
    assert "they agree, or errors do not part them" in text  # 0.1875 is less than two errors of 0.108
    keep(results, "far-0", (*row(far), [0.125] * 5))
    assert (
        "- 4 evaluations, KID of patches: far, gamma 0 is best, near, gamma 0 nearest (KID x 1000 -250.000 +- 72.169, "
        "distance 1.0000 +- 0.0000 apart): they disagree"
    ) in summary(results)


def test_the_study_measures_kid_and_with_several_pictures_diversity():
    base = variants.with_pictures(load(variants.RECIPES / "emoji_mlcm.yaml"), 2)
    evaluate = variants.recipe_of(base, "budgets", 0, 400, 1000).stages[-1]
    assert evaluate.distribution
    assert evaluate.images_per_prompt == 2
    assert variants.teacher_recipe(base, 1000).stages[-1].images_per_prompt == 2
