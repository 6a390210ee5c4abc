"""Metrics of an evaluation, one value per prompt where possible, and standard errors.

A prompt that a metric does not apply to (in another language, without a concept) has the value NaN; means, errors and
paired differences are over the rest. Letters: P prompts, I pictures of each, D features, K prototypes.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import CLIPModel, CLIPTokenizer

from .inception import InceptionV3

NUM_RESAMPLES = 1000
KERNEL_ROWS = 1024  # rows of a kernel matrix in memory at a time: 5,000 x 5,000 in float64 would be 200 MB


def squared_distance(samples: Tensor, reference: Tensor) -> Tensor:
    """Return the mean of (samples - reference)^2 over each sample's elements, (B,) float32, for (B, ...) each."""
    return (samples.float() - reference.float()).square().flatten(1).mean(1)


def kid(features: Tensor, reference: Tensor, num_subsets: int = 1, gamma: float | None = None) -> Tensor:
    """Return the unbiased squared MMD to `reference` (N, D) with the kernel (gamma x.y + 1)^3, (num_subsets,) float64.

    `features` is (P, I, D); a subset is every num_subsets-th prompt, compared with all of `reference`. The mean over
    disjoint subsets has the expectation of the complete set's KID, so their spread gives its standard error. By default
    gamma is 1 / D (Binkowski et al., arXiv 1801.01401, section 4); for features of unit length gamma 1 is the same
    kernel on features rescaled to unit mean square. Raise ValueError if a subset has fewer than two pictures.
    """
    gamma = 1.0 / features.shape[-1] if gamma is None else gamma
    if features[num_subsets - 1 :: num_subsets].flatten(0, 1).shape[0] < 2 or len(reference) < 2:
        raise ValueError(
            f"KID of {tuple(features.shape)} features in {num_subsets} subsets against {len(reference)} references: "
            "every set needs two pictures or more"
        )
    reference = reference.double()
    spread_of_reference = _mean_kernel(reference, None, gamma)
    values = []
    for subset in range(num_subsets):
        x = features[subset::num_subsets].flatten(0, 1).double()
        values.append(_mean_kernel(x, None, gamma) + spread_of_reference - 2.0 * _mean_kernel(x, reference, gamma))
    return torch.stack(values)


def _mean_kernel(x: Tensor, y: Tensor | None, gamma: float) -> Tensor:
    """Return the mean of (gamma x.y + 1)^3 over pairs of `x` (N, D) and `y` (M, D); without `y`, over i != j of x."""
    other = x if y is None else y
    total = sum((gamma * rows @ other.T + 1.0).pow(3).sum() for rows in x.split(KERNEL_ROWS))
    if y is not None:
        return total / (len(x) * len(y))
    with_itself = (gamma * x.square().sum(1) + 1.0).pow(3).sum()
    return (total - with_itself) / (len(x) * (len(x) - 1))


def ranks(features: Tensor, prototypes: Tensor, concepts: Tensor) -> Tensor:
    """Return the rank (B,) int64, from 0, of each picture's concept among the `prototypes` (K, D) by inner product.

    `features` is (B, D), `concepts` (B,) are indices. A tie counts against the picture, so that constant features are
    never correct by chance.
    """
    similarity = features @ prototypes.T
    own = similarity.gather(1, concepts[:, None])
    return (similarity >= own).sum(1) - 1


def recall(rank: Tensor, k: int) -> Tensor:
    """Return R@k of each picture (B,) float32: 1 if its concept is among the first `k`, else 0."""
    return (rank < k).float()


def diversity(features: Tensor) -> Tensor:
    """Return the mean distance (P,) between the pictures of a prompt, over the pairs of `features` (P, I, D), I > 1."""
    count = features.shape[1]
    if count < 2:
        raise ValueError(f"diversity needs two pictures of a prompt or more, got {count}")
    return torch.cdist(features.float(), features.float()).sum((1, 2)) / (count * (count - 1))


