"""Commands on a finished run: sample, pairs, evaluate, export."""

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from ..cost.units import in_words
from . import reward_commands
from .console import imported, line
from .folders import existing_run, existing_student, label_page
from .paths import folder_option, prompts_option

RunFolder = Annotated[
    Path,
    typer.Argument(metavar="RUN", callback=existing_run, show_default=False, help="runs/<recipe>, or a stage's folder"),
]


class DeviceKind(StrEnum):
    """Where a command can compute."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    MPS = "mps"


DeviceOption = Annotated[
    DeviceKind | None, typer.Option("--device", show_default=False, help="where it computes; default: as the recipe")
]

TextAdapter = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        file_okay=False,
        show_default=False,
        help="folder that an adapt_text stage left, through which prompts in its languages go",
    ),
]
Strength = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        show_default=False,
        help="how much of the picture is drawn anew: all steps are over this share of the time axis; "
        "default: 0.5, with --mask 1",
    ),
]


def sample(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            callback=existing_student,
            show_default=False,
            help="runs/<recipe>, a stage's folder, or with --teacher a student's .safetensors file or folder",
        ),
    ],
    out: Annotated[Path, typer.Option(file_okay=False, help="folder for the pictures", show_default=False)],
    prompt: Annotated[list[str] | None, typer.Option(help="what to draw; may be repeated", show_default=False)] = None,
    prompts: Annotated[Path | None, prompts_option("to draw too")] = None,
    images_per_prompt: Annotated[int, typer.Option(min=1, help="pictures of each prompt")] = 1,
    steps: Annotated[
        list[int],
        typer.Option(min=1, max=8, help="network evaluations a picture; repeated, a column of the sheet each"),
    ] = [4],  # noqa: B006  typer reads it and never changes it
    seed: Annotated[int, typer.Option(min=0)] = 0,
    gamma: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="noise put back between steps: 0 none, 1 all; default: what suits the student"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="pictures drawn at once")] = 16,
    device: DeviceOption = None,
    teacher: Annotated[
        Path | None,
        folder_option("for a student of no run, as LCM-LoRA's file: the folder in diffusers' format that it goes over"),
    ] = None,
    family: Annotated[
        str | None, typer.Option(show_default=False, help="of --teacher; default: the one that loads its pipeline")
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            help="with --teacher: times of its steps, lcm, trailing, milestones or a list as 999,759,499,259",
        ),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(show_default=False, help="with --teacher: of a LoRA file that states none")
    ] = None,
    prediction: Annotated[
        str | None,
        typer.Option(
            metavar="teacher|x0", show_default=False, help="with --teacher: x0 where the file's network predicts that"
        ),
    ] = None,
    text_adapter: TextAdapter = None,
    image: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, show_default=False, help="picture to start from")
    ] = None,
    strength: Strength = None,
    mask: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, show_default=False, help="white where --image is drawn anew"),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[:WEIGHT]", show_default=False, help="style LoRA over the student; may be repeated"),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER[:WEIGHT]",
            show_default=False,
            help="ControlNet or T2I-Adapter of the teacher's family, in diffusers' format; may be repeated",
        ),
    ] = None,
    control_image: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, show_default=False, help="what it follows; one for each --control"),
    ] = None,
    edges: Annotated[
        bool, typer.Option("--edges", help="give control networks the edges of their pictures, as train_control does")
    ] = False,
    ip_adapter: Annotated[
        str | None,
        typer.Option(metavar="FILE[:WEIGHT]", show_default=False, help="IP-Adapter, with its image_encoder beside it"),
    ] = None,
    ip_image: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, show_default=False, help="what it attends to")
    ] = None,
) -> None:
    """Draw pictures with a run's student, or with one of no run, and a labelled sheet of them where they are several.

    A picture, a mask, style LoRAs, control networks and an IP-Adapter may join the prompt, at any number of steps.

    A PNG says what it is: prompt, seed, steps, gamma, student and whatever joined them are in its text.
    """
    if not prompt and not prompts:
        raise typer.BadParameter("name what to draw: --prompt TEXT, or --prompts FILE", param_hint="--prompt")
    if teacher is None:
        stated = (("--family", family), ("--grid", grid), ("--alpha", alpha), ("--prediction", prediction))
        for name, value in stated:
            if value is not None:
                raise typer.BadParameter(f"{name} goes with --teacher: a run states its own")
        if run.is_file():
            message = f"{run} is a student of no run: name the folder of its teacher, in diffusers' format"
            raise typer.BadParameter(message, param_hint="--teacher")
    with imported("pipeline.finished_runs") as finished_runs:
        over = teacher and finished_runs.lone_student.Over(teacher, family, grid, gamma, alpha, prediction)
        texts = [*(prompt or []), *(finished_runs.prompts_of(prompts) if prompts else [])]
        inputs = finished_runs.sample_inputs.of_command(
            image, strength, mask, lora or [], control or [], control_image or [], edges, ip_adapter, ip_image
        )
        pictures = finished_runs.sample(
            run, texts, steps, seed, gamma, out, batch_size, images_per_prompt, text_adapter, inputs, device, over
        )
    for picture in pictures:
        line(Text(str(picture)))


def pairs(
    run: RunFolder,
    prompts: Annotated[Path, prompts_option("to draw")],
    out: Annotated[Path, typer.Option(file_okay=False, help="folder for the table", show_default=False)],
    reward: Annotated[
        str | None,
        typer.Option(
            callback=reward_commands.reward_name, show_default=False, help="a reward model's name: it chooses"
        ),
    ] = None,
    by_hand: Annotated[bool, typer.Option("--by-hand", help="you choose, on a page in your browser")] = False,
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="the first so many of the prompts; default: all", show_default=False)
    ] = None,
    num_generations: Annotated[
        int | None, typer.Option(min=2, help="samples a prompt for the reward; default: 4", show_default=False)
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=8, help="network evaluations a sample")] = 4,
    min_margin: Annotated[
        float | None,
        typer.Option(min=0, help="pairs no further apart in reward are left out; default: 0", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="samples drawn at once, in whole prompts")] = 16,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="the page's; default: a free one", show_default=False)
    ] = None,
) -> None:
    """Make a table of preference pairs of a run's samples, chosen by a reward or by hand.

    Of each prompt's samples a reward takes the best and the worst; you choose between two.

    The student is the run's last; a stage's folder, runs/<recipe>/01-distill, gives its own.
    """
    if by_hand:
        _refuse("--by-hand", **{"--reward": reward, "--num-generations": num_generations, "--min-margin": min_margin})
    elif reward is None:
        raise typer.BadParameter("say who chooses: --reward NAME, or --by-hand for yourself")
    else:
        _refuse("--reward", **{"--port": port})
    with imported(
        "pipeline.finished_runs", interrupted="Interrupted. The same command goes on where it was stopped."
    ) as finished_runs:
        if by_hand:
            serve = partial(label_page("pairs").serve, port=port or 0)
            num_pairs, total = finished_runs.pairs_by_hand(
                run, prompts, out, num_prompts, steps, seed, batch_size, serve
            )
        else:
            samples, margin = num_generations or 4, min_margin or 0.0
            num_pairs, total = finished_runs.pairs(
                run, prompts, reward, out, num_prompts, samples, steps, margin, seed, batch_size
            )
    line(Text(f"{out}  {num_pairs} pairs of {total} prompts"))


def evaluate(
    run: RunFolder,
    steps: Annotated[
        list[int] | None, typer.Option(min=1, max=8, help="sampling steps; may be repeated", show_default=False)
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="prompts to draw", show_default=False)] = None,
    prompts: Annotated[
        Path | None, prompts_option("to draw in place of the recipe's, whose evaluate stage is then not needed")
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Measure a run's student beside its teacher and write the report."""
    with imported("pipeline.finished_runs") as finished_runs:
        report = finished_runs.evaluate(run, num_prompts, steps or None, device, prompts)
    line(Text(str(report / "report.html")))


