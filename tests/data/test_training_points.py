"""Where training points come from: each source against the same points made step by step by hand."""

from types import SimpleNamespace

import pytest
import torch

import runs
from mlcm_rl import pipeline
from mlcm_rl.data import training_points
from mlcm_rl.data.training_points import NoisedData, OnLine, RenoisedSamples, StoredStates, draw_target
from mlcm_rl.data.trajectory_store import Store
from mlcm_rl.equations.segments import milestones, segment_start
from mlcm_rl.equations.solver import ddim_step
from mlcm_rl.models import students, teachers
from mlcm_rl.recipe import Full, Teacher
from mlcm_rl.training.seeding import generator

SCALE = 3.0


@pytest.fixture(scope="module")
def base(tiny_sdxl):
    return teachers.load(Teacher(path=str(tiny_sdxl), family="sdxl", guidance_scale=SCALE), "cpu")


@pytest.fixture(scope="module")
def store(tiny_sdxl, tmp_path_factory) -> Store:
    folder = tmp_path_factory.mktemp("store")
    stage = runs.trajectories(runs.write_prompts(folder), solver_steps=16)
    return Store(pipeline.run(runs.recipe(tiny_sdxl, folder, [stage]))[0].folder)


def step_by_hand(base, x, t: int, s: int, prompt: str):
    """One guided DDIM step of one sample (1, C, H, W)."""
    time, end = torch.tensor([t]), torch.tensor([s])
    x0 = base.guided_x0(x, time, base.encode_prompts([prompt]), base.unconditional(1), SCALE)
    return ddim_step(x, x0, time, end, base.schedule)


def online(**changes):
    return runs.distill(source="online", prompts="unused", target="consistency", batch_size=6, **changes)


@pytest.mark.parametrize("num_segments", [8, 4, 2, 1])
@pytest.mark.parametrize("pair", ["next", "random"])
def test_stored_points_are_of_one_trajectory_in_order(base, store, num_segments, pair):
    source = StoredStates(runs.distill(batch_size=64, target="consistency"), base, store, seed=0)
    draw = source.draw(3, num_segments, pair, generator(1))
    assert torch.equal(draw.s, segment_start(draw.t, num_segments))
    assert ((draw.s <= draw.r) & (draw.r < draw.t)).all()
    positions = {time: i for i, time in enumerate(store.times)}
    gaps = torch.tensor([positions[r] - positions[t] for t, r in zip(draw.t.tolist(), draw.r.tolist(), strict=True)])
    assert (gaps == 1).all() if pair == "next" else (gaps > 1).any()
    batch = source.realise(draw)
    for name, times in (("x_t", draw.t), ("x_r", draw.r), ("x_s", draw.s)):
        points = torch.tensor([positions[time] for time in times.tolist()])
        assert torch.equal(getattr(batch, name), store.states(draw.index, points))


def test_every_trajectory_is_seen_once_a_pass(base, store):
    source = StoredStates(runs.distill(batch_size=2), base, store, seed=0)
    indices = torch.cat([source.draw(step, 1, "next", generator(step)).index for step in range(3)])
    assert sorted(indices.tolist()) == list(range(store.num_trajectories))
    assert not set(indices.tolist()) & set(store.held_out)


def test_a_conditioned_student_is_asked_for_every_later_milestone_of_its_range():
    t = torch.full((4000,), 700)
    for num_segments, expected in ((8, {624}), (4, {499, 624}), (2, {499, 624}), (1, {0, 124, 249, 374, 499, 624})):
        s = draw_target(t, [num_segments], True, generator(num_segments))
        assert set(s.tolist()) == expected
        counts = s.unique(return_counts=True)[1]
        assert counts.min() > 0.7 * 4000 / len(expected)  # drawn evenly
        assert set(draw_target(t, [num_segments], False, generator(0)).tolist()) == {min(expected)}


def test_a_phase_that_keeps_segments_draws_k_from_the_phases_up_to_it():
    stage = runs.distill(keep_segments=True, num_segments=[8, 2, 2, 1])
    assert [training_points.drawn_segments(stage, k) for k in (8, 2, 1)] == [[8], [8, 2], [8, 2, 1]]
    assert training_points.drawn_segments(runs.distill(num_segments=[8, 2, 2, 1]), 1) == [1]
    s = draw_target(torch.full((3000,), 700), [8, 2, 1], False, generator(0))
    starts, counts = s.unique(return_counts=True)
    assert starts.tolist() == [0, 499, 624]
    assert counts.min() > 0.9 * 1000


