"""report.json, the record of an evaluation, with its comparisons and headline; report.md."""

import json
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from .. import __version__
from ..recipe import Evaluate, Recipe
from ..recipe.experiment import STUDENTS
from ..storage.commit import commit
from ..storage.files import CheckpointError, public, read_json, replacing
from ..storage.untrusted import path_inside
from . import tuned_students
from .comparisons import comparisons, headline
from .definitions import BY_LANGUAGE
from .figures import binned, listed, rounded, significant, summary
from .tables import markdown
from .types import Environment, LossCurve, Measurements, Network, Prompt, Report, Row, TunedStudent

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
) -> Row:
    """Return a row of report.json: what it is (`row`), its latency, and of each metric mean, standard error and values.

    Latency is the median over batches with the standard error of that, NaN of a single batch. `values` (P,) are by
    metric; R@k and what is right are also given for each of the prompts' `languages`, without repeating the values. Of
    the metrics in `samples` the values of every picture (P, I) are kept too.
    """
    summaries = {key: summary(one).model_copy(update={"values": listed(one)}) for key, one in values.items()}
    for key, by_picture in (samples or {}).items():
        pictures = [listed(one) for one in by_picture]
        summaries[key] = summaries[key].model_copy(update={"samples": pictures})
    if len(set(languages)) > 1:
        for key in [key for key in values if key.startswith(BY_LANGUAGE)]:
            for language in dict.fromkeys(languages):
                chosen = torch.tensor([spoken == language for spoken in languages])
                summaries[f"{key}/{language}"] = summary(values[key][chosen])
    latency = {"latency_ms": significant(latency_ms), "latency_ms_se": rounded(latency_ms_se)}
    return Row.model_validate({**row, **latency, "metrics": summaries})


def assemble(
    recipe: Recipe,
    stage: Evaluate,
    prompts: list[Prompt],
    rows: list[Row],
    device: torch.device,
    curves: list[LossCurve],
    tuned: list[TunedStudent],
    networks: dict[str, dict[str, Any]],
) -> Report:
    """Return the whole of report.json.

    `prompts` are the fixed ones; `rows` come from `record`, `tuned` from `tuned_students.read`; `networks` holds, for
    every network that measured, the files that it was read from.
    """
    measurements = Measurements(
        format=FORMAT,
        name=recipe.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        environment=environment(device),
        teacher=public(recipe.teacher.model_dump(mode="json")),
        settings=public({**stage.model_dump(mode="json"), "seed": recipe.seed}),
        networks={name: Network.model_validate(network) for name, network in networks.items()},
        reference=next(row.id for row in rows if row.role == "reference"),
        prompts=prompts,
        rows=rows,
        curves=curves,
    )
    students = [
        student.model_copy(update={"comparisons": tuned_students.compare(rows, prompts, student)}) for student in tuned
    ]
    name = product(recipe, rows)
    return Report(
        **dict(measurements),
        comparisons=comparisons(measurements),
        product=name,
        tuned=students,
        headline=headline(measurements, students, name),
    )


def product(recipe: Recipe, rows: list[Row]) -> str | None:
    """Return the name of the student that `recipe` makes, its last one, or else the first of `rows`; None without."""
    kinds = [stage.kind for stage in recipe.stages if stage.kind in STUDENTS] or STUDENTS
    names = [row.name for row in rows if row.role == "student"]
    own = [name for kind in kinds if (name := "student" if kind == "distill" else kind) in names]
    return own[-1] if own else names[0] if names else None


def environment(device: torch.device) -> Environment:
    """Return hardware, versions and commit of a measurement on `device`."""
    threads = torch.get_num_threads()
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{processor()}, {threads} thread" + "s" * (threads > 1)
    )
    packages = ("torch", "diffusers", "transformers", "peft", "accelerate")
    return Environment(
        device=f"{device.type}: {name}",
        platform=platform.platform(),
        python=platform.python_version(),
        versions={"mlcm_rl": __version__, **{package: version(package) for package in packages}},
        commit=commit(),
    )


def processor() -> str:
    """Return the CPU's own name where the system gives it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def read_curves(folder: Path | None) -> list[LossCurve]:
    """Return the loss curves of a distill stage and of those that it goes on from, in the order that they ran.

    They are numbered by stage from 1. Empty without a folder; a stage whose folder or log is gone has none.
    """
    stages = distill_stages(folder) if folder is not None else []
    return [curve for number, stage in enumerate(stages, 1) for curve in curves_of_stage(stage, number)]


def distill_stages(folder: Path) -> list[Path]:
    """Return the distill stages that the one in `folder` goes on from, the first one first, and then itself.

    Manifests name them; the earliest may be gone. Raises CheckpointError for a name that leads outside, or in a circle.
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


def curves_of_stage(folder: Path, stage: int) -> list[LossCurve]:
    """Return the loss curves of a distill stage's `log.jsonl`, one a phase, binned where there are many points.

    `stage` is its place in the chain. Empty where the folder holds no log.
    """
    log = folder / "log.jsonl"
    if not log.is_file():
        return []
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    curves = []
    for phase in sorted({entry["phase"] for entry in entries if "phase" in entry}):
        own = [entry for entry in entries if entry.get("phase") == phase]
        loss, held_out_loss = (
            binned([(entry["step"], entry[key]) for entry in own if key in entry]) for key in ("loss", "held_out_loss")
        )
        num_segments = next(entry["num_segments"] for entry in own)
        curves.append(
            LossCurve(stage=stage, phase=phase, num_segments=num_segments, loss=loss, held_out_loss=held_out_loss)
        )
    return curves


# ---- files ----


def read(path: Path) -> Report:
    """Return the report in `path`, of this format or an older one. Raises CheckpointError for a damaged one."""
    try:
        return Report.model_validate(read_json(path))
    except ValidationError as error:
        raise CheckpointError(f"{path} is damaged: {error.error_count()} of its values are missing or odd") from error


def write(report: Report, folder: Path) -> None:
    """Write report.json, a row a line so that it can be read and compared, and report.md."""
    parts = [f"{json.dumps(key)}: {_laid_out(value)}" for key, value in report.as_json().items()]
    _write(folder / "report.json", "{\n" + ",\n".join(parts) + "\n}\n")
    _write(folder / "report.md", markdown(report))


def _laid_out(value: Any) -> str:
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(json.dumps(item, ensure_ascii=False, allow_nan=False) for item in value) + "\n]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
