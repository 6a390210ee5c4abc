"""MPS against its official arithmetic in plain torch, one picture at a time; and its pickled checkpoint."""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from mlcm_rl.rewards.check import check
from reward_models import _clip, mps
from reward_models._published import covered, normalised
from rewards.published import (
    as_tensor,
    clip_config,
    clip_folder,
    merges_file,
    pictures,
    random_tensors,
    replace_weights,
    shapes_of,
    text_features,
    text_tokens,
    token_ids,
    vision_tokens,
)

CONFIG = clip_config("gelu")
WIDTH, NUM_HEADS, HEAD, INNER = CONFIG["projection_dim"], 5, 6, 30
PROMPTS = ["a red fox", "fox fox", "red fox " * 40]
CONDITION = "red o x"


class Norm(nn.Module):
    """The official one: no trained bias, zeros in its place."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("bias", torch.zeros(WIDTH))


class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("inv_freq", 1 / 10000 ** (torch.arange(0, HEAD, 2) / HEAD))


class Residual(nn.Module):
    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn


class Gate(nn.Module):
    pass


class LookAtText(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = Norm()
        self.context_norm = nn.Identity()
        self.to_q = nn.Linear(WIDTH, NUM_HEADS * HEAD, bias=False)
        self.to_kv = nn.Linear(WIDTH, 2 * HEAD, bias=False)
        self.to_out = nn.Linear(NUM_HEADS * HEAD, WIDTH, bias=False)
        self.ff = nn.Sequential(nn.Linear(WIDTH, 2 * INNER, bias=False), Gate(), nn.Linear(INNER, WIDTH, bias=False))


class LookAround(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = Norm()
        self.rotary_emb = Rotary()
        self.fused_attn_ff_proj = nn.Linear(WIDTH, NUM_HEADS * HEAD + 2 * HEAD + 2 * INNER, bias=False)
        self.attn_out = nn.Linear(NUM_HEADS * HEAD, WIDTH, bias=False)
        self.ff_out = nn.Sequential(Gate(), nn.Linear(INNER, WIDTH, bias=False))
        self.register_buffer("pos_emb", torch.zeros(3), persistent=False)


class CrossModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([Residual(LookAtText()), Residual(LookAround())]) for _ in range(2))


class Official(nn.Module):
    """The checkpoint's tree of modules and names; `Score` below has its arithmetic."""

    def __init__(self):
        super().__init__()
        self.model = CLIPModel(CLIPConfig(**CONFIG))
        self.model.text_model.embeddings.register_buffer("position_ids", torch.arange(77)[None])
        self.cross_model = CrossModel()


