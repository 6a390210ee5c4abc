"""Distribution matching and the adversary as terms of a distill stage: resumption, batches, what each one trains."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import runs
from mlcm_rl import pipeline
from mlcm_rl.models import terms
from mlcm_rl.stages import distill
from mlcm_rl.storage.files import CheckpointError
from mlcm_rl.training.loop import NonFiniteLoss, Runtime

FAKE = {"rank": 2, "alpha": 2.0, "learning_rate": 1e-3, "num_updates": 2}
MATCHING = {"weight": 0.5, "fake": FAKE}
ADVERSARIAL = {"width": 4, "learning_rate": 1e-3, "gradient_penalty": 0.01}
BOTH = {"matching": MATCHING, "adversarial": ADVERSARIAL}
GLOBAL = {
    "method": "inter_segment",
    "num_segments": [1],
    "num_teacher_steps": 1,
    "adapter": {"kind": "lora", "rank": 2, "alpha": 2.0},
}
LEARNED = ("fake_loss", "fake_grad_norm", "heads_loss", "heads_grad_norm")


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted(folder.glob("checkpoints/*/state.safetensors"))[-1])


@pytest.fixture(scope="module")
def store(tiny_sdxl, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    recipe = runs.recipe(tiny_sdxl, folder, [runs.trajectories(runs.write_prompts(folder))])
    return pipeline.run(recipe)[0].folder


def store_of(recipe, folder: Path) -> Path:
    """A store of the recipe's own teacher: one in another precision has another identity."""
    stages = [runs.trajectories(runs.write_prompts(folder))]
    return pipeline.run(recipe.model_copy(update={"stages": stages, "runs": str(folder / "stores")}))[0].folder


def train(teacher: Path, store: Path, folder: Path, **settings) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    of_samples = {"num_student_steps": 2} if "matching" in settings or settings.get("renoise") == "student" else {}
    settings = GLOBAL | of_samples | settings
    if settings["method"] != "inter_segment":
        del settings["num_teacher_steps"]
    stage = runs.distill(**settings)
    distill.run(stage, runs.recipe(teacher, folder, [stage]), {"trajectories": store}, folder)
    return folder


@pytest.fixture(scope="module")
def whole(tiny_sdxl, store, tmp_path_factory) -> Path:
    """Three steps with both terms, of a student, two fake updates and one of the heads each."""
    return train(tiny_sdxl, store, tmp_path_factory.mktemp("whole"), num_steps=3, **BOTH)


@pytest.mark.parametrize(
    "update",
    [
        pytest.param(4, id="at-a-step", marks=pytest.mark.slow),
        pytest.param(6, id="in-the-fake"),
        pytest.param(11, id="in-the-heads", marks=pytest.mark.slow),
    ],
)
def test_stopped_between_any_updates_it_ends_with_the_same_bits(tiny_sdxl, store, whole, tmp_path, update):
    with runs.crashing_at(update):
        train(tiny_sdxl, store, tmp_path, num_steps=3, **BOTH)
    train(tiny_sdxl, store, tmp_path, num_steps=3, **BOTH)
    assert runs.records(tmp_path) == runs.records(whole)
    expected, actual = state(whole), state(tmp_path)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    prefixes = {name.split(".")[0] for name in actual}
    assert prefixes == {"student", "optimizer", "fake", "fake_optimizer", "heads", "heads_optimizer"}


def test_the_log_has_every_term_and_they_add_up(whole):
    for record in runs.records(whole):
        assert record["distance"] + record["matching"] + record["adversarial"] == pytest.approx(
            record["loss"], rel=1e-5
        )
        assert all(record[name] == record[name] for name in LEARNED)
        assert record["fake_grad_norm"] > 0 < record["heads_grad_norm"]


def first_record(teacher: Path, store: Path, folder: Path, **settings) -> dict:
    return runs.records(train(teacher, store, folder, num_steps=1, log_every=1, **settings))[0]


