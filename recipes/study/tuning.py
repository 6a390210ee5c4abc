"""The study of tuning: what holds a student back, rewards without gradient, bounded targets, rewards that may not fall.

    python recipes/study/tuning.py emoji|scenes GROUP [--steps N] [--seeds 2] [--rows none,...] [KEY=VALUE ...]

GROUP is `regularisers`, `forms`, on emoji `constraints` or, on scenes, `without_gradient`. Each row is the feedback
stage of the subject's demo recipe, or a policy in its place, with other settings, on the demo's distilled student; a
seed is that of the tuning alone. All rows of a group score as many pictures: those of `--steps` steps of the demo's
batch, by default the demo's own steps. Warm-ups and the guard's looks are the same shares of a shorter run.

Regularisers are compared at equal reward, so that each has several strengths: a row is a point, a run's looks a curve.
So are ways to have two rewards: a sum of several weights, and a constraint of several limits.

What a student measured, and the looks of its guard, are kept in two files of its own in `--results`. A student that has
both is not tuned again: the study may be cut off, go on elsewhere, or be shared among machines (`--first-seed`,
`--rows`). Its pictures (tuning_curves.py, tuning_frontier.py) and its table (tuning_summary.py) are of all files there;
`--tables` makes these alone.
"""

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

import kept_values
import protocol
import tuning_curves
import tuning_frontier
import tuning_looks
import tuning_summary
from mlcm_rl.recipe import Evaluate, Feedback, Policy, Recipe, Tuning
from mlcm_rl.recipe.experiment import TUNING
from mlcm_rl.recipe.file import load

RECIPES = protocol.RECIPES
BASES = {"emoji": "emoji_demo.yaml", "scenes": "scenes_demo.yaml"}
STEPS, GAMMA = 4, 0.5  # of the sampler that is tuned and measured; `kl` needs the noise
LATE = {"gradient": "random", "num_grad_steps": STEPS}  # a target at any step: the first decides what stands where
FREE = {"anchor": 0.0, "consistency": 0.0, "gamma": GAMMA}  # feedback without any regulariser
COUNTED = "without_gradient"  # the group that trains on the demo's held-out reward, a counter, and holds out the other
CALLS = {"batch_size": 64, "num_steps": 125}  # 8,000 scored pictures: those of the demo's feedback on scenes
BY_COUNT = CALLS | {"gamma": GAMMA, "num_generations": 8}
SURROGATE = FREE | CALLS | {"surrogate": {"num_generations": 8}}

Row = tuple[type[Tuning], dict[str, Any]]  # the stage's kind and its settings


