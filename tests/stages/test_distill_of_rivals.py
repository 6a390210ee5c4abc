"""The stage under the keys of other methods: progressive adversarial phases, random ends, simulation."""

import json

import pytest
import torch

import runs
from mlcm_rl import pipeline
from mlcm_rl.equations.solver import ddim_step
from mlcm_rl.models import students, terms
from mlcm_rl.stages import distill
from mlcm_rl.storage.files import read_json

LORA = {"kind": "lora", "rank": 2, "alpha": 2.0}
HEADS = {"jumps": "all", "width": 4, "learning_rate": 1e-3}
LIGHTNING = {"starts": "milestones", "num_segments": [16, 2], "distance_weight": 0.0, "adversarial": HEADS}
HYPER = {"num_segments": [2, 1], "ends": "random", "target": "consistency", "target_ema": 0.9, "adversarial": HEADS}
FAKE = {"rank": 2, "alpha": 2.0, "num_updates": 2}
SIMULATION = {"method": "simulation", "num_segments": [1], "num_student_steps": 2, "matching": {"fake": FAKE}}


@pytest.fixture(scope="module")
def store(tiny_sdxl, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    stage = runs.trajectories(runs.write_prompts(folder), solver_steps=16)
    return pipeline.run(runs.recipe(tiny_sdxl, folder, [stage]))[0].folder


def train(teacher, store, folder, **settings) -> list[dict]:
    folder.mkdir(exist_ok=True)
    stage = runs.distill(adapter=LORA, **settings)
    distill.run(stage, runs.recipe(teacher, folder, [stage]), {"trajectories": store}, folder)
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["lightning", "hyper", "simulation"])
def test_each_trains_and_its_student_is_described(tiny_sdxl, store, tmp_path, name):
    prompts = runs.write_prompts(tmp_path)
    settings = {"lightning": LIGHTNING, "hyper": HYPER, "simulation": SIMULATION | {"prompts": prompts}}[name]
    records = train(tiny_sdxl, store, tmp_path / "run", **settings)
    for record in (one for one in records if "loss" in one):
        term = record.get("adversarial", 0.0) + record.get("matching", 0.0)
        assert record["loss"] == pytest.approx(record["distance"] + term, rel=1e-5)
        assert term != 0
        assert (record["distance"] == 0) == (name != "hyper")
        assert record["grad_norm"] > 0
    assert students.describe(tmp_path / "run" / "student")["num_segments"] == settings["num_segments"][-1]
    if name == "lightning":
        first = tmp_path / "run" / "snapshots" / "phase-0-K16"
        assert read_json(first / "student.json")["num_segments"] == 16
        assert students.describe(first)["num_segments"] == 16


def test_simulation_shows_the_heads_real_pictures(tiny_sdxl, store, tmp_path):
    terms_of = {"adversarial": {"real": "images", "width": 4}, "images": runs.write_images(tmp_path)}
    settings = SIMULATION | terms_of | {"prompts": runs.write_prompts(tmp_path), "num_steps": 1}
    (record,) = train(tiny_sdxl, store, tmp_path / "run", **settings)
    assert record["loss"] == pytest.approx(record["matching"] + record["adversarial"], rel=1e-5)
    assert record["heads_grad_norm"] > 0 < record["fake_grad_norm"]


@pytest.mark.parametrize("settings", [LIGHTNING, HYPER], ids=["lightning", "hyper"])
def test_micro_batches_make_the_steps_of_whole_ones(tiny_sdxl, store, tmp_path, settings):
    whole = train(tiny_sdxl, store, tmp_path / "whole", **settings)
    parts = train(tiny_sdxl, store, tmp_path / "parts", **settings, gradient_accumulation=2)
    for one, other in zip(whole, parts, strict=True):
        assert other == pytest.approx(one, rel=2e-3, abs=1e-5)


def test_heads_see_where_jumps_end(tiny_sdxl, store, tmp_path, monkeypatch):
    """Of all jumps: the student's state at s by DDIM, and the stored one there, both of time s."""
    seen, points = [], []
    original, realise = terms.Adversary.network_loss, distill.StoredStates.realise

    def network_loss(self, made, noised):
        seen.append((self.base, made, noised.rows(made.jumps.rows)))
        return original(self, made, noised)

    monkeypatch.setattr(terms.Adversary, "network_loss", network_loss)
    monkeypatch.setattr(
        distill.StoredStates, "realise", lambda self, draw: points.append(realise(self, draw)) or points[-1]
    )
    train(tiny_sdxl, store, tmp_path / "run", **LIGHTNING | {"num_segments": [2]}, num_steps=1)
    (base, made, noised), batch = seen[0], points[0]
    assert torch.equal(made.target, batch.x_s)
    assert torch.equal(noised.s, batch.s)
    assert (noised.t >= noised.s).all()
    with torch.no_grad():  # a LoRA at its start is the teacher
        x0 = base.x0(base.denoiser, batch.x_t, batch.t, batch.conditioning)
    torch.testing.assert_close(made.jumps.x0, ddim_step(batch.x_t, x0, batch.t, batch.s, base.schedule))
    assert made.weight.tolist() == [1.0] * 4
