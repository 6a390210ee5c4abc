"""A taste becomes a reward model: what is learnt from pairs, what the card says, and what tuning by it does."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import runs
from mlcm_rl import pipeline
from mlcm_rl.data.pairs import PairTable
from mlcm_rl.data.prompts import Prompt
from mlcm_rl.pipeline import finished_runs
from mlcm_rl.pipeline.fingerprint import locate
from mlcm_rl.recipe import Evaluate, Reward, TrainReward
from mlcm_rl.rewards import RewardError, build
from mlcm_rl.rewards import card as reward_card
from mlcm_rl.rewards.card import accuracy, doubt
from mlcm_rl.rewards.check import check
from mlcm_rl.rewards.heads import FeatureScale, dropout, held_out_pairs
from mlcm_rl.stages import train_reward

NUM_PROMPTS, PAIRS_OF_ONE = 10, 3


def write_taste(folder: Path) -> str:
    """Pairs of noisy pictures of many colours, of which the brighter one is always chosen."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, rows = torch.Generator().manual_seed(0), []
    for i in range(NUM_PROMPTS * PAIRS_OF_ONE):
        colours = torch.rand(2, 3, 1, 1, generator=generator) * 0.7 + 0.15
        pictures = (colours + 0.15 * torch.randn(2, 3, 16, 16, generator=generator)).clamp(0, 1)
        order = pictures.mean((1, 2, 3)).argsort(descending=True)
        row = {"prompt": f"thing {i % NUM_PROMPTS}", "chosen": f"{i}-chosen.png", "rejected": f"{i}-rejected.png"}
        for name, picture in zip(("chosen", "rejected"), pictures[order], strict=True):
            pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST).save(folder / row[name])
        rows.append(row)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder)


def stage(pairs: str, **changes) -> TrainReward:
    settings = {"num_steps": 150, "batch_size": 16, "dropout": 0.2, "log_every": 5, "held_out": 0.3}
    return TrainReward(pairs=pairs, **(settings | changes))


@pytest.fixture(scope="module")
def taste(tmp_path_factory) -> str:
    return write_taste(tmp_path_factory.mktemp("taste") / "pairs")


@pytest.fixture(scope="module")
def learnt(taste, tiny_sdxl, tmp_path_factory):
    """A recipe of this one stage, and what it has left, run through the pipeline."""
    recipe = runs.recipe(tiny_sdxl, tmp_path_factory.mktemp("learnt"), [stage(taste)])
    return recipe, pipeline.run(recipe)[0].folder


def trained_by(folder: Path, **changes):
    return build(Reward(name="trained", settings={"folder": str(folder)}, **changes), "cpu")


# ---- what is learnt ----


@pytest.mark.parametrize("backbone", ["efficientnet_lite0", "mobilenet_v2"])
def test_a_known_rule_is_learnt_and_decides_pairs_never_trained_on(taste, tiny_sdxl, tmp_path, backbone):
    recipe = runs.recipe(tiny_sdxl, tmp_path, [stage(taste, backbone=backbone)])
    train_reward.run(recipe.stages[0], recipe, {}, tmp_path)
    measured = json.loads((tmp_path / "measured.json").read_text())
    assert measured["held_out_pairs"] == 9
    assert measured["held_out"]["mean"] > 0.75
    greys = torch.tensor([0.3, 0.5, 0.7]).view(3, 1, 1, 1).expand(3, 3, 64, 64)
    colours = torch.tensor([[0.2, 0.3, 0.25], [0.4, 0.5, 0.45], [0.8, 0.7, 0.75]]).view(3, 3, 1, 1).expand_as(greys)
    noise = 0.1 * torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    scores = trained_by(tmp_path)(colours + noise, [""] * 3)
    assert scores.argsort().tolist() == [0, 1, 2]


def test_the_reward_keeps_the_contract(learnt):
    checks = check(trained_by(learnt[1]), "trained", torch.rand(4, 3, 64, 64, generator=torch.manual_seed(0)), [""] * 4)
    assert [(one.name, one.detail) for one in checks if not one.passed] == []


def test_held_out_pairs_are_whole_prompts_and_never_trained_on(taste):
    prompts = PairTable(taste).prompts
    held_out = held_out_pairs(prompts, 0.3, seed=0)
    texts = [
        {prompt.prompt for prompt, out in zip(prompts, held_out.tolist(), strict=True) if out == side}
        for side in (True, False)
    ]
    assert [len(one) for one in texts] == [3, 7]
    assert not texts[0] & texts[1]
    assert not torch.equal(held_out, held_out_pairs(prompts, 0.3, seed=1))
    for share, expected in ((0.001, 1), (0.999, 9)):
        assert held_out_pairs(prompts, share, seed=0).sum() == expected * PAIRS_OF_ONE
    with pytest.raises(ValueError, match="all pairs are of one prompt, 'a cat'"):
        held_out_pairs([Prompt("a cat", "en")] * 5, 0.2, seed=0)


