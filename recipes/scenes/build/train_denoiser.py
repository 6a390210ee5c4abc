"""Train the scenes' denoiser: rectified flow, logit-normal times, fresh wordings of every scene at every step.

It goes on from `scene_denoiser/` in the cache where that is, else from the shipped teacher with `--start teacher`, else
from random weights. Stop it at any time with SIGINT or SIGTERM; it saves every `--save-every` steps and then.
"""

import mlcm_rl  # noqa: F401  (it quiets what the libraries below import)

# isort: split
import argparse
import json
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from mlcm_rl.data.scenes import CANVAS, RELATIONS
from mlcm_rl.equations.averaging import ema_decay, ema_update_
from mlcm_rl.equations.schedule import flow_schedule, logit_normal_times
from mlcm_rl.models.families.sd3 import T5_TOKENS, merge_equal_tokens
from mlcm_rl.training.loop import cpu_has_bfloat16
from scene_latents import load_parts
from scenes import LANGUAGES, SUBJECT, Scene, read_concepts
from sources import cache_folder, whole_folder, write_text
from train_text_towers import tokenize
from wordings import Writer

LATENT = CANVAS // 8  # values a side
SHIFT = 2.0  # of the times towards noise, where it is decided what stands in which cell
STATED = 0.6  # share of prompts that state the style, and of those that state the background
DROPOUT = 0.1  # share of empty prompts, for classifier-free guidance
SHARES = {"first": (0.5, 0.5, 0.0, 0.0), "then": (0.12, 0.28, 0.3, 0.3)}  # of RELATIONS: a curriculum
MATRICES = ("attn", "ff")  # names of the parts whose matrices Muon trains; AdamW trains the rest


def build_denoiser(seed: int = 0) -> SD3Transformer2DModel:
    """Return an untrained denoiser of 16 x 16 latents in SD3's shape, 6.5 million parameters."""
    torch.manual_seed(seed)
    return SD3Transformer2DModel(
        sample_size=LATENT,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=5,
        attention_head_dim=48,
        num_attention_heads=4,
        joint_attention_dim=192,
        caption_projection_dim=192,
        pooled_projection_dim=192,
        pos_embed_max_size=LATENT // 2,
        qk_norm="rms_norm",
    )


class Encoder:
    """The two frozen towers as the pipeline reads them."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        names = ("text_encoder", "text_encoder_2")
        self.towers = [
            CLIPTextModelWithProjection.from_pretrained(folder / n, dtype=torch.float32).eval() for n in names
        ]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the context (B, L + T5_TOKENS, D) with zeros in T5's place, and pooled vectors (B, P)."""
        ids = tokenize(self.tokenizer, prompts)
        outputs = [tower(input_ids=ids, output_hidden_states=True) for tower in self.towers]
        context = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        return F.pad(context, (0, 0, 0, T5_TOKENS)), torch.cat([output.text_embeds for output in outputs], -1)


class Batches:
    """Draws scenes by relation, and a prompt of each."""

    def __init__(self, scenes: Sequence[Scene], latents: Tensor, writer: Writer) -> None:
        self.scenes, self.latents, self.writer = scenes, latents, writer
        self.rows = {r: [i for i, scene in enumerate(scenes) if scene.relation == r] for r in RELATIONS}

    def draw(self, count: int, shares: Sequence[float], draw: random.Random) -> tuple[Tensor, list[str]]:
        """Return scaled latents (B, C, H, W) and prompts; an empty prompt is a dropped one."""
        rows = [draw.choice(self.rows[relation]) for relation in draw.choices(RELATIONS, shares, k=count)]
        prompts = []
        for row in rows:
            request = self.scenes[row].request(draw.random() < STATED, draw.random() < STATED)
            prompt = self.writer.write(request, draw.choice(LANGUAGES), "trained", draw)
            prompts.append("" if draw.random() < DROPOUT else prompt)
        return self.latents[rows].float(), prompts


