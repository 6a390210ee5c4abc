"""The card of a trained reward: its accuracy on held-out pairs and its weaknesses, measured and written beside it.

Letters: N pairs; of each, picture 0 is the chosen one and picture 1 the rejected one.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.pairs import PairTable
from ..data.prompts import Prompt
from ..equations.statistics import mean_and_error
from ..recipe import Recipe, TrainReward
from ..report import plots
from ..report.figures import plus_minus, rounded
from ..storage.files import replacing, write_json
from ..storage.hashing import sha256
from .contract import RewardModel, score
from .finding import shipped
from .heads import CONTRARY, is_correct

trained = shipped("trained")
TEMPLATE = Path(__file__).with_suffix(".md")
NUM_CLIMBED, NUM_STEPS, STEP = 16, 10, 2 / 255  # of `climb`: pictures, gradient steps, and their size in [0, 1]


def write(
    stage: TrainReward,
    recipe: Recipe,
    table: PairTable,
    held_out: Tensor,
    reward: RewardModel,
    device: torch.device,
    folder: Path,
) -> None:
    """Write `card.md`, `measured.json` and `training.png` of `reward`, on `device`, into the `folder` of its `stage`.

    `held_out` (N,) bool marks the pairs of `table` that it was not trained on.
    """
    scores = torch.cat([_scores(reward, images.flatten(0, 1).to(device)) for images in table.batches(stage.resolution)])
    scores = scores.unflatten(0, (-1, 2))
    measured = {
        "pairs": len(table),
        "held_out_pairs": int(held_out.sum()),
        "training": accuracy(scores[~held_out], _texts_at(table.prompts, ~held_out)),
        "held_out": accuracy(scores[held_out], _texts_at(table.prompts, held_out)),
        "range": value_range(scores, held_out),
        "blanks": blanks(reward, stage.resolution, device),
        "climb": climb(stage, table, held_out, reward, device),
    }
    write_json(folder / "measured.json", measured)
    with replacing(folder / "card.md") as path:
        path.write_text(card(stage, recipe, table, measured), encoding="utf-8")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    with replacing(folder / "training.png") as path:
        plots.reward_training(log).savefig(path, format="png", dpi=160, facecolor="white")


# ---- measurements ----


def accuracy(scores: Tensor, prompts: list[str]) -> dict[str, Any]:
    """Return the share of pairs ranked correctly by `scores` (N, 2), averaged by prompt, with its standard error.

    Pairs of one prompt are not independent, so the error is over prompts. A tie counts half.
    """
    correct = is_correct(scores)
    by_prompt: dict[str, list[float]] = {}
    for prompt, value in zip(prompts, correct.tolist(), strict=True):
        by_prompt.setdefault(prompt, []).append(value)
    means = torch.tensor([sum(values) / len(values) for values in by_prompt.values()])
    mean, error = mean_and_error(means)
    return {"mean": rounded(mean), "se": rounded(error), "num_prompts": len(means)}


def value_range(scores: Tensor, held_out: Tensor) -> dict[str, float | None]:
    """Return mean, deviation, 5% and 95% quantile of `scores` (N, 2), and the means of held-out pairs by side."""
    low, high = scores.flatten().quantile(torch.tensor([0.05, 0.95])).tolist()
    chosen, rejected = scores[held_out].mean(0).tolist()
    spread = {"mean": scores.mean().item(), "deviation": scores.std().item(), "low": low, "high": high}
    return {name: rounded(value) for name, value in (spread | {"chosen": chosen, "rejected": rejected}).items()}


def blanks(reward: RewardModel, side: int, device: torch.device) -> dict[str, float | None]:
    """Return the scores of blank pictures: white, black, grey and noise."""
    greys = torch.tensor([1.0, 0.0, 0.5]).view(3, 1, 1, 1).expand(3, 3, side, side)
    noise = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    scores = _scores(reward, torch.cat([greys, noise]).to(device)).tolist()
    return {name: rounded(value) for name, value in zip(("white", "black", "grey", "noise"), scores, strict=True)}


def climb(
    stage: TrainReward, table: PairTable, held_out: Tensor, reward: RewardModel, device: torch.device
) -> dict[str, float | None]:
    """Measure how NUM_STEPS signed gradient steps of STEP in the pixels raise the scores of rejected held-out pictures.

    "rise" is the mean change; "overtaken" is the share of pictures that then score above the chosen one of their pair.
    """
    index = held_out.nonzero().flatten()[:NUM_CLIMBED].tolist()
    pairs = torch.stack([table.pictures(i, stage.resolution) for i in index]).to(device) / 255
    chosen, images = pairs.unbind(1)
    before = _scores(reward, images)
    for _ in range(NUM_STEPS):
        images = images.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(score(reward, "trained", images, [""] * len(images)).sum(), images)
        images = (images + STEP * gradient.sign()).clamp(0, 1)
    after = _scores(reward, images.detach())
    overtaken = (after > _scores(reward, chosen)).float().mean().item()
    return {"rise": rounded((after - before).mean().item()), "overtaken": rounded(overtaken)}


@torch.no_grad()
def _scores(reward: RewardModel, images: Tensor) -> Tensor:
    return score(reward, "trained", images, [""] * len(images)).cpu()


def _texts_at(prompts: list[Prompt], which: Tensor) -> list[str]:
    return [prompt.prompt for prompt, is_chosen in zip(prompts, which.tolist(), strict=True) if is_chosen]


# ---- text ----


def card(stage: TrainReward, recipe: Recipe, table: PairTable, measured: dict[str, Any]) -> str:
    """Return the card of the reward that `stage` trained on `table`, in Markdown."""
    held_out, training, climbed = (measured[name] for name in ("held_out", "training", "climb"))
    languages = [prompt.language for prompt in table.prompts]
    return TEMPLATE.read_text(encoding="utf-8").format(
        name=recipe.name,
        head=trained.HEAD_FILE,
        source=trained.BACKBONES[stage.backbone].source,
        num_trained=measured["pairs"] - measured["held_out_pairs"],
        num_trained_prompts=training["num_prompts"],
        num_held_out=measured["held_out_pairs"],
        num_held_out_prompts=held_out["num_prompts"],
        languages=", ".join(f"{languages.count(code)} pairs in {code}" for code in sorted(set(languages))),
        pairs=f"`{Path(stage.pairs).name}` (sha256 {_identity(stage.pairs)})",
        held_out=plus_minus(held_out["mean"], held_out["se"]),
        training=plus_minus(training["mean"], training["se"]),
        doubt=doubt(held_out),
        blanks=", ".join(f"{name} {value:.3g}" for name, value in measured["blanks"].items()),
        num_climb_steps=NUM_STEPS,
        rise=climbed["rise"],
        overtaken=climbed["overtaken"],
        deviations=climbed["rise"] / measured["range"]["deviation"],
        **measured["range"],
        **{name: getattr(stage, name) for name in ("num_steps", "dropout", "weight_decay", "resolution")},
        contrary=CONTRARY,
    )


def doubt(held_out: dict[str, Any]) -> str:
    """Return a warning about a held-out accuracy that proves little, or an empty string."""
    mean, error, count = held_out["mean"], held_out["se"], held_out["num_prompts"]
    if mean == 1.0:
        return f". None was wrong, which {count} prompts allow while up to {min(1.0, 3 / count):.0%} of all are"
    if error is None or mean - 2 * error < 0.5:
        return f". **Not told from a coin by {count} prompts: do not tune by it; label more pairs**"
    return ""


def _identity(pairs: str) -> str:
    """Return the first digits of the hash of a table's file, or of its folder's index."""
    path = Path(pairs)
    return sha256(path / "metadata.jsonl" if path.is_dir() else path)[:12]
