"""The study of tuning: valid stages at equal calls, in as many steps as there is time for, curves and table by hand."""

import json
from pathlib import Path

import pytest
import torch

import kept_values
import runs
import tuning
import tuning_curves
import tuning_frontier
import tuning_looks
import tuning_summary
from mlcm_rl.pipeline.fingerprint import identity
from mlcm_rl.recipe import Feedback, Policy, Tuning
from mlcm_rl.recipe.file import check, load
from mlcm_rl.recipe.paths import Folders

GROUPS = [(subject, group) for subject, groups in tuning.ROWS.items() for group in groups]


def base_of(subject: str):
    return load(tuning.RECIPES / tuning.BASES[subject], [])


@pytest.mark.parametrize(("subject", "group"), GROUPS)
def test_every_row_is_a_valid_recipe_of_its_own_at_equal_calls(subject, group):
    base, stages = base_of(subject), {}
    for row in tuning.ROWS[subject][group]:
        recipe = tuning.recipe_of(base, subject, group, row, 3)
        assert check(recipe, Folders(Path(), Path())) == []
        (stages[row],) = (stage for stage in recipe.stages if isinstance(stage, Tuning))
    assert all(isinstance(stage, Feedback | Policy) and stage.seed == 3 for stage in stages.values())
    assert len({stage.model_dump_json() for stage in stages.values()}) == len(stages)
    assert {stage.gamma for stage in stages.values()} == {tuning.GAMMA}
    calls = {stage.batch_size * stage.num_steps for stage in stages.values()}
    assert calls == {{"emoji": 800, "scenes": 8000}[subject]}
    assert all({one.name for one in stage.guard.rewards}.isdisjoint(stage.max_drops) for stage in stages.values())


def test_a_counter_is_trained_on_and_its_stage_is_the_same_in_any_folder():
    recipe = tuning.recipe_of(base_of("scenes"), "scenes", tuning.COUNTED, "policy", 0)
    (stage,) = (one for one in recipe.stages if isinstance(one, Tuning))
    assert [one.name for one in stage.rewards + stage.guard.rewards] == ["scene_count", "scene_match"]
    assert "recipes" not in json.dumps(identity(stage, recipe, {}))


@pytest.mark.parametrize(("subject", "group"), GROUPS)
def test_fewer_steps_are_the_same_calls_in_all_rows_and_the_same_shares(subject, group):
    base = base_of(subject)
    given, rows = tuning.protocol.first_of(base, Feedback), tuning.ROWS[subject][group]
    whole, short = ({row: tuning.stage_of(base, subject, group, row, 0, steps) for row in rows} for steps in (None, 20))
    assert {stage.batch_size * stage.num_steps for stage in short.values()} == {20 * given.batch_size}
    for row, stage in short.items():
        share = stage.num_steps / whole[row].num_steps
        assert stage.guard.every == max(1, round(share * whole[row].guard.every))
        assert stage.warmup_steps == round(share * whole[row].warmup_steps)
        if isinstance(stage, Feedback) and stage.matching:
            assert stage.matching.fake.warmup_steps == stage.num_steps // 5
        same = {"num_steps", "warmup_steps", "guard", "matching", "surrogate"}
        assert stage.model_dump(exclude=same) == whole[row].model_dump(exclude=same)


def test_steps_that_a_row_cannot_make_of_its_batches_are_refused():
    base = base_of("scenes")
    with pytest.raises(ValueError, match=r"--steps 5 of batches of 32 are 160 scored.*64 of row policy.*multiple of 2"):
        tuning.stage_of(base, "scenes", "without_gradient", "policy", 0, 5)


# ---- what is kept ----


def test_rows_stand_in_the_order_of_the_study_and_others_last(tmp_path):
    for name in ("anchor-10-0", "anchor-1-0", "none-0", "none-1", "another-0"):
        (tmp_path / f"{name}.json").write_text("{}")
    (tmp_path / "table.json").write_text("{}")
    found = kept_values.files_of(tmp_path, ["none", "kl-1", "anchor-1", "anchor-10"], "json")
    assert list(found) == ["none", "anchor-1", "anchor-10", "another"]
    assert [path.name for path in found["none"]] == ["none-0.json", "none-1.json"]


def look(step: int, distance: float, trained: float, held_out: float) -> dict:
    gains = {"guard/trained_gain": trained, "guard/held_out_gain": held_out}
    return {"step": step, "guard/distance": distance, **gains}


def keep_looks(folder: Path, name: str, looks: list[dict], kept: int, batch_size: int = 32) -> None:
    """The looks of a finished stage, kept as the study keeps them."""
    stage = folder / f"stage-{name}"
    stage.mkdir(parents=True)
    other = {"step": 1, "loss": 0.5, "grad_norm": 1.0}
    (stage / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (other, *looks)))
    (stage / "guard.json").write_text(json.dumps({"kept_step": kept, "stopped": False}))
    tuning_looks.write(folder / f"{name}.json", stage, batch_size, "fingerprint")


