"""ImageReward against the official class, whose outputs on rebuilt weights the fixture holds."""

import json
import zlib
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from reward_models import image_reward
from reward_models._published import covered, normalised
from rewards.published import as_tensor, replace_weights

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "imagereward_small.json").read_text())


def official_state() -> dict[str, torch.Tensor]:
    """The weights that the fixture was made with, by its recipe."""
    state = {}
    for name, shape in FIXTURE["shapes"].items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{FIXTURE['salt']}:{name}".encode()))
        values = torch.randn(shape, generator=generator)
        if name.endswith("position_ids"):
            state[name] = torch.arange(shape[1])[None]
        elif len(shape) == 1:
            state[name] = 0.05 * values + name.endswith("weight")
        elif any(word in name for word in ("embeddings", "pos_embed", "cls_token")):
            state[name] = 0.2 * values
        else:
            state[name] = FIXTURE["gain"] * values / values[0].numel() ** 0.5
    return state


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """Built as from the published files, but of the fixture's size."""
    folder = tmp_path_factory.mktemp("published")
    torch.save(official_state(), folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(FIXTURE["vocabulary"]) + "\n")
    vision, text = FIXTURE["vision"], FIXTURE["med_config"]
    sizes = {
        "vision_config": {
            "hidden_size": vision["width"],
            "intermediate_size": 4 * vision["width"],
            "num_hidden_layers": vision["depth"],
            "num_attention_heads": vision["num_heads"],
        },
        "text_config": {
            "encoder_hidden_size": vision["width"],
            "intermediate_size": text["intermediate_size"],
            "num_hidden_layers": text["num_hidden_layers"],
            "vocab_size": text["vocab_size"],
        },
    }
    config = {part: image_reward.BLIP_LARGE[part] | sizes[part] for part in sizes}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(image_reward, "BLIP_LARGE", config)
        replace_weights(monkeypatch, image_reward, "IMAGE_REWARD", folder / "ImageReward.pt")
        replace_weights(monkeypatch, image_reward, "VOCABULARY", folder / "vocab.txt")
        return image_reward.ImageReward("cpu", torch.float32)


