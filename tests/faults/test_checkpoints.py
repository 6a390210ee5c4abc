"""Checkpoints: whole or refused, the newest whole one when told, and nothing restored by halves."""

import weakref
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import runs
from mlcm_rl import pipeline
from mlcm_rl.pipeline import RunError
from mlcm_rl.preference.guard import HackingGuard
from mlcm_rl.rewards import Combined
from mlcm_rl.storage import checkpoints, files, tensors
from mlcm_rl.storage.files import CheckpointError
from mlcm_rl.storage.tensors import write_tensors
from mlcm_rl.training.loop import Runtime
from mlcm_rl.training.states import add_prefix, load_optimizer, optimizer_tensors, read_training, under_prefix

Usage = namedtuple("Usage", "total used free")


def save(folder: Path, *steps: int, keep: int = 9) -> list[Path]:
    states = [{"value": torch.full((3,), float(step))} for step in steps]
    return [
        checkpoints.save_state(folder, step, state, {"seen": step / 3}, keep)
        for step, state in zip(steps, states, strict=True)
    ]


def flip(path: Path, place: int) -> None:
    """Change one bit of byte `place`."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def stepped(shape: tuple[int, ...] = (2, 3)) -> tuple[dict[str, torch.Tensor], torch.optim.Optimizer]:
    """A weight and its optimiser after one step."""
    weight = torch.nn.Parameter(torch.ones(shape))
    optimizer = torch.optim.AdamW([weight])
    weight.square().sum().backward()
    optimizer.step()
    return {"weight": weight}, optimizer


def test_what_is_beside_checkpoints_is_none(tmp_path):
    """A copy made by hand is not gone on from, nor are checkpoints deleted on its account."""
    for name in ("step-00000009.bak", "step-00000001 (copy)", "step-abc", "step-9", "step-" + "9" * 30):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    saved = save(tmp_path, 1, 2, keep=2)
    assert checkpoints.checkpoints(tmp_path) == saved
    assert checkpoints.load_state(tmp_path)[0] == 2


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_every_changed_byte_is_seen(tmp_path, name):
    """The record is under the checksum as the tensors are: a digit of a running mean counts too."""
    (path,) = save(tmp_path, 1)
    for place in range((path / name).stat().st_size):
        flip(path / name, place)
        with pytest.raises(CheckpointError, match=r"step-00000001 is damaged"):
            checkpoints.load_state(tmp_path)
        flip(path / name, place)
    assert checkpoints.load_state(tmp_path)[2] == {"seen": 1 / 3}


def test_a_damaged_checkpoint_is_named_and_passed_over_only_when_told(tmp_path):
    paths = save(tmp_path, 1, 2, 3)
    flip(paths[2] / "state.safetensors", -1)
    (paths[1] / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-00000003 is damaged .*--skip-damaged` goes on from .*00000001"):
        checkpoints.load_state(tmp_path)
    skipped = checkpoints.skip_damaged(tmp_path)
    assert [line.split(":")[0] for line in skipped] == [str(paths[2]), str(paths[1])]
    assert checkpoints.load_state(tmp_path)[0] == 1
    assert checkpoints.skip_damaged(tmp_path) == []


def test_a_checkpoint_of_an_older_layout_says_so(tmp_path):
    (path,) = save(tmp_path, 1)
    state = files.read_json(path / "state.json")
    files.write_json(path / "state.json", state | {"format": 1})
    with pytest.raises(CheckpointError, match="it is of format 1, this version reads 2"):
        checkpoints.load_state(tmp_path)


def test_so_many_checkpoints_stay_as_are_asked_for(tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep=3)
    assert [path.name[-1] for path in checkpoints.checkpoints(tmp_path)] == ["2", "3", "4"]


def test_a_file_never_takes_a_folders_place(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "notes.txt").write_text("precious")
    with pytest.raises(CheckpointError, match=r"kept could not be written .is a directory"):
        files.write_json(tmp_path / "kept", {})
    assert (tmp_path / "kept" / "notes.txt").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]


def test_too_full_a_disk_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: Usage(2**30, 2**30 - 1000, 1000))
    with pytest.raises(
        CheckpointError,
        match=r"state\.safetensors needs 4\.0 MB, and its disk has 0\.0 MB free, of which 1 MB stays free",
    ):
        checkpoints.save_state(tmp_path, 2, {"value": torch.zeros(10**6)})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert checkpoints.load_state(tmp_path)[0] == 1


def test_what_cannot_be_put_back_is_an_error(tmp_path):
    weights, optimizer = stepped()
    shapes = {name: value.shape for name, value in weights.items()}
    state = optimizer_tensors(optimizer) | add_prefix("student", weights)
    checkpoints.save_state(tmp_path, 1, state, {"guard": {}})
    steps, _, record = read_training(tmp_path, {"student": shapes}, ["guard"])
    assert (steps, record) == (1, {"guard": {}})
    with pytest.raises(CheckpointError, match=r"step-00000001 holds nothing of rewards"):
        read_training(tmp_path, {"student": shapes}, ["guard", "rewards"])
    with pytest.raises(CheckpointError, match="other weights than this average"):
        read_training(tmp_path, {"average": shapes})
    other, its = stepped((1, 3))  # would be broadcast
    with pytest.raises(CheckpointError, match="other weights than this student"):
        read_training(tmp_path, {"student": {name: value.shape for name, value in other.items()}})
    with pytest.raises(ValueError, match="optimiser's state number 0 is of another parameter"):
        load_optimizer(its, state)
    checkpoints.save_state(tmp_path, 2, add_prefix("student", weights))
    with pytest.raises(CheckpointError, match=r"step-00000002 holds nothing of optimizer"):
        read_training(tmp_path, {"student": shapes})


def test_what_is_written_others_may_read_as_far_as_this_account_lets_them(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    write_tensors(tmp_path / "one.safetensors", {"x": torch.ones(1)})
    checkpoints.save_state(tmp_path, 1, {"x": torch.ones(1)}, {})
    written = [tmp_path / "one.safetensors", *tmp_path.glob("checkpoints/*/*")]
    assert len(written) > 2
    assert {path.stat().st_mode for path in written} == {plain.stat().st_mode}


def test_moments_are_put_back_in_their_parameters_own_order_of_memory(tmp_path):
    """Fused AdamW takes a parameter and its moments for the same memory layout, and says nothing where they differ."""
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(4, 3, 3, 3, generator=generator) for _ in range(5))

    def steps(resumed_after: int | None) -> torch.Tensor:
        parameter = torch.nn.Parameter(start.clone(memory_format=torch.channels_last))
        optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
        for i, gradient in enumerate(gradients):
            parameter.grad = gradient.clone(memory_format=torch.channels_last)
            optimizer.step()
            if i == resumed_after:
                checkpoints.save_state(tmp_path, i, optimizer_tensors(optimizer))
                optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
                load_optimizer(optimizer, checkpoints.load_state(tmp_path)[1])
        return parameter.detach()

    assert torch.equal(steps(resumed_after=1), steps(resumed_after=None))


def test_a_checkpoint_is_put_back_tensor_by_tensor(tmp_path, monkeypatch):
    """Never more than two of its tensors are in memory, nor more than `MAX_MAPPED` bytes of it and one tensor."""
    weights, optimizer = stepped((40, 10))
    for value in (first := [torch.randn(40, 10) for _ in range(9)]):
        weights[f"other.{len(weights)}"] = value
    checkpoints.save_state(tmp_path, 1, optimizer_tensors(optimizer) | add_prefix("student", weights))
    mappings: list[int] = []  # bytes read of each
    looked_up: list[weakref.ref] = []
    most = 0

    def mapped(*arguments):
        mappings.append(0)
        return safe_open(*arguments)

    def get(self, name):
        nonlocal most
        tensor = read(self, name)
        mappings[-1] += tensor.nbytes
        looked_up.append(weakref.ref(tensor))
        most = max(most, sum(one() is not None for one in looked_up))
        return tensor

    read = tensors.TensorFile.__getitem__
    monkeypatch.setattr(tensors, "MAX_MAPPED", 2 * first[0].nbytes)
    monkeypatch.setattr(tensors, "safe_open", mapped)
    monkeypatch.setattr(tensors.TensorFile, "__getitem__", get)
    _, state, _ = read_training(tmp_path, {"student": {name: value.shape for name, value in weights.items()}})
    again = stepped((40, 10))[1]
    load_optimizer(again, state)
    filled = {name: value.clone() for name, value in under_prefix("student", state).items()}
    assert most == 2  # the one that is copied, and the next
    assert max(mappings) <= 3 * first[0].nbytes
    assert filled.keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in filled.items())
    moments, expected = optimizer_tensors(again), optimizer_tensors(optimizer)
    assert all(torch.equal(value, expected[name]) for name, value in moments.items())


def test_the_state_of_another_guard_or_normaliser_is_an_error():
    with pytest.raises(CheckpointError, match="remembers kept_step"):
        HackingGuard.load_state(object.__new__(HackingGuard), {"kept_step": 3})
    rewards = Combined([])
    rewards.normalisers = {"brightness": None}
    with pytest.raises(ValueError, match="incomplete"):
        rewards.load_state({"brightness": {"count": 3}})


def test_a_run_goes_on_past_a_damaged_checkpoint_when_told_and_ends_with_the_same_bits(
    tiny_sdxl, tmp_path, monkeypatch
):
    stages = [runs.trajectories(runs.write_prompts(tmp_path)), runs.distill(num_segments=[1], num_steps=4)]
    whole = pipeline.run(runs.recipe(tiny_sdxl, tmp_path / "whole", stages))[1].folder
    recipe = runs.recipe(tiny_sdxl, tmp_path / "cut", stages)
    backward, calls = Runtime.backward, []

    def crash(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise SystemExit
        return backward(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Runtime, "backward", crash)
        with pytest.raises(SystemExit):
            pipeline.run(recipe)
    folder = next((tmp_path / "cut" / "runs" / "stages").glob("distill-*"))
    flip(folder / "checkpoints" / "step-00000003" / "state.safetensors", -1)
    with pytest.raises(RunError, match=r"stages\[1\] \(distill\): .*step-00000003 is damaged"):
        pipeline.run(recipe)
    assert pipeline.run(recipe, skip_damaged=True)[1].folder == folder
    assert (folder / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    skip = ("manifest.json", "student/student.json")
    assert files.checksums(folder, skip) == files.checksums(whole, skip)


def test_a_path_through_a_file_is_named_with_the_reason(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "x.json", tmp_path / "file" / "folder" / "x.json"):
        with pytest.raises(CheckpointError, match=r"x\.json could not be written .it is in a file, not in a folder"):
            files.write_json(path, {})
    assert (tmp_path / "file").read_bytes() == b""
