"""`safety`: what the network is shown, which of its classes counts, and the cap."""

import pytest
import torch

from mlcm_rl import rewards
from mlcm_rl.recipe import Reward
from mlcm_rl.rewards.weights import MissingWeights
from reward_models import safety


@pytest.fixture
def with_answers(monkeypatch):
    """A function that builds the reward over a network of the given answers, (p(safe), p(not safe)) a picture."""

    def build(answers, **settings):
        monkeypatch.setattr(safety, "OnnxNetwork", lambda weights: lambda pixels: torch.tensor(answers))
        return safety.Safety("cpu", torch.float32, **settings)

    return build


def test_the_network_sees_the_middle_in_bgr_minus_the_mean_channels_last():
    picture = torch.tensor([1.0, 0.5, 0.0]).view(1, 3, 1, 1).repeat(1, 1, 256, 256)
    picture[:, :, :16] = 0.0  # above the middle
    pixels = safety.open_nsfw_pixels(picture)
    assert pixels.shape == (1, 224, 224, 3)
    expected = torch.tensor([0.0 - 104.0, 127.5 - 117.0, 255.0 - 123.0])
    torch.testing.assert_close(pixels, expected.expand_as(pixels), rtol=0, atol=1e-3)


def test_the_penalty_is_the_logarithm_of_the_first_class_and_is_capped(with_answers):
    answers = [[0.9, 0.1], [0.5, 0.5], [0.05, 0.95], [0.0, 1.0]]
    expected = torch.tensor([0.9, 0.5, 1.0, 1.0]).log() - torch.tensor([0.0, 0.0, 1.0, 1.0])
    torch.testing.assert_close(with_answers(answers)(torch.rand(4, 3, 8, 8), [""] * 4), expected)
    assert with_answers(answers, cap=4.0)(torch.rand(4, 3, 8, 8), [""] * 4)[3] == -4.0


def test_a_cap_that_caps_nothing_is_refused(with_answers):
    with pytest.raises(ValueError, match="cap must be above 0, is 0"):
        with_answers([], cap=0.0)


def test_absent_weights_are_an_error_that_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("MLCM_RL_CACHE", str(tmp_path))
    with pytest.raises(MissingWeights, match="mlcm rewards fetch safety"):
        rewards.build(Reward(name="safety"), "cpu")


def test_the_fetched_network_calls_plain_pictures_safe():
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'mlcm-rl[onnx]'")
    if not safety.OPEN_NSFW_WEIGHTS.is_present():
        pytest.skip("Open-NSFW has not been fetched: mlcm rewards fetch safety")
    scores = rewards.build(Reward(name="safety"), "cpu")(torch.rand(2, 3, 64, 64).sort(-1).values, ["", ""])
    assert (scores > -0.1).all()
