"""Distances of distributions to the teacher's own pictures: against loops, closed forms and by hand."""

import math

import pytest
import torch
from torch.nn.functional import normalize
from torchmetrics.image.fid import _compute_fid

from mlcm_rl.equations import statistics
from mlcm_rl.evaluation import distribution, judge, metrics, scene_judge
from mlcm_rl.evaluation.distribution import Distribution, patches


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- KID ----


def kid_by_loops(x, y, gamma):
    """The U-statistic over ordered pairs of different prompts, picture by picture."""
    total, count = 0.0, 0
    for i, j in ((i, j) for i in range(len(x)) for j in range(len(x)) if i != j):
        for a in range(x.shape[1]):
            for b in range(x.shape[1]):
                kernels = [(gamma * float(p @ q) + 1) ** 3 for p, q in (
                    (x[i, a], x[j, b]), (y[i, a], y[j, b]), (x[i, a], y[j, b]), (y[i, a], x[j, b]))]  # fmt: skip
                total += kernels[0] + kernels[1] - kernels[2] - kernels[3]
                count += 1
    return total / count


def test_kid_of_three_prompts_is_the_hand_computed_one():
    # One dimension, gamma 1: x = 0, 1, 0 and y = 1, 1, 1; k(0, .) = 1, k(1, 1) = 8.
    # Pairs {1, 2}: xx 1, yy 8, xy 1, yx 8: 0. {1, 3}: xx 1, yy 8, xy 1, yx 1: 7. {2, 3}: as {1, 2}: 0.
    x, y = torch.tensor([[[0.0]], [[1.0]], [[0.0]]]), torch.ones(3, 1, 1)
    values = metrics.kid_by_prompt(x, y)
    assert values.mean().item() == pytest.approx(7 / 3)
    # Without prompt 1: 0, without 2: 7, without 3: 0. Values: 7/3 + 2 (7/3 - that).
    assert values.tolist() == pytest.approx([7, -7, 7])


@pytest.mark.parametrize("rows", [3, 1024])
@pytest.mark.parametrize("gamma", [None, 1.0])
def test_kid_by_prompt_is_the_loop_over_pairs_and_its_values_the_jackknife(rows, gamma, monkeypatch):
    monkeypatch.setattr(metrics, "KERNEL_ROWS", rows)
    x, y = normal(6, 2, 3).double(), normal(6, 2, 3, seed=1).double() + 0.2
    values = metrics.kid_by_prompt(x, y, gamma)
    factor = gamma or 1 / 3
    assert values.mean().item() == pytest.approx(kid_by_loops(x, y, factor))
    rest = [[j for j in range(6) if j != i] for i in range(6)]
    without = torch.tensor([kid_by_loops(x[keep], y[keep], factor) for keep in rest])
    _, error = statistics.mean_and_error(values)
    assert error == pytest.approx(math.sqrt(5 / 6 * (without - without.mean()).square().sum()))


def test_kid_of_a_set_to_itself_is_zero_and_of_paired_pictures_of_one_distribution_unbiased():
    same = normal(7, 2, 5)
    assert metrics.kid_by_prompt(same, same.clone()).tolist() == [0.0] * 7
    results = []
    for i in range(400):  # pictures of one prompt and noise are alike, as student's and teacher's are
        shared = normal(12, 1, 4, seed=i)
        one, other = (0.9 * shared + 0.436 * normal(12, 1, 4, seed=1000 * k + i) for k in (1, 2))
        results.append(metrics.kid_by_prompt(one, other).mean())
    mean, error = statistics.mean_and_error(torch.stack(results))
    assert abs(mean) < 3 * error
    naive = torch.stack([metrics.kid(normal(12, 1, 4, seed=i), normal(12, 4, seed=i))[0] for i in range(50)])
    mean, error = statistics.mean_and_error(naive)
    assert mean < -5 * error  # with pairs of one prompt in it, the estimate is biased


def test_the_standard_error_of_kid_is_its_spread_over_new_samples_and_pairs_drop_what_is_shared():
    values, others = [], []
    for i in range(200):
        x, y = normal(40, 1, 3, seed=i) + 0.7, normal(40, 1, 3, seed=5000 + i)
        values.append(metrics.kid_by_prompt(x, y))
        others.append(metrics.kid_by_prompt(x + 0.05, y))
    errors = torch.tensor([statistics.mean_and_error(one)[1] for one in values])
    assert errors.mean().item() == pytest.approx(torch.stack(values).mean(1).std().item(), rel=0.25)
    differences = torch.stack([(a - b).mean() for a, b in zip(others, values, strict=True)])
    paired = torch.tensor([statistics.paired_difference(a, b)[1] for a, b in zip(others, values, strict=True)])
    assert paired.mean().item() == pytest.approx(differences.std().item(), rel=0.25)
    assert paired.mean() < errors.mean() / 3


def test_kid_refuses_two_prompts_and_other_prompts():
    with pytest.raises(ValueError, match="three prompts or more"):
        metrics.kid_by_prompt(normal(2, 1, 4), normal(2, 1, 4))
    with pytest.raises(ValueError, match="the same shape"):
        metrics.kid_by_prompt(normal(4, 1, 4), normal(3, 1, 4))


# ---- FID ----


def test_frechet_distance_of_one_dimension_is_by_hand():
    # Means 1 and 5, variances 2 and 8: 16 + 2 + 8 - 2 sqrt(16); the second dimension never changes.
    distance = metrics.frechet_distance(torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([[3.0, 1.0], [7.0, 1.0]]))
    assert distance.item() == pytest.approx(18)


