"""`ocr`: the text a prompt asks for, CTC against all alignments counted out, the fetched recogniser on real text."""

import itertools
import re
import sys
from typing import ClassVar

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from mlcm_rl import rewards
from mlcm_rl.data.picture_files import square
from mlcm_rl.recipe import Reward
from mlcm_rl.rewards.weights import MissingWeights
from reward_models import _onnx, ocr

QUOTED = re.compile(ocr.QUOTED)
CHARACTERS = "ab山"  # labels 1, 2, 3; a space is 4


class StandIn:
    """A recogniser of four characters that sees the same five frames in every picture."""

    metadata: ClassVar = {"character": "\n".join(CHARACTERS)}
    frames = torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).softmax(-1)

    def __init__(self, weights):
        pass

    def __call__(self, pixels):
        return self.frames.repeat(len(pixels), 1, 1)


@pytest.fixture
def small(monkeypatch):
    """A function that builds the reward over the stand-in."""
    monkeypatch.setattr(ocr, "OnnxNetwork", StandIn)
    return lambda **settings: ocr.Ocr("cpu", torch.float32, **settings)


def log_of_sum(probabilities, label):
    """Log of the summed probability of every path (one label a frame) that collapses to `label`."""
    num_frames, num_labels = probabilities.shape
    total = 0.0
    for path in itertools.product(range(num_labels), repeat=num_frames):
        if [one for one, _ in itertools.groupby(path) if one] == label:
            total += torch.stack([probabilities[t, one] for t, one in enumerate(path)]).prod().item()
    return torch.tensor(total).log()


# ---- prompts that it cannot score ----


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ("山", "asks for no text"),
        ("「x」", "characters that PP-OCRv4 does not know: x"),
        (f"「{'ab' * 30}」", "too long"),
    ],
)
def test_a_prompt_that_no_square_picture_can_answer_is_refused_without_one(small, prompt, why):
    with pytest.raises(ValueError, match=why):
        small().refuse_prompt(prompt, 1.0)
    small().refuse_prompt("「ab 山」", 1.0)


def test_a_wider_picture_takes_a_longer_text(small):
    small().refuse_prompt(f"「{'ab' * 30}」", 10.0)


# ---- the text asked for ----


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a red "山"', "山"),
        ("红色的「山」", "山"),
        ("写着『山 水』的画", "山 水"),
        ("a sign that says “ OPEN ”", "OPEN"),
        ('it\'s "a", then "b"', "ab"),
        ("一个＂大＂字", "大"),
        ('「say "hi"」', 'say "hi"'),
    ],
)
def test_the_text_asked_for_stands_in_quotation_marks(prompt, text):
    assert ocr.asked_text(prompt, QUOTED) == text


@pytest.mark.parametrize("prompt", ["山", "a dog's 'tail'", '""', "「 」", 'an open " alone', ""])
def test_a_prompt_that_asks_for_no_text_is_an_error(prompt):
    with pytest.raises(ValueError, match=r"asks for no text: put it in quotation marks.*`text_pattern`"):
        ocr.asked_text(prompt, QUOTED)


@pytest.mark.parametrize("pattern", [r"text: (\w+)", r"(?<=text: )\w+"])
def test_a_pattern_says_where_the_text_stands_by_a_group_or_as_a_whole(small, pattern):
    reward = small(text_pattern=pattern)
    assert torch.equal(reward(torch.rand(1, 3, 8, 8), ["text: ab, red"]), small()(torch.rand(1, 3, 8, 8), ["「ab」"]))


# ---- the score ----


@pytest.mark.parametrize("label", [[1], [2, 1], [1, 1], [2, 1, 2], [1, 1, 1], [2, 2, 1, 1]])
def test_ctc_is_the_sum_over_all_alignments(label):
    torch.manual_seed(1)
    probabilities = torch.rand(2, 6, 3).softmax(-1)
    expected = torch.stack([log_of_sum(one, label) for one in probabilities])
    torch.testing.assert_close(ocr.ctc_log_prob(probabilities.log(), [label, label]), expected)


@pytest.mark.parametrize("label", [[1, 2, 1], [1, 1], [1, 2, 2], [2, 2, 2]])
def test_the_frames_needed_are_the_fewest_that_any_alignment_takes(label):
    needed = ocr.frames_needed(label)
    uniform = torch.full((needed, 3), 1 / 3)
    assert log_of_sum(uniform, label).isfinite()
    assert log_of_sum(uniform[1:], label).isinf()


