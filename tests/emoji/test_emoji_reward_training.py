"""The programs that train the emoji rewards: their losses by hand, a few steps of training, their measures."""

import math

import pytest
import torch
from torch import nn

import train_alignment as alignment
import train_rewards as program
from captions import teacher_concepts
from reward_models._dual_encoder import MEANING_WIDTH, DualEncoder
from sources import STYLES


def test_bradley_terry_agrees_with_hand_arithmetic():
    scores = torch.tensor([[1.0, 0.0, 3.0]])  # noto, twemoji, fluent: margins 2, 3 and 1

    def minus_log_sigmoid(margin: float) -> float:
        return math.log1p(math.exp(-margin))

    sure = sum(minus_log_sigmoid(margin) for margin in (2, 3, 1))
    assert program.bradley_terry(scores, contrary=0.0).item() == pytest.approx(sure, rel=1e-5)
    reversed_ones = sum(minus_log_sigmoid(-margin) for margin in (2, 3, 1))
    found = program.bradley_terry(scores, contrary=0.25).item()
    assert found == pytest.approx(0.75 * sure + 0.25 * reversed_ones, rel=1e-5)


def test_contrary_judgements_bound_the_margin():
    margin = torch.tensor(0.0, requires_grad=True)
    optimizer = torch.optim.Adam([margin], 0.1)
    for _ in range(300):
        scores = torch.stack([margin, torch.tensor(0.0), 2 * margin])[None]
        optimizer.zero_grad()
        loss = program.bradley_terry(scores, contrary=0.05).sum()
        loss.backward()
        optimizer.step()
    assert abs(margin.grad.item()) < 1e-3
    assert 1 < margin.item() < math.log(19), "log-odds of 19 to 1 are shared by a margin and its double"


def test_accuracies_agree_with_hand_counts():
    scores = torch.tensor([[1.0, 0.0, 3.0], [2.0, 0.0, 1.0]])
    assert program.pair_accuracy(scores) == {
        "fluent > noto": 0.5,
        "fluent > twemoji": 1.0,
        "noto > twemoji": 1.0,
        "mean": 0.833,
    }
    logits = torch.eye(3).expand(2, 3, 3).clone()
    logits[0, 1] = torch.tensor([9.0, 0.0, 0.0])
    assert program.style_accuracy(logits) == {"noto": 1.0, "twemoji": 0.5, "fluent": 1.0, "mean": 0.833}


def test_a_style_that_is_no_class_counts_as_not_the_preferred_one(monkeypatch):
    logits = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 2.0], [1.0, 0.0, 3.0]]])
    three, four = (program.cross_entropy(x, contrary=0.05).item() for x in (logits[:, :3], logits))
    preferred = math.exp(3) / (math.e + 1 + math.exp(3))
    assert four - three == pytest.approx(-math.log(1 - preferred), rel=1e-5)
    monkeypatch.setattr(program, "STYLES", (*STYLES, "openmoji"))
    assert program.style_accuracy(logits) == {"noto": 1.0, "twemoji": 1.0, "fluent": 1.0, "openmoji": 0.0, "mean": 0.75}


def test_a_trained_head_takes_features_as_they_are():
    generator = torch.Generator().manual_seed(0)
    taste = torch.randn(8, generator=generator)
    features = 5 + 0.01 * torch.randn(64, 3, 8, generator=generator)
    order = (features @ taste).argsort(1)  # sorted into the rule's order of preference
    worst_to_best = torch.empty_like(order)
    worst_to_best[:] = torch.tensor([STYLES.index(style) for style in reversed(program.PREFERENCE)])
    ranked = torch.zeros_like(features).scatter(
        1, worst_to_best[..., None].expand_as(features), features.gather(1, order[..., None].expand_as(features))
    )
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(8, 4), nn.SiLU(), nn.Linear(4, 1))
    settings = program.HeadSettings(num_steps=120, num_concepts=32, learning_rate=2e-2, dropout=0.0)
    program.train_head(head, ranked, lambda x, contrary: program.bradley_terry(x.squeeze(-1), contrary), settings)
    assert program.pair_accuracy(head(ranked).squeeze(-1))["mean"] > 0.9


def test_views_are_pictures_and_their_first_two_are_untouched():
    generator = torch.Generator().manual_seed(0)
    images, rebuilt = torch.rand(2, 4, 3, 16, 16, generator=generator)
    found = program.views(images, rebuilt, shift=2, seed=0)
    assert torch.equal(found[0], images)
    assert torch.equal(found[1], rebuilt)
    assert all(view.shape == images.shape and view.min() >= 0 and view.max() <= 1 for view in found)
    assert not torch.equal(found[2], images)
    again = program.views(images, rebuilt, shift=2, seed=0)
    assert all(torch.equal(first, second) for first, second in zip(found, again, strict=True))


def test_captions_of_the_test_split_are_never_drawn():
    concepts = teacher_concepts()[0][:5]
    captions = alignment.Captions(concepts)
    drawn = {tuple(rows) for rows in captions.rows[0, "en"]}
    for style in alignment.STYLE_OR_NONE:
        for caption in alignment.captions_of(concepts[0], style, "en"):
            assert (tuple(alignment.rows_of(caption)) in drawn) >= (alignment.split_of(caption) != "test")
    assert len(captions.rows[0, "en"]) < sum(
        len(alignment.captions_of(concepts[0], style, "en")) for style in alignment.STYLE_OR_NONE
    )


def test_a_few_steps_align_pictures_with_names():
    concepts = teacher_concepts()[0][:8]
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 8, 1, 6, generator=generator) + 0.1 * torch.randn(2, 8, 3, 6, generator=generator)
    targets = torch.nn.functional.normalize(torch.randn(8, MEANING_WIDTH, generator=generator), dim=-1)
    torch.manual_seed(0)
    encoder, losses = DualEncoder(picture_width=6), []
    settings = alignment.AlignmentSettings(num_steps=40, num_concepts=8, dropout=0.0)
    alignment.train(
        encoder,
        features,
        range(8),
        alignment.Captions(concepts),
        targets,
        settings,
        lambda step, loss: losses.append(loss),
    )
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert encoder.scale <= alignment.MAX_SCALE
    found = alignment.retrieval(encoder, features[0], concepts, ())
    assert found["en"]["R@1"] > 0.8
    assert found["zh"]["R@1"] > 0.8
