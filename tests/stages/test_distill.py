"""The distillation loop: exact resumption, micro-batches, phases, sources, and what a run leaves behind."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import runs
from mlcm_rl import pipeline
from mlcm_rl.equations.schedule import snr
from mlcm_rl.stages import distill
from mlcm_rl.storage.files import CheckpointError
from mlcm_rl.training.loop import NonFiniteLoss


def student_weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "student").rglob("*.safetensors"))
    assert files
    return {f"{file.name}:{name}": value for file in files for name, value in load_file(file).items()}


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def store(tiny_sdxl, tmp_path_factory):
    """A store of trajectories that every test here starts from."""
    folder = tmp_path_factory.mktemp("store")
    recipe = runs.recipe(tiny_sdxl, folder, [runs.trajectories(runs.write_prompts(folder))])
    return pipeline.run(recipe)[0].folder


def train(tiny_sdxl: Path, store: Path, folder: Path, **settings) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    stage = runs.distill(**settings)
    distill.run(stage, runs.recipe(tiny_sdxl, folder, [stage]), {"trajectories": store}, folder)
    return folder


EVERYTHING = {
    "num_segments": [8, 2, 1],
    "num_steps": [2, 1, 2],
    "target": ["consistency", "trajectory", "consistency"],
    "pair": ["next", "next", "random"],
    "space": ["z", "z", "x0"],
    "distance": "huber",
    "target_ema": 0.9,
    "optimizer_state": "reset",
    "condition_on_target": True,
}


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(tiny_sdxl, store, tmp_path, capsys, step):
    whole = train(tiny_sdxl, store, tmp_path / "whole", **EVERYTHING)
    assert "goes on from" not in capsys.readouterr().out
    with runs.crashing_at(step):
        train(tiny_sdxl, store, tmp_path / "cut", **EVERYTHING)
    resumed = train(tiny_sdxl, store, tmp_path / "cut", **EVERYTHING)
    message = f"distill goes on from step {step}, where it was saved"
    assert [line for line in capsys.readouterr().out.splitlines() if "goes on from" in line] == [message]

    expected, result = student_weights(whole), student_weights(resumed)
    assert expected.keys() == result.keys()
    assert all(torch.equal(expected[name], result[name]) for name in expected)
    assert records(whole) == records(resumed)  # every loss, rate and phase, none twice
    assert {path.name for path in (whole / "snapshots").iterdir()} == {"phase-0-K8", "phase-1-K2", "phase-2-K1"}
    states = [load_file(sorted(f.glob("checkpoints/*/state.safetensors"))[-1]) for f in (whole, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])  # average and Adam's moments too
    assert any(name.startswith("average.") for name in states[0])


def test_a_resumed_run_that_skipped_nothing_differs_when_the_optimizer_is_lost(tiny_sdxl, store, tmp_path, monkeypatch):
    """The test above can fail: dropping the moments from the checkpoint changes the student."""
    whole = train(tiny_sdxl, store, tmp_path / "whole", num_steps=3, num_segments=[1])
    with runs.crashing_at(2):
        train(tiny_sdxl, store, tmp_path / "cut", num_steps=3, num_segments=[1])
    monkeypatch.setattr("mlcm_rl.training.states.load_optimizer", lambda optimizer, tensors: None)
    resumed = train(tiny_sdxl, store, tmp_path / "cut", num_steps=3, num_segments=[1])
    expected, found = student_weights(whole), student_weights(resumed)
    assert not all(torch.equal(expected[name], found[name]) for name in expected)


def test_moments_that_do_not_fit_say_which_checkpoint_to_delete(tiny_sdxl, store, tmp_path, monkeypatch):
    with runs.crashing_at(2):
        train(tiny_sdxl, store, tmp_path, num_steps=3, num_segments=[1])

    def misfit(optimizer, tensors):
        raise ValueError("moments of another optimiser")

    monkeypatch.setattr("mlcm_rl.training.states.load_optimizer", misfit)
    with pytest.raises(CheckpointError, match=r"step-0*2: moments of another optimiser: delete checkpoints/"):
        train(tiny_sdxl, store, tmp_path, num_steps=3, num_segments=[1])


@pytest.mark.parametrize(
    ("optimizer_state", "updates"), [("keep", 3), ("reset", 1), (["keep", "reset", "keep"], 2)], ids=str
)
def test_each_phase_says_whether_it_starts_with_fresh_moments(tiny_sdxl, store, tmp_path, optimizer_state, updates):
    settings = {"num_segments": [8, 2, 1], "num_steps": 1, "optimizer_state": optimizer_state}
    folder = train(tiny_sdxl, store, tmp_path, **settings)
    state = load_file(sorted(folder.glob("checkpoints/*/state.safetensors"))[-1])
    assert {
        int(value) for name, value in state.items() if name.startswith("optimizer.") and name.endswith(".step")
    } == {updates}, "Adam counts its updates since its moments were last fresh"


def test_micro_batches_give_the_step_of_the_whole_batch(tiny_sdxl, store, tmp_path):
    one = train(tiny_sdxl, store, tmp_path / "one", num_steps=2, num_segments=[2])
    four = train(tiny_sdxl, store, tmp_path / "four", num_steps=2, num_segments=[2], gradient_accumulation=4)
    for a, b in zip(runs.records(one), runs.records(four), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_gradient_checkpointing_changes_no_gradient(tiny_sdxl, store, tmp_path):
    plain = train(tiny_sdxl, store, tmp_path / "plain", num_steps=2, num_segments=[2])
    saved = train(tiny_sdxl, store, tmp_path / "saved", num_steps=2, num_segments=[2], gradient_checkpointing=True)
    norms = [[record["grad_norm"] for record in runs.records(folder)] for folder in (plain, saved)]
    assert norms[0] == norms[1]  # not hashed: the same bits


@pytest.mark.parametrize(
    "settings",
    [
        {"target": "trajectory", "adapter": {"kind": "full"}},
        {"target": "trajectory", "condition_on_target": True, "adapter": {"kind": "full"}, "distance": "huber"},
        {"target": "consistency", "num_segments": [1], "pair": "random", "distance": "huber"},
    ],
    ids=["full", "conditioned", "random-skip"],
)
def test_the_held_out_loss_falls(tiny_sdxl, store, tmp_path, settings):
    settings = {"num_segments": [1], "num_steps": 50, "learning_rate": 3e-3, "save_every": 1000} | settings
    found = records(train(tiny_sdxl, store, tmp_path, held_out_every=1, **settings))
    losses = [record["held_out_loss"] for record in found if "held_out_loss" in record and record["num_segments"] == 1]
    assert losses[-1] < 0.85 * losses[0]


@pytest.mark.parametrize("method", ["online", "inter_segment-stored", "inter_segment-student"])
def test_every_source_trains(tiny_sdxl, store, tmp_path, method):
    prompts = runs.write_prompts(tmp_path)
    settings = {
        "online": {"source": "online", "prompts": prompts, "target": "consistency", "num_segments": [8, 1]},
        "inter_segment-stored": {"method": "inter_segment", "num_segments": [1]},
        "inter_segment-student": {
            "method": "inter_segment",
            "num_segments": [1],
            "renoise": "student",
            "prompts": prompts,
        },
    }[method]
    found = records(train(tiny_sdxl, store, tmp_path / "run", **settings))
    assert all(record["loss"] >= 0 and record["grad_norm"] > 0 for record in found if "loss" in record)


def test_the_global_stage_in_x0_has_the_weight_of_the_signal_to_noise_ratio(tiny_sdxl, store, tmp_path, monkeypatch):
    """A loss in x0 is SNR(t) + 1 times that in z, of the same jumps of an untrained student."""
    original, seen = distill.loss, {}

    def recorded(settings, network, batch, *rest):
        value = original(settings, network, batch, *rest)
        seen.setdefault(settings.space, []).append((batch.t, value.detach(), network.base.schedule))
        return value

    monkeypatch.setattr(distill, "loss", recorded)
    for space in ("z", "x0"):
        settings = {"method": "inter_segment", "num_segments": [1], "num_steps": 1, "space": space}
        train(tiny_sdxl, store, tmp_path / space, **settings)
    (t, plain, schedule), (again, weighted, _) = seen["z"][0], seen["x0"][0]
    assert torch.equal(t, again)
    assert (plain > 0).all()
    torch.testing.assert_close(weighted / plain, snr(t, schedule) + 1.0, rtol=1e-4, atol=0.0)


def test_the_newest_checkpoints_are_kept_and_no_others(tiny_sdxl, store, tmp_path):
    train(tiny_sdxl, store, tmp_path, num_segments=[1], num_steps=5, save_every=1, keep_checkpoints=2)
    steps = [int(path.name.removeprefix("step-")) for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert len(steps) == 2
    assert steps[1] - steps[0] == 1
    assert steps[1] >= 4


def test_a_second_stage_starts_from_the_first_ones_student(tiny_sdxl, store, tmp_path):
    first = train(tiny_sdxl, store, tmp_path / "first", num_steps=2, num_segments=[1])
    second = tmp_path / "second"
    second.mkdir()
    stage = runs.distill(method="inter_segment", num_segments=[1], num_steps=1, learning_rate=1e-12)
    parents = {"trajectories": store, "distill": first}
    distill.run(stage, runs.recipe(tiny_sdxl, tmp_path, [stage]), parents, second)
    expected, found = student_weights(first), student_weights(second)
    assert max((expected[name] - found[name]).abs().max() for name in expected) < 1e-9


def test_the_held_out_loss_is_of_trajectories_that_are_never_trained_on(tiny_sdxl, store, tmp_path):
    found = records(train(tiny_sdxl, store, tmp_path, num_segments=[1], num_steps=3, held_out_every=2))
    assert [record["step"] for record in found if "held_out_loss" in record] == [2, 3]


def test_a_loss_that_is_no_number_stops_before_the_update(tiny_sdxl, store, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "loss", lambda *arguments: torch.full((4,), float("nan"), requires_grad=True))
    with pytest.raises(NonFiniteLoss, match="nothing was updated"):
        train(tiny_sdxl, store, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000000"]


def test_a_damaged_checkpoint_is_refused_by_name_and_never_skipped(tiny_sdxl, store, tmp_path):
    train(tiny_sdxl, store, tmp_path)
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    data = bytearray((newest / "state.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "state.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=newest.name):
        train(tiny_sdxl, store, tmp_path)


def test_same_seed_same_bits_and_another_seed_others(tiny_sdxl, store, tmp_path):
    stage = runs.distill(num_segments=[1])
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder = tmp_path / name
        folder.mkdir()
        distill.run(stage, runs.recipe(tiny_sdxl, folder, [stage], seed=seed), {"trajectories": store}, folder)
        weights.append(student_weights(folder))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
