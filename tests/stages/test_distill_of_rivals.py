"""The stage under the keys of other methods: progressive adversarial phases, random ends, simulation."""

import itertools

import pytest
import torch
from safetensors.torch import load_file

import runs
from mlcm_rl import pipeline
from mlcm_rl.equations.segments import milestones
from mlcm_rl.equations.solver import ddim_step
from mlcm_rl.models import students, teachers, terms
from mlcm_rl.stages import distill, feedback
from mlcm_rl.storage.files import read_json

LORA = {"kind": "lora", "rank": 2, "alpha": 2.0}
HEADS = {"jumps": "all", "width": 4, "learning_rate": 1e-3}
PAIRS = HEADS | {"sees_start": True, "loss": "relativistic"}
LIGHTNING = {"starts": "milestones", "num_segments": [16, 2], "distance_weight": 0.0, "adversarial": PAIRS}
HYPER = {"num_segments": [2, 1], "ends": "random", "target": "consistency", "target_ema": 0.9, "adversarial": HEADS}
FAKE = {"rank": 2, "alpha": 2.0, "num_updates": 2}
ONE_STEP = {"starts": "milestones", "num_segments": [1], "prediction": "x0"}
SIMULATION = {"method": "simulation", "num_segments": [1], "num_student_steps": 2, "matching": {"fake": FAKE}}


@pytest.fixture(scope="module")
def store(tiny_sdxl, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    stage = runs.trajectories(runs.write_prompts(folder), solver_steps=16)
    return pipeline.run(runs.recipe(tiny_sdxl, folder, [stage]))[0].folder


def train(teacher, store, folder, before=None, **settings) -> list[dict]:
    folder.mkdir(exist_ok=True)
    stage = runs.distill(**{"adapter": LORA} | settings)
    parents = {"trajectories": store} | ({"distill": before} if before else {})
    distill.run(stage, runs.recipe(teacher, folder, [stage]), parents, folder)
    return runs.records(folder)


@pytest.mark.parametrize("name", ["lightning", "hyper", "simulation"])
def test_each_trains_and_its_student_is_described(tiny_sdxl, store, tmp_path, name):
    prompts = runs.write_prompts(tmp_path)
    settings = {"lightning": LIGHTNING, "hyper": HYPER, "simulation": SIMULATION | {"prompts": prompts}}[name]
    records = train(tiny_sdxl, store, tmp_path / "run", **settings)
    for record in records:
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


def test_a_simulation_whose_terms_all_warm_up_trains_their_networks_alone(tiny_sdxl, store, tmp_path):
    warm = {"matching": {"fake": FAKE | {"warmup_steps": 1}}, "prompts": runs.write_prompts(tmp_path)}
    first, second = train(tiny_sdxl, store, tmp_path / "run", **SIMULATION | warm, num_steps=2)
    assert (first["loss"], first["grad_norm"]) == (0.0, 0.0)
    assert first["fake_grad_norm"] > 0 < second["grad_norm"]


@pytest.mark.parametrize("num_segments", [16, 2])
def test_stored_jumps_of_a_student_of_whole_segments_begin_at_their_tops(tiny_sdxl, store, tmp_path, num_segments):
    """In `feedback` with consistency, whatever its network predicts."""
    settings = {"starts": "milestones", "num_segments": [num_segments]}
    train(tiny_sdxl, store, tmp_path / "run", **settings, num_steps=1)
    tuned = runs.tuning("feedback", "unused", consistency=1.0)
    recipe = runs.recipe(tiny_sdxl, tmp_path, [tuned])
    base = teachers.load(recipe.teacher, "cpu")
    points = feedback.stored_states(tuned, recipe, base, tmp_path / "run" / "student", store)
    draw = points.draw(0, num_segments, "next", torch.Generator().manual_seed(0))
    tops = milestones(num_segments).tolist()
    below = dict(itertools.pairwise(tops))
    assert all(below[s] == t for t, s in zip(draw.t.tolist(), draw.s.tolist(), strict=True))


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


def test_heads_see_where_jumps_begin_and_end(tiny_sdxl, store, tmp_path, monkeypatch):
    """Of all jumps: the point at t; the student's state at s by DDIM, and the stored one there, both of time s."""
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
    assert torch.equal(made.jumps.target, batch.x_s)
    assert torch.equal(noised.s.cpu(), batch.s.cpu())
    assert all(map(torch.equal, made.jumps.start, (batch.x_t, batch.t)))
    assert (noised.t >= noised.s).all()
    with torch.no_grad():  # a LoRA at its start is the teacher
        x0 = base.x0(base.denoiser, batch.x_t, batch.t, batch.conditioning)
    torch.testing.assert_close(made.jumps.x0, ddim_step(batch.x_t, x0, batch.t, batch.s, base.schedule))
    assert made.weight.tolist() == [1.0] * 4


def test_jumps_to_time_0_end_where_their_targets_do(tiny_sdxl, store, tmp_path, monkeypatch):
    """With the noise that is left there, as the stored state has it: x0 without would be told by that alone."""
    seen, original = [], terms.Adversary.network_loss
    monkeypatch.setattr(
        terms.Adversary,
        "network_loss",
        lambda self, made, noised: seen.append((self.base, made)) or original(self, made, noised),
    )
    train(tiny_sdxl, store, tmp_path / "run", num_segments=[1], adversarial={"width": 4}, num_steps=1)
    (base, made), (x_t, t) = seen[0], seen[0][1].jumps.start
    with torch.no_grad():
        x0 = base.x0(base.denoiser, x_t, t, made.jumps.conditioning)
    torch.testing.assert_close(made.jumps.x0, ddim_step(x_t, x0, t, torch.zeros_like(t), base.schedule))
    assert (made.jumps.x0 - x0).abs().max() > 1e-3


# ---- SDXL-Lightning's one-step student ----


def weights(folder):
    files = sorted((folder / "student").rglob("*.safetensors"))
    return {f"{file.name}:{name}": value for file in files for name, value in load_file(file).items()}


@pytest.mark.parametrize(("adapter", "rate"), [(LORA, 3e-2), ({"kind": "full"}, 3e-3)], ids=["lora", "full"])
def test_a_one_step_student_turns_to_x0_by_the_distance_and_goes_on_by_the_adversary(
    tiny_sdxl, store, tmp_path, adapter, rate
):
    """The random teacher's x0 at 999 is an error over alpha, of a mean square of 240: far for a network near 1."""
    settings = {"adapter": adapter, "learning_rate": rate, "num_steps": 30, "log_every": 1}
    records = train(tiny_sdxl, store, tmp_path / "turned", **ONE_STEP | settings)
    base = teachers.load(runs.recipe(tiny_sdxl, tmp_path, [runs.distill()]).teacher, torch.device("cpu"))
    losses = [one["loss"] for one in records if "loss" in one]
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])
    described = students.describe(tmp_path / "turned" / "student")
    assert (described["prediction_type"], described["num_segments"], described["budgets"]) == ("sample", 1, [1])

    settings = {"adapter": adapter, "distance_weight": 0.0, "adversarial": HEADS}
    records = train(tiny_sdxl, store, tmp_path / "sharp", tmp_path / "turned", **ONE_STEP | settings)
    assert all(one["loss"] == pytest.approx(one["adversarial"]) for one in records if "loss" in one)
    student = students.load_student(base, tmp_path / "sharp" / "student")
    assert base.prediction_of(student.denoiser) == "sample"
    with pytest.raises(ValueError, match="a stage continues with the prediction of the student it starts from"):
        train(tiny_sdxl, store, tmp_path / "back", tmp_path / "sharp", num_segments=[1], adapter=adapter)


