"""Put the hanzi teacher together: the emoji teacher's autoencoder and text towers, and a denoiser of its own.

The denoiser alone is of this subject (`unet/`); the rest is copied from `recipes/emoji/teacher`.
"""

import mlcm_rl  # noqa: F401  (it quiets what the libraries below import)

# isort: split
import argparse
import shutil
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

SUBJECT = Path(__file__).parents[1]
EMOJI = SUBJECT.parent / "emoji" / "teacher"
KEPT = SUBJECT / "unet"


def new_denoiser(seed: int = 0) -> UNet2DConditionModel:
    """An untrained denoiser in the form of the emoji teacher's, 3.2 million parameters instead of 8.7 million."""
    torch.manual_seed(seed)
    shape = UNet2DConditionModel.load_config(EMOJI / "unet")
    return UNet2DConditionModel.from_config(shape, block_out_channels=(64, 96), attention_head_dim=(4, 4))


def assemble(folder: Path, denoiser: UNet2DConditionModel) -> None:
    """Write a complete pipeline in diffusers' format to `folder`, half precision; what was there is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(EMOJI, folder, ignore=shutil.ignore_patterns("unet", "*.png"))
    denoiser.half().save_pretrained(folder / "unet")


def keep(trained: Path) -> None:
    """Write the denoiser in `trained` to KEPT, half precision, without the folder names of the machine it is from."""
    denoiser = new_denoiser()
    denoiser.load_state_dict(UNet2DConditionModel.from_pretrained(trained).state_dict())
    denoiser.half().save_pretrained(KEPT)


def main() -> None:
    """Write the teacher's folder; with --from-run, keep that run's denoiser here first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=SUBJECT.parents[1] / "data" / "hanzi_teacher")
    origin = parser.add_mutually_exclusive_group()
    origin.add_argument("--from-run", type=Path, help="a finished run of recipes/hanzi_teacher.yaml: keep its denoiser")
    origin.add_argument("--fresh-denoiser", action="store_true", help="a random denoiser, to be trained")
    arguments = parser.parse_args()
    if arguments.from_run:
        keep(arguments.from_run / "00-train_teacher" / "teacher" / "unet")
    assemble(arguments.out, new_denoiser() if arguments.fresh_denoiser else UNet2DConditionModel.from_pretrained(KEPT))
    print(f"{arguments.out}: denoiser {'random' if arguments.fresh_denoiser else KEPT}")


if __name__ == "__main__":
    main()
