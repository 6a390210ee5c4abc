"""The few-step sampler on tiny teachers: what it evaluates, draws, and carries gradient through."""

import pytest
import torch

from mlcm_rl.models import sampler

TIMES = [999, 749, 499, 249]


class Recorder(torch.nn.Module):
    """A denoiser that says a linear function of its input and remembers what it was asked."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(0.3))
        self.calls = []

    def forward(self, x_t, t, **conditions):
        self.calls.append(
            (t.tolist(), conditions["timestep_cond"], self.gain.requires_grad and torch.is_grad_enabled())
        )
        return (self.gain * x_t,)


def generators_of(base, *seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_deterministic_steps_are_ddim_by_hand(base):
    denoiser, noise = Recorder(), base.noise(torch.Generator().manual_seed(0), 2)
    sample = sampler.sample(base, denoiser, base.unconditional(2), noise, TIMES, gamma=0.0)
    x, alpha, sigma = noise.double(), base.schedule.alpha.double(), base.schedule.sigma.double()
    for t, s in zip(TIMES, [*TIMES[1:], 0], strict=True):
        if base.prediction_type == "epsilon":
            x0, eps = (x - sigma[t] * 0.3 * x) / alpha[t], 0.3 * x
        else:
            x0, eps = (alpha[t] - sigma[t] * 0.3) * x, (sigma[t] + alpha[t] * 0.3) * x
        x = alpha[s] * x0 + sigma[s] * eps
    torch.testing.assert_close(sample.double(), x0, atol=1e-4, rtol=1e-4)


def test_renoising_steps_draw_fresh_noise_in_order(base):
    noise = base.noise(torch.Generator().manual_seed(0), 2)
    denoiser = Recorder().requires_grad_(False)
    sample = sampler.sample(
        base, denoiser, base.unconditional(2), noise, [999, 499], 1.0, torch.Generator().manual_seed(9)
    )
    fresh = base.noise(torch.Generator().manual_seed(9), 2)
    at = [torch.full((2,), time) for time in (999, 499)]
    first = base.x0(denoiser, noise, at[0], base.unconditional(2))
    again = base.schedule.alpha[499] * first + base.schedule.sigma[499] * fresh
    assert torch.equal(sample, base.x0(denoiser, again, at[1], base.unconditional(2)))


def test_every_time_costs_one_evaluation_and_a_conditioned_student_is_told_each_target(base):
    noise = base.noise(torch.Generator().manual_seed(0), 2)
    plain, conditioned = Recorder(), Recorder()
    sampler.sample(base, plain, base.unconditional(2), noise, TIMES, gamma=0.0)
    sampler.sample(base, conditioned, base.unconditional(2), noise, TIMES, gamma=0.0, conditioned=True)
    assert [call[0] for call in plain.calls] == [[time] * 2 for time in TIMES]
    assert all(call[1] is None for call in plain.calls)
    # at s = 0 the sinusoids are known by hand: sines 0, cosines 1 (whichever half they stand in)
    assert set(conditioned.calls[-1][1].flatten().tolist()) == {0.0, 1.0}
    assert len({tuple(call[1][0].tolist()) for call in conditioned.calls}) == len(TIMES)


@pytest.mark.parametrize("grad_steps", [0, 1, 2])
def test_only_the_last_steps_carry_gradient(sdxl, grad_steps):
    denoiser, noise = Recorder(), sdxl.noise(torch.Generator().manual_seed(0), 2)
    sample = sampler.sample(
        sdxl, denoiser, sdxl.unconditional(2), noise, TIMES, 1.0, generators_of(sdxl, 1, 2), grad_steps=grad_steps
    )
    assert [call[2] for call in denoiser.calls] == [False] * (4 - grad_steps) + [True] * grad_steps
    assert sample.requires_grad == (grad_steps > 0)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_a_picture_does_not_depend_on_the_batch_it_was_in(base, gamma):
    prompts, seeds = ["a cat", "a dog", "红苹果"], (11, 12, 13)
    together = sampler.sample(
        base, base.denoiser, base.encode_prompts(prompts), base.noise(generators_of(base, *seeds), 3), TIMES, gamma,
        generators=generators_of(base, 21, 22, 23),
    )  # fmt: skip
    alone = sampler.sample(
        base, base.denoiser, base.encode_prompts(prompts[1:2]), base.noise(generators_of(base, 12), 1), TIMES, gamma,
        generators=generators_of(base, 22),
    )  # fmt: skip
    torch.testing.assert_close(together[1:2], alone, atol=1e-3 * alone.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("times", [[], [499, 749], [999, 0], [999, 999]])
def test_times_that_do_not_descend_to_above_zero_are_refused(sdxl, times):
    noise = sdxl.noise(torch.Generator().manual_seed(0), 1)
    with pytest.raises(ValueError, match="times"):
        sampler.sample(sdxl, sdxl.denoiser, sdxl.unconditional(1), noise, times, 0.0)