def test_looks_are_averaged_over_seeds_as_far_as_all_go(tmp_path):
    keep_looks(tmp_path, "a-0.3-0", [look(25, 0.1, 1.0, 0.5), look(50, 0.2, 2.0, 0.0)], 25)
    keep_looks(tmp_path, "a-0.3-1", [look(25, 0.3, 2.0, 1.5)], 25)
    (tmp_path / "others.json").write_text("{}")
    found = tuning_looks.read(tmp_path, [])
    assert list(found) == ["a-0.3"]
    begin, only = tuning_curves.averaged(found["a-0.3"])
    assert set(begin.values()) == {0.0}
    assert only == {
        "guard/distance": pytest.approx(0.2),
        "guard/trained_gain": 1.5,
        "guard/held_out_gain": 1.0,
        "calls": 800.0,
    }
    tuning_curves.draw(tmp_path, [], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def keep_values(
    folder: Path,
    name: str,
    before: list[float],
    after: list[float],
    kid: list[float],
    kid_after: list[float] | None = None,
) -> None:
    """What a tuned student and the one before it measured, kept as the study keeps it; the teacher beside them."""

    def row(student: str, role: str, values: list[float], kid: list[float] = kid) -> dict:
        metrics = {"r@5": {"values": values}, "teacher_kid": {"values": kid}}
        return {"name": student, "role": role, "sampler": "gamma 0.5", "num_evaluations": 4, "metrics": metrics}

    rows = [row("teacher", "teacher", [1.0, 1.0]), row("student", "student", before)]
    rows += [row("feedback", "student", after, kid_after or kid)]
    report = folder / "report.json"
    report.write_text(json.dumps({"rows": rows}))
    kept_values.write(folder / f"{name}.safetensors", [report], False, "fingerprint", ("r@5", "teacher_kid"))
    kept_values.write(folder / "teacher.safetensors", [report], True, "fingerprint", ("r@5", "teacher_kid"))


def test_the_table_has_paired_differences_of_seeds_averaged_by_prompt(tmp_path):
    """Two prompts, two seeds: before 0 and 1; after 1 and 1, and 0 and 1; KID in thousandths."""
    columns = {"r@5": "judge", "reward/none": "no student has it", "teacher_kid": "KID"}
    assert tuning_summary.text(tmp_path, ["a"], columns).startswith("No student")
    for seed, after in enumerate(([1.0, 1.0], [0.0, 1.0])):
        keep_values(tmp_path, f"a-{seed}", [0.0, 1.0], after, [0.0078125, 0.0078125])
        keep_looks(tmp_path, f"a-{seed}", [look(25, 0.1, 1.0, 0.5)], 25)
    head, _, before, line = tuning_summary.text(tmp_path, ["a"], columns).splitlines()
    assert head == "| row | step kept, last | drift at the last look | judge | KID |"
    assert before == "| before tuning | - | 0 | 0.500 +- 0.500 | 7.812 +- 0.000 |"
    after = "0.750 +- 0.250 (+0.250 +- 0.250) | 7.812 +- 0.000 (+0.000 +- 0.000)"
    assert line == f"| a | 25 of 25, 25 of 25 | 0.1000 | {after} |"


def test_the_frontier_has_the_paired_changes_of_both_metrics(tmp_path):
    """Two prompts, 0 and 1 before: 1 and 1 after, half won on average; or the same, where the guard kept the start."""
    keep_values(tmp_path, "weight-1-0", [0.0, 1.0], [1.0, 1.0], [0.25, 0.25], [0.5, 0.5])
    keep_values(tmp_path, "style-0", [0.0, 1.0], [0.0, 1.0], [0.25, 0.25])
    found = tuning_frontier.changes(tmp_path, ["style", "weight-1"], ("r@5", "teacher_kid"))
    assert list(found) == ["style", "weight-1"]
    assert found["style"] == ((0.0, 0.0), (0.0, 0.0))
    assert found["weight-1"] == ((0.5, pytest.approx(0.5)), (250.0, 0.0))  # KID in thousandths
    out = tmp_path / "frontier.png"
    tuning_frontier.draw(tmp_path, [], ("r@5", "teacher_kid"), tuning.COLUMNS["emoji"], out)
    assert out.read_bytes().startswith(b"\x89PNG")
    out.unlink()
    tuning_frontier.draw(tmp_path, [], ("distance", "r@5"), tuning.COLUMNS["emoji"], out)
    assert not out.exists()  # no row has both


def test_a_student_that_has_its_looks_is_not_tuned_again_and_another_is_refused(tmp_path, tiny_sdxl):
    prompts = runs.write_prompts(tmp_path)
    stages = [runs.trajectories(prompts), runs.distill(num_segments=[2]), runs.tuning("feedback", prompts)]
    recipe, path = runs.recipe(tiny_sdxl, tmp_path, stages), tmp_path / "a-0.json"
    tuning_looks.keep(recipe, path)
    before = path.read_bytes()
    assert [one["step"] for one in json.loads(before)["looks"]] == [1, 2]
    tuning_looks.keep(recipe.model_copy(update={"runs": str(tmp_path / "elsewhere")}), path)
    assert path.read_bytes() == before
    assert not (tmp_path / "elsewhere").exists()
    other = [*stages[:2], runs.tuning("feedback", prompts, num_steps=3)]
    with pytest.raises(ValueError, match="holds the looks of stage"):
        tuning_looks.keep(recipe.model_copy(update={"stages": other}), path)


def test_names_of_rows_with_points_and_numbers_are_read_back():
    assert kept_values.SEEDED.fullmatch("anchor-0.3-1").groups() == ("anchor-0.3", "1")
    assert kept_values.SEEDED.fullmatch("kl-1-0").groups() == ("kl-1", "0")
    names = {row for groups in tuning.ROWS.values() for rows in groups.values() for row in rows}
    assert all(kept_values.SEEDED.fullmatch(f"{row}-12").groups() == (row, "12") for row in names)
    assert torch.equal(tuning_summary.mean_of([], "r@5"), torch.zeros(0))