def matching(weight: float, num_steps: int, rate: float) -> dict[str, Any]:
    """Return distribution matching of `weight`: its fake score, at `rate`, learns alone for a fifth of the steps."""
    return {"matching": {"weight": weight, "fake": {"warmup_steps": num_steps // 5, "learning_rate": rate}}}


def with_alignment(**settings: float) -> dict[str, Any]:
    """Return the demo's feedback on style, and on what the prompt says by `settings`: a weight in a sum, or a limit."""
    alignment = [{"name": "emoji_alignment", **settings}] if settings else []
    guard = {"rewards": [{"name": "emoji_style_judge"}]}
    return {"gamma": GAMMA, "guard": guard, "rewards": [{"name": "emoji_style"}, *alignment]}


FORMS: dict[str, Row] = {
    "direct": (Feedback, FREE),
    "direct-late": (Feedback, FREE | LATE),
    "bounded": (Feedback, FREE | LATE | {"form": "bounded"}),
    "bounded-anchor": (Feedback, FREE | LATE | {"form": "bounded", "anchor": 0.3}),
}
# Subject -> group -> row
ROWS: dict[str, dict[str, dict[str, Row]]] = {
    "emoji": {
        "regularisers": {
            "none": (Feedback, FREE),
            "anchor-1": (Feedback, FREE | {"anchor": 1.0}),
            "anchor-10": (Feedback, FREE | {"anchor": 10.0}),
            "kl-0.1": (Feedback, FREE | {"kl": 0.1}),
            "kl-1": (Feedback, FREE | {"kl": 1.0}),
            "consistency-10": (Feedback, FREE | {"consistency": 10.0}),
            "consistency-100": (Feedback, FREE | {"consistency": 100.0}),
            "matching-1": (Feedback, FREE | matching(1.0, 100, 1e-3)),
            "matching-10": (Feedback, FREE | matching(10.0, 100, 1e-3)),
        },
        "constraints": {
            "style": (Feedback, with_alignment()),
            "weight-0.1": (Feedback, with_alignment(weight=0.1)),
            "weight-0.3": (Feedback, with_alignment(weight=0.3)),
            "weight-1": (Feedback, with_alignment(weight=1.0)),
            "max-drop-0.3": (Feedback, with_alignment(max_drop=0.3)),
            "max-drop-0.1": (Feedback, with_alignment(max_drop=0.1)),
            "max-drop-0": (Feedback, with_alignment(max_drop=0.0)),
        },
        "forms": FORMS,
    },
    "scenes": {
        "regularisers": {
            "none": (Feedback, FREE),
            "anchor-0.3": (Feedback, FREE | {"anchor": 0.3}),
            "anchor-3": (Feedback, FREE | {"anchor": 3.0}),
            "kl-0.1": (Feedback, FREE | {"kl": 0.1}),
            "kl-1": (Feedback, FREE | {"kl": 1.0}),
            "consistency-1": (Feedback, FREE | {"consistency": 1.0}),
            "consistency-10": (Feedback, FREE | {"consistency": 10.0}),
            "matching-1": (Feedback, FREE | matching(1.0, 250, 1e-3)),
            "matching-10": (Feedback, FREE | matching(10.0, 250, 1e-3)),
        },
        COUNTED: {
            "policy": (Policy, BY_COUNT | {"learning_rate": 3e-4}),
            "policy-fast": (Policy, BY_COUNT | {"learning_rate": 1e-3}),
            "surrogate": (Feedback, SURROGATE),
            "surrogate-anchor": (Feedback, SURROGATE | {"anchor": 3.0}),
            "surrogate-bounded": (Feedback, SURROGATE | LATE | {"form": "bounded"}),
            "surrogate-bounded-anchor": (Feedback, SURROGATE | LATE | {"form": "bounded", "anchor": 0.3}),
        },
        "forms": FORMS,
    },
}
# Subject -> metric of the report -> head of its column. KID is to the teacher's own pictures of the same prompts.
COLUMNS = {
    "emoji": {
        "reward/emoji_style": "`emoji_style`, trained on",
        "reward/emoji_style_judge": "`emoji_style_judge`",
        "reward/emoji_alignment": "`emoji_alignment`",
        "r@5": "judge, R@5",
        "distance": "distance to the teacher",
        "diversity": "diversity",
        "teacher_kid": "1,000 KID",
    },
    "scenes": {
        "right@all": "judge, all that is asked",
        "reward/scene_match": "`scene_match`",
        "reward/scene_count": "`scene_count`",
        "distance": "distance to the teacher",
        "diversity": "diversity",
        "teacher_kid": "1,000 KID",
    },
}
# Subject -> what is paid and what is won, whose changes are the axes of a picture
FRONTIERS = {"emoji": ("reward/emoji_alignment", "reward/emoji_style"), "scenes": ("teacher_kid", "right@all")}


def main() -> None:
    parser = protocol.options(str(__doc__), BASES, [group for groups in ROWS.values() for group in groups])
    parser.add_argument("--steps", type=int, help="of the demo's batch, whose scored pictures all rows take")
    parser.add_argument("--tune-only", action="store_true", help="leave the measuring to a later call")
    arguments = parser.parse_intermixed_args()
    subject, group = arguments.subject, arguments.group
    if group not in ROWS[subject]:
        parser.error(f"{subject} has no group {group}, only {', '.join(ROWS[subject])}")
    base = load(RECIPES / BASES[subject], arguments.overrides)
    num_steps = arguments.steps or protocol.first_of(base, Feedback).num_steps
    results = arguments.results or Path(base.runs) / f"tuning-{subject}-{group}-{num_steps}"
    recipes: dict[str, Recipe] = {}
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for row in protocol.rows_of(parser, arguments, list(ROWS[subject][group])):
            made = partial(recipe_of, base, subject, group, row, seed, num_steps, arguments.prompts)
            name = f"tuning-{group}-{row}-{seed}".replace(".", "_")
            recipe = protocol.checked(parser, row, made)
            recipes[f"{row}-{seed}"] = recipe.model_copy(update={"name": name})
    if arguments.write:
        protocol.write_recipes(recipes.values(), arguments.write)
        return
    results.mkdir(parents=True, exist_ok=True)
    for row, recipe in recipes.items():
        tuned = recipe.model_copy(update={"stages": recipe.stages[:-1]})
        tuning_looks.keep(tuned, results / f"{row}.json")
        if not arguments.tune_only:
            kept_values.keep(recipe, results / f"{row}.safetensors", tuple(COLUMNS[subject]))
    order = list(ROWS[subject][group])
    tuning_curves.draw(results, order, results / "curves.png")
    tuning_frontier.draw(results, order, FRONTIERS[subject], COLUMNS[subject], results / "frontier.png")
    Console().print(tuning_summary.text(results, order, COLUMNS[subject]), soft_wrap=True)
    Console().print(f"\n{results / 'curves.png'}\n{results / 'frontier.png'}", soft_wrap=True)


def recipe_of(
    base: Recipe, subject: str, group: str, row: str, seed: int, num_steps: int | None = None, num_prompts: int = 128
) -> Recipe:
    """Return the stages before tuning, the stage of `row` under `seed`, and what it is measured by beside its start."""
    given = protocol.first_of(base, Evaluate)
    measured = {
        "num_prompts": num_prompts,
        "images_per_prompt": max(2, given.images_per_prompt),  # whose difference is the diversity
        "sampling_steps": [STEPS],
        "gammas": [GAMMA],
        "teacher_steps": [50],
        "distribution": True,
    }
    stages = [stage_of(base, subject, group, row, seed, num_steps), protocol.changed(given, measured)]
    return with_stages(base, f"tuning-{group}", stages)


def stage_of(base: Recipe, subject: str, group: str, row: str, seed: int, num_steps: int | None = None) -> Tuning:
    """Return the stage of `row` under `seed`; with `num_steps`, of as many scored pictures as those steps of the demo.

    Raise ValueError if the row's batches do not make that number of pictures.
    """
    kind, changes = ROWS[subject][group][row]
    given = protocol.first_of(base, Feedback)
    shared = {name: value for name, value in given.model_dump(exclude={"kind"}).items() if name in kind.model_fields}
    if group == COUNTED:
        changes = changes | {"rewards": shared["guard"]["rewards"], "guard": {"rewards": shared["rewards"]}}
    guard = shared["guard"] | changes.get("guard", {})
    stage = kind.model_validate(shared | changes | {"guard": guard, "seed": seed})
    calls = (given.num_steps if num_steps is None else num_steps) * given.batch_size
    if calls % stage.batch_size:
        raise ValueError(
            f"--steps {num_steps} of batches of {given.batch_size} are {calls} scored pictures, which the batches of "
            f"{stage.batch_size} of row {row} do not make: take a multiple of {stage.batch_size // given.batch_size}"
        )
    return in_steps(stage, calls // stage.batch_size)


def in_steps(stage: Tuning, num_steps: int) -> Tuning:
    """Return `stage` in `num_steps` steps, of which warm-ups and the steps between looks are the same shares."""
    if num_steps == stage.num_steps:
        return stage
    share, settings = num_steps / stage.num_steps, stage.model_dump()
    settings |= {"num_steps": num_steps, "warmup_steps": round(share * stage.warmup_steps)}
    settings["guard"]["every"] = max(1, round(share * stage.guard.every))
    if isinstance(stage, Feedback) and stage.matching:
        settings["matching"]["fake"]["warmup_steps"] = int(share * stage.matching.fake.warmup_steps)
    if isinstance(stage, Feedback) and stage.surrogate:
        settings["surrogate"]["head_start"] = int(share * stage.surrogate.head_start)
    return type(stage).model_validate(settings)


def with_stages(base: Recipe, name: str, stages: list) -> Recipe:
    """Return the recipe of `name`: the stages before tuning, and `stages`."""
    before = [stage for stage in base.stages if stage.kind not in (*TUNING, "evaluate")]
    return base.model_copy(update={"name": name, "stages": [*before, *stages]})


if __name__ == "__main__":
    main()
