"""Rewards built from a recipe's words, asked in chunks, normalised and added up."""

import json

import pytest
import torch

from mlcm_rl.recipe import Reward
from mlcm_rl.rewards import Combined, Member, RewardError, RunningNormaliser, build, combine, score_in_chunks
from mlcm_rl.rewards.weights import MissingWeights


class Mean:
    """The mean of a picture, and of nothing else."""

    differentiable, needs_prompt, languages = True, False, ()

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))


class Square(Mean):
    def __call__(self, images, prompts):
        return 100 * images.square().mean((1, 2, 3))


class EnglishOnly(Mean):
    needs_prompt, languages = True, ("en",)


SETTABLE = """
class Reward:
    differentiable, needs_prompt, languages = False, False, ()

    def __init__(self, device, dtype, threshold, *, version="v2"):
        self.built = (device, dtype, threshold, version)
        if version == "v0":
            raise OSError("no such version")
"""


def pictures(count, seed=0):
    return torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def combined(**settings):
    return Combined([Member("mean", Mean(), weight=2.0), Member("square", Square(), weight=-0.5)], **settings)


# ---- built ----


def test_a_reward_is_built_with_its_settings_on_its_own_device_and_type(installed):
    name = installed("settable", SETTABLE)
    run = torch.device("meta")
    assert build(Reward(name=name, settings={"threshold": 3}), run).built == (run, torch.float32, 3, "v2")
    config = Reward(name=name, settings={"threshold": 3, "version": "v1"}, dtype="bfloat16", device="cpu")
    assert build(config, run).built == (torch.device("cpu"), torch.bfloat16, 3, "v1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"treshold": 3}}, "unknown setting 'treshold'; did you mean threshold.; its settings are thr"),
        ({"settings": {}}, "the setting 'threshold' is missing; its settings are threshold, version"),
        ({"settings": {"threshold": 3, "version": "v0"}}, "cannot be built: OSError: no such version"),
        ({"settings": {"threshold": 3}, "device": "abacus"}, "cannot be built: RuntimeError: .*abacus"),
    ],
)
def test_what_cannot_be_built_says_which_reward_and_why(installed, changes, message):
    installed("settable", SETTABLE)
    with pytest.raises(RewardError, match=f"^reward settable:? {message}"):
        build(Reward(name="settable", **changes), "cpu")


def test_a_reward_without_settings_says_so_and_an_unknown_name_its_neighbours():
    with pytest.raises(RewardError, match="reward brightness: unknown setting 'x'; it takes no settings"):
        build(Reward(name="brightness", settings={"x": 1}), "cpu")
    with pytest.raises(RewardError, match=r"reward brightnes cannot be used: .*the nearest names are brightness"):
        build(Reward(name="brightnes"), "cpu")


def test_an_absent_dependency_is_named_with_the_reward_that_needs_it(installed):
    installed("broken", "import a_package_that_nobody_has\n")
    with pytest.raises(RewardError, match="reward broken cannot be used: No module named 'a_package_that_nobody_has'"):
        build(Reward(name="broken"), "cpu")


def test_absent_weights_name_the_command_that_fetches_them(installed, tmp_path, monkeypatch):
    monkeypatch.setenv("MLCM_RL_CACHE", str(tmp_path))
    installed(
        "heavy",
        "from mlcm_rl.rewards import HubFile, Weights\n"
        "HEAD = Weights('head', HubFile('a/b', 'c' * 40, 'head.safetensors'), None, 'MIT')\n"
        "class Reward:\n"
        "    differentiable, needs_prompt, languages, weights = False, False, (), (HEAD,)\n"
        "    def __init__(self, device, dtype):\n"
        "        HEAD.path()\n",
    )
    with pytest.raises(MissingWeights, match=r"reward heavy: the weights head are not in .*`mlcm rewards fetch heavy`"):
        build(Reward(name="heavy"), "cpu")


def test_rewards_of_a_recipe_are_combined_with_their_weights():
    both = combine(
        [Reward(name="brightness", weight=3.0), Reward(name="sharpness", weight=-1.0)], "cpu", normalise=False
    )
    total, raw = both(pictures(4), [""] * 4)
    assert list(raw) == ["brightness", "sharpness"]
    torch.testing.assert_close(total, 3 * raw["brightness"] - raw["sharpness"])


# ---- chunks ----


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 5, 7, 100])
def test_scores_and_gradients_are_the_same_whatever_the_chunk(chunk_size):
    images = pictures(7).requires_grad_()
    scores = score_in_chunks(Square(), "square", images, [""] * 7, chunk_size)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    torch.testing.assert_close(scores, Square()(images, [""] * 7), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, 200 * images.detach() / 48)


def test_no_chunk_is_larger_than_asked_and_each_has_its_own_prompts():
    chunks = []

    def recording(images, prompts):
        chunks.append((len(images), prompts))
        return torch.zeros(len(images))

    score_in_chunks(recording, "recording", pictures(5), list("abcde"), 2)
    assert chunks == [(2, ["a", "b"]), (2, ["c", "d"]), (1, ["e"])]


# ---- normalised ----


def test_the_running_mean_and_deviation_are_those_of_all_scores_at_once():
    scores = 1e3 + torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    normaliser = RunningNormaliser()
    for part in scores.split([1, 30, 2, 7, 60]):
        normaliser.update(part)
    assert normaliser.count == 100
    assert normaliser.mean == pytest.approx(scores.mean().item(), rel=1e-14)
    assert normaliser.std == pytest.approx(scores.std().item(), rel=1e-10)


