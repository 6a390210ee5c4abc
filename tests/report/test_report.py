"""What a report says, on rows planted by hand."""

import dataclasses
import json
import math
import re
import shutil

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

from mlcm_rl.data.prompts import Prompt
from mlcm_rl.models.model_card import _without_title
from mlcm_rl.report import assembly, comparisons, definitions, disagreements, figures, page, plots, tables, types
from mlcm_rl.storage.files import CheckpointError

LANGUAGES = ["en", "zh", "en", "zh"]


def planted(name, role, num_evaluations, distance, hits, **settings):
    """A row with the given distance and R@5 of each of four prompts."""
    description = {
        "id": name, "role": role, "name": "teacher" if role != "student" else "student", "sampler": "DDIM, guided",
        "num_steps": num_evaluations, "num_evaluations": num_evaluations, "num_segments": 1, "conditioned": False,
        "default": False, "solver": "ddim", "guidance_scale": 8.0, "grid": None, **settings,
    }  # fmt: skip
    values = {"distance": torch.tensor(distance), "r@5": torch.tensor(hits)}
    return assembly.record(description, values, LANGUAGES, latency_ms=12.3456789, latency_ms_se=math.nan)


def rows(student=(0.1, 0.2, 0.1, 0.2), hits=(1.0, 1.0, 1.0, 1.0)):
    return [
        planted("reference", "reference", 100, [0.0] * 4, [1.0] * 4),
        planted("far", "undistilled", 4, [1.1, 1.2, 1.1, 1.4], [0.0, 1.0, 0.0, 0.0]),
        planted("near", "undistilled", 4, [0.6, 0.7, 0.6, 0.8], [0.0, 0.0, 0.0, 0.0]),
        planted("straight", "student", 4, list(student), list(hits), sampler="gamma 0", default=True),
        planted("renoised", "student", 4, [0.01] * 4, [1.0] * 4, sampler="gamma 1"),
    ]


def made(planted_rows):
    environment = types.Environment(device="cpu: x", platform="here", python="3", versions={}, commit=None)
    measurements = types.Measurements(
        format=assembly.FORMAT,
        name="planted",
        created="now",
        environment=environment,
        teacher={},
        settings={},
        reference="reference",
        prompts=[types.Prompt(prompt="a cat", language=language) for language in LANGUAGES],
        rows=planted_rows,
        curves=[],
    )
    compared = comparisons.comparisons(measurements)
    return types.Report(
        **dict(measurements), comparisons=compared, headline=comparisons.headline(measurements, [], None)
    )


def test_a_record_holds_means_errors_and_values_by_language():
    metrics = rows()[1].metrics
    assert metrics["distance"].mean == pytest.approx(1.2)
    deviations = [-0.1, 0.0, -0.1, 0.2]
    assert metrics["distance"].se == pytest.approx(math.sqrt(sum(d * d for d in deviations) / 3) / 2, rel=1e-5)
    assert metrics["r@5"].values == [0.0, 1.0, 0.0, 0.0]
    assert (metrics["r@5/en"].mean, metrics["r@5/zh"].mean) == (0.0, 0.5)
    assert "distance/en" not in metrics


def test_the_headline_sets_the_default_student_against_the_best_undistilled_row_of_each_metric():
    headline = made(rows()).headline
    assert headline.passed
    distance, retrieval = headline.checks
    assert (distance.student, distance.teacher) == ("straight", "near")
    assert distance.difference == pytest.approx(-0.525)  # of -0.5, -0.5, -0.5, -0.6
    assert distance.se == pytest.approx(0.05 / 2)
    assert (retrieval.student, retrieval.teacher) == ("straight", "far")
    assert (retrieval.difference, retrieval.se) == (0.75, 0.25)


@pytest.mark.parametrize(
    ("student", "hits"),
    [
        ((0.6, 0.7, 0.6, 0.8), (1.0, 1.0, 1.0, 1.0)),  # a tie in distance, with no error
        ((0.1, 0.2, 0.1, 2.0), (1.0, 1.0, 1.0, 1.0)),  # ahead on average, within two standard errors
        ((0.9, 0.9, 0.9, 0.9), (1.0, 1.0, 1.0, 1.0)),  # behind
    ],
)
def test_the_headline_fails_unless_the_distance_is_ahead_by_two_standard_errors(student, hits):
    headline = made(rows(student, hits)).headline
    assert not headline.passed
    assert headline.checks[0].verdict in ("level", "behind")
    assert headline.checks[0].verdict in headline.text