def root_of(matrix):
    """The principal square root, by Denman and Beavers' iteration."""
    root, inverse = matrix, torch.eye(len(matrix), dtype=matrix.dtype)
    for _ in range(40):
        root, inverse = (root + inverse.inverse()) / 2, (inverse + root.inverse()) / 2
    torch.testing.assert_close(root @ root, matrix)
    return root


def test_frechet_distance_is_that_of_an_iterated_root_and_torchmetrics():
    x, y = normal(60, 8).double() @ normal(8, 8, seed=2).double(), normal(50, 8, seed=1).double() + 0.3
    means, covariances = [part.mean(0) for part in (x, y)], [torch.cov(part.T) for part in (x, y)]
    expected = (means[0] - means[1]).square().sum() + covariances[0].trace() + covariances[1].trace()
    expected = (expected - 2 * root_of(covariances[0] @ covariances[1]).trace()).item()
    assert metrics.frechet_distance(x, y).item() == pytest.approx(expected, rel=1e-9)
    theirs = _compute_fid(means[0], covariances[0], means[1], covariances[1]).item()
    assert metrics.frechet_distance(x, y).item() == pytest.approx(theirs, rel=1e-9)


def test_frechet_distance_of_features_that_never_change_is_a_number():
    x = torch.cat([normal(20, 3), torch.zeros(20, 2)], dim=1)
    assert metrics.frechet_distance(x, x).item() == pytest.approx(0.0, abs=1e-6)


def test_fid_by_group_has_the_mean_of_the_whole_and_the_jackknifes_error():
    x, y = normal(11, 2, 3), normal(11, 2, 3, seed=1) + 0.5
    values = metrics.fid_by_group(x, y, num_groups=4)
    assert values.mean().item() == pytest.approx(metrics.frechet_distance(x.flatten(0, 1), y.flatten(0, 1)).item())
    without = []
    for group in range(4):
        keep = [i for i in range(11) if i % 4 != group]
        without.append(metrics.frechet_distance(x[keep].flatten(0, 1), y[keep].flatten(0, 1)))
    deviations = torch.stack(without) - torch.stack(without).mean()
    expected = math.sqrt(3 / 4 * deviations.square().sum())
    assert statistics.mean_and_error(values)[1] == pytest.approx(expected)
    assert len(metrics.fid_by_group(x[:3], y[:3], num_groups=10)) == 3


# ---- the jackknife ----


def test_the_jackknife_of_a_mean_is_the_usual_standard_error():
    data = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64)
    without = (data.sum() - data) / 3
    values = statistics.jackknife_values(data.mean(), without)
    torch.testing.assert_close(values, data)
    assert statistics.mean_and_error(values) == pytest.approx(statistics.mean_and_error(data))


# ---- what is read ----


def test_patches_are_crops_at_places_that_depend_on_seed_and_sample_alone():
    images = torch.arange(3 * 3 * 12 * 16.0).reshape(3, 3, 12, 16)
    samples = [(0, 0), (0, 1), (5, 0)]
    crops = patches(images, 7, samples)
    assert crops.shape == (3, 3, 6, 6)  # half of the shorter side
    for image, crop in zip(images, crops, strict=True):
        top, left = divmod(int(crop[0, 0, 0] - image[0, 0, 0]), 16)
        assert torch.equal(crop, image[:, top : top + 6, left : left + 6])
    assert torch.equal(patches(images[2:], 7, samples[2:]), crops[2:])  # whatever the batch
    assert torch.equal(patches(images + 1, 7, samples), crops + 1)  # in every row the same
    places = {tuple(patches(images[:1], seed, [(0, 0)])[0, :, 0, 0].tolist()) for seed in range(40)}
    assert len(places) > 20
    assert patches(torch.zeros(1, 3, 1024, 1024), 0, [(0, 0)]).shape[-1] == 299


def test_fid_needs_more_pictures_than_features_have_dimensions():
    to_teacher = Distribution("judge", lambda patches: patches, gamma=1.0)
    few = {"judge": normal(4, 2, 8), "patch": normal(4, 2, 7)}
    values = to_teacher.values(few, {name: reading + 0.1 for name, reading in few.items()})
    assert list(values) == ["teacher_kid", "teacher_patch_kid", "teacher_patch_fid"]
    assert {name: len(one) for name, one in values.items()} == {
        "teacher_kid": 4,
        "teacher_patch_kid": 4,
        "teacher_patch_fid": 4,
    }
    assert distribution.NUM_GROUPS == 10


def test_a_judge_reads_patches_of_any_size_and_a_scene_is_the_mean_of_its_cells():
    encoder = judge.PictureEncoder(8)
    with torch.no_grad():
        reader = judge.Judge(encoder, normalize(normal(2, 1, 8), dim=-1), ["a", "b"], ["x"])
        crops = torch.rand(2, 3, 32, 32)
        features = reader.patch_features(crops)
        torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
        scenes = scene_judge.SceneJudge(["a"])
        picture = torch.rand(1, 3, 128, 128)
        cells = [picture[..., i : i + 64, j : j + 64] for i in (0, 64) for j in (0, 64)]
        mean = torch.stack([scenes.encoder.tapped(cell) for cell in cells]).mean(0)
        torch.testing.assert_close(scenes.features(picture), normalize(mean, dim=-1))
        torch.testing.assert_close(scenes.patch_features(cells[2]), normalize(scenes.encoder.tapped(cells[2]), dim=-1))
