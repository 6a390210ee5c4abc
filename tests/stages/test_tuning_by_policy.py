"""Policy gradient: the reward rises, iterations see each other, advantages reach the loss, noise is required."""

import pytest
from tuning_runs import AT_THE_END, records, tune

from mlcm_rl.training.loop import Runtime


@pytest.mark.slow
def test_policy_gradient_raises_the_reward(distilled, tmp_path):
    """Over three seeds and both kinds of student the gain was 0.54 to 1.56; in groups of 4, -0.2 to 1.5."""
    settings = {"num_steps": 40, "learning_rate": 3e-3, "batch_size": 32, "num_generations": 8, "beta": 0.0}
    folder = tune(distilled, tmp_path, "policy", clip_range=0.1, **settings, **AT_THE_END)
    assert records(folder)[-1]["guard/trained_gain"] > 0.1


def test_iterations_in_bfloat16_see_the_updates_before_them(distilled, tmp_path, monkeypatch):
    norms, original = [], Runtime.backward

    def backward(self, *arguments):
        result = original(self, *arguments)
        norms.append(result["grad_norm"])
        return result

    monkeypatch.setattr(Runtime, "backward", backward)
    changes = {"precision": "bf16", "num_iterations": 3, "num_steps": 1, "clip_range": 10.0, "learning_rate": 1e-1}
    tune(distilled, tmp_path, "policy", **changes)
    assert len(set(norms)) == 3


def test_undivided_advantages_reach_the_policys_loss(distilled, tmp_path):
    """Adam hides a scale that all prompts share; the first iteration's gradient norm, unclipped, does not."""
    norms = [
        records(tune(distilled, tmp_path / scale, "policy", scale_rewards=scale, num_iterations=1))[0]["grad_norm"]
        for scale in ("group", "none")
    ]
    assert norms[0] != pytest.approx(norms[1], rel=0.05)


def test_a_sampler_without_noise_is_refused_by_policy_gradient(distilled, tmp_path):
    with pytest.raises(ValueError, match="set gamma"):
        tune(distilled, tmp_path, "policy", gamma=None)