def test_the_headline_fails_where_retrieval_is_behind_and_passes_where_it_is_level():
    planted_rows = rows((0.1, 0.2, 0.1, 0.2), (0.0, 0.0, 0.0, 0.0))
    other = planted("found", "undistilled", 4, [2.0] * 4, [1.0] * 4)
    behind = made([*planted_rows, other]).headline
    assert [check.verdict for check in behind.checks] == ["ahead", "behind"]
    assert not behind.passed
    level = made(rows((0.1, 0.2, 0.1, 0.2), (0.0, 1.0, 0.0, 0.0))).headline
    assert [check.verdict for check in level.checks] == ["ahead", "level"]
    assert level.passed


def test_the_headline_says_so_when_there_is_nothing_to_compare():
    headline = made(rows()[:3]).headline
    assert (headline.passed, headline.checks) == (False, [])
    assert "to compare" in headline.text


def test_comparisons_take_the_best_of_both_sides():
    compared = {one.metric: one for one in made(rows()).comparisons}
    assert compared["distance"].num_evaluations == 4
    assert (compared["distance"].student, compared["distance"].teacher) == ("renoised", "near")
    assert compared["distance"].verdict == "ahead"
    assert (compared["r@5"].student, compared["r@5"].teacher) == ("straight", "far")


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.31234, 0.01234, "0.312 \u00b1 0.012"),
        (31.234, 1.9, "31.2 \u00b1 1.9"),
        (1234.5, 210.0, "1234 \u00b1 210"),
        (0.5, 0.0, "0.5"),
        (0.123456, None, "0.1235"),
        (None, None, "-"),
    ],
)
def test_numbers_are_written_to_the_second_digit_of_their_error(value, error, text):
    assert figures.plus_minus(value, error) == text


def test_the_record_is_json_without_nan_and_a_row_a_line(tmp_path):
    result = made([*rows(), planted("odd", "reference", 2, [math.nan] * 4, [math.nan] * 4)])
    assembly.write(result, tmp_path)
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    back = json.loads(text)
    assert back["rows"][-1]["metrics"]["distance"] == {"mean": None, "se": None, "n": 0, "values": [None] * 4}
    assert assembly.read(tmp_path / "report.json") == result
    assert comparisons.headline(result, [], None) == result.headline  # it can be made again from the file
    assert sum('"id": "' in line for line in text.splitlines()) == len(result.rows)
    assert "| gamma 0, default | 4 | 12.3 | 0.150 \u00b1 0.029 |" in (tmp_path / "report.md").read_text(
        encoding="utf-8"
    )


def test_the_terminal_table_shows_every_row_within_eighty_columns():
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(*tables.terminal(made(rows())))
    text = console.export_text()
    for part in ("Teacher, undistilled", "gamma 0, default", "gamma 1", "100 steps", "0.675"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 80


def test_no_head_of_the_terminal_table_is_broken_inside_a_word():
    planted_rows = rows()
    for name in ("emoji_style", "emoji_style_judge", "emoji_alignment"):
        for row in planted_rows:
            row.metrics[f"reward/{name}"] = row.metrics["r@5"]
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(*tables.terminal(made(planted_rows)))
    lines = console.export_text().splitlines()
    words = " ".join(lines[: next(i for i, line in enumerate(lines) if "reference" in line.lower())]).split()
    assert words.count("emoji") == 3
    assert "alignment" in words
    assert max(map(len, lines)) <= 80


def test_chinese_names_of_rewards_take_their_columns_and_no_more():
    planted_rows = rows()
    for name in ("与提示词是否相符", "色彩"):
        for row in planted_rows:
            row.metrics[f"reward/{name}"] = row.metrics["r@5"]
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(*tables.terminal(made(planted_rows)))
    lines = console.export_text().splitlines()
    assert {cell_len(line) for line in lines[1:] if line} == {cell_len(lines[1])}
    assert cell_len(lines[1]) <= 80
    assert [word for line in lines for word in line.split() if word[0] in "与是"] == ["与提示词", "是否相符"]


@pytest.mark.filterwarnings("error")
def test_a_plot_leaves_chinese_names_to_the_browsers_fonts():
    planted_rows = rows()
    for row in planted_rows:
        row.metrics["reward/亮度"] = row.metrics["r@5"]
    assert ">亮度 (higher is better)</text>" in plots.quality(made(planted_rows), "reward/亮度")


def test_loss_curves_are_read_phase_by_phase_and_averaged_in_bins(tmp_path):
    entries = [
        {"step": step, "phase": step // 300, "num_segments": 8 - 7 * (step // 300), "loss": float(step)}
        for step in range(400)
    ]
    entries[299]["held_out_loss"] = 5.0
    entries.insert(3, {"step": 3, "seconds": 2.0})
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, entries)))
    first, second = assembly.read_curves(tmp_path)
    assert [(one.phase, one.num_segments, len(one.loss)) for one in (first, second)] == [
        (0, 8, 100),
        (1, 1, 100),
    ]
    assert first.loss[:2] == [(2, 1.0), (5, 4.0)]
    assert first.held_out_loss == [(299, 5.0)]
    assert second.held_out_loss == []
    assert assembly.read_curves(None) == assembly.read_curves(tmp_path / "nowhere") == []


