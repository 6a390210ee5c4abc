"""SigLIP 2 against its two networks in plain torch, and transformers' own model, tokenizer and picture processor."""

import json

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import Siglip2Tokenizer, SiglipConfig, SiglipImageProcessorPil, SiglipModel

from mlcm_rl.rewards.check import check
from reward_models import siglip2
from rewards.published import (
    VISION,
    as_tensor,
    attention,
    linear,
    norm,
    pictures,
    random_tensors,
    replace_weights,
    shapes_of,
)

WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *"▁一只红狐在雪里redfoxai", "fo", "fox", "re", "red", "红狐"]
MERGES = [("f", "o"), ("fo", "x"), ("r", "e"), ("re", "d"), ("红", "狐")]
PROMPTS = ["A Red fox", "一只红狐在雪里", "红狐 red fox " * 40]
CONFIG = {
    "text_config": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "vocab_size": len(WORDS),
        "projection_size": 32,
    },
    "vision_config": VISION,
}


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    scalars = {"logit_scale": torch.tensor([1.5]).double(), "logit_bias": torch.tensor([-2.0]).double()}
    return random_tensors(shapes_of(SiglipModel(SiglipConfig(**CONFIG)))) | scalars


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.cat([as_tensor(picture) for picture in pictures((64, 48), (64, 48), (64, 48))])


def tiny_tokenizer() -> Siglip2Tokenizer:
    """Return transformers' own, with the end token of the published settings."""
    numbers = {word: index for index, word in enumerate(WORDS)}
    return Siglip2Tokenizer(numbers, MERGES, padding_side="right", add_eos_token=True, add_bos_token=False)


@pytest.fixture
def tokenizer() -> Siglip2Tokenizer:
    return tiny_tokenizer()


@pytest.fixture
def folder(tensors, tokenizer, tmp_path) -> str:
    tokenizer.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip", **CONFIG}))
    return str(tmp_path)


def plain_layer(tensors: dict[str, Tensor], name: str, x: Tensor, num_heads: int) -> Tensor:
    y = norm(tensors, f"{name}.layer_norm1", x, 1e-6)
    parts = (linear(tensors, f"{name}.self_attn.{part}_proj", y) for part in "qkv")
    x = x + linear(tensors, f"{name}.self_attn.out_proj", attention(*parts, num_heads))
    return x + plain_mlp(tensors, f"{name}.mlp", norm(tensors, f"{name}.layer_norm2", x, 1e-6))


