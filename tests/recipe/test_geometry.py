"""The geometry of latents, from configurations as they are published."""

import pytest

from mlcm_rl.recipe.families import FAMILIES, Geometry, Layout, geometry

UNET = {"in_channels": 4, "sample_size": 128, "block_out_channels": [320, 640, 1280]}
KL = {"block_out_channels": [128, 256, 512, 512]}
FLUX = {"in_channels": 64, "patch_size": 1}


def layout(**changes) -> Layout:
    return Layout("module:name", "Pipeline", "transformer", "Transformer", {}, **changes)


@pytest.mark.parametrize(
    ("denoiser", "vae", "changes", "expected"),
    [
        (UNET, KL, {}, Geometry(channels=4, side=128, multiple=4, downscale=8)),
        ({"in_channels": 16, "sample_size": 128, "patch_size": 2}, KL, {}, Geometry(16, 128, 2, 8)),
        (FLUX, KL, {"packs": 2, "side": 128}, Geometry(16, 128, 2, 8)),  # 2 x 2 of 16 channels are a token of 64
        ({"in_channels": 128, "patch_size": 1}, KL, {"patchifies": 2, "side": 64}, Geometry(128, 64, 1, 16)),
        ({"in_channels": 16, "all_patch_size": [2]}, KL, {"side": 128}, Geometry(16, 128, 2, 8)),
        (
            {"in_channels": 64, "patch_size": 2},
            {"dim_mult": [1, 2, 4, 4]},
            {"packs": 2, "side": 9},
            Geometry(16, 9, 2, 8),
        ),
        (
            {"in_channels": 32, "sample_size": 32, "patch_size": 1},
            {"encoder_block_out_channels": [1] * 6},
            {},
            Geometry(32, 32, 1, 32),
        ),
    ],
    ids=["SDXL", "SD3", "FLUX.1", "FLUX.2", "Z-Image", "Qwen-Image", "Sana"],
)
def test_latents_are_those_of_the_published_model(denoiser, vae, changes, expected):
    assert geometry(layout(**changes), denoiser, vae) == expected


def test_a_picture_is_a_multiple_of_a_patch_in_pixels():
    assert geometry(layout(packs=2, side=128), FLUX, KL).pixels == 16


@pytest.mark.parametrize(("denoiser", "vae"), [(UNET, {}), ({}, KL)])
def test_a_configuration_without_sizes_is_an_error_of_lookup(denoiser, vae):
    with pytest.raises(LookupError):
        geometry(FAMILIES["sdxl"], denoiser, vae)
