"""The draws that other methods need: whole segments, random ends, states of the student's own sampler."""

import pytest
import torch

import runs
from mlcm_rl import pipeline
from mlcm_rl.data.training_points import NoisedData, SimulatedStates, StoredStates
from mlcm_rl.data.trajectory_store import Store
from mlcm_rl.equations.segments import segment_start
from mlcm_rl.models import students, teachers
from mlcm_rl.recipe import Full, Teacher
from mlcm_rl.storage.files import CheckpointError
from mlcm_rl.training.seeding import generator


@pytest.fixture(scope="module")
def base(tiny_sdxl):
    return teachers.load(Teacher(path=str(tiny_sdxl), family="sdxl", guidance_scale=3.0), "cpu")


@pytest.fixture(scope="module")
def store(tiny_sdxl, tmp_path_factory) -> Store:
    folder = tmp_path_factory.mktemp("store")
    stage = runs.trajectories(runs.write_prompts(folder), solver_steps=16)
    return Store(pipeline.run(runs.recipe(tiny_sdxl, folder, [stage]))[0].folder)


def test_jumps_of_whole_segments_start_at_their_tops(base, store):
    stage = runs.distill(starts="milestones", num_segments=[16, 2], batch_size=200)
    source = StoredStates(stage, base, store, seed=0)
    draw = source.draw(0, 2, "next", generator(1))
    assert set(zip(draw.t.tolist(), draw.s.tolist(), strict=True)) == {(999, 499), (499, 0)}
    draw = source.draw(0, 16, "next", generator(1))
    positions = {time: i for i, time in enumerate(store.times)}  # 16 steps: every stored state but the last
    starts, ends = ([positions[time] for time in times.tolist()] for times in (draw.t, draw.s))
    assert set(starts) == set(range(16))
    assert [start + 1 for start in starts] == ends
    batch = source.realise(draw)
    assert torch.equal(batch.x_s, store.states(draw.index, torch.tensor(ends)))


def test_a_store_without_the_ends_of_segments_is_refused(base, store):
    stage = runs.distill(starts="milestones", num_segments=[32, 8])
    with pytest.raises(CheckpointError, match=r"no states at the ends of 32 segments.*time 31: solver_steps .* of 32"):
        StoredStates(stage, base, store, seed=0)


@pytest.mark.parametrize("pair", ["next", "random"])
def test_random_ends_lie_from_the_segments_start_to_the_second_point(base, store, pair):
    """Of 16 stored steps each of 2 segments has 8: from its top there are 8 ends for a pair one step apart."""
    stage = runs.distill(ends="random", target="consistency", batch_size=3000)
    source = StoredStates(stage, base, store, seed=0)
    draw = source.draw(3, 2, pair, generator(1))
    assert ((segment_start(draw.t, 2) <= draw.s) & (draw.s <= draw.r) & (draw.r < draw.t)).all()
    ends, counts = draw.s[draw.t == 999].unique(return_counts=True)
    assert ends.tolist() == sorted(time for time in store.times if 499 <= time < 999)
    if pair == "next":
        assert counts.min() > 0.6 * counts.float().mean()
    fixed = StoredStates(runs.distill(target="consistency", batch_size=3000), base, store, seed=0)
    unchanged = fixed.draw(3, 2, pair, generator(1))
    assert torch.equal(unchanged.t, draw.t)
    assert torch.equal(unchanged.r, draw.r)
    assert torch.equal(unchanged.s, segment_start(draw.t, 2))


def test_random_ends_of_noised_pictures_are_any_times(base):
    stage = runs.distill(source="data", images="unused", target="consistency", ends="random", batch_size=2000)
    source = NoisedData(stage, base, torch.zeros(4, *base.latent_shape), [["a"]] * 4, seed=0)
    draw = source.draw(0, 4, "next", generator(2))
    start = segment_start(draw.t, 4)
    assert torch.equal(draw.r, torch.maximum(draw.t - 20, start))
    assert ((start <= draw.s) & (draw.s <= draw.r)).all()
    share = ((draw.s - start) / (draw.r - start))[draw.r - start > 100]
    assert share.mean().item() == pytest.approx(0.5, abs=0.03)
    assert len(draw.s.unique()) > 100


def simulated(base, num_steps: int, batch_size: int) -> SimulatedStates:
    settings = {"method": "simulation", "num_segments": [1], "prompts": "unused", "matching": {}}
    stage = runs.distill(**settings, num_student_steps=num_steps, batch_size=batch_size)
    return SimulatedStates(stage, base, students.student(base, Full(), seed=0), runs.PROMPTS, seed=0)


def test_simulated_states_are_those_that_the_sampler_visits(base):
    """By hand: from noise at 999, x0 by the student and new noise at 666 and so on, by the sample's own generator."""
    source = simulated(base, 4, 12)
    draw = source.draw(0, 1, "next", generator(2))
    times = [999, 749, 499, 249]
    assert set(draw.t.tolist()) == set(times)
    batch = source.realise(draw)
    with torch.no_grad():
        for i in range(12):
            own = torch.Generator().manual_seed(int(draw.seed[i]))
            conditioning = base.encode_prompts([runs.PROMPTS[int(draw.index[i])]])
            x = base.noise([own], 1)
            for t, s in zip(times, times[1:], strict=False):
                if t <= draw.t[i]:
                    break
                x0 = base.x0(source.student, x, torch.tensor([t]), conditioning)
                x = base.schedule.alpha[s] * x0 + base.schedule.sigma[s] * base.noise([own], 1)
            torch.testing.assert_close(batch.x_t[i : i + 1], x, atol=1e-4, rtol=1e-4)
    assert (batch.s == 0).all()
    parts = torch.cat([source.realise(part).x_t for part in runs.parts_of(draw, 5)])
    torch.testing.assert_close(parts, batch.x_t, atol=1e-4, rtol=1e-4)


def test_every_part_of_a_simulated_step_evaluates_the_student_equally_often(base, monkeypatch):
    """As sharded weights need, whichever times a process's samples have."""
    source, counts = simulated(base, 4, 12), []
    draw = source.draw(0, 1, "next", generator(2))
    original = type(base).x0
    monkeypatch.setattr(type(base), "x0", lambda *arguments: counts.append(1) or original(*arguments))
    for part in runs.parts_of(draw, 1):
        counts.clear()
        source.realise(part)
        assert len(counts) == 3
