"""The terms over every family of teachers: the fake score starts as the teacher, and heads read its features."""

from dataclasses import replace

import pytest
import torch

import tiny
from mlcm_rl.models import heads
from mlcm_rl.models.base import Base
from mlcm_rl.models.features import MOST_BLOCKS, features
from mlcm_rl.models.terms import Adversary, DistributionMatching, Made, Samples
from mlcm_rl.recipe.terms import Adversarial, Fake, Matching

PROMPTS = ["a red apple, 3d", "熊猫"]
FAKE = Fake(rank=2, alpha=2.0)
CLEAN = torch.zeros(2, dtype=torch.int64)


@pytest.fixture(scope="module")
def teacher(case, folder) -> Base:
    return case.load(folder)


def samples(base: Base):
    """x0 (2, C, H, W), the conditioning of two prompts, and rows of everything."""
    return base.noise(torch.Generator().manual_seed(4), 2), base.encode_prompts(PROMPTS)


def check_matching(base: Base) -> None:
    """Without guidance a new fake score is the teacher, so that nothing is matched; trained, it moves the samples."""
    x0, conditioning = samples(base)
    scale = base.teacher.guidance_scale if base.teacher.evaluations == 1 else 1.0
    term = DistributionMatching(Matching(fake=FAKE, guidance_scale=scale), base, seed=0)
    noised = term.draw(torch.Generator().manual_seed(1), 2, CLEAN)
    student = Samples(torch.arange(2), x0.clone().requires_grad_(), conditioning)
    assert term.loss(student, noised).tolist() == [0.0, 0.0]
    sampled = Samples(torch.arange(2), x0, conditioning)
    made = Made(sampled, torch.ones(2), sampled)
    term.network_loss(made, noised).sum().backward()
    trained = [value for value in term.network.parameters() if value.requires_grad]
    assert any(value.grad.abs().sum() > 0 for value in trained if value.grad is not None)
    assert all(value.grad is None for value in base.denoiser.parameters())
    tiny.perturb(trained, seed=1)
    term.loss(student, noised).sum().backward()
    assert (student.x0.grad.flatten(1).abs().amax(1) > 0).all()


def check_adversary(base: Base, sees_start: bool = False, loss: str = "hinge") -> None:
    """The student's gradient comes through the teacher, which has none itself; heads see real and fake apart."""
    x0, conditioning = samples(base)
    term = Adversary(Adversarial(width=4, gradient_penalty=0.1, sees_start=sees_start, loss=loss), base, seed=0)
    noised = term.draw(torch.Generator().manual_seed(1), 2, CLEAN)
    start = base.noise(torch.Generator().manual_seed(5), 2), torch.full((2,), 999)
    student = Samples(torch.arange(2), x0.clone().requires_grad_(), conditioning, start, target=-x0)
    term.loss(student, noised).sum().backward()
    assert (student.x0.grad.flatten(1).abs().amax(1) > 0).all()
    assert all(value.grad is None for value in (*term.network.parameters(), *base.denoiser.parameters()))
    made = Made(replace(student, x0=x0), torch.ones(2), None)
    loss = term.network_loss(made, noised)
    loss.sum().backward()
    assert loss.shape == (2,)
    assert all(value.grad is not None for value in term.network.parameters())
    read = features(base, *noised.on(base, x0), conditioning)
    assert 2 <= len(read) <= MOST_BLOCKS
    shapes = heads.shapes_of(base, base.unconditional(1))
    assert [one.shape[1] for one in read] == [shape[0] for shape in shapes]


def test_unets_match_distributions(base):
    check_matching(base)


def test_heads_read_unets(base):
    check_adversary(base)
    check_adversary(base, sees_start=True, loss="relativistic")


@pytest.mark.slow
def test_every_other_family_matches_distributions(teacher):
    check_matching(teacher)


@pytest.mark.slow
def test_heads_read_every_other_family(teacher):
    check_adversary(teacher)
    check_adversary(teacher, sees_start=True, loss="relativistic")


def test_the_same_noise_is_on_all_that_is_compared(sdxl):
    """Rows of a draw are those of the whole batch, and a term's draw depends on its generator alone."""
    term = DistributionMatching(Matching(fake=FAKE, times=(0.5, 0.6)), sdxl, seed=0)
    whole, again = (term.draw(torch.Generator().manual_seed(3), 6, torch.zeros(6)) for _ in range(2))
    assert torch.equal(whole.noise, again.noise)
    assert torch.equal(whole.rows(torch.tensor([3, 2])).t, whole.t[[3, 2]])
    assert 499 <= whole.t.min() <= whole.t.max() <= 599


