"""Stage `train_reward`: train a reward model from a table of pairs, a head on frozen features, by Bradley-Terry."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.pairs import PairTable
from ..equations.preference import bradley_terry_loss
from ..recipe import Recipe, TrainReward
from ..rewards import card
from ..rewards.finding import shipped
from ..rewards.heads import CONTRARY, FeatureScale, dropout, held_out_pairs, is_correct
from ..storage import files, finite, tensors
from ..training.loop import Runtime, adamw, rate_factor, set_rate
from ..training.processes import on_rank_zero
from ..training.progress import progress
from ..training.seeding import epoch_order

trained = shipped("trained")  # the reward whose files are written here
WARMUP_STEPS = 20  # not a setting, nor is CONTRARY: docs/log.md has the runs with other values


def run(stage: TrainReward, recipe: Recipe, parents: dict[str, Path], folder: Path) -> None:
    """Train a head into `folder`: `reward.json` and `head.safetensors`, which are the reward `trained`; `log.jsonl`.

    Its measurements are in `card.md`, `measured.json` and `training.png`.

    Interrupted at any step and run again, it ends with the same bits. Raises ValueError for a table or a picture that
    cannot be read, and for pairs of one prompt only.
    """
    rt = Runtime(recipe, stage, folder)
    table = PairTable(stage.pairs)
    held_out = held_out_pairs(table.prompts, stage.held_out, recipe.seed)
    pairs = PairFeatures.read(stage, table, held_out, rt.device)
    head = new_head(pairs.training.shape[-1], recipe.seed).to(rt.device)
    optimizer = adamw(head.parameters(), stage)

    first = rt.resume({"head": rt.prepare(head, optimizer)})
    for step in rt.steps(first, stage.num_steps, "train_reward"):
        # one update
        rate = stage.learning_rate * rate_factor(step, stage.num_steps, WARMUP_STEPS)
        set_rate(optimizer, rate)
        index = epoch_order(len(pairs.training), stage.batch_size, step, recipe.seed, "train_reward")
        rt.samples = index.tolist()
        inputs = dropout(pairs.training[index], stage.dropout, rt.generator("dropout", step))
        losses = (loss(head, inputs[part]) for part in rt.micro_batches())
        with rt.autocast():
            logged = rt.backward(losses)

        # held-out pairs, the log and checkpoints
        is_measured = rt.due(step, stage.held_out_every, stage.num_steps)
        if is_measured:
            logged |= measure(head, pairs.held_out)
        if is_measured or rt.is_logged(step):
            rt.log(step, learning_rate=rate, **logged)
        if rt.stopping or rt.due(step, stage.save_every):
            rt.save(step + 1)
    rt.write(write_reward, stage, pairs.scale, folder)
    reward = trained.Trained(rt.device, torch.float32, str(folder))
    on_rank_zero(card.write, stage, recipe, table, held_out, reward, rt.device, folder)


def write_reward(head: nn.Sequential, stage: TrainReward, scale: FeatureScale, folder: Path) -> None:
    """Write the files of the reward `trained`, with `scale` folded into the head's first layer."""
    first = head[0]
    assert isinstance(first, nn.Linear)
    scale.fold_into(first)
    tensors.write_tensors(folder / trained.HEAD_FILE, head.state_dict())
    files.write_json(folder / trained.DESCRIPTION_FILE, trained.description(stage.backbone))


@dataclass(frozen=True)
class PairFeatures:
    """Scaled features of a table's pairs: index 0 is the chosen picture, 1 the rejected one."""

    training: Tensor  # (N, 2, D)
    held_out: Tensor  # (M, 2, D)
    scale: FeatureScale  # of the training pairs

    @classmethod
    def read(cls, stage: TrainReward, table: PairTable, held_out: Tensor, device: torch.device) -> "PairFeatures":
        """Return the features of `table`, with the M pairs that `held_out` (N + M,) bool marks apart."""
        features = torch.cat(list(_features(stage, table, device)))
        if (bad := finite.first_bad_row(features)) is not None:
            raise ValueError(f"{table.places[bad]}: what {stage.backbone} sees in its pictures is not finite")
        held_out = held_out.to(device)
        scale = FeatureScale.of(features[~held_out])
        return cls(scale(features[~held_out]), scale(features[held_out]), scale)


@torch.no_grad()
def _features(stage: TrainReward, table: PairTable, device: torch.device) -> Iterator[Tensor]:
    """Yield features (b, 2, D) of the table's pairs, in order."""
    body = trained.load_features(stage.backbone).to(device)
    with progress(len(table), "read pairs") as bar:
        for images in table.batches(stage.resolution):
            yield body(images.flatten(0, 1).to(device)).unflatten(0, (-1, 2))
            bar.advance(len(images))


def new_head(width: int, seed: int) -> nn.Sequential:
    """Return the head before training, (B, D = `width`) to (B, 1), drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return trained.untrained_head(width)


def loss(head: nn.Module, pairs: Tensor) -> Tensor:
    """Return the Bradley-Terry loss (B,) float32 of pairs (B, 2, D)."""
    chosen, rejected = head(pairs).float().squeeze(-1).unbind(1)
    return bradley_terry_loss(chosen, rejected, CONTRARY)


@torch.no_grad()
def measure(head: nn.Module, pairs: Tensor) -> dict[str, float]:
    """Return the loss on held-out pairs (M, 2, D), and the share of them decided right."""
    right = is_correct(head(pairs).squeeze(-1))
    return {"held_out_loss": loss(head, pairs).mean().item(), "held_out_accuracy": right.mean().item()}
