"""What the studies of this folder share: their options, the settings of training, the protocol of measuring."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from rich.console import Console
from ruamel.yaml import YAML

import kept_values
import tables
from mlcm_rl.recipe import Distill, Evaluate, Recipe
from mlcm_rl.recipe.file import check, load
from mlcm_rl.recipe.paths import Folders
from mlcm_rl.recipe.shipped import PREFIX
from mlcm_rl.recipe.tree import key_text
from mlcm_rl.storage.files import replacing

AnyStage = TypeVar("AnyStage", bound=BaseModel)

RECIPES = Path(__file__).resolve().parents[1]
GAMMAS = {"emoji": [0.0, 0.5, 1.0], "scenes": [0.0, 0.5]}  # subject -> those that students are sampled at


def run(
    description: str,
    bases: dict[str, str],
    rows: Sequence[str],
    columns: Mapping[str, tuple[str, ...]],
    name: str,
    num_steps: int,
    recipe_of: Callable[[Recipe, str, str, int, int, int], Recipe],
) -> None:
    """Run the study of the command line: `rows` on a subject of `bases`, each by `recipe_of`, then print its tables.

    `recipe_of` is given the base, the subject, the row, the seed of training, the optimiser steps, and the prompts.
    """
    parser = options(description, bases)
    parser.add_argument("--steps", type=int, default=num_steps)
    arguments = parser.parse_intermixed_args()
    base, subject = load(RECIPES / bases[arguments.subject], arguments.overrides), arguments.subject
    results = arguments.results or Path(base.runs) / f"{name}-{subject}-{arguments.steps}"
    recipes: dict[Path, Recipe] = {}
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for row in rows_of(parser, arguments, rows):
            path = results / f"{row}-{seed}.safetensors"
            made = partial(recipe_of, base, subject, row, seed, arguments.steps, arguments.prompts)
            recipes[path] = checked(parser, row, made, is_done=path.is_file() and not arguments.write)
    if arguments.write:
        write_recipes(recipes.values(), arguments.write)
        return
    for path, recipe in recipes.items():
        kept_values.keep(recipe, path, columns[subject])
    tables.write(results, columns[subject], list(rows))


def checked(parser: argparse.ArgumentParser, row: str, make: Callable[[], Recipe], is_done: bool = False) -> Recipe:
    """Return the recipe that `make` makes of `row`. End the program with what is wrong with it, before anything runs.

    Its files need not be there for one that `is_done`.
    """
    try:
        recipe = make()
    except ValidationError as error:
        places = (("".join(f"{key}: " for key in one["loc"]), one["msg"]) for one in error.errors())
        parser.error(f"{row}: " + "; ".join(place + text.removeprefix("Value error, ") for place, text in places))
    except ValueError as error:
        parser.error(f"{row}: {error}")
    for problem in [] if is_done else check(recipe, Folders(Path(), Path())):
        parser.error(f"{row}: {key_text(problem.key)}: {problem.text}")
    return recipe


def write_recipes(recipes: Iterable[Recipe], folder: Path) -> None:
    """Write each of `recipes` to `folder`, under its name, for `mlcm run` in any folder; print the paths."""
    yaml = YAML()
    yaml.width = 120
    for recipe in recipes:
        said = recipe.model_dump(mode="json", exclude_unset=True, exclude_none=True)
        said["stages"] = [{"kind": stage.kind} | one for stage, one in zip(recipe.stages, said["stages"], strict=True)]
        path = folder / f"{recipe.name}.yaml"
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            yaml.dump(_anywhere(said), file)
        Console().print(str(path), soft_wrap=True)


def _anywhere(value: Any) -> Any:
    """Return `value` of a recipe with the paths to what comes along as a recipe names it in any folder."""
    if isinstance(value, dict):
        return {name: _anywhere(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_anywhere(one) for one in value]
    path = Path(value).resolve() if isinstance(value, str) and "/" in value else None
    return f"{PREFIX}{path.relative_to(RECIPES)}" if path and path.is_relative_to(RECIPES) and path.exists() else value


def options(description: str, bases: Iterable[str], groups: Iterable[str] = ()) -> argparse.ArgumentParser:
    """Return the options that all studies have; one whose rows are in `groups` asks for one of these."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=list(bases))
    if groups:
        parser.add_argument("group", choices=sorted(set(groups)))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="put over the recipe's settings")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=128, help="that students are measured on")
    parser.add_argument("--rows", help="some of them, by comma; default: all")
    parser.add_argument(
        "--results", type=Path, help="folder of what is measured; default: one in runs, named by the study"
    )
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write a recipe a row there, and run nothing")
    parser.add_argument("--tables", action="store_true", help="print the tables of what is measured, and run nothing")
    return parser


def rows_of(parser: argparse.ArgumentParser, arguments: argparse.Namespace, rows: Sequence[str]) -> list[str]:
    """Return the rows that are asked for, of all; none where tables alone are. Ends the program if there is no such."""
    asked = arguments.rows.split(",") if arguments.rows else list(rows)
    if unknown := [row for row in asked if row not in rows]:
        parser.error(f"--rows: there is no {', '.join(unknown)}, only {', '.join(rows)}")
    return [] if arguments.tables else asked


def training_settings(base: Recipe, seed: int, num_steps: int) -> dict:
    """Return the settings of training that all rows take from the base's distill stage; the seed is theirs alone."""
    given = first_of(base, Distill)
    return {
        "batch_size": given.batch_size,
        "precision": given.precision,
        "adapter": given.adapter.model_dump(),
        "sample_every": num_steps,
        "seed": seed,
    }


def first_of(base: Recipe, kind: type[AnyStage]) -> AnyStage:
    """Return the base's first stage of a `kind`. Raise StopIteration if it has none."""
    return next(stage for stage in base.stages if isinstance(stage, kind))


def rate_of(base: Recipe) -> float:
    """Return the peak rate of the base's distill stage, which all phases of a row share."""
    rate = first_of(base, Distill).learning_rate
    if isinstance(rate, list):
        raise ValueError("the rows of a study share one learning_rate: give the distill stage a number, no list")
    return rate


def evaluate_stage(base: Recipe, subject: str, num_prompts: int, sampling_steps: list[int]) -> Evaluate:
    """Return the base's evaluation of `num_prompts`: the last student in `sampling_steps`, beside the teacher's 50.

    Raise ValueError for prompts that are too few to measure by.
    """
    measured = {
        "num_prompts": num_prompts,
        "images_per_prompt": 2,  # whose difference is the diversity
        "sampling_steps": sampling_steps,
        "gammas": GAMMAS[subject],
        "grids": ["milestones"],
        "teacher_steps": [50],
        "teacher_solvers": ["ddim"],
        "students": "last",
        "distribution": True,
    }
    return changed(first_of(base, Evaluate), measured)


def changed(stage: AnyStage, settings: dict) -> AnyStage:
    """Return `stage` with other `settings`. Raise ValueError if they do not go together."""
    other = stage.model_copy(update=settings)
    type(stage).model_validate(other.model_dump())  # a copy is not checked, and this one is run after hours of training
    return other
