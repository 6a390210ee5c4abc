"""The study of preference learning: every objective, and every language of prompts, over several seeds.

    python recipes/emoji/study/objectives.py [--seeds 3] [--prompts 1000] [--rows feedback,...] [KEY=VALUE ...]

Each row is a stage of `recipes/emoji_preference.yaml` with other settings, on one distilled student; a seed is that of
the tuning alone. Interrupted, it goes on where it was: finished stages are reused. Ends with a picture
(objective_curves.py), the table, and the targets in words (objective_summary.py).
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

import objective_curves
import objective_summary
from mlcm_rl import pipeline
from mlcm_rl.data.prompts import read_prompts
from mlcm_rl.pipeline import finished_runs
from mlcm_rl.recipe import Dpo, Evaluate, Feedback, Policy, Recipe, Tuning
from mlcm_rl.recipe.experiment import TUNING
from mlcm_rl.recipe.file import load

sys.path.append(str(Path(__file__).parents[2] / "study"))  # what all studies share

import protocol

RECIPES = Path(__file__).parents[2]
STEPS = 4  # of the sampler that is tuned and measured
PAIRS = {"num_prompts": 1000, "num_generations": 4}  # of the table that `dpo_offline` learns from

# Row -> the stage of the recipe that it is, and what it changes there.
ROWS: dict[str, tuple[type[Tuning], dict]] = {
    "feedback": (Feedback, {}),
    "dpo": (Dpo, {}),
    "dpo-offline": (Dpo, {}),  # the same, from a table of pairs that `mlcm pairs` makes once
    "policy": (Policy, {}),
    "feedback-english": (Feedback, {"languages": {"en": 1.0}}),
    "feedback-chinese": (Feedback, {"languages": {"zh": 1.0}}),
    "feedback-alignment": (
        Feedback,
        {"rewards": [{"name": "emoji_alignment"}], "guard": {"rewards": [{"name": "emoji_style_judge"}]}},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument(
        "--diversity-prompts", type=int, default=128, help="prompts that name a style, two pictures of each"
    )
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--tune-only", action="store_true", help="leave the measuring to a later call")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="put over the recipe's settings")
    arguments = parser.parse_args()
    base = load(RECIPES / "emoji_preference.yaml", arguments.overrides)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    tuned = [(row, *tune(base, row, seed)) for seed in seeds for row in arguments.rows.split(",")]
    picture = Path(base.runs) / "preference.png"
    objective_curves.draw(tuned, picture)
    if not arguments.tune_only:
        reports = measure(
            base, [(stage, folder) for _, stage, folder in tuned], arguments.prompts, arguments.diversity_prompts
        )
        Console().print(objective_summary.text(*reports), soft_wrap=True)
    Console().print(str(picture), soft_wrap=True)


def tune(base: Recipe, row: str, seed: int) -> tuple[Tuning, Path]:
    """The stage of `row` under `seed`, run, and its folder."""
    kind, changes = ROWS[row]
    given = protocol.first_of(base, kind)
    if row == "dpo-offline":
        changes = {"pairs": str(pair_table(base)), "num_generations": Dpo.model_fields["num_generations"].default}
    merged = given.model_dump() | {"seed": seed} | changes
    if "guard" in changes:
        merged["guard"] = given.guard.model_dump() | changes["guard"]
    stage = type(given).model_validate(merged)
    return stage, pipeline.run(with_stages(base, f"{row}-{seed}", distilled(base), [stage]))[-1].folder


def pair_table(base: Recipe) -> Path:
    """A table of pairs: the distilled student's own samples, ranked by the reward that the others are trained on."""
    student = pipeline.run(with_stages(base, "preference-student", distilled(base), []))[-1].folder
    given = protocol.first_of(base, Dpo)
    out = Path(base.runs) / "preference-pairs"
    prompts, reward = Path(given.prompts), given.rewards[0].name
    finished_runs.pairs(student, prompts, reward, out, **PAIRS, num_steps=STEPS, min_margin=0.0, seed=0, batch_size=64)
    return out


def measure(base: Recipe, tuned: list[tuple[Tuning, Path]], prompts: int, styled: int) -> tuple[list[dict], list[dict]]:
    """Reports of all students beside the distilled one, each under the gamma it was tuned for: one list on the first
    `prompts` prompts, one on `styled` prompts that name a style, two pictures of each."""
    given = protocol.first_of(base, Evaluate)
    shared = {"sampling_steps": [STEPS], "teacher_steps": [25], "distribution": True}
    with_style = {"prompts": str(styled_prompts(base, given.prompts)), "num_prompts": styled, "images_per_prompt": 2}
    kinds: tuple[dict, dict] = ({"num_prompts": prompts}, with_style | {"rewards": []})
    found: tuple[list[dict], list[dict]] = ([], [])
    for gamma in dict.fromkeys(stage.gamma or 0.0 for stage, _ in tuned):
        also = [str(folder) for stage, folder in tuned if (stage.gamma or 0.0) == gamma]
        for reports, kind in zip(found, kinds, strict=True):
            stage = protocol.changed(given, shared | kind | {"gammas": [gamma], "also": also})
            name = f"preference-{'diversity' if reports is found[1] else 'study'}-gamma-{gamma:g}".replace(".", "-")
            folder = pipeline.run(with_stages(base, name, distilled(base), [stage]))[-1].folder
            reports.append(json.loads((folder / "report.json").read_text(encoding="utf-8")))
    return found


def styled_prompts(base: Recipe, path: str) -> Path:
    """A file of those prompts of `path` that name a style."""
    out = Path(base.runs) / "styled_prompts.jsonl"
    lines = [json.dumps(asdict(prompt), ensure_ascii=False) for prompt in read_prompts(path) if prompt.style]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return out


def distilled(base: Recipe) -> list:
    """The stages before preference learning."""
    return [stage for stage in base.stages if stage.kind not in (*TUNING, "evaluate")]


def with_stages(base: Recipe, name: str, *stages: list) -> Recipe:
    return base.model_copy(update={"name": name, "stages": [one for part in stages for one in part]})


if __name__ == "__main__":
    main()
