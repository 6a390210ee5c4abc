"""What the English teacher draws of concepts that are in no parallel caption: the judge's R@1 and R@5 per language.

    python recipes/emoji/build/measure_text_adapter.py runs/emoji_adapt_text/05-adapt_text/text_adapter

Before and after the adapter: the first prompts of `data/emoji_english/test.jsonl`, one noise for all, 25 guided DDIM
steps at scale 4. Writes `measured/text_adapter.json`, which the card's table is.
"""

import argparse
import json
from pathlib import Path

from english_teacher import OUT
from measure_teacher import draw, recalls
from mlcm_rl.data.prompts import first_prompts
from mlcm_rl.evaluation import judge
from mlcm_rl.models import teachers
from mlcm_rl.recipe import Teacher
from mlcm_rl.training import devices
from sources import EMOJI, MEASURED, write_text

COLUMNS = ("R@1 en", "R@5 en", "R@1 zh", "R@5 zh")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--steps", type=int, default=25)
    arguments = parser.parse_args()
    prompts, assessor = first_prompts(OUT / "test.jsonl", arguments.prompts), judge.load(EMOJI / "judge")
    before = Teacher(path=str(OUT / "teacher"), family="sdxl")
    after = before.model_copy(update={"text_adapter": str(arguments.adapter)})
    results = {}
    for name, teacher in (("before", before), ("after", after)):
        base = teachers.load(teacher, devices.device_of("auto"))
        images = draw(base, prompts, guidance_scale=4.0, num_steps=arguments.steps)
        results[name] = recalls(assessor.features(images), prompts, assessor)
    write_text(MEASURED / "text_adapter.json", json.dumps(results, indent=1) + "\n")
    print(
        f"| teacher, {len(prompts) // 2} prompts a language | {' | '.join(COLUMNS)} |",
        "| --- |" + " --- |" * 4,
        sep="\n",
    )
    for name, measured in results.items():
        cells = [f"{mean:.3f} +- {error:.3f}" for mean, error in (measured[column] for column in COLUMNS)]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
