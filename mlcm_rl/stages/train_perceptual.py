"""Stage `train_perceptual`: LPIPS on latents, from distortions of known strength (arXiv 1801.03924, section 3)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.distortions import Pairs, draw_pairs
from ..data.prompts import CaptionedImages
from ..data.trajectory_store import store_of
from ..equations.consistency import squared_l2
from ..equations.perceptual import ranking_inputs, two_alternative_loss, two_alternative_score
from ..equations.statistics import mean_and_error
from ..models import lpips, teachers
from ..models.base import Base
from ..recipe import Recipe, TrainPerceptual
from ..recipe.lpips_layout import FILE, new_layout
from ..storage import files
from ..training.loop import Runtime, adamw, rate_factor, set_rate
from ..training.seeding import epoch_order, generator

RANKING_WIDTH = 32
SLOPE = 0.2  # of leaky ReLUs
TITLES = {
    "seen_one": "one kind",
    "seen_two": "two kinds",
    "unseen_one": "one unseen kind",
    "unseen_two": "an unseen kind and another",
}


def run(stage: TrainPerceptual, recipe: Recipe, parents: dict[str, Path], folder: Path) -> None:
    """Train a latent LPIPS into `folder/lpips.safetensors`, with `measured.json` and `card.md` beside it.

    Interrupted at any step and run again, it ends with the same bits. Raise ValueError for a crop that does not fit.
    """
    rt = Runtime(recipe, stage, folder)
    base = teachers.load(recipe.teacher, rt.device)
    base.forget_denoiser()
    trained_on, measured_on = split(pictures_of(stage, recipe, base, parents), stage.held_out, recipe.seed)
    refuse_crop(stage, base)
    layout = new_layout(base.latent_shape[0], stage.widths, stage.depths)
    ranked = Ranked(lpips.new(layout, recipe.seed), recipe.seed).to(rt.device)
    held_out, apart = held_out_pairs(stage, base, measured_on, recipe.seed), neighbours_apart(stage, measured_on)
    optimizer = adamw(ranked.parameters(), stage)
    untrained = measured(ranked.lpips, held_out)

    first = rt.resume({"ranked": rt.prepare(ranked, optimizer, whole=True)})
    for step in rt.steps(first, stage.num_steps, "train_perceptual"):
        # one update, on pairs that are a function of (seed, step, row) alone
        rate = stage.learning_rate * rate_factor(step, stage.num_steps, stage.warmup_steps)
        set_rate(optimizer, rate)
        index = epoch_order(len(trained_on), stage.batch_size, step, recipe.seed, "train_perceptual")
        rt.samples = index.tolist()
        parts = (LatentPairs.drawn(stage, base, trained_on[index[p]], recipe.seed, step, p) for p in rt.micro_batches())
        losses = (ranked(pairs) for pairs in parts)
        with rt.autocast():
            record = rt.backward(losses)
        ranked.lpips.clamp_channels_()

        # held-out pairs, the log and checkpoints
        is_measured = rt.due(step, stage.held_out_every, stage.num_steps)
        if is_measured:
            shares = measured(ranked.lpips, held_out)
            record |= {f"held_out_accuracy/{name}": mean for name, (mean, _) in shares.items()}
        if is_measured or rt.is_logged(step):
            rt.log(step, learning_rate=rate, **record)
        if rt.stopping or rt.due(step, stage.save_every):
            rt.save(step + 1)
    rt.write(write, stage, held_out, apart, untrained, folder)


class Ranked(nn.Module):
    """LPIPS, and the network that guesses from two of its distances which picture is nearer; only LPIPS is kept."""

    def __init__(self, network: lpips.LatentLpips, seed: int):
        super().__init__()
        self.lpips = network
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            widths = [nn.Linear(5, RANKING_WIDTH), nn.Linear(RANKING_WIDTH, RANKING_WIDTH), nn.Linear(RANKING_WIDTH, 1)]
        first, second, last = widths
        self.ranking = nn.Sequential(first, nn.LeakyReLU(SLOPE), second, nn.LeakyReLU(SLOPE), last)

    def forward(self, pairs: "LatentPairs") -> Tensor:
        """Return the ranking loss (B,) float32."""
        of_original = self.lpips.features(pairs.original)
        distances = [self.lpips.distance(self.lpips.features(one), of_original) for one in (pairs.first, pairs.second)]
        return two_alternative_loss(self.ranking(ranking_inputs(*distances)).squeeze(1).float(), pairs.is_second)


@dataclass(frozen=True)
class LatentPairs:
    """Latents (B, C, H, W) of pictures and of two distortions of each; which is the weaker, and whether of one kind."""

    original: Tensor
    first: Tensor
    second: Tensor
    is_second: Tensor  # (B,) float32
    is_one_kind: Tensor  # (B,) bool

    @classmethod
    def encoded(cls, base: Base, pairs: Pairs) -> "LatentPairs":
        """Return the latents of `pairs`, on the device."""
        original, first, second = base.autoencoder.encode(pairs.pictures.to(base.device) / 255).chunk(3)
        return cls(original, first, second, pairs.is_second.to(base.device), pairs.is_one_kind.to(base.device))

    @classmethod
    def drawn(
        cls, stage: TrainPerceptual, base: Base, pictures: Tensor, seed: int, step: int, rows: slice
    ) -> "LatentPairs":
        """Return the pairs of `rows` of a step, made of `pictures` (b, 3, H, W)."""
        kinds, place = stage.distortions, (seed, "train_perceptual", step)
        return cls.encoded(base, draw_pairs(pictures, kinds, kinds, stage.crop, place, rows.start))

    @classmethod
    def joined(cls, parts: Sequence["LatentPairs"]) -> "LatentPairs":
        """Return the pairs of all `parts`."""
        return cls(**{one.name: torch.cat([getattr(part, one.name) for part in parts]) for one in fields(cls)})


def pictures_of(stage: TrainPerceptual, recipe: Recipe, base: Base, parents: dict[str, Path]) -> Tensor:
    """Return the pictures (N, 3, H, W) uint8: the stage's, or without them the samples of the trajectories."""
    if stage.images is not None:
        return torch.stack(list(CaptionedImages(stage.images, base.resolution).pictures()))
    store = store_of(parents["trajectories"], recipe.teacher, base)
    latents = store.x0(torch.arange(store.num_trajectories)).split(stage.micro_batch)
    with torch.no_grad():
        decoded = (base.autoencoder.decode(part.to(base.device)) for part in latents)
        return torch.cat([(255 * part).round().byte().cpu() for part in decoded])


