"""What the emoji rewards say of the teacher's own samples, and what climbing their gradients does to the samples.

    mlcm run recipes/emoji_demo.yaml          # whose trajectories end in the samples
    python recipes/emoji/build/measure_rewards.py

`emoji_style` is climbed from samples whose prompt named another style, in the latents, through the teacher's decoder,
as tuning does, and in the pixels, where any network can be fooled; `emoji_alignment` in the latents, from each sample
towards another sample's prompt. What is not climbed judges: `emoji_style_judge`, and the judge's R@1.
"""

import mlcm_rl  # noqa: F401  (it quiets what the libraries below import)

# isort: split
import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from mlcm_rl import rewards
from mlcm_rl.data.prompts import Prompt, read_prompts
from mlcm_rl.data.trajectory_store import Store
from mlcm_rl.evaluation import judge, metrics
from mlcm_rl.recipe import Reward
from sources import EMOJI, MEASURED, STYLES, write_text
from train_rewards import PREFERENCE

Scorers = dict[str, rewards.RewardModel]
NUM_STEPS = 20  # of every climb


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Return pictures (N, 3, H, W) in [0, 1] of scaled latents (N, C, H / 8, W / 8), with gradient."""
    return (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


def win_rate(better: Tensor, worse: Tensor) -> float:
    """Return the share of all pairs in which a score of `better` (N,) is above one of `worse` (M,)."""
    return (better[:, None] > worse[None]).float().mean().item()


def per_style(scores: Tensor, styles: list[str | None]) -> dict[str, object]:
    """Return mean and deviation of the scores (N,) per style named, and the win rates over unpaired samples."""
    groups = {style: scores[[found == style for found in styles]] for style in STYLES}
    report: dict[str, object] = {style: spread(group) for style, group in groups.items()}
    for place, better in enumerate(PREFERENCE):
        for worse in PREFERENCE[place + 1 :]:
            report[f"{better} > {worse}"] = round(win_rate(groups[better], groups[worse]), 3)
    return report


def climb(
    start: Tensor, picture_of: Callable[[Tensor], Tensor], reward: rewards.RewardModel, prompts: list[str], rate: float
) -> Tensor:
    """Return what NUM_STEPS steps of Adam at `rate` make of `start`, up the reward of its pictures."""
    variable = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([variable], rate, maximize=True)
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        reward(picture_of(variable), prompts).sum().backward()
        optimizer.step()
    return variable.detach()


def recall(assessor: judge.Judge, images: Tensor, concepts: list[str]) -> float:
    """Return the judge's R@1 of images for the concepts (codepoints) that they should show."""
    places = torch.tensor([assessor.concepts.index(concept) for concept in concepts])
    return round(
        metrics.recall(metrics.ranks(assessor.features(images), assessor.prototypes, places), 1).mean().item(), 3
    )


def share(condition: Tensor) -> float:
    return round(condition.float().mean().item(), 3)


@torch.no_grad()
def gains(before: Tensor, after: Tensor, scorers: Scorers) -> dict[str, object]:
    """Return each reward's mean gain, the share of pictures that gain, and how much a pixel changed on average."""
    report: dict[str, object] = {"change of a pixel": round((after - before).abs().mean().item(), 3)}
    for name, scorer in scorers.items():
        old, new = (scorer(images, [""] * len(images)) for images in (before, after))
        report[name] = {"gain": round((new - old).mean().item(), 2), "wins": share(new > old)}
    return report


@torch.no_grad()
def score_all(reward: rewards.RewardModel, images: Tensor, prompts: list[str]) -> Tensor:
    return rewards.score_in_chunks(reward, "measured", images, prompts, 64)


def style_report(images: Tensor, latents: Tensor, prompts: list[Prompt], vae: AutoencoderKL, climbed: int) -> dict:
    """Return both style rewards on samples (N, 3, H, W), and climbs from the first `climbed` of a lesser style."""
    scorers: Scorers = {name: rewards.build(Reward(name=name), "cpu") for name in ("emoji_style", "emoji_style_judge")}
    styles, assessor = [prompt.style for prompt in prompts], judge.load(EMOJI / "judge")
    report: dict = {
        name: per_style(score_all(scorer, images, [""] * len(images)), styles) for name, scorer in scorers.items()
    }
    chosen = [i for i, style in enumerate(styles) if style not in (None, PREFERENCE[0])][:climbed]
    start, concepts, texts = images[chosen], [str(prompts[i].concept) for i in chosen], [""] * len(chosen)
    climbs = {
        "latents": (latents[chosen], lambda x: decode(vae, x), 0.05),
        "pixels": (start, lambda x: x.clamp(0, 1), 0.005),
    }
    for name, (variable, picture_of, rate) in climbs.items():
        found = picture_of(climb(variable, picture_of, scorers["emoji_style"], texts, rate))
        recalls = {"R@1 before": recall(assessor, start, concepts), "R@1 after": recall(assessor, found, concepts)}
        report[f"climbed in {name}"] = gains(start, found, scorers) | recalls
    return report


def alignment_report(images: Tensor, latents: Tensor, prompts: list[Prompt], vae: AutoencoderKL, climbed: int) -> dict:
    """Return `emoji_alignment` on samples with their own prompts and the next sample's, and a climb to the latter."""
    reward, assessor = rewards.build(Reward(name="emoji_alignment"), "cpu"), judge.load(EMOJI / "judge")
    texts = [prompt.prompt for prompt in prompts]
    others, other_concepts = (x[1:] + x[:1] for x in (texts, [str(prompt.concept) for prompt in prompts]))
    own, wrong = (score_all(reward, images, asked) for asked in (texts, others))
    report: dict = {}
    for language in ("en", "zh"):
        mine = torch.tensor([prompt.language == language for prompt in prompts])
        report[language] = {
            "own": spread(own[mine]),
            "another's": spread(wrong[mine]),
            "wins": share((own > wrong)[mine]),
        }
    found = decode(vae, climb(latents[:climbed], lambda x: decode(vae, x), reward, others[:climbed], 0.05))
    report["climbed in latents to another's prompt"] = {
        "believed": share(score_all(reward, found, others[:climbed]) > score_all(reward, found, texts[:climbed])),
        "judge's R@1 for it": recall(assessor, found, other_concepts[:climbed]),
        "judge's R@1 for its own": recall(assessor, found, [str(prompt.concept) for prompt in prompts[:climbed]]),
    }
    return report


def spread(scores: Tensor) -> list[float]:
    return [round(scores.mean().item(), 2), round(scores.std().item(), 2)]


def main() -> None:
    """Measure, print, and write `measured/rewards_on_samples.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--trajectories", type=Path, default=EMOJI.parents[1] / "runs" / "emoji_demo" / "00-trajectories"
    )
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--climbed", type=int, default=64)
    arguments = parser.parse_args()
    prompts = read_prompts(EMOJI / "prompts" / "train.jsonl")[: arguments.samples]
    vae = AutoencoderKL.from_pretrained(EMOJI / "teacher" / "vae").requires_grad_(False)
    latents = Store(arguments.trajectories).x0(torch.arange(len(prompts)))
    with torch.no_grad():
        images = torch.cat([decode(vae, part) for part in latents.split(64)])
    report = style_report(images, latents, prompts, vae, arguments.climbed)
    report["emoji_alignment"] = alignment_report(images, latents, prompts, vae, arguments.climbed)
    print(json.dumps(report, indent=1))
    write_text(MEASURED / "rewards_on_samples.json", json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
