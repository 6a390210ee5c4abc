"""The few-step sampler on tiny teachers: what it evaluates, draws, and carries gradient through."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

import tiny
from mlcm_rl.equations.segments import time_grid
from mlcm_rl.evaluation import undistilled
from mlcm_rl.models import sampler, students
from mlcm_rl.recipe import Lora
from mlcm_rl.stages import trajectories

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


# Keys and values of the prompts, computed once


@contextmanager
def projections(denoiser):
    """Yield the list of the cross-attention's key and value projections, as they are computed."""
    calls, forward = [], torch.nn.Linear.forward
    names = {
        getattr(layer, "base_layer", layer): name  # of a LoRA
        for name, layer in denoiser.named_modules()
        if name.endswith((".attn2.to_k", ".attn2.to_v"))
    }

    def counted(self, x):
        if self in names:
            calls.append(names[self])
        return forward(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Linear, "forward", counted)
        yield calls


def without_same_prompts(monkeypatch, base):
    monkeypatch.setattr(type(base), "same_prompts", lambda self, denoiser: nullcontext())


def test_keys_and_values_of_a_trajectory_are_computed_once_and_are_the_same_bits(base, monkeypatch):
    conditioning, noise = base.encode_prompts(["a cat", "red apple"]), base.noise(torch.Generator().manual_seed(0), 2)
    dropped = base.unconditional(2)
    ways = {
        "trajectories": lambda: trajectories.solve(base, conditioning, noise, time_grid(8), 3.0),
        **{
            solver: lambda solver=solver: (
                undistilled.sample(base, conditioning, dropped, noise, solver, num_steps=4, guidance_scale=3.0),
            )
            for solver in undistilled.LABELS
        },
    }
    results = {}
    for name, way in ways.items():
        with projections(base.denoiser) as calls:
            results[name] = way()
        assert len(calls) == len(set(calls)) > 0, name
    without_same_prompts(monkeypatch, base)
    for name, way in ways.items():
        assert all(torch.equal(*pair) for pair in zip(results[name], way(), strict=True)), name


@pytest.mark.parametrize("autocast", [False, True])
def test_a_student_without_gradient_computes_them_once_too(sdxl, autocast, monkeypatch):
    student = students.student(sdxl, Lora(rank=4, alpha=4.0), seed=0)
    tiny.perturb(students.trainable_parameters(student))
    noise = sdxl.noise(torch.Generator().manual_seed(0), 2)

    def sample(grad_steps=0):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), projections(student) as calls:
            x0 = sampler.sample(
                sdxl, student, sdxl.encode_prompts(["a cat", "dog"]), noise, TIMES, 0.0, grad_steps=grad_steps
            )
            return x0.detach(), len(calls) / len(set(calls))

    once, several = sample(), sample(grad_steps=2)
    assert (once[1], several[1]) == (1, len(TIMES))  # a step with gradient has a graph of its own
    assert torch.equal(once[0], several[0])
    states, x0s = sampler.rollout(sdxl, student, sdxl.encode_prompts(["a cat", "dog"]), noise, TIMES, 0.0)
    without_same_prompts(monkeypatch, sdxl)
    assert torch.equal(once[0], sample()[0])
    expected = sampler.rollout(sdxl, student, sdxl.encode_prompts(["a cat", "dog"]), noise, TIMES, 0.0)
    assert torch.equal(states, expected[0])
    assert torch.equal(x0s, expected[1])
    alone = sampler.sample(sdxl, student, sdxl.encode_prompts(["a cat", "dog"]), noise, TIMES, 0.0)
    assert torch.equal(x0s[-1], alone)


def test_after_the_block_every_layer_computes_again(sdxl):
    at = (torch.randn(1, *sdxl.latent_shape), torch.tensor([500]))
    cat, dog = (sdxl.encode_prompts([prompt]) for prompt in ("a cat", "a dog"))
    expected = [sdxl.predict(sdxl.denoiser, *at, prompt) for prompt in (cat, dog)]
    with sdxl.same_prompts(sdxl.denoiser):
        assert torch.equal(sdxl.predict(sdxl.denoiser, *at, cat), expected[0])
    with pytest.raises(RuntimeError, match="channels"), sdxl.same_prompts(sdxl.denoiser):
        sdxl.predict(sdxl.denoiser, torch.randn(1, 1, 8, 8), at[1], cat)
    assert torch.equal(sdxl.predict(sdxl.denoiser, *at, dog), expected[1])
    assert not any("forward" in vars(layer) for layer in sdxl.denoiser.modules())