def test_the_scale_folded_into_the_first_layer_changes_no_answer():
    features = 3 + 0.01 * torch.randn(7, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    head, scale = torch.nn.Linear(5, 4).double(), FeatureScale.of(features)
    assert scale(features).mean((0, 1)).abs().max() < 1e-9
    assert scale(features).square().mean().item() == pytest.approx(1.0)
    expected = head(scale(features))
    scale.fold_into(head)
    torch.testing.assert_close(head(features), expected)


def test_dropped_features_keep_their_mean():
    result = dropout(torch.ones(200, 50), 0.25, torch.Generator().manual_seed(0))
    assert result.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert result.mean().item() == pytest.approx(1.0, abs=0.02)


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(taste, tiny_sdxl, tmp_path):
    recipe = runs.recipe(tiny_sdxl, tmp_path, [stage(taste, num_steps=6, save_every=2, held_out_every=3, log_every=1)])
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    train_reward.run(recipe.stages[0], recipe, {}, whole)
    with runs.crashing_at(3):
        train_reward.run(recipe.stages[0], recipe, {}, cut)
    train_reward.run(recipe.stages[0], recipe, {}, cut)
    for name in ("log.jsonl", "measured.json", "card.md", "reward.json"):
        assert (whole / name).read_text() == (cut / name).read_text()
    expected, found = (load_file(folder / "head.safetensors") for folder in (whole, cut))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_micro_batches_change_nothing_but_rounding(taste, tiny_sdxl, tmp_path, monkeypatch):
    monkeypatch.setattr(reward_card, "write", lambda *arguments: None)
    heads = []
    for parts in (1, 4):
        settings = {"num_steps": 3, "gradient_accumulation": parts}
        recipe = runs.recipe(tiny_sdxl, tmp_path, [stage(taste, **settings)])
        (tmp_path / str(parts)).mkdir()
        train_reward.run(recipe.stages[0], recipe, {}, tmp_path / str(parts))
        heads.append(load_file(tmp_path / str(parts) / "head.safetensors"))
    for name, value in heads[0].items():
        torch.testing.assert_close(heads[1][name], value, rtol=1e-3, atol=1e-4)


# ---- the card ----


def test_the_card_says_what_was_measured(learnt):
    recipe, folder = learnt
    measured, card = json.loads((folder / "measured.json").read_text()), (folder / "card.md").read_text()
    table = PairTable(recipe.stages[0].pairs)
    scores = torch.stack(
        [
            trained_by(folder)(images[0], ["", ""])
            for images in (table.pictures(i, 64)[None] / 255 for i in range(len(table)))
        ]
    )
    held_out = held_out_pairs(table.prompts, 0.3, recipe.seed)
    assert measured["range"]["chosen"] == pytest.approx(scores[held_out, 0].mean().item(), rel=1e-3)
    assert measured["range"]["deviation"] == pytest.approx(scores.std().item(), rel=1e-3)
    blank = trained_by(folder)(torch.ones(1, 3, 64, 64), [""]).item()
    assert measured["blanks"]["white"] == pytest.approx(blank, rel=1e-3)
    assert measured["climb"]["rise"] > 0.1
    assert "21 pairs of 7 prompts (30 pairs in en)" in card
    assert "9 pairs of 3 other prompts" in card
    assert f"white {measured['blanks']['white']:.3g}" in card
    assert "{" not in card.replace("{name: trained}", "").replace("{folder: ...}", "")
    with Image.open(folder / "training.png") as plot:
        assert plot.width > 1000


def test_accuracy_is_a_mean_over_prompts_and_a_tie_is_half_right():
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [3.0, 1.0]])
    found = accuracy(scores, ["a", "a", "b", "c"])
    assert found == {
        "mean": pytest.approx((0.5 + 0.5 + 1) / 3, rel=1e-5),
        "se": pytest.approx(1 / 6, rel=1e-5),
        "num_prompts": 3,
    }


@pytest.mark.parametrize(
    ("mean", "error", "told"),
    [
        (0.6, 0.06, "Not told from a coin by 20 prompts"),
        (0.7, None, "Not told from a coin"),
        (1.0, 0.0, "None was wrong, which 20 prompts allow while up to 15% of all are"),
        (0.8, 0.05, ""),
    ],
)
def test_an_accuracy_that_says_little_is_said_to(mean, error, told):
    found = doubt({"mean": mean, "se": error, "num_prompts": 20})
    assert told in found
    assert bool(told) == bool(found)


