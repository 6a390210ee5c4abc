"""The class reward: which class a prompt names, and what it is asked of the classifier."""

import pytest
import torch
from safetensors.torch import save_file

from mlcm_rl import rewards
from mlcm_rl.rewards import weights
from mlcm_rl.rewards.check import EXAMPLE_PROMPTS
from mlcm_rl.rewards.weights import MissingWeights
from reward_models import imagenet_class
from reward_models._efficientnet_lite import EFFICIENTNET_LITE0_WEIGHTS, EfficientNetLite0, efficientnet_pixels


@pytest.fixture(scope="module")
def class_of():
    return imagenet_class._ClassFinder()


@pytest.mark.parametrize(
    ("prompt", "number"),
    [
        ("a strawberry", 949),
        ("Noto style emoji of Banana", 954),
        ("two lemons, sour", 951),
        ("a sports car, racing", 817),  # longer than "racer" or "car"
        ("草莓", 949),
        ("Noto风格的香蕉表情", 954),
        ("一辆跑车的图片", 817),
        ("金鱼", 1),
    ],
)
def test_the_longest_name_in_a_prompt_is_its_class(class_of, prompt, number):
    assert class_of(prompt) == number


@pytest.mark.parametrize("prompt", ["a lemonade", "grinning face", "嘿嘿", "", "a mouse"])
def test_a_prompt_that_names_no_class_is_an_error(class_of, prompt):
    with pytest.raises(ValueError, match="names no class of ImageNet"):
        class_of(prompt)


@pytest.mark.parametrize("prompt", [prompt for prompts in EXAMPLE_PROMPTS.values() for prompt in prompts])
def test_the_prompts_that_rewards_are_checked_with_name_a_class(class_of, prompt):
    assert 0 <= class_of(prompt) < 1000


def test_every_name_belongs_to_one_class(class_of):
    assert sorted(set(class_of.classes.values()))[-1] == 999
    assert len({name for name in class_of.classes if class_of(name) != class_of.classes[name]}) == 0


def test_the_score_is_the_log_probability_of_the_class(tmp_path, monkeypatch):
    monkeypatch.setenv("MLCM_RL_CACHE", str(tmp_path))
    torch.manual_seed(0)
    network = EfficientNetLite0()
    with torch.no_grad():
        network.classes.weight.mul_(30)
    tensors = {name: value.detach().clone() for name, value in network.state_dict().items()}
    stand_in = tmp_path / "given.safetensors"
    save_file(tensors, stand_in)
    monkeypatch.setattr(weights.Weights, "path", lambda self: stand_in)
    reward = rewards.find("imagenet_class")("cpu", torch.float32)
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network(efficientnet_pixels(images, 224)).softmax(-1)[[0, 1], [949, 954]].log()
    torch.testing.assert_close(reward(images, ["a strawberry", "香蕉"]), expected, rtol=1e-4, atol=1e-4)


def test_absent_weights_are_an_error_that_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("MLCM_RL_CACHE", str(tmp_path))
    with pytest.raises(MissingWeights, match="mlcm rewards fetch"):
        rewards.find("imagenet_class")("cpu", torch.float32)


def test_the_fetched_classifier_tells_an_orange_from_a_zebra():
    if not EFFICIENTNET_LITE0_WEIGHTS.is_present():
        pytest.skip("EfficientNet-Lite0 has not been fetched: mlcm rewards fetch imagenet_class")
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 96), torch.linspace(-1, 1, 96), indexing="ij")
    disc = (rows.square() + columns.square() < 0.5).float()
    orange = 1 - disc * torch.tensor([0.0, 0.45, 0.95])[:, None, None]
    reward = rewards.find("imagenet_class")("cpu", torch.float32)
    right, other = reward(orange[None].repeat(2, 1, 1, 1), ["an orange", "a zebra"])
    assert right > other
