"""Checks that a reward model does what it declares, for `mlcm rewards check` and for tests of new models."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import RewardError, RewardModel, score

EXAMPLE_PROMPTS = {  # for every kind of reward: classes of every list, with a colour, and quoted as texts to render
    "en": ('a red "strawberry"', 'a yellow "lemon"', 'an orange "orange"', 'a green "banana"', 'a brown "pineapple"'),
    "zh": ("红色的「草莓」", "黄色的「柠檬」", "橙色的「橙子」", "绿色的「香蕉」", "棕色的「菠萝」"),
}
STEPS = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)  # of the finite differences, in units of a pixel's range
GRADIENT_TOLERANCE = 0.05  # in float32 every step has an error of curvature or of rounding
BATCH_TOLERANCE = 1e-3  # of the scores' deviation: the last digits of kernels depend on the batch size


class Failed(Exception):
    """A check failed; the message is the reason."""


@dataclass(frozen=True)
class Check:
    """The result of one check, a row of a table."""

    name: str
    passed: bool
    detail: str


def check(reward: RewardModel, name: str, images: Tensor, prompts: list[str]) -> list[Check]:
    """Run all checks of `reward` on `images` (B, 3, H, W) in [0, 1], B >= 2, float32, and their prompts, in order.

    If the first, the contract, fails, the others are not run.
    """
    checks: list[Check] = []
    for title, function in CHECKS.items():
        try:
            checks.append(Check(title, True, function(reward, name, images, prompts)))
        except (Failed, RewardError) as error:
            checks.append(Check(title, False, str(error)))
            if title == "contract":
                break
    return checks


def example_prompts(reward: RewardModel, count: int) -> list[str]:
    """Return `count` prompts in the languages of `reward` that have examples; English ones if none has."""
    languages = [language for language in reward.languages if language in EXAMPLE_PROMPTS] or ["en"]
    prompts = [prompt for language in languages for prompt in EXAMPLE_PROMPTS[language]]
    return [prompts[i % len(prompts)] for i in range(count)]


@cache
def random_images(count: int = 6, size: int = 96) -> Tensor:
    """Return pictures of coloured blobs (count, 3, size, size), for checks without real ones."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    fine = torch.rand(count, 3, size // 4, size // 4, generator=generator)
    layers = [F.interpolate(layer, size=(size, size), mode="bicubic") for layer in (coarse, fine)]
    sharpness = torch.linspace(0.1, 0.5, count).view(-1, 1, 1, 1)
    return (layers[0] * (1 - sharpness) + layers[1] * sharpness).clamp(0, 1)


@torch.no_grad()
def _contract(reward: RewardModel, name: str, images: Tensor, prompts: list[str]) -> str:
    before = images.clone()
    score(reward, name, images, prompts)
    if not torch.equal(images, before):
        raise Failed("it changes its input pictures in place")
    return f"({len(images)},) float32, finite"


@torch.no_grad()
def _determinism(reward: RewardModel, name: str, images: Tensor, prompts: list[str]) -> str:
    first, second = (score(reward, name, images, prompts) for _ in range(2))
    if not torch.equal(first, second):
        raise Failed(f"two calls differ by up to {_gap(first, second):.2g}")
    return "two calls give the same bits"


@torch.no_grad()
def _batch_invariance(reward: RewardModel, name: str, images: Tensor, prompts: list[str]) -> str:
    together = score(reward, name, images, prompts)
    single = torch.cat([score(reward, name, images[i : i + 1], [prompt]) for i, prompt in enumerate(prompts)])
    reordered = score(reward, name, images.flip(0), prompts[::-1]).flip(0)
    gap = max(_gap(together, single), _gap(together, reordered))
    if gap > BATCH_TOLERANCE * max(together.std().item(), 1e-2 * together.abs().max().item(), 1e-5):
        raise Failed(f"a picture's score moves by {gap:.2g} with the pictures beside it")
    return f"alone and in any order the same, up to {gap:.1g}"


@torch.no_grad()
def _sizes(reward: RewardModel, name: str, images: Tensor, prompts: list[str]) -> str:
    sizes = [(64, 64), (80, 56), (224, 160)]
    for size in sizes:
        score(reward, name, F.interpolate(images[:2], size=size, mode="area"), prompts[:2])
    return "square, tall and wide: " + ", ".join(f"{width} x {height}" for height, width in sizes)


