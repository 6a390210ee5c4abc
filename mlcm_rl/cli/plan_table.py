"""A plan in a terminal of 100 columns: a row for each stage, the parts of memory, and the assumptions."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..cost.gpus import DEVICES, Device
from ..cost.units import in_words, time_in_words
from ..models.published_teachers import shipped
from ..pipeline.errors import way_out
from ..recipe import Recipe
from ..storage.files import free_space

if TYPE_CHECKING:
    from ..cost.launches import Launch
    from ..pipeline.planning import PlannedStage

MAX_COLUMNS = 1000  # of a table that is wider than the terminal
PARTS = ("parameters", "gradients", "optimiser", "averages", "activations", "exchange", "rewards", "host")
ENGINES = {"whole": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP2"}


def show(
    console: Console,
    recipe: Recipe,
    stages: "list[PlannedStage]",
    launch: "Launch",
    device: Device | None,
    kind: str,
) -> None:
    """Print the plan of `recipe`, whose memory was predicted for a `kind` of device ("cuda", "cpu")."""
    ahead = [stage for stage in stages if not stage.done]
    _print_whole(console, _summary(stages, ahead, device))
    if any(stage.memory for stage in ahead):
        console.print()
        console.print(_memory(ahead), crop=False)
    for text in [*_warnings(ahead, launch, device), *_disk(ahead, Path(recipe.runs)), *_gaps(ahead)]:
        console.print(text, soft_wrap=not console.is_terminal)
    console.print()
    for line in _assumptions(recipe, ahead, launch, device, kind):
        console.print(Text(line), soft_wrap=not console.is_terminal)


def _print_whole(console: Console, table: Table) -> None:
    """Print `table` as wide as it is: a folder's name that is cut could not be copied."""
    table.width = console.measure(table, options=console.options.update(width=MAX_COLUMNS)).maximum
    console.print(table, crop=False)


def _summary(stages: "list[PlannedStage]", ahead: "list[PlannedStage]", device: Device | None) -> Table:
    table = Table("stage", "", box=None, pad_edge=False, header_style="bold")
    for name in ("evaluations", "disk", "memory", *(["time"] if device else [])):
        table.add_column(name, justify="right")
    for stage in stages:
        begun = f"{stage.share_done:.0%} done" if stage.share_done else "to do"
        state = Text("done", style="green") if stage.done else Text(begun, style="yellow")
        figures = [f"{stage.network_evaluations:,}", in_words(stage.disk_bytes)]
        missing = "?" if stage.unknown else ""
        figures.append(in_words(stage.memory.total) if stage.memory else missing)
        figures += [time_in_words(stage.seconds) if stage.seconds is not None else missing] if device else []
        table.add_row(Text(stage.folder.name, no_wrap=True), state, *figures)
    evaluations = sum(round(stage.network_evaluations * (1 - stage.share_done)) for stage in ahead)
    total = [f"{evaluations:,}", in_words(sum(one.disk_bytes for one in ahead))]
    total.append(in_words(max((stage.memory.total for stage in ahead if stage.memory), default=0)))
    total += [time_in_words(sum((stage.seconds or 0) * (1 - stage.share_done) for stage in ahead))] if device else []
    table.add_section()
    table.add_row("still to do", "", *total, style="bold")
    return table