def picture(case: dict) -> Image.Image:
    width, height = case["image_size"]
    noise = numpy.random.RandomState(case["image_seed"]).randint(0, 255, (height // 20, width // 20, 3))
    return Image.fromarray(noise.astype("uint8")).resize((width, height), Image.BICUBIC)


def official_pixels(case: dict) -> torch.Tensor:
    """The official preprocessing: resized and cropped by PIL, in 8 bits."""
    image = picture(case)
    shorter = min(image.size)
    width, height = (int(224 * side / shorter) for side in image.size)
    left, top = round((width - 224) / 2), round((height - 224) / 2)
    cut = image.resize((width, height), Image.BICUBIC).crop((left, top, left + 224, top + 224))
    return normalised(as_tensor(cut).float())


def close(actual: torch.Tensor, expected: list[float] | float, tolerance: float) -> None:
    torch.testing.assert_close(actual.detach().cpu(), torch.tensor(expected), rtol=tolerance, atol=tolerance)


CASES = pytest.mark.parametrize("case", FIXTURE["cases"], ids=lambda case: case["prompt"][:8])


@CASES
def test_the_networks_outputs_are_the_official_classs(reward, case):
    pixels = official_pixels(case).requires_grad_()
    close(pixels.mean(), case["pixel_mean"], 1e-6)
    close(pixels[0, :, 0, 0], case["pixel_first"], 1e-6)
    features = reward.image_features(pixels)
    close(features.mean(), case["vision_features_mean"], 1e-6)
    close(features.std(), case["vision_features_std"], 1e-5)
    # Ten times closer than layer norms with transformers' default epsilon come.
    close(features[0, 0, :8], case["vision_features_first8"], 1e-5)
    close(features[0, -1, -8:], case["vision_features_last8"], 1e-5)
    close(reward.class_token(features, [case["prompt"]])[0, :8], case["text_cls_first8"], 1e-5)
    score = (reward.raw_reward(pixels, [case["prompt"]])[0] - image_reward.MEAN) / image_reward.DEVIATION
    close(score, case["score"], 1e-5)
    # The fixture's names are loose: it is the gradient of the normalised score, and the sum of its absolute values.
    (gradient,) = torch.autograd.grad(score, pixels)
    assert gradient.norm().item() == pytest.approx(case["raw_reward_grad_norm"], rel=1e-5)
    assert gradient.abs().sum().item() == pytest.approx(case["raw_reward_grad_sum"], rel=1e-5)


@CASES
def test_a_prompt_is_cut_into_the_official_tokens(reward, case):
    inputs = []

    def spy(module, args, settings):
        inputs.append(settings["input_ids"])

    hook = reward.text.register_forward_pre_hook(spy, with_kwargs=True)
    reward(torch.zeros(1, 3, 32, 32), [case["prompt"]])
    hook.remove()
    assert inputs[0].tolist() == [case["input_ids"]]


def test_a_long_prompt_is_cut_to_35_tokens_with_its_end(reward):
    encoded = image_reward.tokens(reward.tokenizer, ["big blue " * 40], image_reward.LENGTH, "cpu")
    assert encoded.input_ids.shape == (1, 35)
    assert encoded.input_ids[0, [0, -1]].tolist() == [2, 3]


@CASES
def test_a_picture_is_made_ready_as_the_official_class_does(reward, case):
    prepared = normalised(covered(as_tensor(picture(case)).float(), 224, rounding=round))
    difference = (prepared - official_pixels(case)).abs()
    assert difference.max() < 1.5 / 255 / 0.26
    score = reward(as_tensor(picture(case)), [case["prompt"]])
    assert score.dtype == torch.float32
    assert score.item() == pytest.approx(case["score"], abs=0.1)  # what PIL's rounding to 8 bits moves it by


def test_an_odd_surplus_is_cut_as_torchvision_cuts_it(reward):
    image = torch.rand(1, 3, 224, 227, generator=torch.Generator().manual_seed(0))
    expected = reward.raw_reward(normalised(image[..., 2:226]), ["a fox"])
    torch.testing.assert_close(reward(image, ["a fox"]), (expected - image_reward.MEAN) / image_reward.DEVIATION)


def test_the_published_architecture_is_the_official_one():
    config = image_reward.BlipConfig(**image_reward.BLIP_LARGE)
    with torch.device("meta"):
        networks = [
            image_reward.BlipVisionModel(config.vision_config),
            image_reward.BlipTextModel(config.text_config, add_pooling_layer=False),
        ]
    unused = 256 * (1024 + 1) + 256 * (768 + 1)
    head = 768 * 1024 + 1024 * 128 + 128 * 64 + 64 * 16 + 16 + (1024 + 128 + 64 + 16 + 1)
    num_weights = sum(value.numel() for network in networks for value in network.parameters())
    assert num_weights + head + unused == 446_665_953  # counted on the official class
    assert (config.text_config.num_attention_heads, config.text_config.layer_norm_eps) == (12, 1e-12)


def test_pictures_and_prompts_go_together(reward):
    images = torch.cat([covered(as_tensor(picture(case)), 224) for case in FIXTURE["cases"]])
    prompts = [case["prompt"] for case in FIXTURE["cases"]]
    together = reward(images, prompts)
    alone = torch.cat([reward(images[i : i + 1], prompts[i : i + 1]) for i in range(len(prompts))])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    assert (reward(images, prompts[::-1]) - together).abs().min() > 0.1
    assert (reward(images.flip(1), prompts) - together).abs().min() > 0.01  # blue first is another picture


def test_the_sign_of_the_gradient_is_right(reward):
    case = FIXTURE["cases"][0]
    image = as_tensor(picture(case)).float().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(image, [case["prompt"]]).sum(), image)
    step = 0.02 * gradient / gradient.norm()
    ahead, behind = (reward((image + sign * step).detach(), [case["prompt"]]).item() for sign in (1, -1))
    assert ahead - behind == pytest.approx(2 * 0.02 * gradient.norm().item(), rel=0.02)
    assert not any(parameter.requires_grad for parameter in [*reward.vision.parameters(), *reward.text.parameters()])


def test_a_tensor_that_is_missing_is_named(tmp_path):
    state = image_reward.from_published(official_state())
    vision = image_reward.under("vision_model.", state)
    del vision["encoder.layers.1.mlp.fc2.bias"]
    settings = image_reward.BLIP_LARGE["vision_config"] | {"hidden_size": 64, "intermediate_size": 256}
    config = image_reward.BlipConfig(vision_config=settings | {"num_hidden_layers": 2, "num_attention_heads": 4})
    with pytest.raises(ValueError, match=r"BlipVisionModel: missing keys encoder.layers.1.mlp.fc2.bias"):
        image_reward.network(image_reward.BlipVisionModel, config.vision_config, vision, "cpu", torch.float32)
