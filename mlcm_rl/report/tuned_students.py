"""Preference learning in a report: tuned students beside the distilled ones that they started from.

P prompts, I pictures of each.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..equations.constraints import drop
from ..equations.statistics import deviation, wilson_interval, wins
from ..recipe.experiment import TUNING
from ..storage.files import read_json
from .definitions import BY_LANGUAGE, WIN_RATE, is_detail, metric
from .figures import binned, number, samples_of, summary, values_of, win_rate
from .guard_history import history
from .types import GuardRecord, Measurements, Point, Prompt, Report, Row, Summary, TunedComparison, TunedStudent

NUM_ERRORS = 2.0  # standard errors that ahead and behind ask for
SUMMARY_STEPS = 4  # sampler steps at which a tuned student is summed up, or the nearest number that was measured
GAINS = ("guard/trained_gain", "guard/held_out_gain")


# ---- the record ----


def read(folders: dict[str, Path]) -> list[TunedStudent]:
    """Return the tuned students among `folders`, student by name, with the rewards, guard and curves of their stages.

    A student's reference is the one that it was tuned from; where that is not among `folders`, there is
    nothing to compare with and the student is left out.
    """
    stages = {name: folder.resolve().parent for name, folder in folders.items() if folder.name == "student"}
    names = {stage.name: name for name, stage in reversed(stages.items())}  # the first of equal ones
    students = []
    for name, stage in stages.items():
        manifest = read_json(stage / "manifest.json", kind=str, parents=dict, stage=dict)
        origin = manifest["parents"].get("start", manifest["parents"].get("distill"))
        if manifest["kind"] in TUNING and origin in names:
            settings = manifest["stage"]
            max_drops = {one["name"]: one["max_drop"] for one in settings["rewards"] if "max_drop" in one}
            trained = {reward["name"]: "trained on" for reward in settings["rewards"]}
            constrained = dict.fromkeys(max_drops, "constraint")
            held_out = {reward["name"]: "held out" for reward in settings["guard"]["rewards"]}
            students.append(
                TunedStudent(
                    name=name,
                    reference=names[origin],
                    rewards=trained | constrained | held_out,
                    max_drops=max_drops,
                    num_steps=settings["num_steps"],
                    guard=GuardRecord.model_validate(read_json(stage / "guard.json")),
                    curves=read_curves(stage),
                )
            )
    return students


def read_curves(stage: Path) -> dict[str, list[Point]]:
    """Return the curves of a stage's log: gains, guard/reward/<name> at each look, reward/<name> of its batches.

    Of a constraint guard/drop/<name> and multiplier/<name> too.

    Gains begin at step 0, where they are 0 by definition.
    """
    records = [json.loads(line) for line in (stage / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    looks = history(stage)
    curves: dict[str, list[Point]] = {gain: [(0, 0.0), *_curve(looks, gain)] for gain in GAINS}
    sources = ((looks, "guard/reward/"), (records, "reward/"), (looks, "guard/drop/"), (records, "multiplier/"))
    for source, prefix in sources:
        keys = dict.fromkeys(key for record in source for key in record if key.startswith(prefix))
        curves |= {key: _curve(source, key) for key in keys}
    return curves


def _curve(records: list[dict[str, Any]], key: str) -> list[Point]:
    return binned([(record["step"], record[key]) for record in records if key in record])


def compare(rows: list[Row], prompts: list[Prompt], student: TunedStudent) -> list[TunedComparison]:
    """Return each default row of `student` against its reference's row of the same times and gamma.

    Differences are paired, tuned minus reference, by metric; win rates by reward; both by language too, as r@5/zh or
    reward/<name>/zh, where prompts have several.
    """
    students = [row for row in rows if row.role == "student"]
    references = {_sampler(row): row for row in students if row.name == student.reference}
    comparisons = []
    for row in students:
        if row.name == student.name and row.default:
            reference = references[_sampler(row)]
            keys = [key for key, summary in row.metrics.items() if summary.values]
            differences = {key: values_of(row, key).double() - values_of(reference, key).double() for key in keys}
            win_rates = {key: wins_of(row, reference, key) for key in keys if key.startswith("reward/")}
            comparisons.append(
                TunedComparison(
                    num_steps=row.num_steps,
                    row=row.id,
                    reference=reference.id,
                    differences=_by_language(prompts, differences),
                    win_rates=_by_language(prompts, win_rates),
                    drops={name: drop_of(row, reference, name) for name in student.max_drops if _measured(row, name)},
                )
            )
    return comparisons


def _measured(row: Row, name: str) -> bool:
    return f"reward/{name}" in row.metrics


def drop_of(row: Row, reference: Row, name: str) -> Summary:
    """Return how far the reward `name` is below the reference's, in the standard deviations of its pictures."""
    key = f"reward/{name}"
    unit = deviation(samples_of(reference, key).flatten())
    return summary(drop(values_of(row, key).double(), values_of(reference, key).double(), unit or math.nan))


