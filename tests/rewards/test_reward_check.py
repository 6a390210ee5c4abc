"""The checks of a reward model, each on a model that has the very fault it looks for."""

import re

import pytest
import torch
import torch.nn.functional as F

from mlcm_rl.rewards import find
from mlcm_rl.rewards.check import CHECKS, check, example_prompts, random_images


class Sound:
    """A small smooth reward of picture and prompt, without fault."""

    differentiable, needs_prompt, languages = True, True, ("en", "zh")

    def __call__(self, images, prompts):
        features = F.interpolate(images, size=(8, 8), mode="area").flatten(1)
        directions = torch.stack([torch.sin(torch.arange(192.0) * (1 + len(p))) for p in prompts]).to(features)
        return torch.tanh((features - 0.5) * directions).sum(1)


class Hidden(Sound):
    def __call__(self, images, prompts):
        return super().__call__(images.detach(), prompts)


class HalfHidden(Sound):
    """No gradient comes from the left half of the picture."""

    def __call__(self, images, prompts):
        width = images.shape[3] // 2
        return super().__call__(torch.cat([images[..., :width].detach(), images[..., width:]], 3), prompts)


class WrongLength(Sound):
    """The value of one function, the gradient of twice that."""

    def __call__(self, images, prompts):
        value = super().__call__(images, prompts)
        return 2 * value - value.detach()


class Rounded(Sound):
    def __call__(self, images, prompts):
        return super().__call__(images, prompts).round() + 0 * images.sum((1, 2, 3))


class Drawn(Sound):
    generator = torch.Generator().manual_seed(0)

    def __call__(self, images, prompts):
        return super().__call__(images, prompts) + 1e-3 * torch.rand(len(images), generator=self.generator)


class Ranked(Sound):
    def __call__(self, images, prompts):
        scores = super().__call__(images, prompts)
        return scores - scores.mean()


class Overwriting(Sound):
    def __call__(self, images, prompts):
        return super().__call__(images.clamp_(0.2, 0.8), prompts)


class Deaf(Sound):
    def __call__(self, images, prompts):
        return super().__call__(images, ["same"] * len(prompts))


class Listening(Sound):
    needs_prompt, languages = False, ()


class Constant(Sound):
    differentiable, needs_prompt, languages = False, False, ()

    def __call__(self, images, prompts):
        return torch.full((len(images),), 3.0)


class OneSize(Sound):
    def __call__(self, images, prompts):
        if images.shape[2:] != (96, 96):
            raise ValueError("expected 96 x 96")
        return super().__call__(images, prompts)


class TwoDimensional(Sound):
    def __call__(self, images, prompts):
        return super().__call__(images, prompts)[:, None]


def failed(reward):
    checks = check(reward, "planted", random_images(), example_prompts(reward, 6))
    return {one.name: one.detail for one in checks if not one.passed}


@pytest.mark.parametrize(
    "reward", [Sound(), *(find(name)("cpu", torch.float32) for name in ("brightness", "sharpness"))]
)
def test_a_sound_reward_passes_every_check(reward):
    checks = check(reward, "sound", random_images(), example_prompts(reward, 6))
    assert [one.name for one in checks if one.passed] == list(CHECKS)


@pytest.mark.parametrize(
    ("reward", "name", "message"),
    [
        (Hidden(), "gradient", "declares differentiable, and its score has no gradient"),
        (HalfHidden(), "gradient", "off finite differences"),
        (WrongLength(), "gradient", "50% off finite differences"),
        (Rounded(), "gradient", "length 0"),
        (Drawn(), "determinism", "two calls differ by up to"),
        (Ranked(), "batch invariance", "score moves by .* with the pictures beside it"),
        (Overwriting(), "contract", "it changes its input pictures"),
        (TwoDimensional(), "contract", r"must return shape \(6,\)"),
        (Deaf(), "prompt", "declares needs_prompt, and other prompts change nothing"),
        (Listening(), "prompt", "other prompts move its scores"),
        (Constant(), "range", "all 6 pictures have the same score, 3"),
        (OneSize(), "sizes", "planted failed: ValueError: expected 96 x 96"),
    ],
)
def test_each_fault_is_seen_by_its_check(reward, name, message):
    failures = failed(reward)
    assert re.search(message, failures.get(name, "")), failures


def test_a_fault_in_one_thing_is_not_blamed_on_another():
    assert failed(HalfHidden()).keys() == {"gradient"}
    assert failed(Deaf()).keys() == {"prompt"}
    assert failed(OneSize()).keys() == {"sizes"}
    assert failed(Constant()).keys() == {"range"}


def test_a_broken_contract_ends_the_checks():
    assert len(check(TwoDimensional(), "planted", random_images(), example_prompts(Sound(), 6))) == 1


def test_examples_are_in_the_languages_that_a_reward_reads():
    class Chinese(Sound):
        languages = ("zh",)

    class Finnish(Sound):
        languages = ("fi",)

    assert example_prompts(Chinese(), 2) == ["红色的「草莓」", "黄色的「柠檬」"]
    assert example_prompts(Finnish(), 7)[0] == 'a red "strawberry"'
    assert len(example_prompts(Sound(), 50)) == 50