# ---- the folder as a reward ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 9}, "has format 9, this version reads 1: train it again"),
        ({"backbone": "resnet"}, "stands on resnet; known backbones are efficientnet_lite0, mobilenet_v2"),
        ({"backbone_sha256": "0"}, "was trained on other weights of efficientnet_lite0 than are shipped here"),
    ],
)
def test_a_folder_of_other_features_or_format_is_refused(learnt, tmp_path, changes, message):
    described = json.loads((learnt[1] / "reward.json").read_text())
    (tmp_path / "reward.json").write_text(json.dumps(described | changes))
    with pytest.raises(RewardError, match=f"reward trained cannot be built: .*{message}"):
        trained_by(tmp_path)


def test_a_folder_that_holds_no_reward_and_none_at_all_are_refused(tmp_path):
    with pytest.raises(RewardError, match=r"holds no reward\.json: `folder` is what a train_reward stage has left"):
        trained_by(tmp_path)
    with pytest.raises(RewardError, match="the setting 'folder' is missing"):
        build(Reward(name="trained"), "cpu")


def test_other_weights_under_the_same_path_are_another_fingerprint(learnt, tiny_sdxl, tmp_path):
    recipe, folder = learnt
    copy = tmp_path / "taste"
    copy.mkdir()
    for name in ("reward.json", "head.safetensors"):
        (copy / name).write_bytes((folder / name).read_bytes())
    prompts = runs.write_prompts(tmp_path)
    rewards = [{"name": "trained", "settings": {"folder": str(copy)}}]
    asking = [runs.tuning("feedback", prompts, rewards=rewards), Evaluate(prompts=prompts, rewards=rewards)]
    guard = {"rewards": rewards, "num_prompts": 4}
    asking.append(runs.tuning("dpo", prompts, guard=guard))
    before = [locate(one, recipe, []).fingerprint for one in asking]
    assert before == [locate(one, recipe, []).fingerprint for one in asking]
    (copy / "manifest.json").write_text("{}")  # says when it was made, not what it is
    assert before == [locate(one, recipe, []).fingerprint for one in asking]
    (copy / "head.safetensors").write_bytes(b"another head")
    after = [locate(one, recipe, []).fingerprint for one in asking]
    assert all(old != new for old, new in zip(before, after, strict=True))


def test_a_taste_is_trained_once_and_tuning_by_it_raises_its_rule(taste, tiny_sdxl, tmp_path):
    """Brightness is told only by pairs; feedback on what was learnt from them makes brighter pictures."""
    prompts = runs.write_prompts(tmp_path)
    settings = {"num_steps": 6, "learning_rate": 3e-2, "num_grad_steps": 2, "rewards": [{"name": "trained"}]}
    guard = {"rewards": [{"name": "brightness"}], "num_prompts": 4, "every": 3}
    tuned = runs.tuning("feedback", prompts, **settings, guard=guard)
    evaluate = Evaluate(
        prompts=prompts,
        num_prompts=2,
        sampling_steps=[2],
        teacher_steps=[2],
        gammas=[0.0],
        batch_size=4,
        rewards=["brightness", {"name": "trained", "chunk_size": 2}],
    )
    taught = stage(taste, resolution=16)  # what the student draws
    stages = [taught, runs.trajectories(prompts), runs.distill(num_segments=[2]), tuned, evaluate]
    recipe = runs.recipe(tiny_sdxl, tmp_path, stages)
    head, _, _, feedback, report = pipeline.run(recipe)
    look = [json.loads(line) for line in (feedback.folder / "log.jsonl").read_text().splitlines()][-1]
    assert look["guard/trained_gain"] > 0.3
    assert look["guard/held_out_gain"] > 0.5  # the rule itself, which nothing but pairs has told
    assert look["guard/win_rate/brightness"] == 1.0
    rows = json.loads((report.folder / "report.json").read_text())["rows"]
    assert all({"reward/brightness", "reward/trained"} <= set(row["metrics"]) for row in rows)
    manifest = json.loads((feedback.folder / "manifest.json").read_text())
    assert manifest["parents"]["train_reward"] == head.folder.name
    again = recipe.model_copy(update={"stages": [stage(taste, num_steps=151), *stages[1:]]})
    planned = pipeline.plan(again)
    assert [one.done for one in planned] == [False, True, True, False, False]
    assert planned[0].network_evaluations == 0
    other = finished_runs.evaluate(tmp_path / "runs" / "small", num_prompts=1)
    assert json.loads((other / "manifest.json").read_text())["parents"]["train_reward"] == head.folder.name
