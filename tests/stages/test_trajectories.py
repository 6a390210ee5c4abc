"""The store: what is written is the teacher's own trajectory, resumably, and nothing else is ever read in its place."""

import json
import os
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

import runs
from mlcm_rl import pipeline
from mlcm_rl.data.trajectory_store import Store, refuse_mismatch
from mlcm_rl.equations.segments import time_grid
from mlcm_rl.models import students, teachers
from mlcm_rl.stages import distill, feedback, trajectories
from mlcm_rl.storage import files, hashing
from mlcm_rl.storage.files import CheckpointError, write_json
from mlcm_rl.storage.tensors import read_tensors, write_tensors
from mlcm_rl.training.seeding import generator

Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.fixture
def recipe(tiny_sdxl, tmp_path):
    return runs.recipe(tiny_sdxl, tmp_path, [runs.trajectories(runs.write_prompts(tmp_path))])


@pytest.fixture
def store(recipe) -> Store:
    return Store(pipeline.run(recipe)[0].folder)


def test_states_are_those_of_the_stock_solver(recipe, store):
    """Guided DDIM by diffusers' own scheduler, one pass at a time, from the same noise."""
    base = teachers.load(recipe.teacher, "cpu")
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
    stage = runs.trajectories(runs.write_prompts(tmp_path), solver_steps=48, num_trajectories=1, num_held_out=0)
    store = Store(pipeline.run(runs.recipe(tiny_sdxl, tmp_path, [stage]))[0].folder)
    assert store.times[0] == 999
    assert store.times[-1] == 0
    assert {999, 874, 749, 624, 499, 374, 249, 124, 0} <= set(store.times)


def test_a_trajectory_depends_on_seed_and_number_not_on_its_batch(tiny_sdxl, tmp_path):
    prompts = runs.write_prompts(tmp_path)
    folders = []
    for name, batch_size in (("two", 2), ("three", 3), ("one", 1), ("all", 8)):
        folder = tmp_path / name
        folder.mkdir()
        stage = runs.trajectories(prompts, batch_size=batch_size)
        trajectories.run(stage, runs.recipe(tiny_sdxl, tmp_path, [stage]), {}, folder)
        folders.append(Store(folder))
    every = torch.arange(8)
    for point in range(9):
        first, *others = (store.states(every, torch.full((8,), point)) for store in folders)
        for other in others:  # batches of another size are summed in another order
            assert (first - other).abs().max() < 5e-5 * first.abs().max()


def test_the_batch_size_changes_no_fingerprint_and_stands_in_the_store(tiny_sdxl, tmp_path, monkeypatch):
    """Also both, where memory did not suffice and a store was finished with a smaller one."""
    prompts = runs.write_prompts(tmp_path)
    recipes = [
        runs.recipe(tiny_sdxl, tmp_path, [runs.trajectories(prompts, batch_size=size, shard_size=4)]) for size in (4, 2)
    ]
    assert len({pipeline.plan(recipe)[0].fingerprint for recipe in recipes}) == 1
    solve, calls = trajectories.solve, []

    def crash(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("of the second shard")
        return solve(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(trajectories, "solve", crash)
        with pytest.raises(pipeline.RunError, match="memory of the device does not suffice"):
            pipeline.run(recipes[0])
    folder = pipeline.run(recipes[1])[0].folder
    assert json.loads((folder / "store.json").read_text())["batch_sizes"] == [2, 4]
    assert json.loads((folder / "manifest.json").read_text())["stage"]["batch_size"] == 2


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
    assert len(list((tmp_path / "cut").glob("shard-*.safetensors"))) == 1
    trajectories.run(stage, recipe, {}, tmp_path / "cut")
    trajectories.run(stage, recipe, {}, tmp_path / "whole")
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "cut").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_a_disk_too_small_for_the_whole_store_is_told_before_the_first_shard(recipe, tmp_path, monkeypatch):
    (stage,) = recipe.stages
    trajectories.run(stage, recipe, {}, tmp_path / "enough")
    size = sum(path.stat().st_size for path in (tmp_path / "enough").glob("shard-*"))
    free = files.SPARE_BYTES + size // 2  # room for one shard of two
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: Usage(2**40, 2**40 - free, free))
    with pytest.raises(
        CheckpointError, match=r"small needs .* and its disk has .* free, of which 1 MB stays free: make room"
    ):
        trajectories.run(stage, recipe, {}, tmp_path / "small")
    assert not list((tmp_path / "small").glob("*.safetensors"))


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
            refuse_mismatch(store.folder / "store.json", vars(store.provenance), {name: value})


def sources_over(store: Path, recipe, folder: Path):
    """What every stage that reads a store makes of it: its states in segments, for re-noising, for `feedback`."""
    base = teachers.load(recipe.teacher, "cpu")
    stages = [runs.distill(num_segments=[1]), runs.distill(num_segments=[1], method="inter_segment")]
    for stage in stages:
        yield lambda stage=stage: distill.make_source(stage, recipe, base, base.denoiser, {"trajectories": store})
    student = {"num_segments": 1, "conditioned": False, "budgets": [], "adapter": {"kind": "full"}}
    write_json(folder / "student.json", student | students.expected_of(base))
    tuning = runs.tuning("feedback", recipe.stages[0].prompts, consistency=0.5)
    yield lambda: feedback.stored_states(tuning, recipe, base, folder, store)