def test_its_first_loss_is_by_hand_that_of_the_network_read_as_x0(tiny_sdxl, store, tmp_path, monkeypatch):
    """The jump from 999 to 0 lands at alpha_0 x0 + sigma_0 eps, with eps = (x_t - alpha x0) / sigma of that x0."""
    points, realise = [], distill.StoredStates.realise
    monkeypatch.setattr(
        distill.StoredStates, "realise", lambda self, draw: points.append(realise(self, draw)) or points[-1]
    )
    (record,) = train(tiny_sdxl, store, tmp_path / "run", **ONE_STEP, num_steps=1, log_every=1, held_out_every=1000)
    base = teachers.load(runs.recipe(tiny_sdxl, tmp_path, [runs.distill()]).teacher, torch.device("cpu"))
    batch, alpha, sigma = points[0], base.schedule.alpha.double(), base.schedule.sigma.double()
    assert (set(batch.t.tolist()), set(batch.s.tolist())) == ({999}, {0})
    with torch.no_grad():  # a LoRA at its start is the teacher, whose output is noise
        x0 = base.predict(base.denoiser, batch.x_t, batch.t, batch.conditioning).double()
    eps = (batch.x_t - alpha[999] * x0) / sigma[999]
    error = alpha[0] * x0 + sigma[0] * eps - batch.x_s
    assert record["loss"] == pytest.approx(error.square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("step", [1, 2])
def test_a_one_step_student_is_resumed_to_the_same_bits(tiny_sdxl, store, tmp_path, step):
    settings = ONE_STEP | {"num_steps": 3, "adversarial": HEADS}
    train(tiny_sdxl, store, tmp_path / "whole", **settings)
    with runs.crashing_at(step):
        train(tiny_sdxl, store, tmp_path / "cut", **settings, save_every=1)
    train(tiny_sdxl, store, tmp_path / "cut", **settings, save_every=1)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(cut[name], value) for name, value in whole.items())
