"""Train the scenes' `AutoencoderKL`: the emoji teacher's, which saw white pages only, goes on with coloured scenes."""

import mlcm_rl  # noqa: F401  (it quiets what the libraries below import)

# isort: split
import argparse
import json
import random
import time

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from drawings import Drawings, load_drawings
from mlcm_rl.data.scenes import RELATIONS
from mlcm_rl.training.loop import cpu_has_bfloat16
from scenes import draw_scene, read_concepts
from sources import EMOJI, cache_folder, write_text
from train_autoencoder import as_images, measure_psnr, reconstruction_loss, save, update_average
from updates import Updates, say_every

KL_WEIGHT = 2e-3  # of the mean KL per latent value, as the emoji autoencoder's
SHARES = (0.1, 0.5, 0.2, 0.2)  # of the relations in a batch; counts have the most objects


def paint_scenes(draw: random.Random, drawings: Drawings, concepts: list[str], count: int) -> Tensor:
    """Return pictures of random scenes, uint8 (count, 128, 128, 3)."""
    relations = draw.choices(RELATIONS, SHARES, k=count)
    return torch.stack([torch.from_numpy(drawings.paint(draw_scene(draw, concepts, r, False))) for r in relations])


def main() -> None:
    """Train with progress lines; the averaged weights go to `scene_autoencoder/` in the cache."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    drawings, concepts = load_drawings(), [concept.codepoint for concept in read_concepts()]
    draw, unseen = random.Random(0), paint_scenes(random.Random(1), drawings, concepts, 64)
    model = AutoencoderKL.from_pretrained(EMOJI / "teacher" / "vae").train()
    averaged = AutoencoderKL.from_config(model.config).requires_grad_(False)
    averaged.load_state_dict(model.state_dict())
    model.to(memory_format=torch.channels_last)
    updates = Updates(model.parameters(), arguments.learning_rate, arguments.steps, weight_decay=1e-4, max_norm=1.0)
    folder, started, history = cache_folder() / "scene_autoencoder", time.time(), []
    say = say_every(25, arguments.steps)
    for step in range(1, arguments.steps + 1):
        images = as_images(paint_scenes(draw, drawings, concepts, arguments.batch_size))
        images = images.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bfloat16()):
            posterior = model.encode(images).latent_dist
            decoded = model.decode(posterior.sample()).sample
        values = posterior.mean.numel() / len(images)
        loss = reconstruction_loss(decoded.float(), images) + KL_WEIGHT * posterior.kl().float().mean() / values
        updates.take(loss)
        update_average(averaged, model, min(0.995, step / (step + 10)))
        say(step, loss.item())
        if step % 200 == 0 or step == arguments.steps:
            history.append({"step": step, "psnr_db": round(measure_psnr(averaged, unseen), 2)})
            print(history[-1], flush=True)
            save(averaged, unseen, folder)
    report = {"minutes": round((time.time() - started) / 60, 1), "history": history}
    write_text(folder / "training.json", json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
