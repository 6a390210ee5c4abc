"""The study of tuning on scenes: what holds a student back, rewards without gradient, targets of a bounded size.

    python recipes/scenes/study/tuning.py GROUP [--seeds 2] [--rows none,...] [--tune-only] [KEY=VALUE ...]

GROUP is `regularisers`, `without_gradient` or `forms`. Each row is the feedback stage of `recipes/scenes_demo.yaml`, or
a policy in its place, with other settings, on the demo's distilled student; a seed is that of the tuning alone.
Interrupted, it goes on where it was: finished stages are reused. Ends with a picture, the guard's looks of all rows
(tuning_curves.py), and the table of the finished students by the judge, which trains nothing (tuning_summary.py).

Regularisers are compared at equal reward, so that each has several strengths: a row is a point, a run's looks a curve.
`feedback` has no term of distribution matching yet: its rows go here when it has.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import tuning_curves
import tuning_summary
from rich.console import Console

from mlcm_rl import pipeline
from mlcm_rl.recipe import Evaluate, Feedback, Policy, Recipe, Tuning
from mlcm_rl.recipe.experiment import TUNING
from mlcm_rl.recipe.file import load

RECIPES = Path(__file__).parents[2]
STEPS, GAMMA = 4, 0.5  # of the sampler that is tuned and measured
COUNT = [{"name": "scene_count", "settings": {"prompts": str(RECIPES / "scenes" / "prompts")}}]
MATCH = [{"name": "scene_match", "settings": {"prompts": str(RECIPES / "scenes" / "prompts")}}]
FREE = {"consistency": 0.0, "gamma": GAMMA}  # feedback without any regulariser
CALLS = {"batch_size": 64, "num_steps": 125}  # 8,000 scored pictures: those of the demo's feedback
BY_COUNT = {**CALLS, "rewards": COUNT, "gamma": GAMMA, "num_generations": 8, "guard": {"rewards": MATCH}}
SURROGATE = FREE | CALLS | {"rewards": COUNT, "guard": {"rewards": MATCH}, "surrogate": {"num_generations": 8}}
LATE = {"gradient": "random", "num_grad_steps": STEPS}  # a target at any step: the first decides what stands where

# Group -> row -> the stage's kind and its settings.
ROWS: dict[str, dict[str, tuple[type[Tuning], dict[str, Any]]]] = {
    "regularisers": {
        "none": (Feedback, FREE),
        "anchor-0.3": (Feedback, FREE | {"anchor": 0.3}),
        "anchor-3": (Feedback, FREE | {"anchor": 3.0}),
        "kl-0.1": (Feedback, FREE | {"kl": 0.1}),
        "kl-1": (Feedback, FREE | {"kl": 1.0}),
        "consistency-1": (Feedback, FREE | {"consistency": 1.0}),
        "consistency-10": (Feedback, FREE | {"consistency": 10.0}),
    },
    "without_gradient": {
        "policy": (Policy, BY_COUNT | {"learning_rate": 3e-4}),
        "policy-fast": (Policy, BY_COUNT | {"learning_rate": 1e-3}),
        "surrogate": (Feedback, SURROGATE),
        "surrogate-bounded": (Feedback, SURROGATE | LATE | {"form": "bounded"}),
    },
    "forms": {
        "direct": (Feedback, FREE),
        "direct-late": (Feedback, FREE | LATE),
        "bounded": (Feedback, FREE | LATE | {"form": "bounded"}),
        "bounded-anchor": (Feedback, FREE | LATE | {"form": "bounded", "anchor": 0.3}),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=list(ROWS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--rows", help="some of the group's, by comma; default: all")
    parser.add_argument("--tune-only", action="store_true", help="leave the measuring to a later call")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="put over the recipe's settings")
    arguments = parser.parse_intermixed_args()
    base = load(RECIPES / "scenes_demo.yaml", arguments.overrides)
    names = arguments.rows.split(",") if arguments.rows else list(ROWS[arguments.group])
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    tuned = [(row, *tune(base, arguments.group, row, seed)) for seed in seeds for row in names]
    picture = Path(base.runs) / f"scenes-{arguments.group}.png"
    tuning_curves.draw(tuned, picture)
    if not arguments.tune_only:
        report = measure(base, arguments.group, [folder for _, _, folder in tuned])
        students = [(row, folder) for row, _, folder in tuned]
        Console().print(tuning_summary.text(report, students), soft_wrap=True)
    Console().print(str(picture), soft_wrap=True)


def tune(base: Recipe, group: str, row: str, seed: int) -> tuple[Tuning, Path]:
    """The stage of `row` under `seed`, run, and its folder."""
    stage = stage_of(base, group, row, seed)
    return stage, pipeline.run(with_stages(base, f"{group}-{row}-{seed}".replace(".", "_"), [stage]))[-1].folder


def stage_of(base: Recipe, group: str, row: str, seed: int) -> Tuning:
    """The stage of `row` under `seed`."""
    kind, changes = ROWS[group][row]
    given = next(stage for stage in base.stages if isinstance(stage, Feedback))
    shared = {name: value for name, value in given.model_dump(exclude={"kind"}).items() if name in kind.model_fields}
    guard = shared["guard"] | changes.get("guard", {})
    return kind.model_validate(shared | changes | {"guard": guard, "seed": seed})


def measure(base: Recipe, group: str, folders: list[Path]) -> dict[str, Any]:
    """The report of all students beside the distilled one."""
    given = next(stage for stage in base.stages if isinstance(stage, Evaluate))
    changes = {"sampling_steps": [STEPS], "gammas": [GAMMA], "also": [str(folder) for folder in folders]}
    stage = given.model_copy(update=changes)
    folder = pipeline.run(with_stages(base, f"{group}-measured", [stage]))[-1].folder
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def with_stages(base: Recipe, name: str, stages: list) -> Recipe:
    """The recipe of `name`: the stages before tuning, and `stages`."""
    before = [stage for stage in base.stages if stage.kind not in (*TUNING, "evaluate")]
    return base.model_copy(update={"name": name, "stages": [*before, *stages]})


if __name__ == "__main__":
    main()