def test_the_score_is_per_character_and_each_prompt_has_its_own_text(small):
    images, labels = torch.rand(2, 3, 16, 16), ([1, 2], [3])
    expected = torch.stack([log_of_sum(StandIn.frames, label) / len(label) for label in labels])
    torch.testing.assert_close(small()(images, ['"ab"', "「山」"]), expected)


def test_a_character_that_the_recogniser_does_not_know_is_an_error(small):
    with pytest.raises(ValueError, match=r"'aλ' has characters that PP-OCRv4 does not know: λ"):
        small()(torch.rand(1, 3, 8, 8), ['"aλ"'])


def test_a_text_that_no_alignment_holds_is_an_error_and_not_an_infinity(small):
    with pytest.raises(ValueError, match=r"'aaaa' is too long to be read in one line of a picture of 8 x 16 pixels"):
        small()(torch.rand(1, 3, 16, 8), ['"aaaa"'])


def test_a_certain_recogniser_gives_a_finite_score(small, monkeypatch):
    monkeypatch.setattr(StandIn, "frames", torch.eye(5)[[1, 0, 2, 0, 0]])
    right, wrong = small()(torch.rand(2, 3, 8, 8), ['"ab"', '"ba"'])
    assert right == pytest.approx(0.0, abs=1e-6)
    assert wrong.isfinite()
    assert wrong < -10


def test_the_recogniser_sees_bgr_in_its_range_and_grey_after_the_line():
    red = torch.tensor([1.0, 0.0, 0.25]).view(1, 3, 1, 1).expand(1, 3, 96, 128)
    pixels = ocr._line_pixels(red)
    assert pixels.shape == (1, 3, 48, 320)
    torch.testing.assert_close(pixels[0, :, 20, 30], torch.tensor([-0.5, -1.0, 1.0]))
    assert (pixels[..., 64:] == 0).all()
    assert ocr._line_pixels(torch.rand(2, 3, 24, 240)).shape == (2, 3, 48, 480)


# ---- what is missing ----


def test_absent_weights_are_an_error_that_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("MLCM_RL_CACHE", str(tmp_path))
    with pytest.raises(MissingWeights, match="mlcm rewards fetch ocr"):
        rewards.build(Reward(name="ocr"), "cpu")


def test_without_onnxruntime_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(_onnx.Weights, "path", lambda self: tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(rewards.RewardError, match=r"ocr cannot be built: .*run `pip install 'mlcm-rl\[onnx\]'`"):
        rewards.build(Reward(name="ocr"), "cpu")


# ---- the fetched recogniser ----


@pytest.fixture(scope="module")
def published():
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'mlcm-rl[onnx]'")
    if not ocr.PP_OCRV4_WEIGHTS.is_present():
        pytest.skip("PP-OCRv4 has not been fetched: mlcm rewards fetch ocr")
    return rewards.build(Reward(name="ocr"), "cpu")


def drawing(text, font, size=(64, 64)):
    page = Image.new("RGB", size, "white")
    ImageDraw.Draw(page).text((size[0] / 2, size[1] / 2), text, fill=(200, 30, 30), font=font, anchor="mm")
    return page


def test_latin_words_are_read(published):
    font = ImageFont.load_default(44)
    images = torch.stack([square(drawing(text, font, (128, 128)), 128) for text in ("OPEN", "STOP")])[:, :, 32:96] / 255
    right = published(images, ['a sign that says "OPEN"', "“STOP”"])
    wrong = published(images, ['"STOP"', '"OPEN"'])
    assert (right > -0.2).all()
    assert (wrong < -2).all()


def test_hanzi_are_read_and_their_neighbours_are_not(published):
    fonts = pytest.importorskip("pylopdf_fonts_zh_cn", reason="no Chinese font: pip install 'mlcm-rl[hanzi]'")
    font = ImageFont.truetype(str(fonts.serif_path()), 56)
    images = torch.stack([square(drawing(hanzi, font), 64) for hanzi in "大天木"]) / 255
    right = published(images, ["「大」", '"天"', "「木」"])
    wrong = published(images, ["「天」", '"大"', "「本」"])
    assert (right > -0.2).all()
    assert (wrong < right - 2).all()


@pytest.mark.parametrize("width", [48, 320, 400, 640])
def test_the_recognisers_frames_are_as_many_as_prompts_are_checked_for(published, width):
    frames = published.read(torch.rand(1, 3, 48, width)).shape[1]
    assert frames == ocr.line_width(width / 48) / ocr.FRAME
