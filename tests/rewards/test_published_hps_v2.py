"""HPS v2 against OpenCLIP's network, written once more over torch's own attention with OpenCLIP's names."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from mlcm_rl.rewards.check import check
from reward_models import _clip, hps_v2
from reward_models._published import network, normalised
from rewards.published import (
    as_tensor,
    cached,
    clip_config,
    clip_folder,
    merges_file,
    pictures,
    random_tensors,
    replace_weights,
    shapes_of,
    token_ids,
)

PROMPTS = ["a red fox", "fox fox", "red fox " * 40]
CONFIG = clip_config("gelu")
TEXT, VISION, JOINT = CONFIG["text_config"], CONFIG["vision_config"], CONFIG["projection_dim"]


class Layer(nn.Module):
    def __init__(self, width: int, inner: int, num_heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, num_heads)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, inner))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(inner, width))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Layers(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        sizes = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
        self.resblocks = nn.ModuleList(Layer(*sizes) for _ in range(config["num_hidden_layers"]))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x.transpose(0, 1)  # sequence first
        for layer in self.resblocks:
            x = layer(x, mask)
        return x.transpose(0, 1)


class Visual(nn.Module):
    def __init__(self):
        super().__init__()
        width, patch = VISION["hidden_size"], VISION["patch_size"]
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((VISION["image_size"] // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Layers(VISION)
        self.proj = nn.Parameter(torch.zeros(width, JOINT))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    def __init__(self):
        super().__init__()
        width = TEXT["hidden_size"]
        self.visual = Visual()
        self.transformer = Layers(TEXT)
        self.token_embedding = nn.Embedding(TEXT["vocab_size"], width)
        self.positional_embedding = nn.Parameter(torch.zeros(77, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, JOINT))
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def read(self, ids: Tensor) -> Tensor:
        later = torch.full((77, 77), -torch.inf, dtype=torch.double).triu(1)
        x = self.transformer(self.token_embedding(ids) + self.positional_embedding, later)
        return self.ln_final(x)[torch.arange(len(ids)), ids.argmax(1)] @ self.text_projection


@pytest.fixture(scope="module")
def original() -> OpenClip:
    model = OpenClip().double().eval()
    model.load_state_dict(random_tensors(shapes_of(model)))
    return model


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.cat([as_tensor(picture) for picture in pictures((64, 48), (64, 48), (64, 48))])


def official_score(original: OpenClip, images: Tensor, prompts: list[str]) -> Tensor:
    """As in the official code, whose tokenizer pads with 0 and not with the end token."""
    bars = F.interpolate(images, (21, 28), mode="bicubic", antialias=True)
    pixels = normalised(F.pad(bars, (0, 0, 3, 4)))
    features = F.normalize(original.visual(pixels)), F.normalize(original.read(token_ids(prompts, padding=0)))
    return 100 * (features[0] * features[1]).sum(1).float()


def test_every_tensor_of_open_clip_finds_its_place(original):
    weights = hps_v2.from_open_clip(original.state_dict())
    expected = shapes_of(CLIPModel(CLIPConfig(**CONFIG)))
    assert {name: tuple(value.shape) for name, value in weights.items()} == expected


def test_the_features_are_open_clips(original, images):
    model = network(CLIPModel, CLIPConfig(**CONFIG), hps_v2.from_open_clip(original.state_dict()), "cpu", torch.float64)
    pixels = normalised(images[..., :28, :28])
    torch.testing.assert_close(model.get_image_features(pixels).pooler_output, original.visual(pixels))
    for padding in (0, TEXT["eos_token_id"]):
        features = model.get_text_features(token_ids(PROMPTS, padding=padding)).pooler_output
        torch.testing.assert_close(features, original.read(token_ids(PROMPTS, padding=0)))


@pytest.mark.parametrize(("version", "half"), [("v2.0", False), ("v2.1", True)])
def test_a_published_file_scores_as_the_official_code(original, images, tmp_path, monkeypatch, version, half):
    state = {name: value.half() if half else value for name, value in original.state_dict().items()}
    torch.save({"epoch": 1, "name": "hps", "state_dict": state}, tmp_path / "checkpoint.pt")
    tiny = cached(monkeypatch, hps_v2.VERSIONS[version], tmp_path / "checkpoint.pt")
    monkeypatch.setitem(hps_v2.VERSIONS, version, tiny)
    monkeypatch.setattr(hps_v2, "VIT_H_14", CONFIG)
    replace_weights(monkeypatch, _clip, "CLIP_MERGES", merges_file(tmp_path))
    scores = hps_v2.HpsV2("cpu", torch.float64, version=version)(images, PROMPTS)
    expected = official_score(original, images, PROMPTS)
    torch.testing.assert_close(scores, expected, rtol=0, atol=0.5 if half else 1e-4)


def test_the_version_is_chosen_and_an_unknown_one_refused():
    with pytest.raises(ValueError, match=r"hps_v2: version must be one of v2.0, v2.1, is 'v3'"):
        hps_v2.HpsV2("cpu", torch.float32, version="v3")
    files = {version: weights.source.file for version, weights in hps_v2.VERSIONS.items()}
    assert files == {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


def test_it_passes_every_check_and_knows_whose_prompt_is_whose(original, images, tmp_path):
    folder = clip_folder(tmp_path / "clip", hps_v2.from_open_clip(original.state_dict()), CONFIG)
    reward = hps_v2.HpsV2("cpu", torch.float64, folder=str(folder))
    together = reward(images, PROMPTS)
    torch.testing.assert_close(together, official_score(original, images, PROMPTS), rtol=0, atol=1e-4)
    assert (reward(images, PROMPTS[::-1]) - together)[[0, 2]].abs().min() > 0.01
    assert (reward(images.flip(1), PROMPTS) - together).abs().min() > 0.01
    single = hps_v2.HpsV2("cpu", torch.float32, folder=str(folder))
    checks = check(single, "tiny", images.float(), PROMPTS)
    assert all(one.passed for one in checks), [one for one in checks if not one.passed]
