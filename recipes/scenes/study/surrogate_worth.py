"""What a learned reward knows of `scene_count` online: heads on the student's features, convolutions on its latents.

    python recipes/scenes/study/surrogate_worth.py [--prompts 256] [KEY=VALUE ...]

The demo's distilled student draws eight samples of each prompt, which are scored once. Batches of 32 are then gone
through as a surrogate sees them: first the correlation of its predictions with scores that it has not learned from,
within prompts, then its updates. Printed is that correlation, by quarters of the batches; the student is not tuned.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console
from torch import Tensor, nn

from mlcm_rl import pipeline
from mlcm_rl.data.prompts import read_prompts
from mlcm_rl.equations import feedback
from mlcm_rl.equations.schedule import add_noise
from mlcm_rl.models import sampler, students, teachers
from mlcm_rl.models.features import features
from mlcm_rl.models.heads import Heads
from mlcm_rl.recipe.file import load
from mlcm_rl.rewards import combine
from mlcm_rl.training.progress import progress
from mlcm_rl.training.seeding import generator

sys.path.append(str(Path(__file__).parents[2] / "study"))  # what all studies share

from tuning import COUNTED, GAMMA, RECIPES, STEPS, stage_of, with_stages

GENERATIONS, BATCH, RATE, WIDTH = 8, 32, 1e-3, 64
TIMES, UPDATES = (50, 200), (4, 16)


class OnLatents(nn.Module):
    """What the heads are compared with: convolutions of latents, modulated by the prompt's summary."""

    def __init__(self, channels: int, prompt: int):
        super().__init__()
        self.inward, self.prompt = nn.Conv2d(channels, WIDTH, 3, padding=1), nn.Linear(prompt, 2 * WIDTH)
        self.block = nn.Sequential(
            nn.SiLU(), nn.Conv2d(WIDTH, WIDTH, 3, 2, 1), nn.SiLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.SiLU()
        )
        self.outward = nn.Conv2d(WIDTH, 1, 1)

    def forward(self, x0: Tensor, prompts: Tensor) -> Tensor:
        """Predict the rewards (B,) of latents (B, C, H, W) under the summaries (B, D) of their prompts."""
        scale, shift = self.prompt(prompts)[:, :, None, None].chunk(2, 1)
        return self.outward(self.block(self.inward(x0) * (1 + scale) + shift)).flatten(1).mean(1)


def worth(predict: Callable[[slice], Tensor], network: nn.Module, scores: Tensor, num_updates: int) -> str:
    """The correlation on batches of `scores` (N,) not learned from yet, by quarters; `predict` is of a batch's rows."""
    optimizer, found = torch.optim.AdamW(network.parameters(), RATE), []
    for first in range(0, len(scores), BATCH):
        rows = slice(first, first + BATCH)
        actual = scores[rows].unflatten(0, (-1, GENERATIONS))
        with torch.no_grad():
            found.append(feedback.correlation_within(predict(rows).unflatten(0, (-1, GENERATIONS)), actual))
        for _ in range(num_updates):
            optimizer.zero_grad()
            feedback.centred_error(predict(rows).unflatten(0, (-1, GENERATIONS)), actual).mean().backward()
            optimizer.step()
    size = max(1, len(found) // 4)
    return ", ".join(f"{fmean(found[i : i + size]):.2f}" for i in range(0, 4 * size, size) if found[i : i + size])


def joined(parts: Iterable[list[Tensor]]) -> list[Tensor]:
    """The tensors of all `parts`, each put together along its first dimension."""
    return [torch.cat(each) for each in zip(*parts, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="put over the recipe's settings")
    arguments = parser.parse_args()
    recipe = load(RECIPES / "scenes_demo.yaml", arguments.overrides)
    folder = pipeline.run(with_stages(recipe, "surrogate-student", []))[-1].folder / "student"
    base = teachers.load(recipe.teacher, "cpu")
    student = students.load_student(base, folder)
    reward = combine(stage_of(recipe, "scenes", COUNTED, "policy", 0).rewards, "cpu", normalise=False)
    prompts = read_prompts(str(RECIPES / "scenes" / "prompts" / "train.jsonl"))
    order = torch.randperm(len(prompts), generator=generator(0, "order"))[: arguments.prompts].tolist()
    parts, encoded = [], []
    with torch.no_grad(), progress(len(order), "samples") as bar:
        for first in range(0, len(order), GENERATIONS):
            texts = [prompts[i].prompt for i in order[first : first + GENERATIONS] for _ in range(GENERATIONS)]
            own, conditioning = [generator(0, first, i) for i in range(len(texts))], base.encode_prompts(texts)
            noise, times = base.noise(own, len(texts)), student.grid.times(STEPS)
            x0 = sampler.sample(base, student.denoiser, conditioning, noise, times, GAMMA, own, student.conditioned)
            (scores,) = reward.raw(base.autoencoder.decode(x0), texts).values()
            parts.append([x0, base.noise(own, len(texts)), scores])
            encoded.append(conditioning)
            bar.advance(len(texts) // GENERATIONS)
    x0, noise, scores = joined(parts)
    scores = scores / scores.std()
    summaries = torch.cat([next(one for one in each.values() if one.ndim == 2) for each in encoded])
    for num_updates in UPDATES:
        network = OnLatents(x0.shape[1], summaries.shape[1])

        def read(rows: slice, network: OnLatents = network) -> Tensor:
            return network(x0[rows], summaries[rows])

        found = worth(read, network, scores, num_updates)
        Console().print(f"on latents, {num_updates} updates a batch: {found}", soft_wrap=True)
    for time in TIMES:
        parts_read, first = [], 0
        for conditioning in encoded:
            rows = slice(first, first := first + len(next(iter(conditioning.values()))))
            t = torch.full((rows.stop - rows.start,), time)
            x_t = add_noise(x0[rows], noise[rows], t, base.schedule)
            with torch.no_grad():
                told = torch.zeros_like(t) if student.conditioned else None
                parts_read.append(features(base, x_t, t, conditioning, student.denoiser, told))
        whole = joined(parts_read)
        for num_updates in UPDATES:
            heads = Heads([one.shape[1:] for one in whole], WIDTH, seed=0)

            def predict(rows: slice, heads: Heads = heads, whole: list[Tensor] = whole) -> Tensor:
                return torch.stack([places.mean(1) for places in heads([one[rows] for one in whole])]).mean(0)

            found = worth(predict, heads, scores, num_updates)
            Console().print(f"heads on features at {time}, {num_updates} updates a batch: {found}", soft_wrap=True)


if __name__ == "__main__":
    main()