class Format(StrEnum):
    """What a student can be exported for."""

    DIFFUSERS = "diffusers"
    COMFYUI = "comfyui"
    KOHYA = "kohya"
    PEFT = "peft"
    ALL = "all"


class Precision(StrEnum):
    """In what a student's weights can be exported."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


def export(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to write", show_default=False)],
    formats: Annotated[
        list[Format],
        typer.Option("--format", help="for whom; repeated or `all`, a folder each in OUT"),
    ] = [Format.DIFFUSERS],  # noqa: B006  typer reads it and never changes it
    merge: Annotated[bool, typer.Option("--merge", help="whole weights, no LoRA")] = False,
    dtype: Annotated[
        Precision | None,
        typer.Option(show_default=False, help="of the student's weights; default: a LoRA's fp32, else the teacher's"),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="NAME/MODEL", show_default=False, help="upload OUT to this repository of the hub"),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="let everyone see it; default: private")] = False,
) -> None:
    """Write a run's student for diffusers, or as files for ComfyUI, kohya's tools or PEFT, and list what was written.

    For diffusers it is a folder that opens without this package. A student told the time it jumps to has its pipeline's
    class there: open it with trust_remote_code=True. For stock pipelines (image to image, ControlNet), and for other
    tools, it is a file for each number of steps. The card in README.md has the code and the settings.
    """
    if public and push is None:
        raise typer.BadParameter("--public means nothing without --push NAME/MODEL")
    if push is not None and (len(formats) > 1 or Format.ALL in formats):
        raise typer.BadParameter("--push takes one --format: a repository holds one")
    chosen = list(dict.fromkeys(one.value for one in formats))
    with imported("pipeline.finished_runs") as finished_runs:
        folder = finished_runs.export(run, out, chosen, dtype and dtype.value, merge, push)
        line(Text(str(folder)))
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            line(Text(f"  {file.relative_to(folder)}  {in_words(file.stat().st_size)}", "dim"))
        if push is not None:
            line(Text(finished_runs.push(folder, push, public)))


def _refuse(way: str, **options: object) -> None:
    """Raise BadParameter for any of `options` that is set: it means nothing beside the option `way`."""
    for name, value in options.items():
        if value is not None:
            raise typer.BadParameter(f"{name} means nothing beside {way}; leave one of them out")