def write_distill(folder, num_segments, after=None):
    """What a distill stage of two steps leaves that `read_curves` reads; it goes on from the one in `after`."""
    folder.mkdir()
    parents = {"trajectories": "store"} | ({"distill": after.name} if after else {})
    (folder / "manifest.json").write_text(json.dumps({"kind": "distill", "parents": parents}))
    entries = [{"step": i, "phase": i, "num_segments": k, "loss": 1.0} for i, k in enumerate(num_segments)]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return folder


def test_loss_curves_are_those_of_every_distill_stage_of_the_chain_in_order(tmp_path):
    first = write_distill(tmp_path / "z-first", [8, 4, 2, 1])
    second = write_distill(tmp_path / "a-second", [1], after=first)
    curves = assembly.read_curves(second)
    assert [(one.stage, one.phase, one.num_segments) for one in curves] == [
        *((1, phase, k) for phase, k in enumerate([8, 4, 2, 1])),
        (2, 0, 1),
    ]
    link = tmp_path / "run" / "02-distill"
    link.parent.mkdir()
    link.symlink_to(second)
    assert assembly.read_curves(link) == curves
    plots = page.losses(curves)
    names = ["distill stage 1, phase 1, K = 8", "distill stage 1, phase 4, K = 1", "distill stage 2, phase 1, K = 1"]
    for plot, name in zip((plots[0], plots[3], plots[4]), names, strict=True):
        assert f'aria-label="Loss of {name}, against optimiser steps"' in plot
    ids = [re.findall(r' id="([^"]*)"', plot) for plot in plots]
    assert len({one for result in ids for one in result}) == sum(map(len, ids))
    shutil.rmtree(first)  # the number is still the stage's own
    assert [one.stage for one in assembly.read_curves(second)] == [2]
    assert "distill stage 2, phase 1" in page.losses(assembly.read_curves(second))[0]


def test_curves_of_one_stage_and_of_older_reports_are_named_for_their_phase_alone(tmp_path):
    curves = assembly.read_curves(write_distill(tmp_path / "first", [8, 1]))
    older = [types.LossCurve(**curve.model_dump(exclude={"stage"})) for curve in curves]
    assert page.losses(curves) == page.losses(older)
    assert 'aria-label="Loss of phase 2, K = 1, against optimiser steps"' in page.losses(curves)[1]


def test_a_distill_stage_that_goes_on_from_itself_is_damaged(tmp_path):
    first = write_distill(tmp_path / "first", [8], after=tmp_path / "second")
    with pytest.raises(CheckpointError, match="goes on from itself"):
        assembly.read_curves(write_distill(tmp_path / "second", [8], after=first))


COST = types.TrainingCost(total=1_234_567, teacher_per_sample=96 * 544 / 9600, student_per_sample=1.0)


