"""Whether the teacher draws what it knows in words that it was not trained on: the judge's R@1 and R@5 per language.

    python recipes/emoji/build/measure_wordings.py

Three sets of 80 prompts, 40 concepts in both languages: `test`, captions by the templates of the training captions;
`frames`, each concept's own name in a sentence of no template; `descriptions`, without the name. One noise for all
three, 50 guided DDIM steps at scale 4. Writes `measured/wordings.json`, which the card's table is.
"""

import json

from measure_teacher import draw, recalls
from mlcm_rl.data.prompts import Prompt, read_prompts
from mlcm_rl.evaluation import judge
from mlcm_rl.models import teachers
from mlcm_rl.recipe import Teacher
from mlcm_rl.training import devices
from sources import EMOJI, MEASURED, write_text

SETS = ("test", "frames", "descriptions")
RESULTS = MEASURED / "wordings.json"


def prompts_of(name: str) -> list[Prompt]:
    """Return the prompts of a set; of `test`, one of each concept and language that the other sets have, in order."""
    found = read_prompts(EMOJI / "prompts" / f"{name}.jsonl")
    if name != "test":
        return found
    first = {(prompt.concept, prompt.language): prompt for prompt in reversed(found)}
    return [first[prompt.concept, prompt.language] for prompt in prompts_of("frames")]


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """Return the results as Markdown."""
    columns = ("R@1 en", "R@5 en", "R@1 zh", "R@5 zh")
    rows = [f"| 40 prompts each | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    for name, measured in results.items():
        cells = [f"{mean:.3f} +- {error:.3f}" for mean, error in (measured[column] for column in columns)]
        rows.append(f"| `prompts/{name}.jsonl` | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    base = teachers.load(Teacher(path=str(EMOJI / "teacher"), family="sdxl"), devices.device_of("auto"))
    assessor, results = judge.load(EMOJI / "judge"), {}
    for name in SETS:
        prompts = prompts_of(name)
        results[name] = recalls(assessor.features(draw(base, prompts, guidance_scale=4.0)), prompts, assessor)
    write_text(RESULTS, json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
