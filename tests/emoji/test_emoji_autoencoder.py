"""The autoencoder's training on tiny made-up pictures."""

import math

import pytest
import torch
from diffusers import AutoencoderKL

import train_autoencoder as program

TINY = program.AutoencoderSettings(widths=(8, 16), latent_channels=4, num_steps=40, batch_size=4, shift=1)


@pytest.fixture(scope="module")
def discs() -> torch.Tensor:
    """Twelve discs of random colours on white, uint8 (12, 16, 16, 3)."""
    generator = torch.Generator().manual_seed(0)
    across = torch.arange(16) - 7.5
    inside = (across[:, None] ** 2 + across**2 < 36)[None, ..., None]
    colours = torch.randint(0, 256, (12, 1, 1, 3), generator=generator)
    return torch.where(inside, colours, 255).byte()


def test_a_few_steps_change_every_weight_and_lower_the_loss(discs):
    model, losses = program.build_autoencoder(TINY), []
    before = {name: value.clone() for name, value in model.named_parameters()}
    program.train(model, discs, TINY, lambda step, loss, averaged: losses.append(loss))
    assert all(not torch.equal(before[name], value) for name, value in model.named_parameters())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_the_same_seed_trains_to_the_same_bits(discs):
    settings = program.AutoencoderSettings(widths=(8, 16), latent_channels=4, num_steps=3, batch_size=4)
    first, second = (program.train(program.build_autoencoder(settings), discs, settings) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_augmentation_without_shift_gives_the_picture_or_its_mirror_image(discs):
    images = program.as_images(discs)
    images[:, :, :, :4] = -1.0  # so that left and right differ
    found = program.augment(images, 0, torch.Generator().manual_seed(1))
    same = [torch.equal(a, b) for a, b in zip(found, images, strict=True)]
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(found, images, strict=True)]
    assert [a != b for a, b in zip(same, mirrored, strict=True)] == [True] * len(images)
    assert any(same)
    assert any(mirrored)


def test_a_crop_is_a_square_of_the_picture(discs):
    images = torch.arange(64.0).reshape(1, 1, 8, 8).expand(5, 3, 8, 8)
    found = program.augment(images, 0, torch.Generator().manual_seed(1), crop=3)
    assert found.shape == (5, 3, 3, 3)
    corners = [min(row[0, 0, 0].item(), row[0, 0, -1].item()) for row in found]  # mirrored or not
    for row, corner in zip(found, corners, strict=True):
        wanted = corner + torch.arange(3.0) + 8 * torch.arange(3.0)[:, None]
        assert torch.equal(row[0], wanted) or torch.equal(row[0], wanted.flip(-1))
    assert len(set(corners)) > 1


def test_the_reconstruction_loss_agrees_with_hand_arithmetic():
    wanted, found = torch.zeros(1, 1, 2, 2), torch.tensor([[[[0.0, 1.0], [0.0, 3.0]]]])
    values = (0 + 1 + 0 + 3) / 4
    across, down = (1 + 3) / 2, (0 + 2) / 2
    assert program.reconstruction_loss(found, wanted).item() == pytest.approx(values + across / 2 + down / 2)


def test_psnr_of_a_constant_error_is_its_closed_form(discs, monkeypatch):
    monkeypatch.setattr(program, "encode", lambda model, pixels: program.as_images(pixels))
    monkeypatch.setattr(program, "decode", lambda model, latents: latents / 2 + 0.5 + 0.1)
    assert program.measure_psnr(None, discs) == pytest.approx(-20 * math.log10(0.1), abs=1e-4)


def test_the_running_average_of_a_constant_weight_is_geometric():
    model, averaged = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    with torch.no_grad():
        for parameter in averaged.parameters():
            parameter.zero_()
        for parameter in model.parameters():
            parameter.fill_(1.0)
    for _ in range(3):
        program.update_average(averaged, model, 0.9)
    assert averaged.weight.item() == pytest.approx(1 - 0.9**3)


def test_saved_latents_have_unit_variance_after_scaling(discs, tmp_path):
    model = program.build_autoencoder(TINY)
    program.save(model, discs, tmp_path / "vae")
    loaded = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert (program.encode(loaded, discs) * loaded.config.scaling_factor).std().item() == pytest.approx(1, abs=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["vae"], "no half-written folder is left"


def test_each_level_but_the_last_halves_the_sides(discs):
    settings = program.AutoencoderSettings(widths=(8, 8, 8, 8), latent_channels=8)
    with torch.no_grad():
        latents = program.encode(program.build_autoencoder(settings), discs)
    assert latents.shape == (12, 8, 2, 2)
