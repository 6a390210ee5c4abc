"""A full disk, a read-only one, a folder in use, shards that changed: each an error in words, the rest as it was."""

import errno
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import runs
from mlcm_rl import pipeline
from mlcm_rl.pipeline import RunError
from mlcm_rl.storage import files, lock
from mlcm_rl.storage import tensors as tensors_module
from mlcm_rl.storage.files import CheckpointError


def small(teacher: Path, folder: Path):
    folder.mkdir(exist_ok=True)
    prompts = runs.write_prompts(folder)
    stages = [runs.trajectories(prompts), runs.distill(num_segments=[1], adapter={"kind": "full"})]
    return runs.recipe(teacher, folder, stages)


@pytest.fixture(scope="module")
def whole(tiny_sdxl, tmp_path_factory):
    """A run that nothing disturbed."""
    recipe = small(tiny_sdxl, tmp_path_factory.mktemp("whole"))
    return recipe, pipeline.run(recipe)


def test_a_disk_that_fills_up_in_any_write_leaves_what_was_saved_and_the_same_command_goes_on(
    whole, tiny_sdxl, tmp_path, monkeypatch
):
    """Every second write of tensors is cut in half, until the run is through."""
    recipe, save_file, writes = small(tiny_sdxl, tmp_path), tensors_module.save_file, []

    def cut(tensors, path, *rest):
        writes.append(path)
        save_file(tensors, path, *rest)
        if len(writes) % 2 == 0:
            os.truncate(path, path.stat().st_size // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tensors_module, "save_file", cut)
    for _ in range(20):
        with suppress(RunError):
            assert pipeline.run(recipe)
            break
        assert not list(tmp_path.rglob("*.part"))
    assert len(writes) > 6
    assert runs.results(recipe) == runs.results(whole[0])


def test_a_disk_without_room_is_an_error_in_words_and_more_room_lets_the_run_end_with_the_same_bits(
    whole, tiny_sdxl, disk
):
    folder, remount = disk
    recipe = small(tiny_sdxl, folder)
    for size in ("1200k", "4m"):  # too small for a shard, then for a checkpoint
        remount(f"size={size}")
        with pytest.raises(RunError, match=r"its disk has .* MB free, of which 1 MB stays free: make room"):
            pipeline.run(recipe)
    remount("size=64m")
    pipeline.run(recipe)
    assert runs.results(recipe) == runs.results(whole[0])


def test_a_disk_that_is_really_full_says_so(disk):
    """Past the check for room: the write itself fails, in the library that saves tensors."""
    folder, remount = disk
    remount("size=400k")
    with (
        pytest.raises(CheckpointError, match=r"could not be written .*[Nn]o space left"),
        files.replacing(folder / "value.safetensors") as temporary,
    ):
        tensors_module.save_file({"value": torch.ones(10**6)}, temporary)
    assert list(folder.iterdir()) == []


def test_a_read_only_folder_is_an_error_in_words(tiny_sdxl, disk):
    folder, remount = disk
    recipe = small(tiny_sdxl, folder)
    remount("ro")
    with pytest.raises(RunError, match=r"stages\[0\] \(trajectories\): .*/runs.*: read-only file system"):
        pipeline.run(recipe)


def test_a_folder_in_use_is_refused_by_name_and_free_again_when_its_process_is_killed(tiny_sdxl, tmp_path):
    recipe = small(tiny_sdxl, tmp_path)
    folder = pipeline.plan(recipe)[0].folder
    folder.mkdir(parents=True)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with lock.folder_lock(folder):
            os.write(writing, b"held")
            signal.pause()
    try:
        assert os.read(reading, 4) == b"held"
        with pytest.raises(RunError, match=rf"is being written by process {child} on .*wait for it or end it"):
            pipeline.run(recipe)
        assert not (folder / "store.json").exists()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with lock.folder_lock(folder):
        assert f"process {os.getpid()} " in (folder / lock.FILE).read_text()
    assert (folder / lock.FILE).read_text() == ""


def changed(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def halved(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [changed, halved, Path.unlink])
def test_a_damaged_shard_is_named_and_made_again_when_it_is_deleted(whole, tiny_sdxl, tmp_path, damage):
    """Of a finished store, which the next stage reads, and of one that is resumed."""
    recipe = small(tiny_sdxl, tmp_path)
    shutil.copytree(whole[0].runs, recipe.runs, symlinks=True)
    shutil.rmtree(pipeline.plan(recipe)[1].folder)
    store = pipeline.plan(recipe)[0].folder
    shard = store / "shard-0000004.safetensors"
    damage(shard)
    with pytest.raises(RunError, match=r"stages\[1\] \(distill\): .*shard-0000004.*missing or damaged: delete it and"):
        pipeline.run(recipe)
    (store / "manifest.json").unlink()
    if damage is not Path.unlink:
        with pytest.raises(RunError, match=r"stages\[0\] .*shard-0000004.*is damaged .*: delete it"):
            pipeline.run(recipe)
        return
    pipeline.run(recipe)
    assert runs.results(recipe) == runs.results(whole[0])


def test_a_store_of_another_teacher_is_refused_finished_or_not(whole, tiny_sdxl, tmp_path):
    recipe = small(tiny_sdxl, tmp_path)
    other = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"guidance_scale": 2.0})})
    place = pipeline.plan(other)[0].folder
    shutil.copytree(pipeline.plan(whole[0])[0].folder, place)
    with pytest.raises(RunError, match="which another teacher, recipe or seed made"):
        pipeline.run(other)
    (place / "manifest.json").unlink()
    with pytest.raises(RunError, match=r"does not belong to this run: guidance_scale is 3\.0, expected 2\.0"):
        pipeline.run(other)


def test_a_manifest_with_a_changed_byte_is_refused(whole, tiny_sdxl, tmp_path):
    recipe = small(tiny_sdxl, tmp_path)
    shutil.copytree(whole[0].runs, recipe.runs, symlinks=True)
    manifest = pipeline.plan(recipe)[0].folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"network_evaluations": 1', '"network_evaluations": 2'))
    with pytest.raises(RunError, match=r"manifest\.json is damaged: delete"):
        pipeline.run(recipe)


def test_a_log_that_the_disk_refuses_is_named_and_the_same_command_goes_on(whole, tiny_sdxl, tmp_path, monkeypatch):
    """Of a file that is open already the system's error names none."""
    recipe, fsync = small(tiny_sdxl, tmp_path), os.fsync

    def refused(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("log.jsonl"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refused)
        with pytest.raises(RunError, match=r"\(distill\): .*/log\.jsonl could not be written \(input/output error\)"):
            pipeline.run(recipe)
    pipeline.run(recipe)
    assert runs.results(recipe) == runs.results(whole[0])


def test_a_folder_that_cannot_be_locked_is_named(tmp_path, monkeypatch):
    """A network's disk may know no locks."""

    def unknown(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", unknown)
    told = r"stage/\.lock cannot be locked \(no locks available\)"
    with pytest.raises(CheckpointError, match=told), lock.folder_lock(tmp_path / "stage"):
        pytest.fail("it is taken for locked")