def median_and_error(values: Tensor) -> tuple[float, float]:
    """Return the median of `values` (N,) and its standard error by the bootstrap, from NUM_RESAMPLES fixed draws.

    The median, since a first batch that compiles or waits is an outlier and would dominate a mean's error. The error is
    NaN for a single value.
    """
    values = values.double()
    if len(values) == 1:
        return values.item(), math.nan
    generator = torch.Generator().manual_seed(0)
    resamples = values[torch.randint(len(values), (NUM_RESAMPLES, len(values)), generator=generator)]
    return values.quantile(0.5).item(), resamples.quantile(0.5, dim=1).std().item()


# ---- by networks from local files ----


class _Identity(nn.Module):
    """Returns its input, for a metric that would compute the features itself."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class InceptionDistances:
    """FID (by torchmetrics) and KID of sampled pictures to real ones, by the features of an Inception network.

    `network` maps pictures (B, 3, H, W) uint8 to (B, num_features); `real` are batches of such pictures. Only features
    (N, num_features) are kept, of these and of a row's pictures. KID is this module's own, with a standard error: that
    of torchmetrics, to which it is equal, draws its subsets from the global generator.
    """

    def __init__(self, network: InceptionV3, real: Iterable[Tensor], device: torch.device | str):
        self.network, self.device = network, device
        self.real = torch.cat([self._features_of(batch) for batch in real])
        self.frechet = FrechetInceptionDistance(feature=_Identity(network.num_features), reset_real_features=False)
        self.frechet.update(self.real, real=True)

    def features(self, images: Tensor) -> Tensor:
        """Return features (B, D), on the CPU, of `images` (B, 3, H, W) in [0, 1], rounded to 8 bits as in a PNG."""
        return self._features_of((images * 255).round().to(torch.uint8))

    def values(self, features: Tensor, num_subsets: int) -> dict[str, Tensor]:
        """Return "fid" (1,) and "inception_kid" (num_subsets,) of `features` (P, I, D), both in float64."""
        self.frechet.reset()  # forgets the row before; the real pictures stay
        self.frechet.update(features.flatten(0, 1), real=False)
        return {
            "fid": self.frechet.compute().double().reshape(1),
            "inception_kid": kid(features, self.real, num_subsets),
        }

    @torch.no_grad()
    def _features_of(self, pictures: Tensor) -> Tensor:
        return self.network(pictures.to(self.device)).cpu()


class ClipScore:
    """CLIPScore (Hessel et al., arXiv 2104.08718) by a CLIP in transformers' format, from a local folder.

    Its preprocessing is done in tensors: bicubic with antialiasing to the model's size, centre crop, the folder's own
    mean and deviation.
    """

    def __init__(self, folder: Path | str, device: torch.device | str):
        self.model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).to(device).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        settings = json.loads((Path(folder) / "preprocessor_config.json").read_text(encoding="utf-8"))
        self.size: int = self.model.config.vision_config.image_size
        self.mean, self.deviation = (
            torch.tensor(settings[name], device=device).reshape(3, 1, 1) for name in ("image_mean", "image_std")
        )

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Return 100 max(cos, 0) of picture and prompt (B,) float32, for `images` (B, 3, H, W) in [0, 1]."""
        tokens = self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").to(images.device)
        output = self.model(pixel_values=self._prepared(images), **tokens)
        cosine = F.cosine_similarity(output.image_embeds.float(), output.text_embeds.float())
        return 100.0 * cosine.clamp(min=0.0)

    def _prepared(self, images: Tensor) -> Tensor:
        scale = self.size / min(images.shape[-2:])
        size = [max(self.size, round(side * scale)) for side in images.shape[-2:]]
        resized = F.interpolate(images.float(), size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((side - self.size) // 2 for side in size)
        return (resized[..., top : top + self.size, left : left + self.size] - self.mean) / self.deviation