def test_of_all_jumps_both_ends_get_the_noise_of_a_time_above_their_own(sdxl):
    """By hand: alpha_t / alpha_s of a state, and noise for the rest of sigma_t^2; a clean term has times of all."""
    s = torch.tensor([0, 499, 874])
    term = Adversary(Adversarial(width=4, jumps="all", times=(0.5, 0.6)), sdxl, seed=0)
    noised = term.draw(torch.Generator().manual_seed(3), 3, s)
    low, high = ([int(time) for time in (part * (999 - s.double()) + s)] for part in (0.5, 0.6))
    assert all(first <= t <= last for first, t, last in zip(low, noised.t.tolist(), high, strict=True))
    x = torch.ones(3, *sdxl.latent_shape)
    x_t, t = noised.on(sdxl, x)
    for i in range(3):
        a, b = (sdxl.schedule.alpha[time] for time in (t[i], s[i]))
        p, q = (sdxl.schedule.sigma[time] for time in (t[i], s[i]))
        expected = a / b + (p**2 - (a / b * q) ** 2).sqrt() * noised.noise[i]
        torch.testing.assert_close(x_t[i], expected)
    assert torch.equal(noised.rows(torch.tensor([2])).s, s[2:])
    clean = Adversary(Adversarial(width=4, times=(0.5, 0.6)), sdxl, seed=0)
    other = clean.draw(torch.Generator().manual_seed(3), 3, s)
    assert other.s is None
    assert 499 <= other.t.min() <= other.t.max() <= 599


@pytest.mark.parametrize("sees_start", [False, True])
def test_heads_that_see_the_start_tell_an_end_from_that_of_another_jump(sdxl, sees_start):
    """Real are ends of their jumps, fake the same ends, exchanged: apart from where they began no head can tell them.

    Its two losses are then of the same logits a, and max(0, 1 - a) + max(0, 1 + a) is never below 2.
    """
    settings = Adversarial(width=16, learning_rate=0.03, gradient_penalty=0.0, sees_start=sees_start)
    term = Adversary(settings, sdxl, seed=0)
    optimizer = torch.optim.Adam(term.network.parameters(), lr=settings.learning_rate)
    ends, conditioning = sdxl.noise(torch.Generator().manual_seed(4), 2), sdxl.encode_prompts(["a", "a"])
    start = 0.5 * ends, torch.full((2,), 499)
    made = Made(Samples(torch.arange(2), ends.flip(0), conditioning, start, ends), torch.ones(2), None)
    noised = term.draw(torch.Generator().manual_seed(1), 2, CLEAN)
    noised = replace(noised, t=torch.ones(2, dtype=torch.int64), noise=torch.zeros_like(ends))
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = term.network_loss(made, noised).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if sees_start:
        assert losses[-1] < 1.0
    else:
        assert min(losses) >= 2.0 - 1e-5


def test_what_heads_read_of_each_state_is_normalised_by_itself():
    """By hand: a second state of any scale and mean leaves the first one's normalised features as they are."""
    head = heads.Head(channels=3, width=4, is_picture=True, num_states=2)
    one, other = torch.randn(2, 3, 5, 5), 100.0 * torch.randn(2, 3, 5, 5) + 7.0
    normal = head.norm(heads.paired([one], [other])[0])
    variance, mean = torch.var_mean(one, dim=(1, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(normal[:, :3], (one - mean) / (variance + 1e-5).sqrt())
    assert head.inward.in_channels == 6


def test_a_pair_of_equal_samples_leaves_nothing_to_win_in_a_relativistic_loss(sdxl):
    """By hand: at the target itself both losses are log 2, and the penalty is all that heads learn from it."""
    x0, conditioning = samples(sdxl)
    term = Adversary(Adversarial(width=4, gradient_penalty=0.0, loss="relativistic"), sdxl, seed=0)
    noised = term.draw(torch.Generator().manual_seed(1), 2, CLEAN)
    both = Samples(torch.arange(2), x0, conditioning, target=x0)
    torch.testing.assert_close(term.loss(both, noised), torch.full((2,), 2.0).log())
    torch.testing.assert_close(term.network_loss(Made(both, torch.ones(2), None), noised), torch.full((2,), 2.0).log())
