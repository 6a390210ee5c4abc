"""The shipped emoji rewards, on pictures that are in every checkout: the card's sheets of the teacher's folder."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mlcm_rl import rewards
from reward_models import _efficientnet_lite, emoji_alignment, emoji_style, emoji_style_judge
from reward_models._dual_encoder import NUM_ROWS, DualEncoder, pieces_of, rows_of

EMOJI = Path(__file__).parents[2] / "recipes" / "emoji"
NAMES = ("emoji_style", "emoji_style_judge", "emoji_alignment")
NOTO, TWEMOJI, FLUENT = range(3)


def cells(path: Path, gap: int) -> torch.Tensor:
    """The 64 x 64 pictures of a sheet, row by row (N, 3, 64, 64) in [0, 1]."""
    sheet = np.asarray(Image.open(path).convert("RGB"))
    step = 64 + gap
    rows = [
        sheet[y : y + 64, x : x + 64] for y in range(gap, len(sheet), step) for x in range(gap, sheet.shape[1], step)
    ]
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def held_out() -> dict[str, torch.Tensor]:
    """32 held-out concepts in three styles, drawn and reconstructed: (32, 3, 3, 64, 64) each."""
    sheet = cells(EMOJI / "teacher" / "reconstructions.png", gap=0).unflatten(0, (4, 2, 24))
    return {"drawings": sheet[:, 0].reshape(32, 3, 3, 64, 64), "reconstructions": sheet[:, 1].reshape(32, 3, 3, 64, 64)}


@pytest.fixture(scope="module")
def samples() -> tuple[torch.Tensor, list[str]]:
    """The 64 samples of the teacher's card and their prompts."""
    lines = (EMOJI / "samples.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split(". ", 1)[1] for line in lines if line[:1].isdigit()]
    return cells(EMOJI / "samples.png", gap=4), [prompt for line in rows for prompt in line.split(" · ")]


def built(name: str, dtype: torch.dtype = torch.float32) -> rewards.RewardModel:
    return rewards.find(name)("cpu", dtype)


def scores_of(name: str, images: torch.Tensor) -> torch.Tensor:
    """Scores (K, S) of pictures (K, S, 3, 64, 64) without prompts."""
    flat = images.flatten(0, 1)
    return rewards.score(built(name), name, flat, [""] * len(flat)).unflatten(0, images.shape[:2])


@pytest.mark.parametrize("view", ["drawings", "reconstructions"])
@pytest.mark.parametrize("name", ["emoji_style", "emoji_style_judge"])
def test_fluent_is_preferred_on_concepts_never_trained_on(held_out, name, view):
    scores = scores_of(name, held_out[view])
    assert (scores[:, FLUENT] > scores[:, NOTO]).float().mean() > 0.85
    assert (scores[:, FLUENT] > scores[:, TWEMOJI]).float().mean() > 0.85


@pytest.mark.parametrize("view", ["drawings", "reconstructions"])
def test_noto_is_preferred_to_twemoji(held_out, view):
    scores = scores_of("emoji_style", held_out[view])
    assert (scores[:, NOTO] > scores[:, TWEMOJI]).float().mean() > 0.7


def test_a_sample_fits_its_own_prompt_better_than_the_next_ones(samples):
    images, prompts = samples
    reward = built("emoji_alignment")
    own, others = (rewards.score(reward, "emoji_alignment", images, x) for x in (prompts, prompts[1:] + prompts[:1]))
    assert len(images) == len(prompts) == 64
    assert (own > others).float().mean() > 0.95


def test_english_and_chinese_names_of_a_concept_mean_the_same():
    encoder = built("emoji_alignment").encoder
    english = ("panda", "red apple", "rocket", "snowman", "guitar", "pizza", "elephant", "umbrella", "key", "octopus")
    chinese = ("熊猫", "红苹果", "火箭", "雪人", "吉他", "披萨", "大象", "雨伞", "钥匙", "章鱼")
    first, second = (encoder.text_vectors([rows_of(name) for name in names]) for names in (english, chinese))
    assert (first @ second.T).argmax(1).tolist() == list(range(len(english)))


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_the_score(name, samples):
    images, prompts = samples[0][:2].double(), samples[1][:2]
    reward = built(name, torch.float64)
    images.requires_grad_(True)
    (gradient,) = torch.autograd.grad(reward(images, prompts).sum(), images)
    direction = gradient.detach() / gradient.norm()
    step = 1e-4  # the score is bent: a picture is far from flat beyond this
    ahead, behind = (reward(images.detach() + sign * step * direction, prompts).double().sum() for sign in (1, -1))
    assert ((ahead - behind) / (2 * step)).item() == pytest.approx(gradient.norm().item(), rel=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_a_score_does_not_depend_on_its_batch_and_nothing_is_trainable(name, samples):
    images, prompts = samples[0][:5], samples[1][:5]
    reward = built(name)
    alone = torch.cat([reward(images[i : i + 1], prompts[i : i + 1]) for i in range(5)])
    together = reward(images, prompts)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert together.dtype == torch.float32
    assert not together.requires_grad


def test_half_precision_changes_scores_little(samples):
    images, prompts = samples
    expected, half = (built("emoji_style", dtype)(images, prompts) for dtype in (torch.float32, torch.bfloat16))
    assert half.dtype == torch.float32
    assert torch.corrcoef(torch.stack([expected, half]))[0, 1] > 0.99


def test_the_style_judge_gives_the_log_odds_of_its_classifier(samples):
    reward = built("emoji_style_judge")
    share = reward.classifier(samples[0]).softmax(-1)[:, emoji_style_judge.PREFERRED]
    torch.testing.assert_close(reward(*samples), share.logit(), rtol=1e-4, atol=1e-4)
    assert emoji_style_judge.STYLES[emoji_style_judge.PREFERRED] == "fluent"


def test_the_style_judge_shares_no_weights_with_what_it_checks():
    trained = {**load_file(_efficientnet_lite.SHIPPED), **load_file(emoji_style.SHIPPED)}
    held_out = load_file(emoji_style_judge.SHIPPED)
    for name, ours in trained.items():
        for other, theirs in held_out.items():
            assert ours.shape != theirs.shape or not torch.equal(ours.float(), theirs.float()), (name, other)


def test_the_shipped_files_are_as_small_as_promised():
    sizes = {module: module.SHIPPED.stat().st_size for module in (emoji_alignment, emoji_style, emoji_style_judge)}
    assert sizes[emoji_alignment] < 6_000_000
    assert sizes[emoji_style] < 1_000_000
    assert sizes[emoji_style_judge] + _efficientnet_lite.SHIPPED.stat().st_size < 4_000_000


def test_a_text_becomes_words_their_parts_characters_and_pairs():
    assert pieces_of("Cat 红苹果") == [
        "",
        "<cat>",
        "<ca",
        "cat",
        "at>",
        "<cat",
        "cat>",
        "红",
        "苹",
        "果",
        "红苹",
        "苹果",
    ]
    assert pieces_of("ＣＡＴ") == pieces_of("cat"), "full-width letters are letters"
    assert pieces_of("!?") == pieces_of("") == [""]
    assert rows_of("") == [0], "CRC-32 of nothing is 0"
    assert rows_of("熊") == [0, 0x33584AC4 % NUM_ROWS], "the same row on every machine"


def test_a_text_vector_does_not_depend_on_what_it_is_batched_with():
    torch.manual_seed(0)
    encoder = DualEncoder(picture_width=6, num_rows=64)
    texts = [[1, 2, 3], [4], [5, 5, 6, 7, 8]]
    together = encoder.text_vectors(texts)
    torch.testing.assert_close(together, torch.cat([encoder.text_vectors([text]) for text in texts]))
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(3))


def test_a_piece_weighs_what_it_has_learnt_to_weigh():
    torch.manual_seed(0)
    tower = DualEncoder(picture_width=6, num_rows=4).tower.requires_grad_(False)
    thrice = tower([[1, 3, 3, 3]])
    tower.weights.weight[3] = torch.tensor(3.0).log()
    torch.testing.assert_close(tower([[1, 3]]), thrice)
    tower.weights.weight[2] = -100.0  # says nothing
    torch.testing.assert_close(tower([[1, 2]]), tower([[1]]))
