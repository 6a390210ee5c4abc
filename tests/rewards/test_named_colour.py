"""`named_colour`: the colour a prompt names, and the ink it is compared with."""

import pytest
import torch

from mlcm_rl import rewards
from reward_models.named_colour import named_colour

RED, BLUE = (216, 32, 32), (32, 64, 208)


@pytest.fixture
def reward():
    return rewards.find("named_colour")("cpu", torch.float32)


def stroke(colour, width=8):
    """A stroke of `colour` on white paper, (1, 3, 32, 32)."""
    page = torch.ones(1, 3, 32, 32)
    page[..., :width] = torch.tensor(colour).view(1, 3, 1, 1) / 255
    return page


@pytest.mark.parametrize(
    ("prompt", "colour"),
    [('a red "山"', RED), ("蓝色的「山」", BLUE), ('Blue serif "红"', BLUE), ('a hundred "greens" in red', RED)],
)
def test_the_first_colour_named_counts_and_an_english_one_as_a_whole_word(prompt, colour):
    assert named_colour(prompt) == colour


@pytest.mark.parametrize("prompt", ["「山」", "a mountain", "scarred", ""])
def test_a_prompt_that_names_no_colour_is_an_error(prompt):
    with pytest.raises(ValueError, match="names no colour; known are black, red"):
        named_colour(prompt)


def test_ink_of_the_named_colour_scores_nearly_nothing_and_another_its_distance(reward):
    prompts = ["red", "blue"]
    right = reward(torch.cat([stroke(RED), stroke(BLUE)]), prompts)
    wrong = reward(torch.cat([stroke(BLUE), stroke(RED)]), prompts)
    distance = ((216 - 32) ** 2 + (64 - 32) ** 2 + (208 - 32) ** 2) / 255**2
    torch.testing.assert_close(right, torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(wrong, torch.full((2,), -distance), atol=2e-2, rtol=0)


def test_the_amount_of_ink_hardly_counts(reward):
    thin, thick = (reward(stroke(BLUE, width), ["red"]) for width in (2, 16))
    torch.testing.assert_close(thin, thick, atol=2e-2, rtol=0)


def test_a_page_without_ink_is_white_and_has_a_gradient(reward):
    page = torch.ones(1, 3, 8, 8, requires_grad=True)
    score = reward(page, ["black"])
    score.sum().backward()
    torch.testing.assert_close(score.detach(), torch.tensor([-3 * (223 / 255) ** 2]))
    assert page.grad.isfinite().all()
