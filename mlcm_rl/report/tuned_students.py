"""What a report says of preference learning: tuned students beside the distilled ones that they started from.

P prompts, I pictures of each.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..recipe.experiment import TUNING
from ..storage.files import read_json
from .definitions import WIN_RATE, metric
from .figures import binned, kept, kept_samples, number, summary
from .looks import history

NUM_ERRORS = 2.0  # standard errors that ahead and behind ask for
SPOKEN_OF = 4  # steps at which a tuned student is summed up, or the nearest number that was measured
GAINS = ("guard/trained_gain", "guard/held_out_gain")


# ---- the record ----


def read(folders: dict[str, Path]) -> list[dict[str, Any]]:
    """What their stages left of the tuned students among `folders`, student by name: rewards, guard, curves.

    A student's reference is the distilled one that it was tuned from; where that is not among `folders`, there is
    nothing to compare with and the student is left out.
    """
    stages = {name: folder.resolve().parent for name, folder in folders.items() if folder.name == "student"}
    names = {stage.name: name for name, stage in reversed(stages.items())}  # the first of equal ones
    found = []
    for name, stage in stages.items():
        manifest = read_json(stage / "manifest.json", kind=str, parents=dict, stage=dict)
        if manifest["kind"] in TUNING and manifest["parents"].get("distill") in names:
            settings = manifest["stage"]
            trained = {reward["name"]: "trained on" for reward in settings["rewards"]}
            held_out = {reward["name"]: "held out" for reward in settings["guard"]["rewards"]}
            found.append(
                {
                    "name": name,
                    "reference": names[manifest["parents"]["distill"]],
                    "rewards": trained | held_out,
                    "num_steps": settings["num_steps"],
                    "guard": read_json(stage / "guard.json"),
                    "curves": read_curves(stage),
                }
            )
    return found


def read_curves(stage: Path) -> dict[str, list[list[float | None]]]:
    """Curves (step, value) over a stage's log: gains, guard/reward/<name> at each look, reward/<name> of its batches.

    Gains begin at step 0, where they are 0 by definition.
    """
    records = [json.loads(line) for line in (stage / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    looks = history(stage)
    curves: dict[str, list[list[float | None]]] = {gain: [[0, 0.0], *_curve(looks, gain)] for gain in GAINS}
    for found, prefix in ((looks, "guard/reward/"), (records, "reward/")):
        keys = dict.fromkeys(key for record in found for key in record if key.startswith(prefix))
        curves |= {key: _curve(found, key) for key in keys}
    return curves


def _curve(records: list[dict], key: str) -> list[list[float | None]]:
    return binned([(record["step"], record[key]) for record in records if key in record])


def compared(report: dict[str, Any], student: dict[str, Any]) -> list[dict[str, Any]]:
    """Each default row of `student`, one of `read`'s, against its reference's row of the same times and gamma.

    "differences" are paired, tuned minus reference, by metric; "win_rates" by reward; both by language too, as
    r@5/zh or reward/<name>/zh, where prompts have several.
    """
    students = [row for row in report["rows"] if row["role"] == "student"]
    references = {_sampler(row): row for row in students if row["name"] == student["reference"]}
    found = []
    for row in students:
        if row["name"] == student["name"] and row["default"]:
            reference = references[_sampler(row)]
            keys = [key for key, value in row["metrics"].items() if "values" in value]
            differences = {key: kept(row, key).double() - kept(reference, key).double() for key in keys}
            rewards = [key for key in keys if key.startswith("reward/")]
            found.append(
                {
                    "num_steps": row["num_steps"],
                    "row": row["id"],
                    "reference": reference["id"],
                    "differences": _by_language(report, differences),
                    "win_rates": _by_language(report, {key: wins(row, reference, key) for key in rewards}),
                }
            )
    return found


def _sampler(row: dict) -> tuple:
    """What two rows must share to be compared; gamma does nothing in a single step."""
    return tuple(row["times"]), row["gamma"] if len(row["times"]) > 1 else None


def wins(row: dict, reference: dict, key: str) -> Tensor:
    """Share (P,) of a prompt's pictures that score higher in `row` than in `reference`; a tie counts half."""
    difference = kept_samples(row, key).double() - kept_samples(reference, key).double()
    won = torch.heaviside(difference, difference.new_tensor(0.5))
    return torch.where(difference.isnan(), math.nan, won).mean(1)


