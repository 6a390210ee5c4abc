"""Whether a reward model does what it declares: `mlcm rewards check`, and what a new model's own tests may call."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import RewardError, RewardModel, score

EXAMPLE_PROMPTS = {  # things that every list of classes knows, of a colour, and quoted: so they ask for a text as well
    "en": ('a red "strawberry"', 'a yellow "lemon"', 'an orange "orange"', 'a green "banana"', 'a brown "pineapple"'),
    "zh": ("红色的「草莓」", "黄色的「柠檬」", "橙色的「橙子」", "绿色的「香蕉」", "棕色的「菠萝」"),
}
STEPS = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)  # of the finite differences, in units of a pixel's range
GRADIENT_TOLERANCE = 0.05  # scores are float32, so no step is free of both curvature and rounding
BATCH_TOLERANCE = 1e-3  # of the scores' deviation: kernels differ with the batch's size, in the last digits


class Failed(Exception):
    """A check found what it looks for; the message says what."""


@dataclass(frozen=True)
class Check:
    """What came of one check, for a line of a table."""

    name: str
    passed: bool
    detail: str


def check(reward: RewardModel, name: str, images: Tensor, prompts: list[str]) -> list[Check]:
    """Every check of a built `reward` on `images` (B, 3, H, W) in [0, 1], B >= 2, float32, and their prompts, in order.

    When the first, the contract, is not kept, it is the only one.
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
    """`count` prompts in the languages that `reward` reads, as far as examples are at hand; else English ones."""
    languages = [language for language in reward.languages if language in EXAMPLE_PROMPTS] or ["en"]
    known = [prompt for language in languages for prompt in EXAMPLE_PROMPTS[language]]
    return [known[i % len(known)] for i in range(count)]


@cache
def drawn_images(count: int = 6, size: int = 96) -> Tensor:
    """`count` pictures to check with where there are no real ones: coloured blobs, (count, 3, size, size)."""
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
        raise Failed("it changes the pictures that it is given")
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
    turned = score(reward, name, images.flip(0), prompts[::-1]).flip(0)
    gap = max(_gap(together, single), _gap(together, turned))
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
    others = prompts[1:] + prompts[:1]
    gap = _gap(score(reward, name, images, prompts), score(reward, name, images, others))
    if reward.needs_prompt and gap == 0 and others != prompts:
        raise Failed("it declares needs_prompt, and other prompts change nothing")
    if not reward.needs_prompt and gap > 0:
        raise Failed(f"it declares that it needs no prompt, and other prompts move its scores by {gap:.2g}")
    return f"used, in {', '.join(reward.languages)}" if reward.needs_prompt else "not used"


def _gradient(reward: RewardModel, name: str, images: Tensor, prompts: list[str]) -> str:
    """Directional derivatives of one score: along four random directions and along the gradient itself.

    The random directions feel a part of the picture that no gradient comes from, the gradient's own its length.
    Each finite difference is taken at several steps, and the step at which all of them agree best counts.
    """
    if not reward.differentiable:
        return "none, as declared"
    generator = torch.Generator().manual_seed(0)
    grain = 0.04 * torch.randn(images[:1].shape, generator=generator).to(images.device)  # flat areas sit on kinks
    image = (0.1 + 0.8 * images[:1] + grain).clamp(0.02, 0.98).requires_grad_()  # away from the ends of the range
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
    """The larger of two relative differences between `slopes` (D,) and central differences at `step`.

    One over all random directions, one along the gradient, which is the last.
    """
    found = []
    for direction in directions:
        ahead, behind = (
            score(reward, name, image + sign * step * direction, prompts).double().item() for sign in (1, -1)
        )
        found.append((ahead - behind) / (2 * step))
    off = torch.tensor(found) - slopes
    return max((off[:-1].norm() / slopes[:-1].norm().clamp(min=1e-12)).item(), (off[-1] / slopes[-1]).abs().item())


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
