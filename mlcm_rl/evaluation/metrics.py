"""Metrics of an evaluation, one value per prompt where possible, and standard errors.

A prompt that a metric does not apply to (in another language, without a concept) has the value NaN; means, errors and
paired differences are over the rest. Letters: P prompts, I pictures of each, D features, K prototypes.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BatchEncoding, CLIPModel, CLIPTokenizer

from ..equations.statistics import jackknife_values
from .inception import InceptionV3
from .local_networks import load_network, load_part

NUM_RESAMPLES = 1000
KERNEL_ROWS = 1024  # rows of a kernel matrix in memory at a time: 5,000 x 5,000 in float64 would be 200 MB


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
    total = sum((_kernel(rows, other, gamma).sum() for rows in x.split(KERNEL_ROWS)), x.new_zeros(()))
    if y is not None:
        return total / (len(x) * len(y))
    with_itself = (gamma * x.square().sum(1) + 1.0).pow(3).sum()
    return (total - with_itself) / (len(x) * (len(x) - 1))


def kid_by_prompt(features: Tensor, reference: Tensor, gamma: float | None = None) -> Tensor:
    """Return P values (float64) whose mean is KID of `features` to `reference`, (P, I, D) each, of the same prompts.

    The kernel is that of `kid`. The two sets are paired: their pictures of one prompt are alike. So the estimate is the
    U-statistic over pairs of different prompts (Gretton et al. 2012, equation 4), which pairs of one prompt, in a set
    or across, have no part in: unbiased for prompts drawn independently, and exactly 0 of a set to itself. The values
    are those of the jackknife over prompts, so that their spread, and that of the paired difference of two sets, gives
    the standard error. Raise ValueError for fewer than three prompts.
    """
    if features.shape != reference.shape or len(features) < 3:
        raise ValueError(
            f"KID of {tuple(features.shape)} features to {tuple(reference.shape)} of the same prompts: both need the "
            "same shape, and three prompts or more"
        )
    num_prompts, per_prompt, width = features.shape
    gamma = 1.0 / width if gamma is None else gamma
    x, y = (part.flatten(0, 1).double() for part in (features, reference))
    own = torch.arange(num_prompts).repeat_interleave(per_prompt)
    sums = []
    for rows in torch.arange(len(x)).split(KERNEL_ROWS):
        within = _kernel(x[rows], x, gamma) + _kernel(y[rows], y, gamma)
        pairs = within - (_kernel(x[rows], y, gamma) + _kernel(y[rows], x, gamma))
        sums.append(pairs.masked_fill(own[rows, None] == own, 0.0).sum(1))
    by_prompt = torch.cat(sums).unflatten(0, (num_prompts, per_prompt)).sum(1) / per_prompt**2
    by_prompt /= num_prompts - 1  # the mean over the pairs that a prompt is in
    whole = by_prompt.mean()
    return jackknife_values(whole, (num_prompts * whole - 2.0 * by_prompt) / (num_prompts - 2))


def _kernel(x: Tensor, y: Tensor, gamma: float) -> Tensor:
    """Return (gamma x.y + 1)^3 of `x` (N, D) and `y` (M, D), (N, M)."""
    return (gamma * x @ y.T + 1.0).pow(3)


def frechet_distance(features: Tensor, reference: Tensor) -> Tensor:
    """Return the squared Frechet distance, a scalar in float64, of the Gaussians of `features` (N, D) and `reference`.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), covariances with n - 1 (Heusel et al., arXiv 1706.08500, equation 6),
    D > 1. The trace of the root is that of (S1^(1/2) S2 S1^(1/2))^(1/2), which is symmetric.
    """
    x, y = features.double(), reference.double()
    cov_x, cov_y = torch.cov(x.T), torch.cov(y.T)
    values, vectors = torch.linalg.eigh(cov_y)
    root = vectors * values.clamp(min=0.0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ cov_x @ root).clamp(min=0.0).sqrt().sum()
    return (x.mean(0) - y.mean(0)).square().sum() + cov_x.trace() + cov_y.trace() - 2.0 * shared


def fid_by_group(features: Tensor, reference: Tensor, num_groups: int) -> Tensor:
    """Return values (G,) in float64 whose mean is the FID of `features` to `reference`, (P, I, D) each.

    The values are those of the jackknife over G groups of prompts, every num_groups-th one, left out of both sets at
    once: their spread, and that of the paired difference of two sets, gives the standard error. G is `num_groups`, or
    the number of prompts if that is less. FID's bias upwards for few pictures is that of the complete sets.
    """
    group = torch.arange(len(features)) % num_groups
    distances = [
        frechet_distance(features[chosen].flatten(0, 1), reference[chosen].flatten(0, 1))
        for chosen in (group >= 0, *(group != left_out for left_out in group.unique()))
    ]
    return jackknife_values(distances[0], torch.stack(distances[1:]))


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


class InceptionDistances:
    """FID and KID of sampled pictures to real ones, by the features of an Inception network.

    `network` maps pictures (B, 3, H, W) uint8 to (B, num_features); `real` are batches of such pictures, of which only
    the features (N, num_features) are kept; empty without real pictures, where only `features` has a meaning. KID has a
    standard error; that of torchmetrics, to which it is equal, draws its subsets from the global generator.
    """

    def __init__(self, network: InceptionV3, real: Iterable[Tensor], device: torch.device | str):
        self.network, self.device = network, device
        self.real = torch.cat([torch.empty(0, network.num_features), *map(self._features_of, real)])

    def features(self, images: Tensor) -> Tensor:
        """Return features (B, D), on the CPU, of `images` (B, 3, H, W) in [0, 1], rounded to 8 bits as in a PNG."""
        return self._features_of((images * 255).round().to(torch.uint8))

    def values(self, features: Tensor, num_subsets: int) -> dict[str, Tensor]:
        """Return "fid" (1,) and "inception_kid" (num_subsets,) of `features` (P, I, D) to the real, in float64.

        Empty without real pictures.
        """
        if not len(self.real):
            return {}
        return {
            "fid": frechet_distance(features.flatten(0, 1), self.real).reshape(1),
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
        self.model = load_network(CLIPModel, folder, "clip").to(device).eval()
        self.tokenizer = load_part(CLIPTokenizer, folder, "clip")
        settings = json.loads((Path(folder) / "preprocessor_config.json").read_text(encoding="utf-8"))
        self.size: int = self.model.config.vision_config.image_size
        self.mean, self.deviation = (
            torch.tensor(settings[name], device=device).reshape(3, 1, 1) for name in ("image_mean", "image_std")
        )

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Return 100 max(cos, 0) of picture and prompt (B,) float32, for `images` (B, 3, H, W) in [0, 1]."""
        tokens = self._tokens(prompts)
        output = self.model(pixel_values=self._prepared(images), **tokens)
        cosine = F.cosine_similarity(output.image_embeds.float(), output.text_embeds.float())
        return 100.0 * cosine.clamp(min=0.0)

    @torch.no_grad()
    def text_features(self, texts: list[str]) -> Tensor:
        """Return unit features (B, D) float32 of `texts`."""
        pooled = self.model.text_model(**self._tokens(texts)).pooler_output
        return F.normalize(self.model.text_projection(pooled).float(), dim=-1)

    @torch.no_grad()
    def image_features(self, images: Sequence[Tensor]) -> Tensor:
        """Return unit features (B, D) float32 of B pictures (1, 3, H, W) in [0, 1] of any sizes."""
        prepared = torch.cat([self._prepared(image) for image in images])
        pooled = self.model.vision_model(pixel_values=prepared).pooler_output
        return F.normalize(self.model.visual_projection(pooled).float(), dim=-1)

    def _tokens(self, texts: list[str]) -> BatchEncoding:
        return self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.mean.device)

    def _prepared(self, images: Tensor) -> Tensor:
        scale = self.size / min(images.shape[-2:])
        size = [max(self.size, round(side * scale)) for side in images.shape[-2:]]
        resized = F.interpolate(images.float(), size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((side - self.size) // 2 for side in size)
        return (resized[..., top : top + self.size, left : left + self.size] - self.mean) / self.deviation
