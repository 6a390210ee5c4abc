"""report.json, the record of an evaluation, and what is said of it: comparisons, headline, table, report.md."""

import json
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..recipe import Evaluate, Recipe
from ..recipe.experiment import STUDENTS
from ..storage.commit import commit
from ..storage.files import CheckpointError, public, read_json, replacing
from ..storage.untrusted import path_inside
from . import tuned_students
from .comparisons import comparisons, headline
from .figures import binned, listed, rounded, summary
from .tables import markdown

# Of report.json, raised when its layout changes. Still read: 1 has no "training", no "networks", 1 and 2 no "tuned",
# 1 to 3 the curves of the last distill stage only, without "stage", and no "latency_ms_se".
FORMAT = 4


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
        earlier = path_inside(stages[0].parent, name, file).resolve()
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
