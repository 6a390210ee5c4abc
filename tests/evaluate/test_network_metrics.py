"""FID, KID and CLIP score with random networks from local files, against closed forms and stock transformers."""

import hashlib
import json

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

import tiny
from mlcm_rl import metrics

MEAN, DEVIATION = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


class Statistics(torch.nn.Module):
    """Stands for Inception: the three channels' means, as TorchScript with NVIDIA's signature."""

    def forward(self, pictures, return_features: bool = False):
        features = pictures.float().mean((2, 3)) / 64.0
        return features if return_features else features.sum(1)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception.pt"
    torch.jit.script(Statistics()).save(str(path))
    made = metrics.Inception(path, "cpu")
    assert made.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert made.num_features == 3
    return made


def pictures(count, low, high, seed):
    """Flat pictures of random colours, in batches of 16."""
    colours = torch.rand(count, 3, 1, 1, generator=torch.Generator().manual_seed(seed)) * (high - low) + low
    return list(colours.expand(-1, -1, 4, 4).split(16))


def test_fid_is_the_closed_form_of_two_gaussians(inception):
    real, drawn = pictures(64, 0.0, 0.5, 0), pictures(64, 0.3, 1.0, 1)
    x, y = (inception((torch.cat(side) * 255).round().to(torch.uint8)).double() for side in (real, drawn))
    covariance = torch.cov(x.T) @ torch.cov(y.T)
    root = torch.linalg.eigvals(covariance).real.sqrt().sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + torch.cov(x.T).trace() + torch.cov(y.T).trace() - 2 * root
    found = metrics.inception_distances(inception, real, drawn, num_subsets=4)
    assert found["fid"] == pytest.approx(expected.item(), rel=1e-4)
    assert found["kid"] > 4 * found["kid_se"]


def test_fid_and_kid_of_one_distribution_are_about_zero(inception):
    same = pictures(400, 0, 1, 2)
    assert metrics.inception_distances(inception, same, same)["fid"] == pytest.approx(0.0, abs=1e-4)
    found = metrics.inception_distances(inception, same, pictures(400, 0, 1, 3))
    assert abs(found["kid"]) < 4 * found["kid_se"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    words = tiny.tokenizer()
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=len(words), max_position_embeddings=24, projection_dim=12, **sizes, **ends)
    vision = CLIPVisionConfig(image_size=20, patch_size=5, projection_dim=12, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": DEVIATION}))
    return metrics.ClipScore(folder, "cpu")


def test_clip_score_is_the_models_own_logit_over_its_temperature(clip):
    images = torch.rand(3, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    prompts = ["a", "苹果", "a longer prompt"]
    normalised = (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]
    tokens = clip.tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = clip.model(pixel_values=normalised, **tokens)
    expected = 100 * (output.logits_per_image.diag() / clip.model.logit_scale.exp()).clamp(min=0)
    torch.testing.assert_close(clip(images, prompts), expected, rtol=1e-4, atol=1e-4)
    assert clip(images, prompts).shape == (3,)


def test_clip_sees_the_middle_of_a_wide_picture_at_its_own_size(clip):
    wide = torch.zeros(1, 3, 40, 80)
    wide[..., 20:60] = 1.0  # the middle square is white, and it is all that is left
    white = clip._prepared(torch.ones(1, 3, 20, 20))
    found = clip._prepared(wide)
    assert found.shape == (1, 3, 20, 20)
    torch.testing.assert_close(found[..., 2:-2], white[..., 2:-2], atol=1e-3, rtol=0)
