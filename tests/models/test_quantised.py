"""A frozen denoiser in integers: its size, its products and gradients, its students, and what is refused."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.profiler import ProfilerActivity, profile

import runs
import tiny
from mlcm_rl import pipeline
from mlcm_rl.cost import memory
from mlcm_rl.data.trajectory_store import store_of
from mlcm_rl.models import students, teachers
from mlcm_rl.models.quantised import QuantisedLinear, quantise_
from mlcm_rl.pipeline import fingerprint, finished_runs
from mlcm_rl.recipe import Evaluate, Full, Lora, Teacher, experiment
from mlcm_rl.stages import distill
from mlcm_rl.storage.files import CheckpointError
from mlcm_rl.training import autocast
from tiny_families import CASES

pytest.importorskip("bitsandbytes", reason="needs the extra `quantised`: pip install 'mlcm-rl[quantised]'")

KINDS = ["int8", "nf4"]
CPU = torch.device("cpu")


def linear(kind: str, rows: int = 96, columns: int = 128) -> tuple[nn.Linear, QuantisedLinear]:
    """A layer with random weights, and the same one quantised."""
    generator = torch.Generator().manual_seed(0)
    floats = nn.Linear(columns, rows).requires_grad_(False)
    floats.weight.copy_(torch.randn(rows, columns, generator=generator))
    network = nn.Sequential(floats)
    quantise_(network, kind, CPU)
    return floats, network[0]


def load(folder: Path, kind: str | None, family: str = "sdxl", **settings):
    return teachers.load(Teacher(path=str(folder), family=family, quantise=kind, **settings), "cpu")


def inputs(base):
    noise = base.noise(torch.Generator().manual_seed(3), 2)
    return noise, torch.tensor([999, 374]), base.encode_prompts(["a cat", "红苹果"])


# ---- one layer ----


@pytest.mark.parametrize(("kind", "bytes_a_weight", "error"), [("int8", 1.0, 0.01), ("nf4", 0.5, 0.1)])
def test_a_weight_is_a_byte_or_half_and_close_to_what_it_was(kind, bytes_a_weight, error):
    floats, layer = linear(kind)
    assert layer.integers.nbytes == bytes_a_weight * floats.weight.numel()
    assert layer.scales.nbytes == 4 * (96 if kind == "int8" else floats.weight.numel() // 64)
    apart = (layer.floats(torch.float32) - floats.weight).norm() / floats.weight.norm()
    assert 0.1 * error < apart < error


def test_int8_rounds_each_row_to_127_steps_of_its_largest_weight():
    floats, layer = linear("int8")
    steps = floats.weight.abs().amax(1, keepdim=True) / 127
    assert ((layer.floats(torch.float32) - floats.weight).abs() / steps).max() < 0.6  # not 0.5, as float16 rounds first
    assert torch.equal(layer.integers.abs().amax(1), torch.full((96,), 127, dtype=torch.int8))


@pytest.mark.parametrize("shape", [(96, 128), (5, 2), (7, 66)])
@pytest.mark.parametrize("kind", KINDS)
def test_product_and_gradient_are_those_of_the_rounded_weights(kind, shape):
    floats, layer = linear(kind, *shape)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 7, shape[1], generator=generator, requires_grad=True)
    y = layer(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    expected = nn.functional.linear(x, layer.floats(torch.float32), floats.bias)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), x)
    assert torch.equal(y, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_as_large_as_the_weights_stays_between_the_passes(kind):
    _, layer = linear(kind)
    kept: list[torch.Tensor] = []
    x = torch.zeros(2, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        layer(x)
    assert not kept


@pytest.mark.parametrize("kind", KINDS)
def test_the_product_is_in_the_precision_of_its_input_or_of_autocast(kind):
    _, layer = linear(kind)
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert layer(x.half()).dtype == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        with autocast.own(CPU):
            assert torch.equal(layer(x), layer.forward(x))
            assert layer(x).dtype == torch.float32
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.2)
    (gradient,) = torch.autograd.grad(y.float().sum(), x)
    assert gradient.dtype == torch.float32


def test_weights_beyond_float16_are_refused_by_name():
    network = nn.Sequential(nn.Linear(4, 4).requires_grad_(False))
    network[0].weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"0 has weights that are not finite in float16"):
        quantise_(network, "int8", CPU)


# ---- teachers and students ----


@pytest.mark.parametrize(("family", "write"), [("sdxl", tiny.sdxl), ("sd", tiny.sd), ("sd3", tiny.sd3)])
@pytest.mark.parametrize(("kind", "error"), [("int8", 0.01), ("nf4", 0.12)])
def test_every_family_predicts_nearly_the_same(family, write, kind, error, tmp_path):
    whole, base = (load(write(tmp_path / "teacher"), one, family) for one in (None, kind))
    x_t, t, conditioning = inputs(whole)
    expected = whole.predict(whole.denoiser, x_t, t, conditioning)
    actual = base.predict(base.denoiser, x_t, t, conditioning)
    assert 0 < (actual - expected).norm() / expected.norm() < error
    assert not any(type(layer) is nn.Linear for layer in base.denoiser.modules())
    assert torch.equal(conditioning["context"], base.encode_prompts(["a cat", "红苹果"])["context"])


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_student_shares_the_integers_and_starts_as_its_teacher(kind, conditioned, tiny_sdxl):
    base = load(tiny_sdxl, kind)
    x_t, t, conditioning = inputs(base)
    student = students.student(base, Lora(rank=4, alpha=8.0), 0, conditioned)
    expected = base.predict(base.denoiser, x_t, t, conditioning)
    targets = torch.tensor([499, 0]) if conditioned else None
    assert torch.equal(base.predict(student, x_t, t, conditioning, targets), expected)
    own = {value.data_ptr() for value in base.denoiser.buffers()}
    layers = [layer for layer in student.modules() if isinstance(layer, QuantisedLinear)]
    assert all({layer.integers.data_ptr(), layer.scales.data_ptr()} <= own for layer in layers)
    assert len(layers) == sum(isinstance(layer, QuantisedLinear) for layer in base.denoiser.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_is_loaded_bit_for_bit_and_the_reference_is_the_distilled_one(kind, tiny_sdxl, tmp_path):
    base = load(tiny_sdxl, kind)
    x_t, t, conditioning = inputs(base)
    student = students.student(base, Lora(rank=4, alpha=8.0), 0)
    tiny.perturb(students.trainable_parameters(student))
    expected = base.predict(student, x_t, t, conditioning)
    description = {"num_segments": 1, "family": base.family, "prediction_type": base.prediction_type}
    students.save_student(student, tmp_path / "student", description)
    again = students.load_student(load(tiny_sdxl, kind), tmp_path / "student").denoiser
    assert torch.equal(base.predict(again, x_t, t, conditioning), expected)
    tuned = students.for_preference(base, Lora(rank=2, alpha=2.0), 0, tmp_path / "student")
    tiny.perturb(students.trainable_parameters(tuned))
    assert not torch.equal(base.predict(tuned, x_t, t, conditioning), expected)
    with students.as_reference(tuned) as reference:  # a frozen matrix is multiplied in another order
        torch.testing.assert_close(base.predict(reference, x_t, t, conditioning), expected)


@pytest.mark.parametrize("family", sorted(CASES))
@pytest.mark.parametrize("condition", [False, True], ids=["plain", "conditioned"])
def test_a_student_of_every_family_starts_as_its_quantised_teacher_in_half_precision(family, condition, tmp_path):
    """FLUX.2-klein's layers have no bias, so that the first parameter of its student is a float32 adapter's."""
    case = CASES[family]
    teacher = case.teacher(case.write(tmp_path / "teacher"))
    base = teachers.load(teacher.model_copy(update={"dtype": "bfloat16", "quantise": "int8"}), "cpu")
    student = students.student(base, Lora(rank=2, alpha=2.0), 0, condition)
    noise = base.noise(torch.Generator().manual_seed(4), len(case.prompts))
    point = (noise, torch.tensor([999, 374]), base.encode_prompts(list(case.prompts)))
    s = torch.tensor([749, 0]) if condition else None
    assert torch.equal(base.predict(student, *point, s), base.predict(base.denoiser, *point))


def test_what_needs_floats_is_refused(tiny_sdxl, tmp_path):
    base = load(tiny_sdxl, "int8")
    with pytest.raises(ValueError, match=r"full weights cannot be trained in integers: train a LoRA"):
        students.student(base, Full(), 0)
    student = students.Student(students.student(base, Lora(rank=4, alpha=8.0), 0), 1, False, tmp_path)
    with pytest.raises(ValueError, match=r"merged into floats: load the teacher without quantise"):
        students.merged(student, torch.float32)


def test_without_the_library_the_error_says_what_to_install(tiny_sdxl, monkeypatch):
    monkeypatch.setattr(experiment, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"teacher.quantise: nf4 needs bitsandbytes.*pip install 'mlcm-rl\[quantised\]'"
    ):
        load(tiny_sdxl, "nf4")


# ---- stages ----


def stages(folder: Path) -> list:
    prompts = runs.write_prompts(folder)
    tuned = [runs.tuning(kind, prompts, num_steps=1, gamma=1.0) for kind in ("feedback", "dpo", "policy")]
    evaluate = Evaluate(prompts=prompts, num_prompts=2, sampling_steps=[1], teacher_steps=[2], batch_size=2)
    return [runs.trajectories(prompts), runs.distill(num_segments=[2], precision="bf16"), *tuned, evaluate]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype"), [("int8", "float16"), ("nf4", "float32")])
def test_every_stage_runs_and_the_export_is_over_the_floats(kind, dtype, tiny_sdxl, tmp_path):
    recipe = runs.recipe(tiny_sdxl, tmp_path, stages(tmp_path), quantise=kind)
    recipe = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"dtype": dtype})})
    done = {one.kind: one.folder for one in pipeline.run(recipe)}
    assert json.loads((done["distill"] / "student" / "student.json").read_text())["quantise"] == kind
    log = [json.loads(line) for line in (done["distill"] / "log.jsonl").read_text().splitlines()]
    assert all(record["grad_norm"] > 0 for record in log if "grad_norm" in record)
    folder = finished_runs.export(done["distill"], tmp_path / "export")
    assert f"trained and measured over the teacher's weights in {kind}" in (folder / "README.md").read_text()
    exported = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32).unet
    base = load(tiny_sdxl, None, dtype=dtype)
    student = students.load_student(base, done["distill"] / "student")
    x_t, t, conditioning = inputs(base)
    expected = base.predict(students.merged(student, torch.float32), x_t, t, conditioning)
    torch.testing.assert_close(base.predict(exported, x_t, t, conditioning), expected, rtol=0.01, atol=0.01)


def test_same_seed_same_bits_and_a_resumed_run_too(tiny_sdxl, tmp_path):
    """The second folder's training is interrupted after its first step."""
    found = []
    for name, lengths in (("whole", [2]), ("resumed", [1, 2])):
        folder = tmp_path / name
        folder.mkdir()
        prompts = runs.write_prompts(folder)
        for num_steps in lengths:
            made = runs.recipe(tiny_sdxl, folder, [runs.trajectories(prompts)], quantise="nf4")
            store = pipeline.run(made)[0].folder
            stage = runs.distill(num_segments=[1], num_steps=num_steps)
            recipe = runs.recipe(tiny_sdxl, folder, [stage], quantise="nf4")

            (folder / "distill").mkdir(exist_ok=True)
            distill.run(stage, recipe, {"trajectories": store}, folder / "distill")
        found.append((folder / "distill" / "student" / "pytorch_lora_weights.safetensors").read_bytes())
    assert found[0] == found[1]