class Score:
    """The official evaluation of one picture and one prompt, over the tensors of `Official`."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.clip = {name.removeprefix("model."): value for name, value in tensors.items()}
        self.head = {name.removeprefix("cross_model."): value for name, value in tensors.items()}

    def __call__(self, pixels: Tensor, prompt: str, condition: str, threshold: float) -> Tensor:
        ids = token_ids([prompt, condition])
        words, condition_words = text_tokens(self.clip, ids, 3, "gelu") @ self.clip["text_projection.weight"].T
        fit = torch.einsum("id,jd->ji", words, condition_words).amax(0)
        mask = torch.where(fit / fit.max() > threshold, 0.0, -torch.inf)
        x = (vision_tokens(self.clip, pixels, 4, "gelu") @ self.clip["visual_projection.weight"].T)[0]
        for layer in range(2):
            x = x + self.look_at_text(f"layers.{layer}.0.fn", x, words, mask)
            x = x + self.look_around(f"layers.{layer}.1.fn", x)
        text = text_features(self.clip, ids[:1], 3, "gelu")[0]
        return self.clip["logit_scale"].exp() * (x[0] @ text) / x[0].norm() / text.norm()

    def of(self, name: str, part: str) -> Tensor:
        return self.head[f"{name}.{part}.weight"]

    def normed(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (WIDTH,), self.of(name, "norm"))

    def look_at_text(self, name: str, x: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        x = self.normed(name, x)
        key, value = (words @ self.of(name, "to_kv").T).split(HEAD, 1)
        heads = []
        for query in (x @ self.of(name, "to_q").T).split(HEAD, 1):
            heads.append(((query * HEAD**-0.5) @ key.T + mask).softmax(1) @ value)
        value, gate = (x @ self.of(name, "ff.0").T).split(INNER, 1)
        hidden = (F.silu(gate) * value) @ self.of(name, "ff.2").T
        return torch.cat(heads, 1) @ self.of(name, "to_out").T + hidden

    def look_around(self, name: str, x: Tensor) -> Tensor:
        fused = self.normed(name, x) @ self.of(name, "fused_attn_ff_proj").T
        *queries, key, value, _ = fused.split([HEAD] * (NUM_HEADS + 2) + [2 * INNER], 1)
        hidden, gate = fused[:, -2 * INNER :].split(INNER, 1)
        heads = [
            ((self.rotate(name, query) * HEAD**-0.5) @ self.rotate(name, key).T).softmax(1) @ value for query in queries
        ]
        return torch.cat(heads, 1) @ self.of(name, "attn_out").T + (F.silu(gate) * hidden) @ self.of(name, "ff_out.1").T

    def rotate(self, name: str, x: Tensor) -> Tensor:
        """Rotary embedding by complex numbers: coordinate i and i + HEAD / 2 are one of them."""
        angles = torch.outer(torch.arange(len(x)).double(), self.head[f"{name}.rotary_emb.inv_freq"])
        pairs = torch.complex(*x.split(HEAD // 2, 1)) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag], 1)


def official_tensors() -> dict[str, Tensor]:
    tensors = random_tensors(shapes_of(Official()))
    for name in tensors:
        if name.endswith("fn.norm.bias"):
            tensors[name] = torch.zeros(WIDTH, dtype=torch.double)
        elif name.endswith("inv_freq"):
            tensors[name] = 1 / 10000 ** (torch.arange(0, HEAD, 2, dtype=torch.double) / HEAD)
        elif name.endswith("position_ids"):
            tensors[name] = torch.arange(77)[None]
    return tensors | {"model.logit_scale": torch.tensor(1.5, dtype=torch.double)}


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.cat([as_tensor(picture) for picture in pictures((64, 48), (64, 48), (64, 48))])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    weights = {name.removeprefix("model."): value for name, value in official_tensors().items()}
    return str(clip_folder(tmp_path_factory.mktemp("mps"), weights, CONFIG))


def official_scores(images: Tensor, prompts: list[str], condition: str, threshold: float) -> Tensor:
    score = Score(official_tensors())
    pixels = normalised(covered(images, 28))
    pairs = zip(pixels.split(1), prompts, strict=True)
    return torch.stack([score(one, prompt, condition, threshold) for one, prompt in pairs]).float()


@pytest.mark.parametrize("threshold", [0.3, 0.8, 0.01])
def test_the_score_is_the_official_arithmetics(folder, images, threshold):
    reward = mps.Mps("cpu", torch.float64, folder=folder, condition=CONDITION, threshold=threshold)
    expected = official_scores(images, PROMPTS, CONDITION, threshold)
    torch.testing.assert_close(reward(images, PROMPTS), expected, rtol=1e-5, atol=1e-6)


def test_the_condition_and_the_threshold_decide_which_words_are_seen(folder, images):
    words, _ = mps.Mps("cpu", torch.float64, folder=folder).text(PROMPTS)
    words_in_use = [
        mps.Mps("cpu", torch.float64, folder=folder, condition=CONDITION, threshold=threshold).seen(words)
        for threshold in (-100.0, 0.3, 0.8, 0.9999)
    ]
    assert words_in_use[0].all()
    assert [rows.sum(1).tolist() for rows in words_in_use[1:]] == sorted(
        [rows.sum(1).tolist() for rows in words_in_use[1:]], reverse=True
    )
    assert (words_in_use[2].sum(1) < 77).all()
    assert (words_in_use[3].sum(1) >= 1).all()  # the best word is always seen, so no row of the attention is empty
    default = mps.Mps("cpu", torch.float64, folder=folder)
    assert default.threshold == 0.3
    assert default.condition.tolist() == default.text([mps.OVERALL])[0][0].tolist()
    assert default.condition.tolist() != default.text([CONDITION])[0][0].tolist()


def test_no_score_depends_on_its_neighbours_and_red_comes_first(folder, images):
    reward = mps.Mps("cpu", torch.float64, folder=folder, condition=CONDITION)
    together = reward(images, PROMPTS)
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    assert (reward(images, PROMPTS[::-1]) - together)[[0, 2]].abs().min() > 1e-3
    assert (reward(images.flip(1), PROMPTS) - together).abs().min() > 1e-3


def test_it_passes_every_check(folder, images):
    reward = mps.Mps("cpu", torch.float32, folder=folder, condition=CONDITION)
    checks = check(reward, "tiny", images.float(), PROMPTS)
    assert all(one.passed for one in checks), [one for one in checks if not one.passed]


def test_a_head_of_another_form_is_refused():
    head = {name.removeprefix("cross_model."): x for name, x in official_tensors().items() if "cross_model" in name}
    head["layers.1.0.fn.to_q.bias"] = torch.zeros(NUM_HEADS * HEAD)
    del head["layers.1.1.fn.attn_out.weight"]
    with pytest.raises(ValueError, match=r"mps: the head's layers lack or .* attn_out.weight, to_q.bias"):
        mps._CrossModel(head, "cpu", torch.float32)


# ---- the checkpoint: a whole pickled module ----


OFFICIAL_MODULES = ("trainer", "trainer.models", "trainer.models.clip_model")


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """The official module, pickled under the official names, whose code is then gone."""
    model = Official().double()
    model.load_state_dict(official_tensors())
    trainer, models, vanished = map(ModuleType, OFFICIAL_MODULES)
    for module in (trainer, models, vanished):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    ours = (Official, CrossModel, Residual, LookAtText, LookAround, Norm, Rotary, Gate)
    for kind in ours:
        monkeypatch.setattr(kind, "__module__", vanished.__name__)
        setattr(vanished, kind.__name__, kind)
    torch.save(model, tmp_path / "MPS_overall_checkpoint.pth")
    for name in OFFICIAL_MODULES:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path / "MPS_overall_checkpoint.pth"


def test_the_pickled_module_is_read_without_its_code(checkpoint):
    weights = mps.convert(checkpoint)
    expected = {name.removeprefix("model."): value for name, value in official_tensors().items()}
    assert weights.keys() == expected.keys()  # the buffer that is not kept in state dicts is left out
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert not sys.modules.keys() & set(OFFICIAL_MODULES)


class Trap:
    """Would print when it is unpickled by pickle itself."""

    def __reduce__(self):
        return print, ("sprung",)


def test_nothing_that_a_checkpoint_names_is_run(tmp_path, capsys):
    model = nn.Linear(2, 3)
    model.trap = Trap()
    torch.save(model, tmp_path / "trapped.pth")
    assert mps.convert(tmp_path / "trapped.pth").keys() == {"weight", "bias"}
    assert "sprung" not in capsys.readouterr().out


def test_the_published_files_make_the_same_reward(checkpoint, folder, images, tmp_path, monkeypatch):
    monkeypatch.setattr(mps, "VIT_H_14", CONFIG)
    replace_weights(monkeypatch, mps, "MPS_OVERALL", checkpoint)
    replace_weights(monkeypatch, _clip, "CLIP_MERGES", merges_file(tmp_path))
    published = mps.Mps("cpu", torch.float64, condition=CONDITION)
    from_folder = mps.Mps("cpu", torch.float64, condition=CONDITION, folder=folder)
    assert published(images, PROMPTS).tolist() == from_folder(images, PROMPTS).tolist()
