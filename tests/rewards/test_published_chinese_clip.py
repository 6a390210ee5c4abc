"""Chinese-CLIP against its two networks in plain torch and its authors' way with pictures and prompts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import ChineseCLIPConfig, ChineseCLIPModel

from mlcm_rl.rewards.check import check
from reward_models import chinese_clip
from reward_models._published import normalised, resized, tokens
from rewards.published import (
    VISION,
    as_tensor,
    attention,
    image_features,
    linear,
    norm,
    pictures,
    random_tensors,
    replace_weights,
    shapes_of,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"一只红狐狸在雪地里", "fox", "##es", "\u2028", ",", "\uff0c"]
PROMPTS = ["一只红狐狸", "Foxes在雪里\uff0c", "红狐狸" * 40]
CONFIG = {
    "projection_dim": 20,
    "text_config": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "vocab_size": len(WORDS),
    },
    "vision_config": VISION,
}


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return random_tensors(shapes_of(ChineseCLIPModel(ChineseCLIPConfig(**CONFIG))))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.cat([as_tensor(picture) for picture in pictures((64, 48), (64, 48), (64, 48))])


@pytest.fixture
def folder(tensors, tmp_path) -> str:
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chinese_clip", **CONFIG}))
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return str(tmp_path)


def token_ids(prompts: list[str]) -> Tensor:
    """The authors' tokenizer for these words: 52 places, the first 50 tokens of a prompt, 0 behind them."""
    rows = []
    for prompt in prompts:
        pieces = prompt.lower().replace("foxes", "\x00\x01")  # one word in two pieces
        row = [WORDS.index({"\x00": "fox", "\x01": "##es"}.get(piece, piece)) for piece in pieces][:50]
        rows.append([2, *row, 3] + [0] * (50 - len(row)))
    return torch.tensor(rows)


def plain_text_features(tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    """BERT as published, its norms after each addition; the first token, projected."""
    name = "text_model.embeddings"
    words, positions, kinds = (
        tensors[f"{name}.{kind}_embeddings.weight"] for kind in ("word", "position", "token_type")
    )
    x = norm(tensors, f"{name}.LayerNorm", words[ids] + positions[: ids.shape[1]] + kinds[0], 1e-12)
    padding = (ids == 0)[:, None]
    for layer in range(2):
        name = f"text_model.encoder.layer.{layer}"
        parts = (linear(tensors, f"{name}.attention.self.{part}", x) for part in ("query", "key", "value"))
        y = linear(tensors, f"{name}.attention.output.dense", attention(*parts, 3, padding))
        x = norm(tensors, f"{name}.attention.output.LayerNorm", x + y, 1e-12)
        y = linear(tensors, f"{name}.output.dense", F.gelu(linear(tensors, f"{name}.intermediate.dense", x)))
        x = norm(tensors, f"{name}.output.LayerNorm", x + y, 1e-12)
    return linear(tensors, "text_projection", x[:, 0])


def plain_score(tensors: dict[str, Tensor], images: Tensor, prompts: list[str]) -> Tensor:
    pictures = image_features(tensors, normalised(resized(images, [28, 28])), 4, "quick_gelu")
    texts = plain_text_features(tensors, token_ids(prompts))
    return 100 * (F.normalize(pictures) * F.normalize(texts)).sum(1).float()


def test_prompts_are_cut_into_the_authors_tokens(folder):
    tokenizer = chinese_clip.bert_tokenizer(Path(folder) / "vocab.txt")
    encoded = tokens(tokenizer, PROMPTS, chinese_clip.LENGTH, "cpu")
    assert encoded.input_ids.tolist() == token_ids(PROMPTS).tolist()
    assert encoded.attention_mask.tolist() == (token_ids(PROMPTS) != 0).int().tolist()
    assert len(tokenizer) == len(WORDS)  # a token that is itself a line separator is one token


def test_the_score_is_100_times_the_plain_cosine(folder, tensors, images):
    reward = chinese_clip.ChineseClip("cpu", torch.float64, folder=folder)
    torch.testing.assert_close(reward(images, PROMPTS), plain_score(tensors, images, PROMPTS), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reward.text_features(PROMPTS), plain_text_features(tensors, token_ids(PROMPTS)))


def test_a_wide_picture_is_squeezed_not_cropped(folder, images):
    reward = chinese_clip.ChineseClip("cpu", torch.float64, folder=folder)
    changed = images.clone()
    changed[..., :8] = 0.5  # a margin that a centre crop would cut off
    assert (reward(changed, PROMPTS) - reward(images, PROMPTS)).abs().min() > 0.01


def test_the_published_files_make_the_same_reward(folder, tensors, images, tmp_path, monkeypatch):
    old = {"text_model.embeddings.position_ids": torch.arange(512)[None]}
    torch.save(tensors | old, tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(chinese_clip, "VIT_B_16", CONFIG)
    replace_weights(monkeypatch, chinese_clip, "CHINESE_CLIP", tmp_path / "pytorch_model.bin")
    replace_weights(monkeypatch, chinese_clip, "VOCABULARY", tmp_path / "vocab.txt")
    published = chinese_clip.ChineseClip("cpu", torch.float64)
    from_folder = chinese_clip.ChineseClip("cpu", torch.float64, folder=folder)
    assert published(images, PROMPTS).tolist() == from_folder(images, PROMPTS).tolist()


def test_the_published_architecture_is_that_of_the_authors_configuration():
    config = ChineseCLIPConfig(**chinese_clip.VIT_B_16)
    with torch.device("meta"):
        model = ChineseCLIPModel(config)
    assert sum(value.numel() for value in model.parameters()) / 1e6 == pytest.approx(188.3, abs=0.05)
    assert (config.text_config.hidden_act, config.vision_config.hidden_act) == ("gelu", "quick_gelu")
    assert (config.vision_config.image_size, config.text_config.num_attention_heads) == (224, 12)


def test_it_passes_every_check_and_knows_whose_prompt_is_whose(folder, images):
    reward = chinese_clip.ChineseClip("cpu", torch.float32, folder=folder)
    together = reward(images, PROMPTS)
    assert (reward(images, PROMPTS[::-1]) - together)[[0, 2]].abs().min() > 0.01
    assert (reward(images.flip(1), PROMPTS) - together).abs().min() > 0.01
    checks = check(reward, "tiny", images.float(), PROMPTS)
    assert all(one.passed for one in checks), [one for one in checks if not one.passed]
