"""How many of a run's pictures PP-OCRv4 takes for the character they were asked for, among the subject's sixteen."""

import argparse
from pathlib import Path

import torch

from draw import HANZI, HERE
from mlcm_rl import rewards
from mlcm_rl.data.picture_files import read_picture, square
from mlcm_rl.data.prompts import Prompt, read_prompts
from mlcm_rl.recipe import Reward
from reward_models.ocr import Ocr, ctc_log_prob


def read(recogniser: Ocr, images: torch.Tensor) -> torch.Tensor:
    """Log-probability (B, 16) of each of HANZI in each of `images` (B, 3, H, W) in [0, 1]."""
    frames = recogniser.read(images)
    return torch.stack([ctc_log_prob(frames, [[recogniser.label_of[hanzi]]] * len(images)) for hanzi in HANZI], 1)


def right(scores: torch.Tensor, prompts: list[Prompt]) -> torch.Tensor:
    """Whether the character asked for is the likeliest (B,), of `scores` (B, 16)."""
    return scores.argmax(1) == torch.tensor([HANZI.index(prompt.concept) for prompt in prompts])


def main() -> None:
    """One line for each row of pictures that the run's evaluation kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run of recipes/hanzi_ocr.yaml")
    parser.add_argument("--prompts", type=Path, default=HERE / "prompts" / "test.jsonl")
    arguments = parser.parse_args()
    recogniser = rewards.build(Reward(name="ocr"), "cpu")
    for row in sorted(path.parent for path in arguments.run.glob("*-evaluate/samples/*/00000.png")):
        files = sorted(row.glob("*.png"))
        prompts = read_prompts(arguments.prompts)[: len(files)]
        images = torch.stack([square(read_picture(file, str(file)), 64) for file in files]) / 255
        found = right(read(recogniser, images), prompts).float()
        error = found.std() / len(found) ** 0.5
        print(f"{row.name}: {found.mean():.2f} +- {error:.2f} of {len(found)} read right (chance {1 / len(HANZI):.2f})")


if __name__ == "__main__":
    main()