def plain_mlp(tensors: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return linear(tensors, f"{name}.fc2", F.gelu(linear(tensors, f"{name}.fc1", x), approximate="tanh"))


def plain_text_features(tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    """A transformer without a mask; its last place, projected."""
    words, places = (tensors[f"text_model.embeddings.{kind}_embedding.weight"] for kind in ("token", "position"))
    x = words[ids] + places
    for layer in range(2):
        x = plain_layer(tensors, f"text_model.encoder.layers.{layer}", x, 3)
    return linear(tensors, "text_model.head", norm(tensors, "text_model.final_layer_norm", x, 1e-6)[:, -1])


def plain_image_features(tensors: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """A transformer over patches, gathered by the attention of one learned query."""
    patch = "vision_model.embeddings.patch_embedding"
    x = F.conv2d(pixels, tensors[f"{patch}.weight"], tensors[f"{patch}.bias"], stride=7).flatten(2).transpose(1, 2)
    x = x + tensors["vision_model.embeddings.position_embedding.weight"]
    for layer in range(2):
        x = plain_layer(tensors, f"vision_model.encoder.layers.{layer}", x, 4)
    x, head = norm(tensors, "vision_model.post_layernorm", x, 1e-6), "vision_model.head"
    weights, biases = (tensors[f"{head}.attention.in_proj_{kind}"].chunk(3) for kind in ("weight", "bias"))
    query = tensors[f"{head}.probe"].expand(len(x), 1, -1)
    parts = (y @ weight.T + bias for y, weight, bias in zip((query, x, x), weights, biases, strict=True))
    x = linear(tensors, f"{head}.attention.out_proj", attention(*parts, 4))
    return (x + plain_mlp(tensors, f"{head}.mlp", norm(tensors, f"{head}.layernorm", x, 1e-6)))[:, 0]


def expected_ids(tokenizer: Siglip2Tokenizer) -> Tensor:
    rows = [tokenizer(prompt, truncation=True, max_length=63, add_special_tokens=False).input_ids for prompt in PROMPTS]
    return torch.tensor([[*row, 1] + [0] * (63 - len(row)) for row in rows])


def test_prompts_are_cut_into_transformers_tokens_in_lower_case_with_an_end(folder, tokenizer):
    reward = siglip2.Siglip2("cpu", torch.float64, folder=folder)
    ids = reward.token_ids(PROMPTS)
    assert ids.tolist() == expected_ids(tokenizer).tolist()
    assert [WORDS[i] for i in ids[1, :8]] == ["一", "只", "红狐", "在", "雪", "里", "<eos>", "<pad>"]
    assert ids[2, 63] == siglip2.END  # too long: cut, the end kept


def test_settings_of_the_tokenizers_file_change_no_token(folder, tokenizer):
    tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=5)
    tokenizer.backend_tokenizer.save(f"{folder}/tokenizer.json")
    reward = siglip2.Siglip2("cpu", torch.float64, folder=folder)
    assert reward.token_ids(PROMPTS).tolist() == expected_ids(tokenizer).tolist()


def test_pictures_are_made_ready_as_by_transformers(folder, images):
    processor = SiglipImageProcessorPil(size={"height": 28, "width": 28}, resample=2)
    expected = torch.as_tensor(numpy.array(processor(pictures((64, 48), (64, 48), (64, 48)))["pixel_values"]))
    prepared = siglip2.Siglip2("cpu", torch.float64, folder=folder).pixels(images)
    assert (prepared - expected).abs().max() < 1.5 * 2 / 255  # PIL rounds to 8 bits twice


def test_the_score_is_the_plain_logit_and_transformers_own(folder, tensors, images):
    reward = siglip2.Siglip2("cpu", torch.float64, folder=folder)
    pixels, ids = reward.pixels(images), reward.token_ids(PROMPTS)
    cosine = F.cosine_similarity(plain_image_features(tensors, pixels), plain_text_features(tensors, ids))
    torch.testing.assert_close(reward(images, PROMPTS), (torch.e**1.5 * cosine - 2).float(), rtol=1e-5, atol=1e-5)
    stock = SiglipModel.from_pretrained(folder, dtype=torch.float64).eval()
    logits = stock(input_ids=ids, pixel_values=pixels).logits_per_image.diagonal()
    torch.testing.assert_close(reward(images, PROMPTS), logits.float(), rtol=1e-5, atol=1e-5)


def test_the_published_files_make_the_same_reward(folder, images, tmp_path, monkeypatch):
    monkeypatch.setattr(siglip2, "BASE_256", CONFIG)
    replace_weights(monkeypatch, siglip2, "SIGLIP2", tmp_path / "model.safetensors")
    replace_weights(monkeypatch, siglip2, "TOKENIZER", tmp_path / "tokenizer.json")
    published = siglip2.Siglip2("cpu", torch.float64)
    from_folder = siglip2.Siglip2("cpu", torch.float64, folder=folder)
    assert published(images, PROMPTS).tolist() == from_folder(images, PROMPTS).tolist()


def test_the_published_architecture_has_the_published_files_parameters():
    config = SiglipConfig(**siglip2.BASE_256)
    with torch.device("meta"):
        model = SiglipModel(config)
    assert sum(value.numel() for value in model.parameters()) == 375_234_050  # 1.5 GB in float32
    assert config.text_config.max_position_embeddings == siglip2.LENGTH
    assert (config.text_config.hidden_act, config.vision_config.hidden_act) == ("gelu_pytorch_tanh",) * 2


def test_a_network_of_free_resolution_is_refused(folder, tensors, tmp_path):
    name = "vision_model.embeddings.patch_embedding.weight"
    save_file(tensors | {name: tensors[name].flatten(1)}, tmp_path / "model.safetensors")  # linear, over patches
    with pytest.raises(ValueError, match=r"SiglipModel: mismatched keys .*patch_embedding.weight"):
        siglip2.Siglip2("cpu", torch.float32, folder=folder)


def test_it_passes_every_check_and_knows_whose_prompt_is_whose(folder, images):
    reward = siglip2.Siglip2("cpu", torch.float32, folder=folder)
    together = reward(images, PROMPTS)
    assert (reward(images, PROMPTS[::-1]) - together)[[0, 2]].abs().min() > 0.001
    assert (reward(images.flip(1), PROMPTS) - together).abs().min() > 0.001
    checks = check(reward, "tiny", images.float(), PROMPTS)
    assert all(one.passed for one in checks), [one for one in checks if not one.passed]