@pytest.mark.parametrize("part", ["matching", "adversarial", "distance"])
def test_a_part_of_half_the_weight_is_half_of_it_and_the_others_stay(tiny_sdxl, store, tmp_path, part):
    whole = {"matching": MATCHING | {"weight": 1.0}, "adversarial": ADVERSARIAL | {"weight": 1.0}}
    half = whole | ({"distance_weight": 0.5} if part == "distance" else {part: whole[part] | {"weight": 0.5}})
    found = {name: first_record(tiny_sdxl, store, tmp_path / name, **s) for name, s in (("1", whole), ("half", half))}
    for one in ("matching", "adversarial", "distance"):
        share = 0.5 if one == part else 1.0
        assert found["half"][one] == pytest.approx(share * found["1"][one], rel=1e-5), one


def test_the_penalty_of_the_heads_counts_by_its_weight(tiny_sdxl, store, tmp_path):
    """Before the first update their loss is a + w b: the differences of three weights are as these."""
    losses = [
        first_record(tiny_sdxl, store, tmp_path / str(weight), adversarial=ADVERSARIAL | {"gradient_penalty": weight})[
            "heads_loss"
        ]
        for weight in (0.0, 100.0, 300.0)
    ]
    assert losses[1] - losses[0] > 1e-3
    assert (losses[2] - losses[0]) / (losses[1] - losses[0]) == pytest.approx(3.0, rel=1e-2)


def test_the_networks_of_the_terms_learn_and_the_teacher_does_not(tiny_sdxl, store, tmp_path, monkeypatch):
    """No loss leaves a gradient on another network than its own, and steps change the fake score and the heads."""
    bases, left = [], []
    original_backward, original_terms = Runtime.backward, distill.terms_of

    def backward(self, losses, beside=None):
        result = original_backward(self, losses, beside)
        networks = [bases[0].denoiser, self.engine.student, *(one.engine.student for one in self.beside)]
        left.extend(one for network in networks for one in network.parameters() if one.grad is not None)
        return result

    def terms_of(stage, base, *rest):
        bases.append(base)
        return original_terms(stage, base, *rest)

    monkeypatch.setattr(Runtime, "backward", backward)
    monkeypatch.setattr(distill, "terms_of", terms_of)
    folder = train(tiny_sdxl, store, tmp_path, num_steps=2, **BOTH)
    assert not left
    first, last = (load_file(path) for path in sorted(folder.glob("checkpoints/*/state.safetensors")))
    for prefix in ("student", "fake", "heads"):
        assert any(not torch.equal(first[name], last[name]) for name in first if name.startswith(f"{prefix}."))


BUDGETS = {"method": "segments", "condition_on_target": True, "budgets": [4], "distance": "log_l2"}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, BUDGETS], ids=["inter_segment", "budgets"])
def test_micro_batches_give_the_step_of_the_whole_batch(tiny_sdxl, store, tmp_path, settings):
    """Of `budgets`, most micro-batches of one sample have no jump that ends at time 0, and so no term."""
    settings = {"num_steps": 3, **BOTH, **settings}
    whole = train(tiny_sdxl, store, tmp_path / "whole", **settings)
    split = train(tiny_sdxl, store, tmp_path / "split", gradient_accumulation=4, **settings)
    assert any(record["matching"] for record in runs.records(whole))
    for one, other in zip(runs.records(whole), runs.records(split), strict=True):
        assert one.keys() == other.keys()
        for name in {"loss", "grad_norm", "matching", "adversarial", *LEARNED} & one.keys():
            assert one[name] == pytest.approx(other[name], rel=2e-3), name


