"""Write `prompts/`: training and validation prompts, and tests of held-out combinations, frames and words.

All tests ask for combinations that no training scene has (scenes of one object have none that are held out):
`test.jsonl` in the trained wordings, `frames.jsonl` in held-out frames, `synonyms.jsonl` in held-out words.
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence

import drawings  # noqa: F401  puts the emoji teacher's programs on the path
from mlcm_rl.data.scenes import RELATIONS
from scenes import LANGUAGES, SUBJECT, Concept, draw_scene, read_concepts
from sources import write_text
from wordings import Writer

STATED = 0.6  # share of prompts that state the style, and of those that state the background
FILES = {  # name: (prompts, held-out combinations, wording)
    "train": (2000, False, "trained"),
    "validation": (200, False, "trained"),
    "test": (400, True, "trained"),
    "frames": (200, True, "frames"),
    "synonyms": (200, True, "synonyms"),
}


def prompts_of(name: str, concepts: Sequence[Concept], known: set[str]) -> Iterator[dict[str, str]]:
    """Yield the lines of a file; none has a text in `known`, to which they are added.

    Languages alternate and relations go round, so that every prefix is balanced over both.
    """
    count, held_out, wording = FILES[name]
    draw, writer = random.Random(f"prompts {name}"), Writer(concepts)
    codepoints = [concept.codepoint for concept in concepts]
    for i in range(count):
        language, relation = LANGUAGES[i % 2], RELATIONS[i // 2 % len(RELATIONS)]
        while True:
            scene = draw_scene(draw, codepoints, relation, held_out and relation != "single")
            request = scene.request(draw.random() < STATED, draw.random() < STATED)
            prompt = writer.write(request, language, wording, draw)
            if prompt not in known:
                break
        known.add(prompt)
        yield {"prompt": prompt, "language": language, "concept": request.code} | (
            {"style": request.style} if request.style else {}
        )


def main() -> None:
    """Write the five files for the concepts that the teacher draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concepts", type=int, default=32, help="the first so many of concepts.json")
    concepts, known = read_concepts()[: parser.parse_args().concepts], set[str]()
    for name in FILES:
        lines = [json.dumps(line, ensure_ascii=False) for line in prompts_of(name, concepts, known)]
        write_text(SUBJECT / "prompts" / f"{name}.jsonl", "\n".join(lines) + "\n")
        print(f"{name}: {len(lines)} prompts")


if __name__ == "__main__":
    main()