def test_what_training_cost_stands_beside_every_student_and_is_explained():
    result = made([*rows()[:3], *(row.model_copy(update={"training": COST}) for row in rows()[3:])])
    lines = tables.markdown(result).splitlines()
    assert lines[4].startswith("| Sampler | Evals | ms | Training evals | Distance |")
    assert any(line.startswith("| gamma 0, default | 4 | 12.3 | 1.23M (5.44 + 1) | 0.150") for line in lines)
    assert any(line.startswith("| DDIM, guided | 4 | 12.3 | - |") for line in lines)
    assert any(line.startswith("- **Training evals**: ") for line in lines)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(*tables.terminal(result))
    assert console.export_text().count("1.23M") == 2


def test_student_and_teacher_are_compared_at_two_four_and_eight_evaluations():
    """The best of each: 0.2, 0.3 and 0.1 against 0.5 everywhere; 6 evaluations are in the table alone."""
    both = [planted("reference", "reference", 100, [0.0] * 4, [1.0] * 4)]
    for evaluations, distance in {2: 0.2, 4: 0.3, 6: 0.1, 8: 0.1}.items():
        both.append(planted(f"t{evaluations}", "undistilled", evaluations, [0.5, 0.6, 0.4, 0.5], [0.0] * 4))
        both.append(planted(f"s{evaluations}", "student", evaluations, [distance] * 4, [0.0] * 4))
        both.append(planted(f"worse{evaluations}", "student", evaluations, [distance + 0.1] * 4, [0.0] * 4))
    compared = [one for one in made(both).comparisons if one.metric == "distance"]
    found = {one.num_evaluations: (one.student, one.teacher, round(one.difference, 6)) for one in compared}
    assert found == {2: ("s2", "t2", -0.3), 4: ("s4", "t4", -0.2), 8: ("s8", "t8", -0.4)}
    assert {one.verdict for one in compared} == {"ahead"}


def test_latency_is_shown_with_its_error_where_it_has_one():
    timed = [row.model_copy(update={"latency_ms_se": 0.4567}) for row in rows()]
    assert all(tables.cells(made(timed), row)[1] == "12.35 \u00b1 0.46" for row in timed)
    of_one_batch = rows()
    assert of_one_batch[0].latency_ms_se is None
    kept_before = [types.Row(**row.model_dump(exclude={"latency_ms_se"})) for row in of_one_batch]
    for old in (of_one_batch, kept_before):
        assert all(tables.cells(made(old), row)[1] == "12.3" for row in old)
    assert "- **ms**: Milliseconds a picture" in tables.markdown(made(kept_before))


def test_a_report_of_format_1_is_still_read(tmp_path):
    """Before it said what training cost, and which networks measured."""
    assembly.write(made(rows()), tmp_path)
    content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) | {"format": 1}
    del content["networks"]
    assert not {"tuned", "product"} & content.keys()
    (tmp_path / "report.json").write_text(json.dumps(content), encoding="utf-8")
    text = tables.markdown(assembly.read(tmp_path / "report.json"))
    assert "Training" not in text
    assert "Network" not in text


def test_a_report_without_its_rows_is_damaged(tmp_path):
    (tmp_path / "report.json").write_text('{"format": 4, "name": "tiny"}', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"report\.json is damaged"):
        assembly.read(tmp_path / "report.json")


def test_no_field_of_a_prompt_is_lost_in_the_report():
    assert {field.name for field in dataclasses.fields(Prompt)} <= set(types.Prompt.model_fields)


@pytest.mark.parametrize(
    ("count", "text"), [(168, "168"), (999, "999"), (1000, "1k"), (62464, "62.5k"), (999_600, "1M"), (2.5e9, "2.5G")]
)
def test_large_counts_are_short(count, text):
    assert tables.compact(count) == text


def test_a_report_leaves_its_title_behind_in_a_model_card():
    text = tables.markdown(made(rows()))
    assert text.startswith("# planted\n")
    card = _without_title(text)
    assert card.startswith("At 4 network evaluations: ")
    assert card == text.partition("\n")[2].strip()
    assert _without_title("| a |\n|---|\n") == "| a |\n|---|"


def test_every_metric_is_defined():
    keys = (
        "distance",
        "kid",
        "r@1",
        "r@5/zh",
        "diversity",
        "fid",
        "inception_kid",
        "clip",
        "reward/colourfulness",
        *definitions.DISTRIBUTION,
    )
    for key in keys:
        assert len(definitions.metric(key).definition) > 30
    assert definitions.metric("r@5/zh").label == "R@5 zh"
    assert definitions.metric("kid").label == "KID (judge features)"