def test_online_points_are_those_of_algorithm_1(base):
    """L = 8 - s guided steps of one length from the top to t, then one step of 20 to r, never below s."""
    source = OnLine(online(), base, runs.PROMPTS, seed=0)
    draw = source.draw(0, 8, "next", generator(4))
    batch = source.realise(draw)
    segments = set()
    for i in range(6):
        t, r, s = (int(times[i]) for times in (draw.t, draw.r, draw.s))
        segment = int(torch.searchsorted(milestones(8), torch.tensor(t))) - 1
        segments.add(segment)
        num_steps = 8 - segment
        times = [999 - (999 - t) * j // num_steps for j in range(num_steps + 1)]
        x, prompt = draw.noise[i : i + 1], runs.PROMPTS[int(draw.index[i])]
        for start, end in zip(times, times[1:], strict=False):
            x = step_by_hand(base, x, start, end, prompt)
        assert torch.allclose(batch.x_t[i : i + 1], x, atol=1e-4)
        assert r == max(t - 20, s)
        assert torch.allclose(batch.x_r[i : i + 1], step_by_hand(base, x, t, r, prompt), atol=1e-4)
    assert len(segments) > 2


def test_online_points_are_made_without_reading_the_device(base):
    """On `meta`, whose tensors have no values to read."""
    meta = torch.device("meta")
    blind = SimpleNamespace(
        device=meta,
        teacher=base.teacher,
        schedule=base.schedule.to(meta),
        encode_prompts=lambda texts: {"context": torch.empty(len(texts), 1, 1, device=meta)},
        unconditional=lambda count: {},
        guided_x0=lambda x_t, *_: x_t,
    )
    draw = OnLine(online(), base, runs.PROMPTS, seed=0).draw(0, 8, "next", generator(4))
    assert OnLine(online(), blind, runs.PROMPTS, seed=0).realise(draw).x_r.is_meta


def test_noised_data_is_latents_plus_noise_and_one_guided_step(base):
    latents = torch.randn(6, *base.latent_shape, generator=generator(9))
    stage = runs.distill(source="data", images="unused", target="consistency", batch_size=6)
    source = NoisedData(stage, base, latents, [[prompt] for prompt in runs.PROMPTS], seed=0)
    draw = source.draw(0, 1, "next", generator(5))
    batch = source.realise(draw)
    for i in range(6):
        t, r, index = int(draw.t[i]), int(draw.r[i]), int(draw.index[i])
        alpha, sigma = base.schedule.alpha[t], base.schedule.sigma[t]
        x = (alpha * latents[index] + sigma * draw.noise[i])[None]
        assert torch.allclose(batch.x_t[i : i + 1], x, atol=1e-6)
        assert torch.allclose(batch.x_r[i : i + 1], step_by_hand(base, x, t, r, runs.PROMPTS[index]), atol=1e-4)


def test_a_pictures_caption_is_drawn_evenly_whatever_the_time_and_the_split(base, monkeypatch):
    """Two captions, by the parity of the time, would tie one of them to the even noise levels."""
    monkeypatch.setattr(
        base, "encode_prompts", lambda texts: {"context": torch.tensor([float(text) for text in texts])}
    )
    monkeypatch.setattr(training_points, "_guided_step", lambda base, x_t, *rest: x_t)
    stage = runs.distill(source="data", images="unused", target="consistency", batch_size=4000)
    source = NoisedData(stage, base, torch.zeros(8, *base.latent_shape), [["0", "1"]] * 8, seed=0)
    draw = source.draw(0, 1, "next", generator(5))
    which = source.realise(draw).conditioning["context"]
    for parity in (0, 1):
        assert which[draw.t % 2 == parity].mean().item() == pytest.approx(0.5, abs=0.05)
    parts = [source.realise(part).conditioning["context"] for part in runs.parts_of(draw, 1000)]
    assert torch.equal(torch.cat(parts), which)


def test_renoised_samples_go_from_milestone_to_milestone_in_p_teacher_steps(base, store):
    stage = runs.distill(method="inter_segment", num_segments=[1], num_teacher_steps=3, batch_size=6)
    source = RenoisedSamples(stage, base, base.denoiser, store, None, seed=0)
    draw = source.draw(0, 1, "next", generator(6))
    batch = source.realise(draw)
    ends = milestones(8).tolist()
    for i in range(6):
        t, r = int(draw.t[i]), int(draw.r[i])
        assert ends.index(t) - ends.index(r) == 1
        alpha, sigma = base.schedule.alpha[t], base.schedule.sigma[t]
        x = alpha * store.x0(draw.index[i : i + 1]) + sigma * draw.noise[i : i + 1]
        assert torch.allclose(batch.x_t[i : i + 1], x, atol=1e-6)
        prompt = runs.PROMPTS[int(draw.index[i]) % len(runs.PROMPTS)]
        for j in range(3):
            x = step_by_hand(base, x, t - (t - r) * j // 3, t - (t - r) * (j + 1) // 3, prompt)
        assert torch.allclose(batch.x_r[i : i + 1], x, atol=1e-4)
    assert (batch.s == 0).all()


@pytest.mark.parametrize("source_name", ["stored", "online", "student"])
def test_points_do_not_depend_on_how_a_step_is_split(base, store, source_name):
    student = students.student(base, Full(), seed=0)
    renoise = runs.distill(method="inter_segment", num_segments=[1], renoise="student", prompts="unused", batch_size=6)
    source = {
        "stored": StoredStates(runs.distill(batch_size=6, target="consistency"), base, store, 0),
        "online": OnLine(online(), base, runs.PROMPTS, 0),
        "student": RenoisedSamples(renoise, base, student, None, runs.PROMPTS, 0),
    }[source_name]
    draw = source.draw(0, 1, "next", generator(7))
    whole = source.realise(draw)
    parts = [source.realise(part) for part in runs.parts_of(draw, 2)]
    for name in ("x_t", "x_r"):
        assert torch.allclose(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]), atol=1e-5)
