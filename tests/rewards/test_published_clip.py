"""The rewards over CLIP in transformers' layout, CLIP score, PickScore and aesthetic, against CLIP in plain torch."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from mlcm_rl.rewards.check import check
from reward_models import _clip, aesthetic, clip_score, pick_score
from reward_models._published import covered, normalised
from rewards.published import (
    MERGES,
    NUM_TOKENS,
    as_tensor,
    clip_config,
    clip_folder,
    image_features,
    merges_file,
    pictures,
    random_tensors,
    replace_weights,
    shapes_of,
    text_features,
    token_ids,
)

PROMPTS = ["a red fox", "fox fox", "red fox " * 40]
HEAD = {  # by the names and in the order of the published file, at another width
    f"layers.{layer}.{part}": shape
    for layer, (rows, columns) in zip((0, 2, 4, 6, 7), ((9, 20), (8, 9), (7, 8), (6, 7), (1, 6)), strict=True)
    for part, shape in (("weight", (rows, columns)), ("bias", (rows,)))
}


def tensors(activation: str) -> dict[str, torch.Tensor]:
    tensors = random_tensors(shapes_of(CLIPModel(CLIPConfig(**clip_config(activation)))))
    return tensors | {"logit_scale": torch.tensor(1.5, dtype=torch.double)}


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    # At 35 x 28: an odd surplus, of which 3 columns or 4 are cut off first.
    return torch.cat([as_tensor(picture) for picture in pictures((60, 48), (60, 48), (60, 48))])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("clips")
    return {act: str(clip_folder(root / act, tensors(act), clip_config(act))) for act in ("gelu", "quick_gelu")}


def plain_cosine(images: torch.Tensor, prompts: list[str], activation: str) -> torch.Tensor:
    pixels = normalised(covered(images, 28))
    pictures = image_features(tensors(activation), pixels, 4, activation)
    texts = text_features(tensors(activation), token_ids(prompts), 3, activation)
    return (pictures * texts).sum(1) / pictures.norm(dim=1) / texts.norm(dim=1)


# ---- the tokenizer ----


def test_prompts_are_cut_into_openais_tokens(folders, tmp_path, monkeypatch):
    replace_weights(monkeypatch, _clip, "CLIP_MERGES", merges_file(tmp_path))
    prompts = [*PROMPTS, "caf\u00e9 \u72d0", ""]
    for tokenizer in (_clip.published_tokenizer(), _clip.CLIPTokenizer.from_pretrained(folders["gelu"])):
        ids = _clip.tokens(tokenizer, prompts, 77, "cpu").input_ids
        assert ids.tolist() == token_ids(prompts).tolist()
        assert ids[2, [0, 76]].tolist() == [NUM_TOKENS - 2, NUM_TOKENS - 1]  # too long: cut, the end kept
        assert ids[4].tolist() == [NUM_TOKENS - 2] + [NUM_TOKENS - 1] * 76  # padded by the end token
        assert tokenizer("A  Red\nFox ").input_ids == tokenizer("a red fox").input_ids


def test_of_the_published_list_only_the_first_merges_are_used(tmp_path):
    numbered = [f"left{index} right" for index in range(50_000)]
    path = tmp_path / "list.gz"
    path.write_bytes(_clip.gzip.compress("\n".join(["title", *numbered]).encode()))
    merges = bytes(_clip.merges_of(path)["merges"].tolist()).decode().split("\n")
    assert merges == numbered[: 49408 - 512 - 2]


def test_tokens_are_numbered_as_in_the_published_vocabulary():
    tokenizer = _clip.clip_tokenizer("\n".join(MERGES))
    # Of the published one: "!" is 0, "a" is 64, "a" at a word's end 320; merges from 512 on; the two marks last.
    for token, number in (("!", 0), ("a", 64), ("a</w>", 320), ("re", 512), ("<|endoftext|>", NUM_TOKENS - 1)):
        assert tokenizer.convert_tokens_to_ids(token) == number


# ---- the scores ----


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_clip_score_is_100_times_the_plain_cosine(folders, images, activation):
    reward = clip_score.ClipScore("cpu", torch.float64, folder=folders[activation])
    scores = reward(images, PROMPTS)
    torch.testing.assert_close(scores, 100 * plain_cosine(images, PROMPTS, activation).float(), rtol=1e-5, atol=1e-5)
    other = {"gelu": "quick_gelu", "quick_gelu": "gelu"}[activation]
    assert (scores - 100 * plain_cosine(images, PROMPTS, other).float()).abs().min() > 0.01


def test_pick_score_is_the_plain_cosine_on_the_trained_scale(folders, images):
    reward = pick_score.PickScore("cpu", torch.float64, folder=folders["gelu"])
    expected = torch.e**1.5 * plain_cosine(images, PROMPTS, "gelu")
    torch.testing.assert_close(reward(images, PROMPTS), expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("module", "constant", "architecture", "name"),
    [(clip_score, "CLIP_L_14", "VIT_L_14", "ClipScore"), (pick_score, "PICK_SCORE", "VIT_H_14", "PickScore")],
)
def test_the_published_files_make_the_same_reward(
    folders, images, tmp_path, monkeypatch, module, constant, architecture, name
):
    config = clip_config(getattr(module, architecture)["vision_config"]["hidden_act"])
    monkeypatch.setattr(module, architecture, config)
    # Checkpoints of that time also hold the numbers of the positions.
    old = {
        f"{tower}_model.embeddings.position_ids": torch.arange(n)[None] for tower, n in (("text", 77), ("vision", 17))
    }
    save_file(tensors("gelu") | old, tmp_path / "model.safetensors")
    replace_weights(monkeypatch, module, constant, tmp_path / "model.safetensors")
    replace_weights(monkeypatch, _clip, "CLIP_MERGES", merges_file(tmp_path))
    published = getattr(module, name)("cpu", torch.float64)
    from_folder = getattr(module, name)("cpu", torch.float64, folder=folders[config["text_config"]["hidden_act"]])
    assert published(images, PROMPTS).tolist() == from_folder(images, PROMPTS).tolist()


def test_the_published_architectures_are_those_of_their_papers():
    for architecture, millions, head_widths, activation in (
        (clip_score.VIT_L_14, 427.6, [64, 64], "quick_gelu"),
        (pick_score.VIT_H_14, 986.1, [80, 64], "gelu"),
    ):
        with torch.device("meta"):
            model = CLIPModel(CLIPConfig(**architecture))
        assert sum(value.numel() for value in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
        assert model.config.vision_config.image_size == 224
        assert model.config.text_config.max_position_embeddings == 77
        towers = (model.config.vision_config, model.config.text_config)
        assert [tower.hidden_size / tower.num_attention_heads for tower in towers] == head_widths
        assert [tower.hidden_act for tower in towers] == [activation] * 2
        assert model.config.text_config.eos_token_id == 49407


def test_aesthetic_is_the_plain_head_over_plain_features_of_unit_length(folders, images, tmp_path, monkeypatch):
    head = random_tensors(HEAD, seed=1)
    monkeypatch.setattr(aesthetic, "VIT_L_14", clip_config("quick_gelu"))
    save_file(tensors("quick_gelu"), tmp_path / "model.safetensors")
    torch.save(head, tmp_path / "head.pth")
    replace_weights(monkeypatch, aesthetic, "CLIP_L_14", tmp_path / "model.safetensors")
    replace_weights(monkeypatch, aesthetic, "HEAD", tmp_path / "head.pth")
    scores = aesthetic.Aesthetic("cpu", torch.float64)(images, PROMPTS)
    x = image_features(tensors("quick_gelu"), normalised(covered(images, 28, round)), 4, "quick_gelu")
    x = x / x.norm(dim=1, keepdim=True)
    for layer in (0, 2, 4, 6, 7):
        x = x @ head[f"layers.{layer}.weight"].T + head[f"layers.{layer}.bias"]
    torch.testing.assert_close(scores, x[:, 0].float(), rtol=1e-5, atol=1e-6)
    folder = clip_folder(tmp_path / "folder", tensors("quick_gelu") | head, clip_config("quick_gelu"))
    again = aesthetic.Aesthetic("cpu", torch.float64, folder=str(folder))(images, [""] * 3)
    assert again.tolist() == scores.tolist()


def rewards_of(folders: dict[str, str], dtype: torch.dtype) -> list:
    return [
        clip_score.ClipScore("cpu", dtype, folder=folders["quick_gelu"]),
        pick_score.PickScore("cpu", dtype, folder=folders["gelu"]),
    ]


def test_each_picture_goes_with_its_own_prompt_and_red_comes_first(folders, images):
    for reward in rewards_of(folders, torch.float64):
        together = reward(images, PROMPTS)
        alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
        assert (reward(images, PROMPTS[::-1]) - together)[[0, 2]].abs().min() > 0.01
        assert (reward(images.flip(1), PROMPTS) - together).abs().min() > 0.01


def test_they_pass_every_check(folders, images):
    for reward in rewards_of(folders, torch.float32):
        checks = check(reward, "tiny", images.float(), PROMPTS)
        assert all(one.passed for one in checks), [one for one in checks if not one.passed]


def test_half_precision_is_near(folders, images):
    for reward, half in zip(rewards_of(folders, torch.float64), rewards_of(folders, torch.bfloat16), strict=True):
        scores = half(images.float(), PROMPTS)
        assert scores.dtype == torch.float32
        assert F.cosine_similarity(scores, reward(images, PROMPTS), dim=0) > 0.99


def test_a_folder_that_lacks_a_tensor_is_refused(tmp_path):
    lacking = tensors("gelu")
    del lacking["vision_model.encoder.layers.1.mlp.fc1.bias"]
    folder = clip_folder(tmp_path / "clip", lacking | {"more": torch.zeros(1)}, clip_config("gelu"))
    with pytest.raises(ValueError, match=r"CLIPModel: missing keys vision_model.encoder.layers.1.mlp.fc1.bias"):
        clip_score.ClipScore("cpu", torch.float32, folder=str(folder))
    save_file(tensors("gelu") | {"more": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="CLIPModel: unexpected keys more"):
        pick_score.PickScore("cpu", torch.float32, folder=str(folder))
    assert json.loads((folder / "config.json").read_text())["model_type"] == "clip"
