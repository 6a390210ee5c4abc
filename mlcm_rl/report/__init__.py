"""report.json, the record of an evaluation, and what is said of it: comparisons, headline, table, report.md."""

import json
import platform
import textwrap
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from .. import __version__
from ..checkpoint import CheckpointError, public, read_json, replacing
from ..fingerprint import STUDENTS
from ..metrics import paired_difference
from ..recipe import Evaluate, Recipe
from ..runtime import commit
from ..untrusted import held
from . import tuned_students
from .definitions import LATENCY, TRAINING, metric
from .figures import binned, kept, listed, number, plus_minus, rounded, summary
from .tuned_students import NUM_ERRORS

# Of report.json, raised when its layout changes. Still read: 1 has no "training", no "networks", 1 and 2 no "tuned",
# 1 to 3 the curves of the last distill stage only, without "stage", and no "latency_ms_se".
FORMAT = 4
BUDGETS = (2, 4, 8)  # network evaluations at which student and teacher are compared
HEADLINE_BUDGET = 4
MANY_METRICS = 5  # in the terminal table
COMPARED = ("distance", "r@5", "clip")
MAIN_METRICS = ("distance", "kid", "r@5", "fid", "clip")  # beside the rewards


# ---- the record ----


def record(
    row: dict[str, Any],
    values: dict[str, Tensor],
    languages: list[str],
    latency_ms: float,
    latency_ms_se: float,
    samples: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """A row of report.json: what it is, its latency, and of each metric mean, standard error and the values (P,).

    Latency is the median over batches with the standard error of that, nan of a single batch. R@k is also given
    for each of the prompts' `languages`, without repeating the values. Of the metrics in `samples` the values of every
    picture (P, I) are kept too.
    """
    summaries = {key: summary(one) | {"values": listed(one)} for key, one in values.items()}
    for key, by_picture in (samples or {}).items():
        summaries[key]["samples"] = [listed(one) for one in by_picture]
    if len(set(languages)) > 1:
        for key in [key for key in values if key.startswith("r@")]:
            for language in dict.fromkeys(languages):
                chosen = torch.tensor([spoken == language for spoken in languages])
                summaries[f"{key}/{language}"] = summary(values[key][chosen])
    timed = {"latency_ms": rounded(latency_ms), "latency_ms_se": rounded(latency_ms_se)}
    return row | timed | {"metrics": summaries}


def assemble(
    recipe: Recipe,
    stage: Evaluate,
    prompts: list[dict],
    rows: list[dict],
    device: torch.device,
    curves: list[dict],
    tuned: list[dict],
    networks: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """The whole of report.json.

    `prompts` are the fixed ones, each with "shown"; `rows` come from `record`; `tuned` are what `tuned_students.read`
    found; `networks` says of every network that measured which files it was read from.
    """
    report = {
        "format": FORMAT,
        "name": recipe.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(device),
        "teacher": public(recipe.teacher.model_dump(mode="json")),
        "settings": public({**stage.model_dump(mode="json"), "seed": recipe.seed}),
        "networks": networks,
        "reference": next(row["id"] for row in rows if row["role"] == "reference"),
        "prompts": prompts,
        "rows": rows,
        "curves": curves,
    }
    compared = [student | {"comparisons": tuned_students.compared(report, student)} for student in tuned]
    report |= {"comparisons": comparisons(report), "product": product(recipe, report), "tuned": compared}
    return report | {"headline": headline(report)}


def product(recipe: Recipe, report: dict[str, Any]) -> str | None:
    """The name of the student that `recipe` makes, its last one, or else the first of the report; None without any."""
    made = [stage.kind for stage in recipe.stages if stage.kind in STUDENTS] or STUDENTS
    names = [row["name"] for row in report["rows"] if row["role"] == "student"]
    own = [name for kind in made if (name := "student" if kind == "distill" else kind) in names]
    return own[-1] if own else names[0] if names else None


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and commit that a measurement was made with."""
    threads = torch.get_num_threads()
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{processor()}, {threads} thread" + "s" * (threads > 1)
    )
    packages = ("torch", "diffusers", "transformers", "peft", "accelerate")
    return {
        "device": f"{device.type}: {name}",
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {"mlcm_rl": __version__, **{package: version(package) for package in packages}},
        "commit": commit(),
    }


def processor() -> str:
    """The CPU's own name where the system tells it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def read_curves(folder: Path | None) -> list[dict[str, Any]]:
    """The loss curves of a distill stage and of those before it that it goes on from, in the order that they ran.

    "stage" counts them from 1. Empty without a folder; a stage whose folder or log is gone has none.
    """
    stages = distill_stages(folder) if folder is not None else []
    return [{"stage": number, **curve} for number, stage in enumerate(stages, 1) for curve in curves_of_stage(stage)]


def distill_stages(folder: Path) -> list[Path]:
    """The distill stages that the one in `folder` goes on from, the first one first, and then itself.

    They are known by their manifests; the earliest named may be gone. Raises CheckpointError for a name that leads
    outside, or round.
    """
    stages = [folder.resolve()]
    while (file := stages[0] / "manifest.json").is_file():
        name = read_json(file, parents=dict)["parents"].get("distill")
        if name is None:
            break
        earlier = held(stages[0].parent, name, file).resolve()
        if earlier in stages:
            raise CheckpointError(f"{file} is damaged: the stage goes on from itself")
        stages.insert(0, earlier)
    return stages


def curves_of_stage(folder: Path) -> list[dict[str, Any]]:
    """The loss curves of a distill stage's `log.jsonl`, one a phase: points (step, loss), binned where there are many.

    Empty where the folder holds no log.
    """
    log = folder / "log.jsonl"
    if not log.is_file():
        return []
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [
        {
            "phase": phase,
            "num_segments": next(entry["num_segments"] for entry in entries if entry.get("phase") == phase),
            **{
                name: binned([(one["step"], one[name]) for one in entries if one.get("phase") == phase and name in one])
                for name in ("loss", "held_out_loss")
            },
        }
        for phase in sorted({entry["phase"] for entry in entries if "phase" in entry})
    ]


# ---- what it says ----


def comparisons(report: dict[str, Any]) -> list[dict[str, Any]]:
    """At 2, 4 and 8 evaluations, the best student row against the best undistilled row, by each metric, paired.

    "Best" is picked on these very prompts, on both sides; an honest headline compares the student's default instead.
    """
    found = []
    for key in measured(report, COMPARED):
        for budget in BUDGETS:
            student = best(rows_at(report, "student", budget), key)
            teacher = best(rows_at(report, "undistilled", budget), key)
            if student and teacher:
                found.append({"num_evaluations": budget, **compare(student, teacher, key)})
    return found


def compare(student: dict, teacher: dict, key: str) -> dict[str, Any]:
    """Student minus teacher in metric `key`, over the prompts that both have, with its standard error.

    "verdict": ahead or behind where the difference is more than NUM_ERRORS standard errors, else level.
    """
    difference, error = paired_difference(kept(student, key), kept(teacher, key))
    gain = -difference if metric(key).lower_is_better else difference
    return {
        "metric": key,
        "student": student["id"],
        "teacher": teacher["id"],
        "difference": rounded(difference),
        "se": rounded(error),
        "verdict": "ahead" if gain > NUM_ERRORS * error else "behind" if gain < -NUM_ERRORS * error else "level",
    }


def headline(report: dict[str, Any], name: str | None = None) -> dict[str, Any]:
    """Whether the student `name`, at its default sampler, beats the undistilled teacher at four evaluations, in words.

    Without a name it is what the run made: the tuned student where there is one. In every metric of COMPARED that was
    measured, the student's row at 4 is set against the best undistilled row at 4, paired. "passed" needs the distance
    ahead, nothing behind, and of a tuned student no reward lost to the one that it was tuned from, each by two standard
    errors: retrieval can be at its ceiling on both sides.
    """
    students = [row for row in rows_at(report, "student", HEADLINE_BUDGET) if row["default"]]
    name = name or report.get("product") or (students[0]["name"] if students else None)  # older reports do not say
    own = [row for row in students if row["name"] == name]
    teachers = rows_at(report, "undistilled", HEADLINE_BUDGET)
    if not own or not teachers:
        text = (
            f"Nothing to compare at {HEADLINE_BUDGET} network evaluations: the student or the undistilled teacher was "
            "not measured there."
        )
        return {"num_evaluations": HEADLINE_BUDGET, "passed": False, "checks": [], "text": text}
    checks = [compare(own[0], best(teachers, key), key) for key in measured(report, COMPARED)]
    tuned = next((one for one in report.get("tuned", []) if one["name"] == name), None)
    lost = tuned_students.lost(tuned) if tuned else []
    said = [sentence(report, check) for check in checks] + ([tuned_students.outcome(tuned)] if tuned else [])
    verdicts = [check["verdict"] for check in checks]
    return {
        "num_evaluations": HEADLINE_BUDGET,
        "passed": verdicts[0] == "ahead" and "behind" not in verdicts and not lost,
        "checks": checks,
        "text": f"At {HEADLINE_BUDGET} network evaluations: {' '.join(said)}",
    }


def sentence(report: dict[str, Any], check: dict[str, Any]) -> str:
    """A comparison in words, beside what the reference itself reaches."""
    rows, key = by_id(report), check["metric"]
    student, teacher, reference = (rows[name] for name in (check["student"], check["teacher"], report["reference"]))
    own = f", {reference['num_steps']} guided steps {number(reference['metrics'][key])}" if key != "distance" else ""
    return (
        f"{metric(key).label} {number(student['metrics'][key])} for the student, {number(teacher['metrics'][key])} for "
        f"the undistilled teacher ({teacher['sampler']}){own}; paired difference "
        f"{plus_minus(check['difference'], check['se'])}, {check['verdict']}."
    )


def rows_at(report: dict[str, Any], role: str, num_evaluations: int) -> list[dict]:
    return [row for row in report["rows"] if row["role"] == role and row["num_evaluations"] == num_evaluations]


def by_id(report: dict[str, Any]) -> dict[str, dict]:
    return {row["id"]: row for row in report["rows"]}


def measured(report: dict[str, Any], keys: Iterable[str]) -> list[str]:
    """Those of `keys` that the rows have a value of."""
    return [key for key in keys if report["rows"][0]["metrics"].get(key, {}).get("mean") is not None]


def best(rows: list[dict], key: str) -> dict | None:
    """The row whose mean of `key` is best, None of no rows."""
    sign = 1.0 if metric(key).lower_is_better else -1.0
    return min(rows, key=lambda row: sign * row["metrics"][key]["mean"], default=None)


# ---- as text ----


def columns(report: dict[str, Any]) -> list[str]:
    """The metrics that the table shows, in order: R@k by language where there is more than one."""
    keys = [key for key in report["rows"][0]["metrics"] if "values" in report["rows"][0]["metrics"][key]]
    shown = []
    for key in keys:
        by_language = [other for other in report["rows"][0]["metrics"] if other.startswith(f"{key}/")]
        shown += by_language or [key]
    return shown


def main_metrics(report: dict[str, Any]) -> list[str]:
    """The metrics that get a plot and a place on the terminal; R@5 is over all languages."""
    keys = measured(report, report["rows"][0]["metrics"])
    return [key for key in keys if key in MAIN_METRICS or key.startswith("reward/")]


def heading(row: dict[str, Any]) -> str:
    """What a row stands under in the table."""
    if row["role"] == "reference":
        return "Teacher, reference"
    if row["role"] == "undistilled":
        return "Teacher, undistilled"
    return f"{row['name']}: " + ("conditioned on its target" if row["conditioned"] else f"K = {row['num_segments']}")


def label(row: dict[str, Any]) -> str:
    """A row's name under its heading."""
    if row["role"] == "reference":
        return f"{row['num_steps']} steps"
    return row["sampler"] + (", default" if row["default"] else "")


def groups(report: dict[str, Any]) -> dict[str, list[dict]]:
    """The rows under their headings, in the table's order: the references, every student, the undistilled teacher."""
    found: dict[str, list[dict]] = {}
    for row in sorted(report["rows"], key=lambda row: ("reference", "student", "undistilled").index(row["role"])):
        found.setdefault(heading(row), []).append(row)
    return found


def cells(report: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """The numbers of a row of the table, after its label."""
    values = [number(row["metrics"][key]) for key in columns(report)]
    cost = [training(row.get("training"))] if has_training(report) else []
    return [str(row["num_evaluations"]), latency(row), *cost, *values]


def latency(row: dict[str, Any]) -> str:
    """A row's milliseconds a picture, without an error where it has one batch or was kept by an earlier version."""
    error = row.get("latency_ms_se")
    return plus_minus(row["latency_ms"], error) if error else f"{row['latency_ms']:.3g}"


def heads(report: dict[str, Any]) -> list[str]:
    cost = ["Training evals"] if has_training(report) else []
    return ["Evals", "ms", *cost, *(metric(key).label for key in columns(report))]


def has_training(report: dict[str, Any]) -> bool:
    """Whether there is a student, and so a column of what training cost."""
    return any(row.get("training") for row in report["rows"])


def training(cost: dict[str, float] | None) -> str:
    """A training's evaluations in all, and for each sample the teacher's + the student's; a dash for the teacher."""
    if cost is None:
        return "-"
    return f"{compact(cost['total'])} ({cost['teacher_per_sample']:.3g} + {cost['student_per_sample']:.3g})"


def compact(count: float) -> str:
    """1234567 -> "1.23M"."""
    for unit in ("", "k", "M"):
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}G"


def table(report: dict[str, Any]) -> Table:
    """The table for a terminal: the means of the main metrics, so that it fits; the files have everything."""
    keys = main_metrics(report)
    title = f"{report['name']}: means over {len(report['prompts'])} prompts"
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown.add_column("Sampler", min_width=18)
    cost = has_training(report) and len(keys) <= MANY_METRICS  # 80 columns hold no more
    heads = [metric(key).label.partition(" (")[0].replace("_", " ") for key in keys]
    for head in ("Evals", *["Train"] * cost, *heads):
        shown.add_column("\n".join(textwrap.wrap(head, 8, break_long_words=False)), justify="right", no_wrap=True)
    for name, rows in groups(report).items():
        shown.add_row(name, style="bold")
        for row in rows:
            values = [row["metrics"][key]["mean"] for key in keys]
            texts = [str(row["num_evaluations"])]
            texts += [training(row.get("training")).partition(" ")[0]] * cost
            texts += ["-" if value is None else f"{value:.3g}" for value in values]
            shown.add_row(f"  {label(row)}", *texts, style="green" if row["default"] else "")
        shown.add_section()
    return shown


def markdown(report: dict[str, Any]) -> str:
    """report.md: the headline, the table, what its columns mean, and what preference learning changed."""
    head = ["Sampler", *heads(report)]
    lines = [f"# {report['name']}", "", report["headline"]["text"], ""]
    lines += [f"| {' | '.join(head)} |", f"|---{'|--:' * (len(head) - 1)}|"]
    for name, rows in groups(report).items():
        lines.append(f"| **{name}** {'| ' * (len(head) - 1)}|")
        lines += [f"| {' | '.join([label(row), *cells(report, row)])} |" for row in rows]
    lines += [
        "",
        f"{len(report['prompts'])} prompts; \u00b1 is one standard error over prompts.",
        "",
        f"- **ms**: {LATENCY}",
    ]
    lines += [f"- **Training evals**: {TRAINING}"] * has_training(report)
    lines += [f"- **{metric(key).label}**: {metric(key).definition}" for key in dict.fromkeys(columns(report))]
    lines += [f"- Network `{name}`: {text}" for name, text in network_texts(report)]
    lines += tuned_students.markdown(report)
    lines += ["", f"Measured on {report['environment']['device']}, {report['created']}."]
    return "\n".join(lines) + "\n"


def network_texts(report: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of the networks that measured: figures by different files, or real pictures, do not compare."""
    found = []
    for name, network in report.get("networks", {}).items():
        parts = [f"{file}, sha256 {checksum}" for file, checksum in network["files"].items()]
        if "num_real_images" in network:
            parts.append(f"{network['num_real_images']} real pictures")
        found.append((name, "; ".join(parts)))
    return found


# ---- files ----


def write(report: dict[str, Any], folder: Path) -> None:
    """report.json, a row a line so that it can be read and compared, and report.md."""
    parts = [f"{json.dumps(key)}: {_laid_out(value)}" for key, value in report.items()]
    _write(folder / "report.json", "{\n" + ",\n".join(parts) + "\n}\n")
    _write(folder / "report.md", markdown(report))


def _laid_out(value: Any) -> str:
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(json.dumps(item, ensure_ascii=False, allow_nan=False) for item in value) + "\n]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