def test_a_store_of_another_precision_is_refused_and_fingerprints_differ(tiny_sdxl, tmp_path):
    stage = runs.trajectories(runs.write_prompts(tmp_path))
    recipes = [runs.recipe(tiny_sdxl, tmp_path, [stage], quantise=kind) for kind in (None, *KINDS)]
    places = [fingerprint.locate(stage, recipe, []).fingerprint for recipe in recipes]
    assert len(set(places)) == 3
    assert "quantise" not in fingerprint.identity(stage, recipes[0], {})["teacher"]
    folder = pipeline.run(recipes[1])[0].folder
    store_of(folder, recipes[1].teacher, load(tiny_sdxl, "int8"))
    with pytest.raises(CheckpointError, match=r"in int8', expected"):
        store_of(folder, recipes[0].teacher, load(tiny_sdxl, None))


# ---- what a plan predicts ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_counts_as_many_bytes_less_as_are_loaded_less(kind, tiny_sdxl, tmp_path):
    stage = runs.distill(adapter=Lora(rank=2, alpha=2.0))

    def sizes(quantise: str | None) -> tuple[int, int]:
        recipe = runs.recipe(tiny_sdxl, tmp_path, [stage], quantise=quantise)
        base = teachers.load(recipe.teacher, "cpu")
        parts = [students.student(base, stage.adapter, 0), base.denoiser]
        storages = [one.untyped_storage() for part in parts for one in (*part.parameters(), *part.buffers())]
        loaded = sum({one.data_ptr(): one.nbytes() for one in storages}.values())
        return memory.of_stage(stage, recipe, 0, stage.adapter, "cpu").parameters, loaded

    (whole, whole_loaded), (predicted, loaded) = sizes(None), sizes(kind)
    assert whole - predicted == whole_loaded - loaded > 0.3 * whole_loaded


@pytest.mark.parametrize("kind", KINDS)
def test_the_predicted_passes_are_those_that_torch_allocates(kind, tiny_sdxl, tmp_path):
    stage = runs.distill(batch_size=4, adapter=Lora(rank=2, alpha=2.0))
    recipe = runs.recipe(tiny_sdxl, tmp_path, [stage], quantise=kind)
    predicted = memory.of_stage(stage, recipe, 0, stage.adapter, "cpu")
    base = teachers.load(recipe.teacher, "cpu")
    student = students.student(base, stage.adapter, 0)
    x_t, t = torch.zeros(4, *base.latent_shape), torch.full((4,), 500)
    conditioning = base.encode_prompts(["a cat"] * 4)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        base.x0(student, x_t, t, conditioning).square().mean().backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    measured = max(itertools.accumulate(event.nbytes() for event in events))
    assert predicted.activations + predicted.gradients == pytest.approx(measured, rel=0.1)