def split(images: Tensor, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the pictures to learn from, and a share `held_out` that only measures.

    Raise ValueError for fewer than three: the unit is the distance of two different ones that are not learned from.
    """
    if len(images) < 3:
        raise ValueError(f"train_perceptual needs three different pictures or more, found {len(images)}")
    order = torch.randperm(len(images), generator=generator(seed, "train_perceptual", "held out"))
    count = min(max(2, round(held_out * len(images))), len(images) - 1)
    return images[order[count:]], images[order[:count]]


def refuse_crop(stage: TrainPerceptual, base: Base) -> None:
    """Raise ValueError for a crop that is no part of the pictures, or whose latents are not whole."""
    side, downscale = stage.crop or base.resolution, base.geometry.downscale
    if side > base.resolution or side % downscale or side < 2 * downscale:
        raise ValueError(
            f"crop: expected a multiple of {downscale} from {2 * downscale} to {base.resolution} pixels, as "
            f"{base.teacher.path} needs, found {side}"
        )


def held_out_pairs(stage: TrainPerceptual, base: Base, images: Tensor, seed: int) -> dict[str, LatentPairs]:
    """Return pairs of the pictures that are not learned from: of the kinds learned from, and of those held out."""
    rows = torch.arange(stage.num_held_out_pairs)
    pairs = {}
    for name, kinds in {"seen": stage.distortions, "unseen": stage.held_out_distortions}.items():
        if kinds:
            place = (seed, "train_perceptual", "held out", name)
            made = draw_pairs(images[rows % len(images)], kinds, stage.distortions, stage.crop, place)
            parts = [LatentPairs.encoded(base, made.rows(part)) for part in rows.split(stage.micro_batch)]
            pairs[name] = LatentPairs.joined(parts)
    return pairs


@torch.no_grad()
def scores(distance: Callable[[Tensor, Tensor], Tensor], pairs: LatentPairs) -> Tensor:
    """Return 1 for each of `pairs` (B,) of which `distance` finds the weaker distortion nearer, 0.5 for a tie."""
    first, second = (distance(one, pairs.original) for one in (pairs.first, pairs.second))
    return two_alternative_score(first, second, pairs.is_second)


def measured(distance: Callable[[Tensor, Tensor], Tensor], held_out: dict[str, LatentPairs]) -> dict[str, list[float]]:
    """Return the share of pairs decided rightly and its standard error, by measure, of one kind and of two."""
    shares = {}
    for name, pairs in held_out.items():
        right = scores(distance, pairs)
        for which, chosen in (("one", pairs.is_one_kind), ("two", ~pairs.is_one_kind)):
            if chosen.sum() > 1:  # none are of two kinds where there is one
                mean, error = mean_and_error(right[chosen].cpu())
                shares[f"{name}_{which}"] = [round(mean, 4), round(error, 4)]
    return shares


def neighbours_apart(stage: TrainPerceptual, images: Tensor) -> Tensor:
    """Return whether the picture of each held-out pair (M,) differs from that of the pair before, the last for pair 0.

    Raise ValueError where none does: the unit is the distance of two different pictures.
    """
    rows = torch.arange(stage.num_held_out_pairs) % len(images)
    apart = torch.tensor([not images[i].equal(images[j]) for i, j in zip(rows, rows.roll(1), strict=True)])
    if not apart.any():
        raise ValueError(
            f"train_perceptual needs three different pictures or more: the {len(images)} that only measure it are the "
            "same; add others, or raise held_out"
        )
    return apart


def write(
    ranked: Ranked,
    stage: TrainPerceptual,
    held_out: dict[str, LatentPairs],
    apart: Tensor,
    untrained: dict,
    folder: Path,
) -> None:
    """Write the network, its unit the mean distance of two different pictures, and what was measured of it.

    `apart` (M,) says which held-out pictures differ from the one before.
    """
    network = ranked.lpips
    originals = held_out["seen"].original
    with torch.no_grad():
        network.scale_(1 / network(originals, originals.roll(1, 0))[apart.to(originals.device)].mean())
    lpips.save(network, folder / FILE)
    rows = {"trained": measured(network, held_out), "untrained": untrained, "l2": measured(squared_l2, held_out)}
    files.write_json(folder / "measured.json", {"pairs": stage.num_held_out_pairs, "accuracy": rows})
    with files.replacing(folder / "card.md") as path:
        path.write_text(card(stage, network, rows), encoding="utf-8")


def card(stage: TrainPerceptual, network: lpips.LatentLpips, rows: dict[str, dict[str, list[float]]]) -> str:
    """Return what the network is, what it was trained on and how often it is right, as Markdown."""
    columns = list(rows["trained"])
    titles = [TITLES[name] for name in columns]
    shares = {name: [f"{mean:.3f} +- {error:.3f}" for mean, error in row.values()] for name, row in rows.items()}
    table = [["distance", *titles], ["---"] * (1 + len(titles)), *([name, *row] for name, row in shares.items())]
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join(
        [
            "# A perceptual distance of latents",
            "",
            f"LPIPS on latents of {network.layout.channels} channels: slices of {list(stage.widths)} channels and "
            f"{list(stage.depths)} convolutions, {sum(value.numel() for value in network.parameters()):,} weights. "
            f"Trained for {stage.num_steps:,} steps of {stage.batch_size} pairs on {', '.join(stage.distortions)}. "
            "Its unit is the mean distance of two different pictures.",
            "",
            f"Share of {stage.num_held_out_pairs} pairs of pictures that were not learned from in which it finds the "
            "weaker of two distortions nearer, +- one standard error; 0.5 is chance:",
            "",
            *lines,
            "",
            "The answers are those of the strengths that the distortions are made with, not of people. It is for "
            "latents of the same autoencoder alone.",
            "",
        ]
    )
