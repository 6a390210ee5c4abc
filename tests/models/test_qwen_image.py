"""Qwen-Image: its traps."""

import copy

import pytest
import torch

from mlcm_rl.equations.segments import sampling_times
from mlcm_rl.equations.solver import guided
from mlcm_rl.models import sampler, students, teachers
from mlcm_rl.models.base import Base
from mlcm_rl.models.export import export
from mlcm_rl.models.families.qwen_image import Times
from mlcm_rl.recipe import Full, Lora
from mlcm_rl.recipe.teacher_check import problems
from tiny_families.qwen_image import CASE, from_stock, qwen_image, to_stock


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return qwen_image(tmp_path_factory.mktemp("qwen_image") / "teacher")


@pytest.fixture(scope="module")
def base(folder) -> Base:
    return CASE.load(folder)


def test_guidance_keeps_the_norm_of_each_token(base):
    with_prompt, without = torch.randn(2, 2, *base.latent_shape, generator=torch.Generator().manual_seed(0))
    expected = to_stock(base, with_prompt).norm(dim=-1)
    actual = to_stock(base, base._guided(with_prompt, without, 4.0))
    torch.testing.assert_close(actual.norm(dim=-1), expected)
    plain = to_stock(base, guided(with_prompt, without, 4.0))
    torch.testing.assert_close(torch.cosine_similarity(actual, plain, dim=-1), torch.ones_like(expected))


def test_every_target_time_is_told_exactly_in_bfloat16(base):
    """The transformer rounds its times to the precision of its states, which has eight bits."""
    embedding = base.with_target_time(base.empty_denoiser(base.denoiser.config, condition=True)).time_text_embed
    assert isinstance(embedding, Times)
    s, told = torch.arange(1000), []
    embedding.timestep_embedder.forward = lambda sinusoids, target_time: told.append(target_time)
    parts = torch.stack([torch.zeros(1000), s // 32, s % 32], 1)
    for dtype in (torch.float32, torch.bfloat16):
        embedding(parts.to(dtype), torch.empty(0))
    assert torch.equal(*told)
    assert len(told[0].unique(dim=0)) == 1000


def test_a_renoising_student_is_the_stock_pipelines_whose_noise_is_of_tokens(base, tmp_path):
    description = {"num_segments": 1, "family": base.family, "prediction_type": base.prediction_type}
    students.save_student(students.student(base, Lora(rank=2, alpha=2.0), 0), tmp_path / "student", description)
    stock, times = CASE.stock(export(tmp_path / "student", base, tmp_path / "out")), sampling_times(3)
    noise = base.noise(torch.Generator().manual_seed(4), len(CASE.prompts))
    torch.manual_seed(7)
    expected = CASE.draw(base, stock, noise, base.stock_call(times) | base.stock_guidance)
    generator = torch.Generator().manual_seed(7)
    with pytest.MonkeyPatch.context() as patched:
        shape = to_stock(base, noise).shape
        patched.setattr(base, "noise", lambda _, count: from_stock(base, torch.randn(shape, generator=generator)))
        with torch.no_grad():
            inputs = (base, base.denoiser, base.encode_prompts(list(CASE.prompts)), noise, times)
            actual = sampler.sample(*inputs, 1.0, generator)
    torch.testing.assert_close(actual, expected, atol=5e-5, rtol=1e-5)


# ---- the autoencoder of videos ----


def gradient(base: Base, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pictures and the gradient of a sum of them."""
    latents = latents.detach().requires_grad_()
    pictures = base.autoencoder.decode(latents)
    (pictures * torch.linspace(0, 1, pictures.shape[-1])).sum().backward()
    return pictures.detach(), latents.grad


def test_blocks_and_tiles_that_are_computed_again_have_the_same_gradient(folder, base):
    """The cache that the decoder passes on holds the frame itself by then."""
    latents = base.noise(torch.Generator().manual_seed(4), 2)
    expected = gradient(base, latents)
    other = CASE.load(folder)
    other.autoencoder.checkpoint_blocks()
    assert all(torch.equal(one, two) for one, two in zip(gradient(other, latents), expected, strict=True))
    tiled = [CASE.load(folder) for _ in range(3)]
    tiled[0].autoencoder.vae.enable_tiling(8, 8, 6, 6)
    for one in tiled[1:]:
        one.autoencoder.use_tiles(8)
    tiled[2].autoencoder.checkpoint_blocks()
    first, *others = [gradient(one, latents) for one in tiled]
    assert not torch.equal(first[0], expected[0])
    for one in others:
        assert all(torch.equal(*pair) for pair in zip(one, first, strict=True))


def test_weights_of_five_dimensions_stay_where_channels_are_last(folder, base):
    other = teachers.load(CASE.teacher(folder).model_copy(update={"memory_format": "channels_last"}), "cpu")
    latents = base.noise(torch.Generator().manual_seed(4), 2)
    torch.testing.assert_close(other.autoencoder.decode(latents), base.autoencoder.decode(latents))


def test_a_posteriors_sample_is_a_function_of_the_generator(base):
    pictures = base.autoencoder.decode(base.noise(torch.Generator().manual_seed(4), 2)).detach()
    one, two = (base.autoencoder.encode(pictures, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, base.autoencoder.encode(pictures))


# ---- refused ----


def test_a_denoiser_whose_guidance_is_an_input_is_refused(tmp_path):
    folder = qwen_image(tmp_path / "teacher", guidance_embeds=True)
    (line,) = problems(folder, "qwen_image")
    assert line.startswith("transformer/config.json: guidance_embeds: true is of a model that is distilled")
    assert line.endswith("name the model that it was made from, Qwen-Image")


def test_a_copy_of_the_denoiser_has_its_positions(base):
    """They are tensors that no state dictionary has; built without data they would stay so."""
    denoiser = students.student(base, Full(), 0)
    for name in ("pos_freqs", "neg_freqs"):
        assert torch.equal(getattr(denoiser.pos_embed, name), getattr(base.denoiser.pos_embed, name))
    copy.deepcopy(denoiser)
