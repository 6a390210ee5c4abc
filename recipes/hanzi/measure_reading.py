"""How many of a run's pictures PP-OCRv4 takes for the character they were asked for, among the subject's sixteen."""

import argparse
from pathlib import Path

import torch

from mlcm_rl import rewards
from mlcm_rl.data.picture_files import read_picture, square
from mlcm_rl.data.prompts import Prompt, read_prompts
from mlcm_rl.recipe import Reward
from reward_models.ocr import Ocr, ctc_log_prob

PROMPTS = Path(__file__).parent / "prompts" / "test.jsonl"


def read(recogniser: Ocr, images: torch.Tensor, characters: list[str]) -> torch.Tensor:
    """Return the log-probability (B, C) of each of C `characters` in each of `images` (B, 3, H, W) in [0, 1]."""
    frames = recogniser.read(images)
    return torch.stack([ctc_log_prob(frames, [[recogniser.label_of[hanzi]]] * len(images)) for hanzi in characters], 1)


def right(scores: torch.Tensor, prompts: list[Prompt], characters: list[str]) -> torch.Tensor:
    """Return whether the character asked for is the likeliest (B,), of `scores` (B, C)."""
    return scores.argmax(1) == torch.tensor([characters.index(str(prompt.concept)) for prompt in prompts])


def main() -> None:
    """Print one line for each row of pictures that the run's evaluation kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run of recipes/hanzi_ocr.yaml")
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    arguments = parser.parse_args()
    characters = sorted({str(prompt.concept) for prompt in read_prompts(PROMPTS)})
    recogniser = rewards.build(Reward(name="ocr"), "cpu")
    assert isinstance(recogniser, Ocr)
    for row in sorted(path.parent for path in arguments.run.glob("*-evaluate/samples/*/00000.png")):
        files = sorted(row.glob("*.png"))
        prompts = read_prompts(arguments.prompts)[: len(files)]
        images = torch.stack([square(read_picture(file, str(file)), 64) for file in files]) / 255
        found = right(read(recogniser, images, characters), prompts, characters).float()
        error = found.std() / len(found) ** 0.5
        chance = 1 / len(characters)
        print(f"{row.name}: {found.mean():.2f} +- {error:.2f} of {len(found)} read right (chance {chance:.2f})")


if __name__ == "__main__":
    main()