def _sampler(row: Row) -> tuple[tuple[int, ...], float | None]:
    """Return what two rows must share to be compared; gamma does nothing in a single step."""
    times = row.times or ()
    return times, row.gamma if len(times) > 1 else None


def wins_of(row: Row, reference: Row, key: str) -> Tensor:
    """Return the share (P,) of a prompt's pictures that score higher in `row` than in `reference`; ties count half."""
    return wins(samples_of(row, key).double(), samples_of(reference, key).double()).mean(1)


def _by_language(prompts: list[Prompt], values: dict[str, Tensor]) -> dict[str, Summary]:
    """Return summaries of `values` (P,); of metrics that read each picture alone by language too."""
    summaries = {key: summary(one) for key, one in values.items()}
    if len(languages(prompts)) > 1:
        for key in [key for key in values if key.startswith((*BY_LANGUAGE, "reward/"))]:
            for language in languages(prompts):
                chosen = torch.tensor([prompt.language == language for prompt in prompts])
                summaries[f"{key}/{language}"] = summary(values[key][chosen])
    return summaries


def languages(prompts: list[Prompt]) -> list[str]:
    """Return the languages of `prompts`, in the order in which they first appear."""
    return list(dict.fromkeys(prompt.language for prompt in prompts))


# ---- as text ----


def nearest(student: TunedStudent) -> TunedComparison | None:
    """Return the comparison at the number of steps nearest to SUMMARY_STEPS; None without a default row."""
    return min(student.comparisons, key=lambda one: abs(one.num_steps - SUMMARY_STEPS), default=None)


def rewards(student: TunedStudent, comparison: TunedComparison) -> list[tuple[str, str, str]]:
    """Return (key, name, role) of the rewards that were measured: trained on, then held out, then any others."""
    order = list(student.rewards)
    names = {key: key.partition("/")[2] for key in comparison.win_rates if key.count("/") == 1}
    entries = [(key, name, student.rewards.get(name, "neither")) for key, name in names.items()]
    return sorted(entries, key=lambda one: order.index(one[1]) if one[1] in order else len(order))


def sentence(student: TunedStudent) -> str:
    """Return a tuned student in a line: its win rates at SUMMARY_STEPS steps."""
    comparison = nearest(student)
    if comparison is None or not comparison.win_rates:
        reason = "its default sampler was not measured" if comparison is None else "evaluate names no rewards"
        return f"{student.name}: no win rate, since {reason}"
    rates = [
        f"{name}{' win rate' * (place == 0)} {win_rate(comparison.win_rates[key])} ({role})"
        for place, (key, name, role) in enumerate(rewards(student, comparison))
    ]
    num_steps = comparison.num_steps
    return f"{student.name} at {num_steps} step{'s' * (num_steps > 1)}: {', '.join(rates)}"


def _against_reference(student: TunedStudent) -> dict[str, list[str]]:
    """Return the rewards, with win rates, in which a tuned student is "ahead" of its reference or "behind" it.

    At SUMMARY_STEPS steps, or the nearest number; a lead counts from NUM_ERRORS standard errors.
    """
    comparison = nearest(student)
    sides: dict[str, list[str]] = {"ahead": [], "behind": []}
    if comparison is None:
        return sides
    for key, name, _ in rewards(student, comparison):
        rate = comparison.win_rates[key]
        if (side := _side_of_rate(rate)) is not None:
            sides[side].append(f"{name} (win rate {win_rate(rate)})")
    return sides


def _side_of_rate(rate: Summary) -> str | None:
    """Return the side of a win rate; where all or none are won, there is one if the interval of 95 % leaves out 0.5."""
    if rate.mean not in (0.0, 1.0):
        return _side(rate.mean, rate.se, 0.5)
    low, high = wilson_interval(rate.mean, rate.n)
    return "ahead" if low > 0.5 else "behind" if high < 0.5 else None


def _side(mean: float | None, error: float | None, level: float) -> str | None:
    """Return whether `mean` is "ahead" of `level` or "behind" it by NUM_ERRORS standard errors; None where neither."""
    if mean is None or abs(mean - level) <= NUM_ERRORS * (error or 0.0):
        return None
    return "ahead" if mean > level else "behind"


def rewards_behind(student: TunedStudent) -> list[str]:
    """Return the rewards, with win rates, in which a tuned student is behind the one that it was tuned from."""
    return _against_reference(student)["behind"]


def outcome(student: TunedStudent) -> str:
    """Return in a sentence where tuning got ahead or behind, or that the guard kept step 0."""
    if not student.guard.kept_step:
        return f"It is the student as it was distilled: the guard of {student.name} kept step 0."
    comparison = nearest(student)
    if comparison is None or not comparison.win_rates:
        return f"Tuned by {student.name}, it was measured by no reward beside the student that it was tuned from."
    sides = [f"{side} in {', '.join(names)}" for side, names in _against_reference(student).items() if names]
    standing = " and ".join(sides) or "level in every reward"
    return f"Tuned by {student.name}, it is {standing} beside the student that it was tuned from."