def _memory(ahead: "list[PlannedStage]") -> Table:
    """Return the table of memory: a row for each stage to do, with the columns that apply."""
    predicted = [(stage.kind, stage.memory) for stage in ahead if stage.memory]
    parts = [
        part for part in PARTS if part not in ("exchange", "host") or any(getattr(one, part) for _, one in predicted)
    ]
    table = Table("memory of", *parts, box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, memory in predicted:
        sizes = (getattr(memory, part) for part in parts)
        table.add_row(kind, *(in_words(size) if size else "" for size in sizes))
    return table


def _warnings(ahead: "list[PlannedStage]", launch: "Launch", device: Device | None) -> list[Text]:
    """Return a warning for each stage whose memory exceeds the device's."""
    together = launch.processes if device is not None and device.is_shared else 1
    return [
        Text.assemble(
            ("too large", "bold red"),
            f"  {stage.kind} needs {in_words(together * stage.memory.total)} and {device.name} has "
            f"{in_words(device.memory)}: {way_out(bool(stage.memory.gradients or stage.memory.host))}",
        )
        for stage in ahead
        if device is not None and stage.memory and together * stage.memory.total > device.memory
    ]


def _disk(ahead: "list[PlannedStage]", runs: Path) -> list[Text]:
    """Return a warning if the stages to do write more than the disk of the folder `runs` has free."""
    needed = sum(round(stage.disk_bytes * (1 - stage.share_done)) for stage in ahead)
    free = free_space(runs.absolute())
    if needed <= free:
        return []
    message = (
        f"  the stages to do write {in_words(needed)} and the disk of {runs} has {in_words(free)} free: make room, "
    )
    return [Text.assemble(("too large", "bold red"), f"{message}or set runs= to a folder on another disk")]


def _gaps(ahead: "list[PlannedStage]") -> list[Text]:
    """Return a line for each stage without a prediction, and for the rewards that are not counted, of all stages."""
    lines = [f"memory and time of {one.kind} could not be predicted: {one.unknown}" for one in ahead if one.unknown]
    unbuilt: dict[str, list[str]] = {}  # the kinds of stages, by the reward
    uncalled: dict[str, list[str]] = {}
    for stage in ahead:
        for name in stage.memory.uncounted if stage.memory else ():
            is_unbuilt = stage.memory is not None and name in stage.memory.unbuilt
            (unbuilt if is_unbuilt else uncalled).setdefault(name, []).append(stage.kind)
    why = {
        "their weights are not here: `mlcm rewards fetch NAME` fetches them": unbuilt,
        "what they compute depends on pictures, and a plan has shapes alone": uncalled,
    }
    for reason, rewards in why.items():
        if rewards:
            kinds = ", ".join(dict.fromkeys(kind for kinds in rewards.values() for kind in kinds))
            lines.append(f"not counted for {kinds}: {', '.join(rewards)} ({reason})")
    return [Text(line) for line in lines]


def _assumptions(
    recipe: Recipe, ahead: "list[PlannedStage]", launch: "Launch", device: Device | None, kind: str
) -> list[str]:
    """Return the assumptions behind the figures, a sentence a line."""
    lines = ["One evaluation is one pass of the denoiser for one sample."]
    if shipped(recipe.teacher):
        lines.append(f"Shapes of {recipe.teacher.path} are those published, which come with this package.")
    if any(stage.memory for stage in ahead):
        lines.append(
            "Memory is that of tensors. Beside them a process has its libraries, about 0.5 GB (on a GPU also there), "
            "and its allocator keeps more: 0.2 to 0.6 of the figure was measured on a CPU."
        )
    if device is None and kind == "cpu" and any(getattr(one, "precision", "no") == "bf16" for one in recipe.stages):
        lines.append(
            "Memory is as on a CPU, where attention in bfloat16 is written out; a GPU takes less: --device "
            f"{' | '.join(DEVICES)} says how much."
        )
    if launch.processes > 1:
        lines.append(f"Memory is that of each of {launch.processes} processes ({ENGINES[launch.engine]}).")
    if any(stage.memory and stage.memory.host for stage in ahead):
        lines.append("What stands under host is in the memory of the CPU, for each process, and not in the sum.")
    if device is not None:
        basis = "measured on a CPU" if device.kind == "cpu" else "an assumption, no GPU was measured"
        lines.append(f"Time is at {device.share:.0%} of the matrix rate of {device.name}: {basis}.")
    return [*lines, f"Stages are kept in {recipe.runs}/stages."]
