"""FID, KID and CLIP score with random networks from local files, against closed forms and stock transformers."""

import pytest
import torch

from evaluation_case import DEVIATION, MEAN, write_clip
from mlcm_rl.equations import statistics
from mlcm_rl.evaluation import metrics


class Means(torch.nn.Module):
    """Stands for Inception: the three channels' means."""

    num_features = 3

    def forward(self, pictures):
        assert pictures.dtype == torch.uint8
        return pictures.float().mean((2, 3)) / 64.0


def distances(real, sampled, num_subsets=10):
    """FID, KID and its error."""
    instrument = metrics.InceptionDistances(Means(), ((batch * 255).round().byte() for batch in real), "cpu")
    values = instrument.values(torch.cat([instrument.features(batch) for batch in sampled])[:, None], num_subsets)
    return values["fid"].item(), *statistics.mean_and_error(values["inception_kid"])


def pictures(count, low, high, seed):
    """Flat pictures of random colours, in batches of 16."""
    colours = torch.rand(count, 3, 1, 1, generator=torch.Generator().manual_seed(seed)) * (high - low) + low
    return list(colours.expand(-1, -1, 4, 4).split(16))


def test_fid_is_the_closed_form_of_two_gaussians():
    real, sampled = pictures(64, 0.0, 0.5, 0), pictures(64, 0.3, 1.0, 1)
    x, y = (Means()((torch.cat(side) * 255).round().byte()).double() for side in (real, sampled))
    covariance = torch.cov(x.T) @ torch.cov(y.T)
    root = torch.linalg.eigvals(covariance).real.sqrt().sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + torch.cov(x.T).trace() + torch.cov(y.T).trace() - 2 * root
    fid, kid, error = distances(real, sampled, num_subsets=4)
    assert fid == pytest.approx(expected.item(), rel=1e-4)
    assert kid > 4 * error


def test_fid_and_kid_of_one_distribution_are_about_zero():
    same = pictures(400, 0, 1, 2)
    assert distances(same, same)[0] == pytest.approx(0.0, abs=1e-4)
    _, kid, error = distances(same, pictures(400, 0, 1, 3))
    assert abs(kid) < 4 * error


def test_a_rows_distances_do_not_depend_on_the_rows_before_it():
    instrument = metrics.InceptionDistances(Means(), (batch.mul(255).byte() for batch in pictures(48, 0, 1, 4)), "cpu")
    rows = [torch.cat([instrument.features(batch) for batch in pictures(40, 0, top, 5)])[:, None] for top in (0.5, 1.0)]
    first, second, again = (instrument.values(rows[i], 4) for i in (0, 1, 0))
    assert first["fid"] != second["fid"]
    assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return metrics.ClipScore(write_clip(tmp_path_factory.mktemp("clip")), "cpu")


def test_clip_score_is_the_models_own_logit_over_its_temperature(clip):
    images = torch.rand(3, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    prompts = ["a", "苹果", "a longer prompt"]
    normalised = (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]
    tokens = clip.tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = clip.model(pixel_values=normalised, **tokens)
    expected = 100 * (output.logits_per_image.diag() / clip.model.logit_scale.exp()).clamp(min=0)
    assert expected.min() > 1
    torch.testing.assert_close(clip(images, prompts), expected, rtol=1e-4, atol=1e-4)
    assert clip(images, prompts).shape == (3,)


def test_clip_sees_the_middle_of_a_wide_picture_at_its_own_size(clip):
    wide = torch.zeros(1, 3, 40, 80)
    wide[..., 20:60] = 1.0  # the middle square is white, and it is all that is left
    white = clip._prepared(torch.ones(1, 3, 20, 20))
    prepared = clip._prepared(wide)
    assert prepared.shape == (1, 3, 20, 20)
    torch.testing.assert_close(prepared[..., 2:-2], white[..., 2:-2], atol=1e-3, rtol=0)