def constraints(student: TunedStudent) -> list[str]:
    """Return a sentence for each reward that was not to fall: whether it did by more than was allowed."""
    return [_constraint(student, name, limit) for name, limit in student.max_drops.items()]


def _constraint(student: TunedStudent, name: str, limit: float) -> str:
    if not student.guard.kept_step:
        return f"Constraint on {name}: there was nothing to meet, since the guard kept step 0."
    comparison = nearest(student)
    drop = comparison.drops.get(name) if comparison else None
    if drop is None or drop.mean is None:
        return f"Constraint on {name}, at most {limit:g} deviations below the student before: not measured here."
    is_met = drop.mean <= limit
    is_clear = _side(drop.mean, drop.se, limit) is not None
    outcome = f"{'met' if is_met else 'not met'}{'' if is_clear else ', within two standard errors of the limit'}"
    return f"Constraint on {name}: it fell by {number(drop)} deviations, at most {limit:g} was allowed: {outcome}."


def verdict(student: TunedStudent) -> str:
    """Return in words which student the guard kept and whether it stopped the run."""
    step = student.guard.kept_step
    trained, constrained, held_out = (
        ", ".join(name for name, role in student.rewards.items() if role == part)
        for part in ("trained on", "constraint", "held out")
    )
    under = f" under a constraint on {constrained}" if constrained else ""
    choice = f"kept is the student of step {step}" if step else "no look was better, so kept is the distilled student"
    ended = f"the run went on to its end, step {student.num_steps}"
    ending = "it stopped the run" if student.guard.stopped else ended
    return f"Trained on {trained}{under}, held out {held_out}. By the held-out gain, {choice}; {ending}."


def heads(report: Measurements) -> list[str]:
    """Return the heads of the table of rewards, after the student's steps."""
    spoken = languages(report.prompts)
    return ["Reward", "", "Before", "After", "Paired difference", "Win rate", *(spoken if len(spoken) > 1 else [])]


def table(report: Report, student: TunedStudent) -> list[list[str]]:
    """Return a line of cells for every number of steps and reward, the steps first."""
    rows = {row.id: row for row in report.rows}
    lines = []
    for one in student.comparisons:
        for key, name, role in rewards(student, one):
            before, after = (number(rows[id].metrics[key]) for id in (one.reference, one.row))
            rates = [rate for other, rate in one.win_rates.items() if f"{other}/".startswith(f"{key}/")]
            difference = number(one.differences[key])
            lines.append([str(one.num_steps), name, role, before, after, difference, *map(win_rate, rates)])
    return lines


def others(report: Report) -> list[str]:
    """Return the metrics beside the rewards, by language where there are several: what tuning may have cost."""
    metrics = []
    for student in report.tuned:
        for one in student.comparisons:
            keys = [key for key in one.differences if not key.startswith("reward/") and not is_detail(key)]
            metrics += [key for key in keys if not any(other.startswith(f"{key}/") for other in keys)]
    return list(dict.fromkeys(metrics))


def costs(report: Report, student: TunedStudent) -> list[list[str]]:
    """Return a line of cells for every number of steps: the paired difference in each of `others`."""
    return [
        [str(one.num_steps), *(number(one.differences[key]) for key in others(report))] for one in student.comparisons
    ]


def markdown(report: Report) -> list[str]:
    """Return the lines of report.md on tuned students; none where there are none."""
    students = report.tuned
    if not students:
        return []
    lines = ["", "## Tuned to preferences", ""]
    for student in students:
        lines.append(f"- {sentence(student)}. {verdict(student)}")
        lines += [f"  - {one}" for one in constraints(student)]
        lines += [f"  - Warning: {warning}" for warning in student.guard.warnings]
    lines += _markdown_table(heads(report), {one.name: table(report, one) for one in students}, num_words=2)
    lines += ["", "Paired differences beside the rewards, tuned minus distilled:"]
    labels = [metric(key).label for key in others(report)]
    lines += _markdown_table(labels, {one.name: costs(report, one) for one in students}, num_words=0)
    return [*lines, "", f"- **Win rate**: {WIN_RATE}"]


def _markdown_table(heads: list[str], lines: dict[str, list[list[str]]], num_words: int) -> list[str]:
    """Return a table of the students' `lines`; the first `num_words` columns after the steps are words."""
    rule = f"|---|--:{'|---' * num_words}{'|--:' * (len(heads) - num_words)}|"
    head = ["", f"| Student | Steps | {' | '.join(heads)} |", rule]
    return head + [f"| {' | '.join([name, *cells])} |" for name, rows in lines.items() for cells in rows]