def test_a_student_of_one_number_of_steps_is_kept_on_the_jumps_of_its_sampler(store, recipe, tmp_path):
    """Of two steps: from 999 to 499 and on to 0, and from no time between."""
    base = teachers.load(recipe.teacher, "cpu")
    student = {"num_segments": 2, "conditioned": False, "budgets": [2], "adapter": {"kind": "full"}}
    write_json(tmp_path / "student.json", student | students.expected_of(base))
    tuning = runs.tuning("feedback", recipe.stages[0].prompts, consistency=0.5)
    source = feedback.stored_states(tuning, recipe, base, tmp_path, store.folder)
    drawn = source.draw_for(torch.zeros(64).long(), 2, "next", torch.Generator().manual_seed(0))
    assert set(zip(drawn.t.tolist(), drawn.s.tolist(), strict=True)) == {(999, 499), (499, 0)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("teacher_hash", "0"),
        ("prediction_type", "v_prediction"),
        ("guidance_scale", 7.0),
        ("scheduler", {"num_train_timesteps": 1000, "shift": 2.0}),
    ],
)
def test_every_stage_refuses_a_store_of_another_teacher_with_the_field(store, recipe, tmp_path, name, value):
    record = json.loads((store.folder / "store.json").read_text())
    record["provenance"][name] = value
    write_json(store.folder / "store.json", record)
    message = re.escape(f"store.json does not belong to this run: {name} is {value!r}, expected")
    for read in sources_over(store.folder, recipe, tmp_path):
        with pytest.raises(CheckpointError, match=message):
            read()


def test_every_stage_refuses_a_store_of_another_resolution_with_both(store, recipe, tmp_path):
    larger = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"resolution": 32})})
    message = "resolution is 16, expected 32; latents is [4, 8, 8], expected [4, 16, 16]"
    for read in sources_over(store.folder, larger, tmp_path):
        with pytest.raises(CheckpointError, match=re.escape(message)):
            read()


def test_files_of_a_store_that_have_other_latents_than_its_first_are_refused(store):
    path, record = store.folder / "shard-0000004.safetensors", json.loads((store.folder / "store.json").read_text())
    write_tensors(path, {name: value[..., :4] for name, value in read_tensors(path).items()})
    record["shards"][path.name] = [path.stat().st_size, hashing.sha256(path)]
    write_json(store.folder / "store.json", record)
    with pytest.raises(CheckpointError, match=r"shard-0000004.* does not hold 4 trajectories of 9 states \(4, 8, 8\)"):
        Store(store.folder).x0(torch.arange(8))


def test_a_store_is_one_of_the_same_teacher_wherever_that_is_and_whatever_the_seed(store, recipe, tmp_path):
    moved = shutil.copytree(recipe.teacher.path, tmp_path / "moved")
    teacher = recipe.teacher.model_copy(update={"path": str(moved)})
    other = recipe.model_copy(update={"teacher": teacher, "seed": 5})
    for read in sources_over(store.folder, other, tmp_path):
        assert read().store.provenance == store.provenance


def flip(path: Path) -> None:
    """Change one bit of a file, nothing of its size or its times of modification."""
    data, before = bytearray(path.read_bytes()), path.stat()
    data[-3] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_one_changed_byte_reaches_no_step(recipe, store):
    """Also of a file that was found whole before, and remembered as that."""
    every = torch.arange(8)
    store.states(every, torch.zeros_like(every))
    shard, prompts = (store.folder / f"{kind}-0000004.safetensors" for kind in ("shard", "prompts"))
    flip(shard)
    changed = Store(store.folder)
    changed.states(every[:4], torch.zeros_like(every[:4]))  # of the other file
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing or damaged: delete it and .*manifest.json"):
        changed.states(every, torch.zeros_like(every))
    flip(shard)
    flip(prompts)
    with pytest.raises(CheckpointError, match=f"{prompts.name} is missing or damaged"):
        Store(store.folder).conditioning(every)
    base = teachers.load(recipe.teacher, "cpu")
    source = distill.make_source(
        runs.distill(num_segments=[1], batch_size=6), recipe, base, base.denoiser, {"trajectories": store.folder}
    )
    with pytest.raises(CheckpointError, match=prompts.name):
        source.realise(source.draw(0, 1, "next", generator(0)))


def test_a_file_that_is_gone_or_cut_is_told_when_the_store_is_opened(store):
    shard = store.folder / "shard-0000004.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=shard.name):
        Store(store.folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        Store(store.folder)


def test_a_checksum_is_compared_once_while_a_file_stays_as_it_was(store, monkeypatch):
    monkeypatch.setattr(hashing, "SETTLED_NS", -(10**12))  # as if the files had been written long ago
    monkeypatch.setattr(hashing, "LARGE", 0)
    every, hashed = torch.arange(8), []
    sha256 = hashing.sha256
    monkeypatch.setattr(hashing, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    for _ in range(2):
        hashing._memory.cache_clear()  # as in another process
        again = Store(store.folder)
        again.states(every, torch.zeros_like(every))
        again.conditioning(every)
    assert sorted(hashed) == sorted(path.name for path in store.folder.glob("*.safetensors"))
    path = store.folder / "shard-0000000.safetensors"
    path.with_name("x").write_bytes(path.read_bytes())
    path.with_name("x").rename(path)  # another inode
    Store(store.folder).x0(every)
    assert hashed[4:] == [path.name]


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