def test_the_loss_of_heads_is_of_the_jumps_that_they_see(tiny_sdxl, store, tmp_path):
    """2 is chance of the hinge, however many of a batch's jumps end at time 0; a step without one has no such loss."""
    folder = train(tiny_sdxl, store, tmp_path, **BUDGETS, num_steps=6, adversarial={"width": 4})
    steps = runs.records(folder)
    seen = [record for record in steps if "heads_loss" in record]
    assert 0 < len(seen) < len(steps)
    assert all(record["heads_loss"] == pytest.approx(2.0, abs=0.3) for record in seen)
    assert all(record["heads_grad_norm"] == 0 for record in steps if record not in seen)


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_gradient(tiny_sdxl, store, whole, tmp_path):
    saved = train(tiny_sdxl, store, tmp_path, num_steps=3, gradient_checkpointing=True, **BOTH)
    norms = [[record["grad_norm"] for record in runs.records(folder)] for folder in (saved, whole)]
    assert norms[0] == norms[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"adapter": {"kind": "full"}, "distance": "features"},
        {"condition_on_target": True, "method": "segments", "budgets": [1, 2], "distance": "log_l2"},
        {"renoise": "student", "condition_on_target": True, "target_ema": 0.5},
        {"method": "segments", "target": "consistency", "adversarial": {**ADVERSARIAL, "real": "images"}},
    ],
    ids=["full", "budgets", "own-samples", "images"],
)
def test_every_kind_of_student_takes_the_terms(tiny_sdxl, store, tmp_path, settings):
    paths = {"prompts": runs.write_prompts(tmp_path), "images": runs.write_images(tmp_path)}
    lines = runs.records(train(tiny_sdxl, store, tmp_path / "run", **BOTH | paths | settings))
    assert len(lines) == 2
    seen = [record for record in lines if "heads_loss" in record]  # of budgets a step may have no jump that heads see
    assert seen
    assert all(record[name] > 0 for record in seen for name in ("grad_norm", *LEARNED))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_terms_in_bfloat16_are_near_those_in_float32(tiny_sdxl, store, tmp_path, dtype):
    """Over a teacher in half precision, recomputed in the backward pass; an adversary is refused over float16."""
    added = {"matching": MATCHING} if dtype == "float16" else BOTH
    stage = runs.distill(**GLOBAL, **added, num_steps=1, precision="bf16", gradient_checkpointing=True)
    recipe = runs.recipe(tiny_sdxl, tmp_path, [stage])
    recipe = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"dtype": dtype})})
    distill.run(stage, recipe, {"trajectories": store_of(recipe, tmp_path)}, tmp_path)
    exact = train(tiny_sdxl, store, tmp_path / "exact", num_steps=1, **added)
    (half,), (whole,) = runs.records(tmp_path), runs.records(exact)
    for name in ("matching", "fake_loss", "heads_loss"):
        assert half.get(name, 0.0) == pytest.approx(whole.get(name, 0.0), rel=0.1), name


@pytest.mark.parametrize("name", [pytest.param("fake", marks=pytest.mark.slow), "heads"])
def test_a_network_beside_the_student_that_is_not_finite_stops_the_run(tiny_sdxl, store, tmp_path, monkeypatch, name):
    term = {"fake": terms.DistributionMatching, "heads": terms.Adversary}[name]
    original = term.network_loss
    monkeypatch.setattr(term, "network_loss", lambda *arguments: original(*arguments) * float("nan"))
    with pytest.raises(NonFiniteLoss, match=f"step 1: loss nan.*{name} was not updated"):
        train(tiny_sdxl, store, tmp_path, **BOTH)


@pytest.mark.slow
def test_a_checkpoint_of_another_fake_is_refused(tiny_sdxl, store, tmp_path):
    train(tiny_sdxl, store, tmp_path, num_steps=1, matching=MATCHING)
    with pytest.raises(CheckpointError, match="other weights than this fake"):
        train(tiny_sdxl, store, tmp_path, matching={"fake": {**FAKE, "rank": 3}})


@pytest.mark.parametrize(
    ("term", "settings", "network"),
    [
        ("matching", {"fake": {**FAKE, "warmup_steps": 1}}, "fake"),
        ("adversarial", {**ADVERSARIAL, "warmup_steps": 1}, "heads"),
    ],
)
def test_a_network_that_warms_up_leaves_the_student_alone(tiny_sdxl, store, tmp_path, term, settings, network):
    """The student's first step is that without the term, to the bit, and the term's own network learns in it."""
    plain = train(tiny_sdxl, store, tmp_path / "plain", num_steps=2)
    warm = train(tiny_sdxl, store, tmp_path / "warm", num_steps=2, **{term: settings})
    (first, second), (expected, other) = runs.records(warm), runs.records(plain)
    assert (first["loss"], first["grad_norm"]) == (expected["loss"], expected["grad_norm"])
    assert first[term] == 0.0 < first[f"{network}_grad_norm"]
    assert second[term] != 0.0
    assert second["distance"] == other["loss"]


def test_without_terms_the_loss_is_the_distance(tiny_sdxl, store, tmp_path):
    assert runs.records(train(tiny_sdxl, store, tmp_path, num_steps=1))[0].keys().isdisjoint({"distance", *LEARNED})