def with_distribution(planted_rows, kids):
    """`planted_rows` with the values `kids` of KID to the teacher, by id; the others have those of "far"."""
    for row in planted_rows:
        values = torch.tensor(kids.get(row.id, [0.5, 0.6, 0.5, 0.6]))
        for key in ("teacher_kid", "teacher_patch_kid"):
            summary = figures.summary(values).model_copy(update={"values": figures.listed(values)})
            row.metrics[key] = summary
    return planted_rows


KIDS = {"reference": [0.0] * 4, "straight": [0.01, 0.02, 0.01, 0.02], "renoised": [0.31, 0.33, 0.31, 0.33]}


def test_where_distance_and_distribution_disagree_it_is_said_in_words():
    report = made(with_distribution(rows(), KIDS))  # "renoised" is nearest by distance, "straight" by distribution
    first, why = disagreements.sentences(report)
    assert first == (
        "At 4 evaluations they disagree: student, gamma 1 is best in Distance (0.01), student, gamma 0 in KID to the "
        "teacher (0.0150 \u00b1 0.0029 against 0.3200 \u00b1 0.0058) and KID to the teacher, patches (0.0150 \u00b1 "
        "0.0029 against 0.3200 \u00b1 0.0058)."
    )
    assert "go by the distribution" in why
    assert f"- {first}" in tables.markdown(report)


@pytest.mark.parametrize(
    ("kids", "says"),
    [
        (KIDS | {"straight": [0.9, -0.8, 0.9, -0.8]}, "name different students or samplers as the best, none of them"),
        (KIDS | {"renoised": [0.0] * 4}, "At 4 evaluations student, gamma 1 is the best by distance and distribution."),
    ],
    ids=["within two errors", "one best row"],
)
def test_no_disagreement_is_said_of_differences_within_two_errors_or_of_one_best_row(kids, says):
    (text,) = disagreements.sentences(made(with_distribution(rows(), kids)))
    assert says in text
    assert disagreements.sentences(made(rows())) == []  # nothing was measured


@pytest.mark.parametrize(("distance", "is_nearer"), [(0.05, True), (0.5, False)])
def test_of_several_students_the_headline_names_its_own_and_one_that_is_nearer(distance, is_nearer):
    other = rows((distance,) * 4)[3].model_copy(update={"id": "lcm", "name": "lcm"})
    text = made([*rows(), other]).headline.text
    assert "for the recipe's own student" in text
    assert ("Of the students of this table lcm is the nearest (0.05" in text) == is_nearer
    assert "own student" not in made(rows()).headline.text


def test_paired_tables_are_beside_the_reference_and_beside_the_student_named_first():
    report = made(with_distribution(rows(), KIDS))
    beside_reference, beside_first = tables.paired(report)
    assert beside_reference.heads == ["Evals", "R@5"]  # the others are differences to the reference already
    assert beside_reference.groups == [("student: K = 1", [["gamma 0, default", "4", "0"], ["gamma 1", "4", "0"]])]
    assert beside_first.heads == ["Evals", "Distance", "R@5", "KID to the teacher", "KID to the teacher, patches"]
    (student, (line,)), (undistilled, _) = beside_first.groups
    assert (student, undistilled) == ("student: K = 1", "Teacher, undistilled")
    # Distances 0.01 less 0.1, 0.2, 0.1, 0.2; KID 0.3, 0.31, 0.3, 0.31 more.
    assert line[:3] == ["gamma 1", "4", "-0.140 \u00b1 0.029"]
    assert line[4] == "0.3050 \u00b1 0.0029"
    assert beside_first.title in tables.markdown(report)


def test_the_terminal_has_a_table_of_its_own_for_distributions_within_eighty_columns():
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    grids = tables.terminal(made(with_distribution(rows(), KIDS)))
    assert len(grids) == 2
    assert len(tables.terminal(made(rows()))) == 1
    console.print(*grids)
    text = console.export_text()
    assert "0.32" in text
    assert max(map(len, text.splitlines())) <= 80
