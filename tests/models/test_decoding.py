"""Decoding with less memory: in tiles, and by a small decoder. Both carry the gradient that a reward is tuned by."""

import pytest
import torch

import tiny
from mlcm_rl import recipe
from mlcm_rl.models import teachers as bases
from mlcm_rl.models.base import Base
from mlcm_rl.models.teachers import small_decoder

# Mean difference of a pixel where tiles are normalised each for itself and blended: 0.039 was measured, of pixels that
# deviate by 0.15. Random weights and tiles of 8 latents are the worst case; docs/log.md has the shipped base's.
SEAMS = 0.05


@pytest.fixture
def latents() -> torch.Tensor:
    """Clean latents of one picture of 32 pixels a side, on the scale of the denoiser."""
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def load(folder) -> Base:
    return bases.load(recipe.Teacher(path=str(folder), family="sdxl"), "cpu")


def tiled(folder, size) -> Base:
    base = load(folder)
    base.autoencoder.use_tiles(size)
    return base


def gradient_of(decode, latents, weights) -> torch.Tensor:
    """Of the weighted sum of decoded pixels, towards the latents."""
    latents = latents.clone().requires_grad_()
    (decode(latents) * weights).sum().backward()
    return latents.grad


def holds_in_a_direction(decode, latents) -> bool:
    """Whether the gradient is finite and not zero, and its slope is that of central differences.

    The direction is half the gradient's own, so that the slope does not vanish, and half random.
    """
    random = torch.Generator().manual_seed(1)
    weights = torch.rand(decode(latents).shape, generator=random)
    gradient = gradient_of(decode, latents, weights)
    assert gradient.isfinite().all()
    assert gradient.norm() > 0
    noise = torch.randn(latents.shape, generator=random)
    direction = gradient / gradient.norm() + noise / noise.norm()
    step = 1e-2
    with torch.no_grad():
        ends = [(decode(latents + sign * step * direction).double() * weights).sum() for sign in (1, -1)]
    slope = ((ends[0] - ends[1]) / (2 * step)).item()
    return (gradient * direction).sum().item() == pytest.approx(slope, rel=0.02)


def test_tiles_give_the_whole_picture_up_to_their_seams(teachers, latents):
    plain, in_tiles = load(teachers["sdxl"]), tiled(teachers["sdxl"], 16)
    plain, in_tiles = (base.autoencoder.decode(latents) for base in (plain, in_tiles))
    assert in_tiles.shape == plain.shape == (1, 3, 32, 32)
    assert 0 < (in_tiles - plain).abs().mean() < SEAMS


def test_where_one_tile_holds_the_picture_it_is_the_same_to_the_bit_gradient_too(teachers, latents):
    plain, in_tiles = load(teachers["sdxl"]), tiled(teachers["sdxl"], 32)
    assert torch.equal(plain.autoencoder.decode(latents), in_tiles.autoencoder.decode(latents))
    weights = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(*(gradient_of(base.autoencoder.decode, latents, weights) for base in (plain, in_tiles)))


def test_the_gradient_through_tiles_is_that_of_finite_differences(teachers, latents):
    assert holds_in_a_direction(tiled(teachers["sdxl"], 16).autoencoder.decode, latents)


def test_a_tile_is_computed_again_in_the_backward_pass(teachers, latents):
    base = load(teachers["sdxl"])
    inner, calls = base.autoencoder.vae.decoder.forward, []
    base.autoencoder.vae.decoder.forward = lambda *arguments: calls.append(1) or inner(*arguments)
    base.autoencoder.use_tiles(16)
    pictures = base.autoencoder.decode(latents.requires_grad_())
    forward = len(calls)
    pictures.sum().backward()
    assert forward == 9  # three starts a side: 0, 6 and 12 of 16 latents
    assert len(calls) == 2 * forward


def test_tiles_of_no_whole_quarters_are_refused(teachers):
    with pytest.raises(ValueError, match="autoencoder_tiles: 20 is not a multiple of 8"):
        tiled(teachers["sdxl"], 20)


def test_the_gradient_through_a_small_decoder_is_that_of_finite_differences(teachers, latents, tmp_path):
    base = load(teachers["sdxl"])
    small = small_decoder(tiny.small_decoder(tmp_path), base)
    assert small.decode(latents).sample.shape == (1, 3, 32, 32)
    assert not any(value.requires_grad for value in small.parameters())
    assert holds_in_a_direction(lambda x: base.autoencoder.decode(x, small), latents)
    assert torch.equal(base.autoencoder.decode(latents, small), (small.decode(latents).sample / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latent_channels": 5}, "latent channels 5, .* that need 4"),
        ({"scaling_factor": 0.5}, "scaling_factor 0.5, .* that need 1.0"),
        ({"shift_factor": 0.1}, "shift_factor 0.1, .* that need 0.0"),
        ({"stages": 3}, "pixels a latent 4, .* that need 2"),
    ],
)
def test_a_small_decoder_of_other_latents_is_refused(sdxl, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        small_decoder(tiny.small_decoder(tmp_path, **changes), sdxl)


def test_what_is_no_small_decoder_is_refused_by_its_file(sdxl, teachers, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"small_decoder: no .*config\.json"):
        small_decoder(str(tmp_path), sdxl)
    with pytest.raises(ValueError, match="is of a AutoencoderKL, and an AutoencoderTiny is needed"):
        small_decoder(str(teachers["sdxl"] / "vae"), sdxl)
    folder = tiny.small_decoder(tmp_path / "cut")
    weights = next((tmp_path / "cut").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(Exception, match=weights.name):
        small_decoder(folder, sdxl)
