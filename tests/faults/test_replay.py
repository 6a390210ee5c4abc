"""A step whose loss or gradient is no number leaves a bundle, and `mlcm replay` repeats it."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import runs
from mlcm_rl import pipeline
from mlcm_rl.cli.app import app
from mlcm_rl.pipeline import RunError
from mlcm_rl.stages import distill
from mlcm_rl.storage import files
from mlcm_rl.storage.files import CheckpointError
from mlcm_rl.training import replay

STAGES = {
    "distill": {"num_segments": [2, 1], "num_steps": 2, "optimizer_state": "reset", "save_every": 1},
    "feedback": {"num_steps": 4, "save_every": 100},
    "dpo": {"num_steps": 4, "save_every": 2},
    "policy": {"num_steps": 4, "num_iterations": 2, "save_every": 1, "keep_checkpoints": 4},
}


@pytest.fixture(scope="module")
def distilled(tiny_sdxl, tmp_path_factory):
    """A recipe with a store and a student, both made."""
    folder = tmp_path_factory.mktemp("distilled")
    stages = [runs.trajectories(runs.write_prompts(folder)), runs.distill(num_segments=[1])]
    recipe = runs.recipe(tiny_sdxl, folder, stages)
    pipeline.run(recipe)
    return recipe


def with_stage(distilled, kind: str):
    prompts = distilled.stages[0].prompts
    stage = runs.distill(**STAGES[kind]) if kind == "distill" else runs.tuning(kind, prompts, **STAGES[kind])
    stages = [distilled.stages[0], stage] if kind == "distill" else [*distilled.stages, stage]
    return distilled.model_copy(update={"stages": stages})


@pytest.mark.parametrize(
    "kind", ["distill", "feedback", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("dpo", "policy"))]
)
def test_a_step_is_repeated_to_the_last_bit_from_what_it_left(distilled, monkeypatch, kind):
    """The gradient of the third step is spoiled (of policy, that of its second update). Its losses come out again,
    which takes the weights, the moments and the rewards' statistics of before the step."""
    recipe, clip, calls = with_stage(distilled, kind), nn.utils.clip_grad_norm_, []
    spoiled = 6 if kind == "policy" else 3

    def clip_spoiled(*arguments):
        calls.append(1)
        norm = clip(*arguments)
        return torch.full_like(norm, torch.nan) if len(calls) == spoiled else norm

    with monkeypatch.context() as patched:
        patched.setattr(nn.utils, "clip_grad_norm_", clip_spoiled)
        with pytest.raises(
            RunError, match=rf"\({kind}\): step 3: .* nan: nothing was updated.*`mlcm replay .*-3\.json"
        ):
            pipeline.run(recipe)
    folder = pipeline.plan(recipe)[-1].folder
    before = files.checksums(folder)
    then, now = pipeline.replay(folder / "nonfinite-3.json")
    assert (then["step"], then["grad_norm"]) == (2, "nan")
    assert isinstance(now["grad_norm"], float)
    assert len(set(now["losses"])) > 1
    assert now == then | {"grad_norm": now["grad_norm"]}
    assert then["seeds"] or kind in ("dpo", "policy")  # their samples have generators of their own
    assert len(then["samples"]) in (4, 2)
    assert files.checksums(folder) == before


def test_a_run_that_diverges_says_how_to_repeat_the_step_and_the_command_prints_the_same_figures(
    distilled, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    stages = [distilled.stages[0], distilled.stages[1].model_copy(update={"learning_rate": 1e30, "num_steps": 4})]
    path = tmp_path / "diverging.yaml"
    path.write_text(distilled.model_copy(update={"stages": stages}).model_dump_json())
    failed = CliRunner().invoke(app, ["run", str(path)])
    assert failed.exit_code == 1
    bundle = failed.stderr.split("`mlcm replay ")[1].split("`")[0]
    repeated = CliRunner().invoke(app, ["replay", bundle])
    assert repeated.exit_code == 0, repeated.output
    assert "the same figures" in repeated.output
    assert repeated.output.count("nan") >= 10  # 4 samples, their mean and the norm, then and now
    kept = json.loads(Path(bundle).read_text())
    kept["figures"]["losses"][0] = 0.5
    Path(bundle).write_text(json.dumps(kept))
    changed = CliRunner().invoke(app, ["replay", bundle])
    assert changed.exit_code == 1
    assert "the figures differ" in changed.output


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda bundle: bundle["stage"].update(unheard=1), "is of another version: 1 settings are unknown"),
        (lambda bundle: bundle["parents"].update(trajectories="gone"), "starts from the trajectories stage in .*gone"),
        (lambda bundle: bundle["figures"].update(step="3"), "is damaged: its figures do not say their step"),
    ],
    ids=["another-version", "no-parent", "no-step"],
)
def test_a_bundle_that_cannot_be_repeated_is_refused_in_words(bundle, change, words):
    path, content = bundle
    changed = json.loads(json.dumps(content))
    change(changed)
    path.write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match=words):
        replay.read(path)


def test_a_stage_that_ends_before_the_bundles_step_is_said(bundle, monkeypatch):
    path, content = bundle
    path.write_text(json.dumps(content))
    monkeypatch.setattr(distill, "run", lambda *_: None)
    with pytest.raises(RunError, match="the stage ended before step 2"):
        pipeline.replay(path)


@pytest.fixture(scope="module")
def bundle(tiny_sdxl, tmp_path_factory) -> tuple[Path, dict]:
    """What a step that diverged has left, and its content."""
    folder = tmp_path_factory.mktemp("bundle")
    stages = [runs.trajectories(runs.write_prompts(folder)), runs.distill(learning_rate=1e30, num_steps=4)]
    with pytest.raises(RunError, match="nothing was updated"):
        pipeline.run(runs.recipe(tiny_sdxl, folder, stages))
    (path,) = folder.rglob("nonfinite-*.json")
    return path, json.loads(path.read_text())


def test_what_is_no_bundle_is_refused_in_words(tmp_path):
    path = tmp_path / "nonfinite-1.json"
    path.write_text("{}")
    with pytest.raises(CheckpointError, match="is not a bundle of format 1"):
        replay.read(path)