def test_one_score_and_equal_scores_do_not_divide_by_zero():
    normaliser = RunningNormaliser()
    normaliser.update(torch.tensor([5.0]))
    assert normaliser(torch.tensor([5.0, 6.0])).tolist() == [0.0, 1.0]
    normaliser.update(torch.tensor([5.0, 5.0]))
    assert normaliser(torch.tensor([5.0])).tolist() == [0.0]
    assert normaliser.std == 1e-4


def with_statistics(rewards: Combined, images: torch.Tensor) -> Combined:
    """`rewards` with their scores of `images` in its statistics."""
    rewards.take_in(rewards.raw(images, [""] * len(images)))
    return rewards


def test_a_batch_is_normalised_by_all_that_was_taken_in_before_it_however_it_is_split():
    first, second = pictures(6, seed=1), pictures(5, seed=2)
    rewards = with_statistics(with_statistics(combined(), first), second)
    earlier = rewards.raw(torch.cat([first, second]), [""] * 11)
    images = pictures(4, seed=3)
    total, raw = rewards(images, [""] * 4)
    expected = sum(w * (raw[n] - earlier[n].mean()) / earlier[n].std() for n, w in (("mean", 2.0), ("square", -0.5)))
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)
    parts = torch.cat([rewards(part, [""] * 2)[0] for part in images.split(2)])
    torch.testing.assert_close(parts, total)


def test_what_is_logged_as_normalised_adds_up_to_the_total():
    rewards = with_statistics(combined(), pictures(6, seed=1))
    total, raw = rewards(pictures(6), [""] * 6)
    terms = rewards.normalised(raw)
    torch.testing.assert_close(total, 2.0 * terms["mean"] - 0.5 * terms["square"])


def test_the_gradient_of_the_total_is_that_of_the_raw_scores_over_their_deviation():
    rewards = with_statistics(combined(), pictures(6, seed=1))
    images = pictures(6).requires_grad_()
    total, _ = rewards(images, [""] * 6)
    (gradient,) = torch.autograd.grad(total.sum(), images)
    mean, square = (rewards.normalisers[name].std for name in ("mean", "square"))
    torch.testing.assert_close(gradient, 2.0 / 48 / mean - 0.5 * 200 * images.detach() / 48 / square)


def test_without_normalising_the_total_is_of_raw_scores():
    total, raw = combined(normalise=False)(pictures(3), [""] * 3)
    torch.testing.assert_close(total, 2.0 * raw["mean"] - 0.5 * raw["square"])


def test_held_out_scoring_leaves_the_statistics_alone():
    rewards = combined()
    rewards.raw(pictures(4), [""] * 4)
    assert rewards.normalisers["mean"] == RunningNormaliser()


def test_a_state_that_went_through_json_continues_bit_for_bit():
    straight, saved = combined(), combined()
    for seed in range(3):
        with_statistics(straight, pictures(5, seed))
        with_statistics(saved, pictures(5, seed))
    resumed = combined()
    resumed.load_state(json.loads(json.dumps(saved.state())))
    for seed in range(3, 6):
        expected, actual = (rewards(pictures(5, seed), [""] * 5)[0] for rewards in (straight, resumed))
        assert torch.equal(expected, actual)
        with_statistics(straight, pictures(5, seed))
        with_statistics(resumed, pictures(5, seed))
    assert resumed.state() == straight.state()


def test_a_state_of_other_rewards_is_refused():
    with pytest.raises(ValueError, match="statistics of the rewards mean, not of mean, square"):
        combined().load_state({"mean": {"count": 1, "mean": 0.0, "squares": 0.0}})


def test_asking_changes_no_statistics_and_scores_of_others_are_passed_over():
    rewards = combined()
    rewards(pictures(3), [""] * 3)
    assert rewards.normalisers["mean"].count == 0
    rewards.take_in({"mean": torch.tensor([7.0, 8.0, 9.0]), "held out": torch.ones(3)})
    assert (rewards.normalisers["mean"].mean, rewards.normalisers["mean"].count) == (8.0, 3)
    assert rewards.normalisers.keys() == {"mean", "square"}


# ---- refused ----


def test_a_nan_stops_with_the_name_of_the_reward_before_any_statistics_change():
    class Nan(Mean):
        def __call__(self, images, prompts):
            return images.mean((1, 2, 3)) * float("nan")

    rewards = Combined([Member("mean", Mean()), Member("poisoned", Nan())])
    with pytest.raises(RewardError, match="reward poisoned: returned nan"):
        rewards(pictures(2), ["a", "b"])
    assert rewards.normalisers["mean"].count == 0


def test_a_prompt_in_a_language_that_a_reward_does_not_read_is_refused():
    rewards = Combined([Member("mean", Mean()), Member("english", EnglishOnly())])
    with pytest.raises(RewardError, match="reward english reads prompts in en, not in zh"):
        rewards(pictures(2), ["a cat", "一只猫"])
    rewards(pictures(2), ["a cat", "一只猫"], languages=["en", "en"])  # what the prompt file says is believed
    with pytest.raises(RewardError, match="not in fr"):
        rewards(pictures(1), ["un chat"], languages=["fr"])


def test_a_reward_named_twice_is_refused():
    with pytest.raises(ValueError, match="named twice: mean, mean"):
        Combined([Member("mean", Mean()), Member("mean", Square())])