def _by_language(report: dict[str, Any], values: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Summaries of `values` (P,), and of those that are read off each picture alone by language too."""
    spoken = [prompt["language"] for prompt in report["prompts"]]
    found = {key: summary(one) for key, one in values.items()}
    if len(languages(report)) > 1:
        for key in [key for key in values if key.startswith(("r@", "reward/"))]:
            for language in languages(report):
                chosen = torch.tensor([one == language for one in spoken])
                found[f"{key}/{language}"] = summary(values[key][chosen])
    return found


def languages(report: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(prompt["language"] for prompt in report["prompts"]))


# ---- as text ----


def nearest(student: dict[str, Any]) -> dict[str, Any] | None:
    """The comparison at the number of steps nearest to SPOKEN_OF; None where no default row was measured."""
    return min(student["comparisons"], key=lambda one: abs(one["num_steps"] - SPOKEN_OF), default=None)


def rewards(student: dict[str, Any], comparison: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(key, name, role) of the rewards that were measured: those trained on first, then held out, then any others."""
    order = list(student["rewards"])
    keys = [key for key in comparison["win_rates"] if key.count("/") == 1]
    named = [(key, name, student["rewards"].get(name, "neither")) for key in keys for name in [key.partition("/")[2]]]
    return sorted(named, key=lambda one: order.index(one[1]) if one[1] in order else len(order))


def sentence(student: dict[str, Any]) -> str:
    """A tuned student in a line: its win rates at SPOKEN_OF steps."""
    comparison = nearest(student)
    if comparison is None or not comparison["win_rates"]:
        reason = "its default sampler was not measured" if comparison is None else "evaluate names no rewards"
        return f"{student['name']}: no win rate, since {reason}"
    rates = [
        f"{name}{' win rate' * (place == 0)} {number(comparison['win_rates'][key])} ({role})"
        for place, (key, name, role) in enumerate(rewards(student, comparison))
    ]
    num_steps = comparison["num_steps"]
    return f"{student['name']} at {num_steps} step{'s' * (num_steps > 1)}: {', '.join(rates)}"


def _against_reference(student: dict[str, Any]) -> dict[str, list[str]]:
    """The rewards in which a tuned student is "ahead" of or "behind" the one that it was tuned from, with win rates.

    At SPOKEN_OF steps, or the nearest number; a lead counts from NUM_ERRORS standard errors.
    """
    comparison = nearest(student)
    found: dict[str, list[str]] = {"ahead": [], "behind": []}
    if comparison is None:
        return found
    for key, name, _ in rewards(student, comparison):
        rate = comparison["win_rates"][key]
        if (side := _side(rate["mean"], rate["se"], 0.5)) is not None:
            found[side].append(f"{name} (win rate {number(rate)})")
    return found


def _side(mean: float | None, error: float | None, level: float) -> str | None:
    """Whether a `mean` is "ahead" of `level` or "behind" it by NUM_ERRORS standard errors; None where neither."""
    if mean is None or abs(mean - level) <= NUM_ERRORS * (error or 0.0):
        return None
    return "ahead" if mean > level else "behind"


def lost(student: dict[str, Any]) -> list[str]:
    """The rewards, with their win rates, in which a tuned student is behind the one that it was tuned from."""
    return _against_reference(student)["behind"]


def outcome(student: dict[str, Any]) -> str:
    """What tuning has won and lost, in a sentence; that the guard kept step 0, where it did."""
    name = student["name"]
    if not student["guard"]["kept_step"]:
        return f"It is the student as it was distilled: the guard of {name} kept step 0."
    comparison = nearest(student)
    if comparison is None or not comparison["win_rates"]:
        return f"Tuned by {name}, it was measured by no reward beside the student that it was tuned from."
    found = {side: ", ".join(names) for side, names in _against_reference(student).items() if names}
    said = " and ".join(f"{side} in {names}" for side, names in found.items())
    return f"Tuned by {name}, it is {said or 'level in every reward'} beside the student that it was tuned from."


def verdict(student: dict[str, Any]) -> str:
    """What the guard made of a student's run."""
    step, stopped = student["guard"]["kept_step"], student["guard"]["stopped"]
    trained, held_out = (
        ", ".join(name for name, role in student["rewards"].items() if role == wanted)
        for wanted in ("trained on", "held out")
    )
    kept_one = f"kept is the student of step {step}" if step else "no look was better, so kept is the distilled student"
    ending = "it stopped the run" if stopped else f"the run went on to its end, step {student['num_steps']}"
    return f"Trained on {trained}, held out {held_out}. By the held-out gain, {kept_one}; {ending}."


def heads(report: dict[str, Any]) -> list[str]:
    """Of the table of rewards, after the student's steps."""
    spoken = languages(report)
    return ["Reward", "", "Before", "After", "Paired difference", "Win rate", *(spoken if len(spoken) > 1 else [])]


def table(report: dict[str, Any], student: dict[str, Any]) -> list[list[str]]:
    """A line of cells for every number of steps and reward, the steps first."""
    rows = {row["id"]: row for row in report["rows"]}
    lines = []
    for one in student["comparisons"]:
        for key, name, role in rewards(student, one):
            before, after = (number(rows[one[side]]["metrics"][key]) for side in ("reference", "row"))
            rates = [one["win_rates"][spoken] for spoken in one["win_rates"] if f"{spoken}/".startswith(f"{key}/")]
            difference = number(one["differences"][key])
            lines.append([str(one["num_steps"]), name, role, before, after, difference, *map(number, rates)])
    return lines


def others(report: dict[str, Any]) -> list[str]:
    """The metrics beside the rewards, by language where there are several: what tuning may have cost."""
    shown = []
    for student in report["tuned"]:
        for one in student["comparisons"]:
            keys = [key for key in one["differences"] if not key.startswith("reward/")]
            shown += [key for key in keys if not any(other.startswith(f"{key}/") for other in keys)]
    return list(dict.fromkeys(shown))


def costs(report: dict[str, Any], student: dict[str, Any]) -> list[list[str]]:
    """A line of cells for every number of steps: the paired difference in each of `others`."""
    return [
        [str(one["num_steps"]), *(number(one["differences"][key]) for key in others(report))]
        for one in student["comparisons"]
    ]


def markdown(report: dict[str, Any]) -> list[str]:
    """The lines of report.md on tuned students; none where there are none."""
    students = report.get("tuned", [])  # reports before format 3 have no such key
    if not students:
        return []
    lines = ["", "## Tuned to preferences", ""]
    for student in students:
        lines.append(f"- {sentence(student)}. {verdict(student)}")
        lines += [f"  - Warning: {warning}" for warning in student["guard"]["warnings"]]
    lines += _markdown_table(heads(report), {one["name"]: table(report, one) for one in students}, num_words=2)
    lines += ["", "Paired differences beside the rewards, tuned minus distilled:"]
    labels = [metric(key).label for key in others(report)]
    lines += _markdown_table(labels, {one["name"]: costs(report, one) for one in students}, num_words=0)
    return [*lines, "", f"- **Win rate**: {WIN_RATE}"]


def _markdown_table(heads: list[str], lines: dict[str, list[list[str]]], num_words: int) -> list[str]:
    """A table of the students' `lines`; the first `num_words` columns after the steps are words, the rest numbers."""
    rule = f"|---|--:{'|---' * num_words}{'|--:' * (len(heads) - num_words)}|"
    found = ["", f"| Student | Steps | {' | '.join(heads)} |", rule]
    return found + [f"| {' | '.join([name, *cells])} |" for name, rows in lines.items() for cells in rows]
