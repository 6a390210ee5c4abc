"""Write scenes with captions as pictures, for `recipes/scenes_teacher.yaml`: `data/scenes_128`.

Every scene has NUM_CAPTIONS wordings, half of them Chinese; none is of a held-out combination. `train_denoiser.py`
words its scenes afresh at every step instead, and reads them as stored latents.
"""

import argparse
import json
import random
from pathlib import Path

from PIL import Image

from drawings import load_drawings
from scene_latents import NUM_IN_PART, scenes_of_part
from scenes import LANGUAGES, SUBJECT, Scene, read_concepts
from sources import whole_folder, write_text
from wordings import Writer

NUM_CAPTIONS = 4
STATED = 0.6  # share of captions that state the style, and of those that state the background


def captions_of(scene: Scene, writer: Writer, draw: random.Random) -> list[str]:
    """Return NUM_CAPTIONS prompts that the scene is right for, in each language by turns."""
    requests = [scene.request(draw.random() < STATED, draw.random() < STATED) for _ in range(NUM_CAPTIONS)]
    return [writer.write(one, LANGUAGES[i % 2], "trained", draw) for i, one in enumerate(requests)]


def main() -> None:
    """Write the first scenes of the training set and `metadata.jsonl`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=int, default=32, help="the first so many of concepts.json")
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--folder", type=Path, default=SUBJECT.parents[1] / "data" / "scenes_128")
    arguments = parser.parse_args()
    concepts, drawings, draw = read_concepts(), load_drawings(), random.Random("captions")
    writer, codepoints, scenes = Writer(concepts), [c.codepoint for c in concepts][: arguments.concepts], list[Scene]()
    for part in range(-(-arguments.scenes // NUM_IN_PART)):
        scenes += scenes_of_part(part, codepoints)
    lines = []
    with whole_folder(arguments.folder) as partial:
        partial.mkdir(parents=True)
        for number, scene in enumerate(scenes[: arguments.scenes]):
            name = f"{number:05d}.png"
            Image.fromarray(drawings.paint(scene)).save(partial / name)
            lines.append(
                json.dumps({"file_name": name, "prompts": captions_of(scene, writer, draw)}, ensure_ascii=False)
            )
        write_text(partial / "metadata.jsonl", "\n".join(lines) + "\n")
    print(f"{len(lines)} scenes in {arguments.folder}")


if __name__ == "__main__":
    main()