@torch.no_grad()
def _prompts(reward: RewardModel, name: str, images: Tensor, prompts: list[str]) -> str:
    shifted = prompts[1:] + prompts[:1]
    gap = _gap(score(reward, name, images, prompts), score(reward, name, images, shifted))
    if reward.needs_prompt and gap == 0 and shifted != prompts:
        raise Failed("it declares needs_prompt, and other prompts change nothing")
    if not reward.needs_prompt and gap > 0:
        raise Failed(f"it declares that it needs no prompt, and other prompts move its scores by {gap:.2g}")
    return f"used, in {', '.join(reward.languages)}" if reward.needs_prompt else "not used"


def _gradient(reward: RewardModel, name: str, images: Tensor, prompts: list[str]) -> str:
    """Compare directional derivatives of one score, along four random directions and its gradient, with differences.

    The random directions detect a part of the picture whose gradient is missing, the gradient's own direction a wrong
    length. Finite differences are taken at several steps; the step at which they agree best counts.
    """
    if not reward.differentiable:
        return "none, as declared"
    generator = torch.Generator().manual_seed(0)
    grain = 0.04 * torch.randn(images[:1].shape, generator=generator).to(
        images.device
    )  # flat areas are at kinks of many scores
    image = (0.1 + 0.8 * images[:1] + grain).clamp(0.02, 0.98).requires_grad_()  # away from 0 and 1
    with torch.enable_grad():
        value = score(reward, name, image, prompts[:1])
    if not value.requires_grad:
        raise Failed("it declares differentiable, and its score has no gradient")
    (gradient,) = torch.autograd.grad(value.sum(), image)
    length = gradient.norm().item()
    if not 0 < length < float("inf"):
        raise Failed(f"it declares differentiable, and its gradient at a picture has the length {length}")
    directions = [torch.randn(image.shape, generator=generator).to(image.device) for _ in range(4)]
    directions.append(gradient * (gradient.numel() ** 0.5 / length))
    slopes = torch.tensor([(gradient * direction).sum().item() for direction in directions])
    gap, step = min((_slope_gap(reward, name, image, prompts[:1], directions, slopes, step), step) for step in STEPS)
    if gap > GRADIENT_TOLERANCE:
        raise Failed(f"it is {gap:.0%} off finite differences (at the best step, {step:g})")
    return f"{gap:.1%} off finite differences at step {step:g}; length {length:.3g}"


@torch.no_grad()
def _slope_gap(
    reward: RewardModel,
    name: str,
    image: Tensor,
    prompts: list[str],
    directions: list[Tensor],
    slopes: Tensor,
    step: float,
) -> float:
    """Return the larger of two relative errors of `slopes` (D,) against central differences at `step`.

    One is over all random directions, the other along the gradient, which is the last direction.
    """
    differences = []
    for direction in directions:
        ahead, behind = (
            score(reward, name, image + sign * step * direction, prompts).double().item() for sign in (1, -1)
        )
        differences.append((ahead - behind) / (2 * step))
    errors = torch.tensor(differences) - slopes
    in_random = errors[:-1].norm() / slopes[:-1].norm().clamp(min=1e-12)
    return max(in_random.item(), (errors[-1] / slopes[-1]).abs().item())


@torch.no_grad()
def _range(reward: RewardModel, name: str, images: Tensor, prompts: list[str]) -> str:
    scores = torch.cat([score(reward, name, images[i : i + 1], [prompt]) for i, prompt in enumerate(prompts)])
    low, mean, high = scores.min().item(), scores.mean().item(), scores.max().item()
    if low == high:
        raise Failed(f"all {len(scores)} pictures have the same score, {low:.4g}")
    return f"{low:.4g} to {high:.4g}, mean {mean:.4g}, deviation {scores.std().item():.3g}"


def _gap(first: Tensor, second: Tensor) -> float:
    return (first - second).abs().max().item()


CHECKS: dict[str, Callable[[RewardModel, str, Tensor, list[str]], str]] = {
    "contract": _contract,
    "determinism": _determinism,
    "batch invariance": _batch_invariance,
    "sizes": _sizes,
    "prompt": _prompts,
    "gradient": _gradient,
    "range": _range,
}
