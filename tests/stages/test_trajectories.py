"""The store: what is written is the teacher's own trajectory, resumably, and nothing else is ever read in its place."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler

import runs
from mlcm_rl import bases, pipeline
from mlcm_rl.checkpoint import CheckpointError
from mlcm_rl.equations.segments import time_grid
from mlcm_rl.runtime import generator
from mlcm_rl.stages import trajectories
from mlcm_rl.trajectories import Store


@pytest.fixture
def recipe(tiny_sdxl, tmp_path):
    return runs.recipe(tiny_sdxl, tmp_path, [runs.trajectories(runs.write_prompts(tmp_path))])


@pytest.fixture
def store(recipe) -> Store:
    return Store(pipeline.run(recipe)[0].folder)


def test_states_are_those_of_the_stock_solver(recipe, store):
    """Guided DDIM by diffusers' own scheduler, one pass at a time, from the same noise."""
    base = bases.load(recipe.teacher, "cpu")
    scheduler = DDIMScheduler.from_config(base.pipeline.scheduler.config, set_alpha_to_one=False, clip_sample=False)
    grid = time_grid(8)
    index = 5
    context = base.encode_prompts([runs.PROMPTS[index]])
    x = base.noise(generator(0, "trajectories", index), 1)
    assert torch.equal(store.states(torch.tensor([index]), torch.tensor([0])), x)
    for i, (t, s) in enumerate(zip(grid, grid[1:], strict=False)):
        time = torch.tensor([t])
        without = base.predict(base.denoiser, x, time, base.unconditional(1))
        given = base.predict(base.denoiser, x, time, context)
        eps = without + 3.0 * (given - without)
        scheduler.num_inference_steps = 1000 // (t - s) if 1000 % (t - s) == 0 else None
        alpha_t, alpha_s = scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[s]
        x0 = (x - (1 - alpha_t).sqrt() * eps) / alpha_t.sqrt()
        x = alpha_s.sqrt() * x0 + (1 - alpha_s).sqrt() * eps
        stored = store.states(torch.tensor([index]), torch.tensor([i + 1]))
        assert torch.allclose(stored, x, atol=1e-4)
    assert torch.allclose(store.x0(torch.tensor([index])), x0, atol=1e-4)


def test_the_grid_runs_from_noise_to_index_zero_over_every_milestone(tiny_sdxl, tmp_path):
    stage = runs.trajectories(runs.write_prompts(tmp_path), num_steps=48, num_trajectories=1, num_held_out=0)
    store = Store(pipeline.run(runs.recipe(tiny_sdxl, tmp_path, [stage]))[0].folder)
    assert store.grid[0] == 999
    assert store.grid[-1] == 0
    assert {999, 874, 749, 624, 499, 374, 249, 124, 0} <= set(store.grid)


def test_a_trajectory_depends_on_seed_and_number_not_on_its_batch(tiny_sdxl, tmp_path):
    prompts = runs.write_prompts(tmp_path)
    folders = []
    for name, batch_size in (("two", 2), ("three", 3)):
        folder = tmp_path / name
        folder.mkdir()
        stage = runs.trajectories(prompts, batch_size=batch_size)
        trajectories.run(stage, runs.recipe(tiny_sdxl, tmp_path, [stage]), {}, folder)
        folders.append(Store(folder))
    every = torch.arange(8)
    for point in range(9):
        a, b = (store.states(every, torch.full((8,), point)) for store in folders)
        assert (a - b).abs().max() < 1e-5 * a.abs().max()  # batches of another size are summed in another order


def test_an_interrupted_store_is_finished_and_equals_an_uninterrupted_one(recipe, tmp_path, monkeypatch):
    (stage,) = recipe.stages
    solve, calls = trajectories.solve, []

    def crash(*arguments):
        if len(calls) == 1:
            raise SystemExit("crash")
        calls.append(1)
        return solve(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(trajectories, "solve", crash)
        with pytest.raises(SystemExit):
            trajectories.run(stage, recipe, {}, tmp_path / "cut")
    assert len(list((tmp_path / "cut").glob("shard-*"))) == 1
    trajectories.run(stage, recipe, {}, tmp_path / "cut")
    trajectories.run(stage, recipe, {}, tmp_path / "whole")
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "cut").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_a_store_that_differs_in_anything_is_refused_with_the_field(store):
    for name, value in {
        "teacher_hash": "0",
        "guidance_scale": 7.0,
        "prompts_hash": "0",
        "seed": 1,
        "solver": "heun",
        "dtype": "float16",
        "maths": 99,
    }.items():
        with pytest.raises(CheckpointError, match=name):
            Store(store.folder, expected=replace(store.provenance, **{name: value}))


def test_one_changed_byte_in_a_shard_is_refused_by_name(store):
    shard = sorted(store.folder.glob("shard-*"))[1]
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=shard.name):
        Store(store.folder)


def test_half_precision_keeps_the_states_to_half_precision(tiny_sdxl, tmp_path):
    prompts = runs.write_prompts(tmp_path)
    stores = []
    for dtype in ("float32", "float16"):
        recipe = runs.recipe(tiny_sdxl, tmp_path, [runs.trajectories(prompts, dtype=dtype)])
        stores.append(Store(pipeline.run(recipe)[0].folder))
    index, point = torch.arange(8), torch.full((8,), 4)
    full, half = (store.states(index, point) for store in stores)
    assert half.dtype == torch.float32
    assert 0 < (full - half).abs().max() < 2**-10 * full.abs().max()