def build_optimizers(denoiser: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of attention and feed-forward layers, and AdamW for everything else."""
    named = [(name, p) for name, p in denoiser.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if p.ndim == 2 and any(part in name for part in MATRICES)]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]


class Checkpoint:
    """What a stopped training goes on from, in safetensors files: weights, their average, moments, the step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, denoiser: nn.Module, average: dict[str, Tensor], optimizers: Sequence, step: int) -> None:
        """Write the state so that the folder appears whole."""
        with whole_folder(self.folder) as partial:
            partial.mkdir(parents=True)
            save_file(
                {n: p.detach().contiguous() for n, p in denoiser.named_parameters()}, partial / "weights.safetensors"
            )
            save_file({n: p.contiguous() for n, p in average.items()}, partial / "average.safetensors")
            moments = {
                f"{i}.{j}.{name}": value.contiguous()
                for i, optimizer in enumerate(optimizers)
                for j, state in optimizer.state_dict()["state"].items()
                for name, value in state.items()
                if isinstance(value, Tensor)
            }
            save_file(moments, partial / "moments.safetensors")
            write_text(partial / "step.json", json.dumps({"step": step}) + "\n")

    def load(self, denoiser: nn.Module, average: dict[str, Tensor], optimizers: Sequence) -> int:
        """Fill everything from the folder; return the number of steps that were taken, 0 where there is no folder."""
        if not (self.folder / "step.json").exists():
            return 0
        with torch.no_grad():
            for name, value in load_file(self.folder / "weights.safetensors").items():
                denoiser.get_parameter(name).copy_(value)
            for name, value in load_file(self.folder / "average.safetensors").items():
                average[name].copy_(value)
        moments = load_file(self.folder / "moments.safetensors")
        for i, optimizer in enumerate(optimizers):
            state = optimizer.state_dict()
            for key, value in moments.items():
                number, j, name = key.split(".", 2)
                if int(number) == i:
                    state["state"].setdefault(int(j), {})[name] = value
            optimizer.load_state_dict(state)
        return json.loads((self.folder / "step.json").read_text(encoding="utf-8"))["step"]


def main() -> None:
    """Train until `--steps` or a signal; print losses by quarter of the noise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concepts", type=int, default=32, help="the first so many of concepts.json")
    parser.add_argument("--steps", type=int, default=20_000, help="the rate falls over the last --decay of these")
    parser.add_argument("--decay", type=int, default=1500)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--first", type=int, default=400, help="steps with the curriculum's first shares")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--ema-decay", type=float, default=0.998)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--start", choices=("random", "teacher"), default="random")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="scene_denoiser", help="folder in the cache")
    parser.add_argument("--towers", default="scene_towers", help="folder of the text towers in the cache")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    denoiser = build_denoiser()
    if arguments.start == "teacher":
        denoiser = SD3Transformer2DModel.from_pretrained(SUBJECT / "teacher" / "transformer", torch_dtype=torch.float32)
    denoiser = merge_equal_tokens(denoiser).train()
    average = {name: p.detach().clone() for name, p in denoiser.named_parameters()}
    optimizers = build_optimizers(denoiser, arguments.learning_rate)
    checkpoint = Checkpoint(cache_folder() / arguments.name)
    first = checkpoint.load(denoiser, average, optimizers)
    scenes, latents = load_parts(arguments.concepts)
    batches = Batches(scenes, latents, Writer(read_concepts()))
    encoder, schedule = Encoder(cache_folder() / arguments.towers), flow_schedule(SHIFT)
    stopping: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, frame: stopping.append(received))
    print(
        f"{len(scenes)} scenes, {sum(p.numel() for p in denoiser.parameters()) / 1e6:.2f} M, step {first}", flush=True
    )
    started, sums = time.time(), torch.zeros(2, 4)
    for step in range(first, arguments.steps):
        # scenes, prompts, times and noise of the step
        draw, generator = random.Random(f"denoiser {step}"), torch.Generator().manual_seed(step)
        x0, prompts = batches.draw(arguments.batch_size, SHARES["first" if step < arguments.first else "then"], draw)
        context, pooled = encoder.encode(prompts)
        t = logit_normal_times(torch.randn(len(x0), generator=generator), schedule.num_times)
        eps = torch.randn(x0.shape, generator=generator)
        alpha, sigma = schedule.at(t, x0)
        # one update
        factor = min(1.0, (step + 1) / arguments.warmup, max(0.02, (arguments.steps - step) / arguments.decay))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = arguments.learning_rate * factor
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bfloat16()):
            prediction = denoiser(
                hidden_states=alpha * x0 + sigma * eps,
                encoder_hidden_states=context,
                pooled_projections=pooled,
                timestep=schedule.network_time[t],
                return_dict=False,
            )[0]
        errors = (prediction.float() - (eps - x0)).square().mean((1, 2, 3))
        errors.mean().backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema_update_(average.values(), [p.detach() for p in denoiser.parameters()], ema_decay(step, arguments.ema_decay))
        # the log and the checkpoint
        quarter = (sigma.flatten() * 4).long().clamp(max=3)
        sums += torch.stack([torch.bincount(quarter, errors.detach(), 4), torch.bincount(quarter, minlength=4)])
        if (step + 1) % 50 == 0:
            losses = [round(value, 3) for value in (sums[0] / sums[1]).tolist()]
            pace = (time.time() - started) / (step + 1 - first)
            print(
                f"step {step + 1} loss {(sums[0].sum() / sums[1].sum()):.4f} {losses} {pace:.2f} s a step", flush=True
            )
            sums.zero_()
        if stopping or (step + 1) % arguments.save_every == 0 or step + 1 == arguments.steps:
            checkpoint.save(denoiser, average, optimizers, step + 1)
        if stopping:
            break


if __name__ == "__main__":
    main()
