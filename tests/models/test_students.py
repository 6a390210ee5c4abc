"""Students: how they start, what is trained, what is kept, and how LoRA files are read."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tiny
from mlcm_rl import recipe
from mlcm_rl.models import students
from mlcm_rl.models.teachers import load
from mlcm_rl.models.unet import LORA_TARGETS
from mlcm_rl.recipe import Full, Lora
from mlcm_rl.storage.files import CheckpointError

ADAPTERS = [Lora(rank=4, alpha=8.0), Full()]


def inputs(base):
    noise = base.noise(torch.Generator().manual_seed(3), 2)
    return noise, torch.tensor([999, 374]), base.encode_prompts(["a cat", "红苹果"])


def targets(conditioned):
    return torch.tensor([499, 0]) if conditioned else None


def description(base, num_segments=1):
    return {"num_segments": num_segments, "family": base.family, "prediction_type": base.prediction_type}


def trained(base, adapter, condition_on_target=False, seed=0):
    denoiser = students.student(base, adapter, seed, condition_on_target)
    tiny.perturb(students.trainable_parameters(denoiser), seed)
    return denoiser


# Starting


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.kind)
@pytest.mark.parametrize("conditioned", [False, True])
def test_student_starts_as_its_teacher_bit_for_bit(base, adapter, conditioned):
    x_t, t, conditioning = inputs(base)
    denoiser = students.student(base, adapter, 0, conditioned)
    expected = base.predict(base.denoiser, x_t, t, conditioning)
    assert torch.equal(base.predict(denoiser, x_t, t, conditioning, targets(conditioned)), expected)


def test_same_seed_gives_the_same_adapter_and_leaves_the_global_generator_alone(sdxl):
    before = torch.get_rng_state()
    first, again, other = (students.student(sdxl, ADAPTERS[0], seed).state_dict() for seed in (1, 1, 2))
    students.student(sdxl, Full(), 0, condition_on_target=True)
    assert torch.equal(before, torch.get_rng_state())
    matrices = [name for name in first if "lora_A" in name]
    assert all(torch.equal(first[name], again[name]) for name in matrices)
    assert not any(torch.equal(first[name], other[name]) for name in matrices)


def test_lora_shares_the_teachers_memory_and_full_weights_do_not(sdxl):
    pointers = {parameter.data_ptr() for parameter in sdxl.denoiser.parameters()}
    lora, full = (students.student(sdxl, adapter, 0) for adapter in ADAPTERS)
    assert pointers <= {parameter.data_ptr() for parameter in lora.parameters()}
    assert not pointers & {parameter.data_ptr() for parameter in full.parameters()}


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.kind)
def test_training_a_student_leaves_the_teacher_as_it_was(either, adapter):
    x_t, t, conditioning = inputs(either)
    before = either.predict(either.denoiser, x_t, t, conditioning)
    denoiser = students.student(either, adapter, 0, condition_on_target=True)
    optimizer = torch.optim.SGD(students.trainable_parameters(denoiser), lr=0.1)
    either.predict(denoiser, x_t, t, conditioning, targets(True)).square().mean().backward()
    optimizer.step()
    assert torch.equal(either.predict(either.denoiser, x_t, t, conditioning), before)
    assert not torch.equal(either.predict(denoiser, x_t, t, conditioning, targets(True)), before)


def test_lora_sits_on_every_published_target_and_is_all_that_is_trained(either):
    denoiser = students.student(either, Lora(rank=4, alpha=4.0), 0, condition_on_target=True)
    modules = {name.partition(".lora_A")[0] for name, _ in denoiser.named_parameters() if ".lora_A." in name}
    for target in LORA_TARGETS:
        assert any(module.endswith(f".{target}") for module in modules), target
    for module in modules:
        assert any(module.endswith(f".{target}") for target in LORA_TARGETS), module
    names = [name for name, parameter in denoiser.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * len(modules) + 1
    assert all(".lora_" in name or name == "time_embedding.cond_proj.weight" for name in names)
    assert len(students.trainable_parameters(denoiser)) == len(names)


def test_adapter_over_a_half_precision_teacher_is_float32_and_trains(teachers):
    base = load(recipe.Teacher(path=str(teachers["sdxl"]), family="sdxl", dtype="bfloat16"), "cpu")
    x_t, t, conditioning = inputs(base)
    for adapter in ADAPTERS:
        denoiser = students.student(base, adapter, 0, condition_on_target=True)
        parameters = students.trainable_parameters(denoiser)
        assert {parameter.dtype for parameter in parameters} == {torch.float32}
        base.predict(denoiser, x_t, t, conditioning, targets(True)).square().mean().backward()
        assert denoiser.time_embedding.cond_proj.weight.grad.abs().sum() > 0


# Keeping


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.kind)
def test_a_student_of_a_channels_last_teacher_keeps_the_layout_and_computes_the_same(teachers, adapter, tmp_path):
    path = str(teachers["sdxl"])
    usual, other = (
        load(recipe.Teacher(path=path, family="sdxl", memory_format=one), "cpu")
        for one in ("contiguous", "channels_last")
    )
    x_t, t, conditioning = inputs(usual)
    expected = usual.predict(usual.denoiser, x_t, t, conditioning)
    start = students.student(other, adapter, 0)
    students.save_student(start, tmp_path / "student", description(other))
    for denoiser in (other.denoiser, start, students.load_student(other, tmp_path / "student").denoiser):
        weights = [value for name, value in denoiser.named_parameters() if value.ndim == 4 and "lora" not in name]
        assert all(value.is_contiguous(memory_format=torch.channels_last) for value in weights)
        torch.testing.assert_close(other.predict(denoiser, x_t, t, conditioning), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.autoencoder.decode(x_t), usual.autoencoder.decode(x_t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.kind)
@pytest.mark.parametrize("conditioned", [False, True])
def test_saved_student_loads_and_goes_on_bit_for_bit(either, adapter, conditioned, tmp_path):
    x_t, t, conditioning = inputs(either)
    denoiser = trained(either, adapter, conditioned)
    expected = either.predict(denoiser, x_t, t, conditioning, targets(conditioned))
    students.save_student(denoiser, tmp_path / "student", description(either, num_segments=4))
    loaded = students.load_student(either, tmp_path / "student")
    resumed = students.student(either, adapter, 9, conditioned, start=tmp_path / "student")
    assert (loaded.num_segments, loaded.conditioned) == (4, conditioned)
    assert torch.equal(either.predict(loaded.denoiser, x_t, t, conditioning, targets(conditioned)), expected)
    assert torch.equal(either.predict(resumed, x_t, t, conditioning, targets(conditioned)), expected)
    shapes = [[parameter.shape for parameter in students.trainable_parameters(one)] for one in (denoiser, resumed)]
    assert shapes[0] == shapes[1]


def test_two_students_and_their_teacher_live_side_by_side(sdxl, tmp_path):
    x_t, t, conditioning = inputs(sdxl)
    outputs = []
    for seed in (1, 2):
        denoiser = trained(sdxl, ADAPTERS[0], seed=seed)
        outputs.append(sdxl.predict(denoiser, x_t, t, conditioning))
        students.save_student(denoiser, tmp_path / str(seed), description(sdxl))
    loaded = [students.load_student(sdxl, tmp_path / str(seed)).denoiser for seed in (1, 2)]
    for one, expected in zip(loaded, outputs, strict=True):
        assert torch.equal(sdxl.predict(one, x_t, t, conditioning), expected)


def test_saving_replaces_an_older_student_whole(sdxl, tmp_path):
    students.save_student(trained(sdxl, ADAPTERS[0], True), tmp_path / "student", description(sdxl))
    students.save_student(trained(sdxl, Full()), tmp_path / "student", description(sdxl))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student"]
    assert sorted(path.name for path in (tmp_path / "student").iterdir()) == ["student.json", "unet"]
    described = json.loads((tmp_path / "student" / "student.json").read_text())
    assert (described["adapter"], described["conditioned"]) == ({"kind": "full"}, False)


def test_target_time_is_added_to_a_finished_student_without_changing_it(either, tmp_path):
    x_t, t, conditioning = inputs(either)
    for adapter in ADAPTERS:
        denoiser = trained(either, adapter)
        students.save_student(denoiser, tmp_path / adapter.kind, description(either))
        resumed = students.student(either, adapter, 0, condition_on_target=True, start=tmp_path / adapter.kind)
        expected = either.predict(denoiser, x_t, t, conditioning)
        assert torch.equal(either.predict(resumed, x_t, t, conditioning, targets(True)), expected)


def test_start_of_another_kind_is_refused(sdxl, tmp_path):
    students.save_student(trained(sdxl, ADAPTERS[0], True), tmp_path / "student", description(sdxl))
    for other in (Lora(rank=4, alpha=4.0), Lora(rank=8, alpha=8.0), Full()):
        with pytest.raises(ValueError, match="'rank': 4"):
            students.student(sdxl, other, 0, True, start=tmp_path / "student")
    with pytest.raises(ValueError, match="conditioned on its target time, and the stage would go on without"):
        students.student(sdxl, ADAPTERS[0], 0, False, start=tmp_path / "student")


def test_student_of_another_teacher_kind_is_refused(sdxl, teachers, tmp_path):
    students.save_student(trained(sdxl, ADAPTERS[0]), tmp_path / "student", description(sdxl))
    other = load(recipe.Teacher(path=str(teachers["sd15"]), family="sd"), "cpu")
    with pytest.raises(ValueError, match="family is sdxl, the teacher's sd"):
        students.load_student(other, tmp_path / "student")
    with pytest.raises(FileNotFoundError, match=r"student\.json"):
        students.load_student(sdxl, tmp_path)
    with pytest.raises(ValueError, match="lacks num_segments, prediction_type"):
        students.save_student(sdxl.denoiser, tmp_path / "other", {"family": "sdxl"})


@pytest.mark.parametrize("wrong", [[9], [True], ["2"], [[2]], {"2": 1}, 4])
def test_budgets_are_kept_and_a_damaged_list_of_them_is_refused(sdxl, tmp_path, wrong):
    denoiser = trained(sdxl, ADAPTERS[0], True)
    students.save_student(denoiser, tmp_path / "student", description(sdxl))
    assert students.load_student(sdxl, tmp_path / "student").budgets == ()
    students.save_student(denoiser, tmp_path / "student", description(sdxl) | {"budgets": [2, 4]})
    assert students.load_student(sdxl, tmp_path / "student").budgets == (2, 4)
    students.save_student(denoiser, tmp_path / "student", description(sdxl) | {"budgets": wrong})
    with pytest.raises(CheckpointError, match=r"student\.json: budgets must be numbers from 1 to 8, are"):
        students.load_student(sdxl, tmp_path / "student")


@pytest.mark.parametrize(
    ("num_segments", "conditioned", "gamma", "segments_of_sampler"),
    [(1, False, 1.0, 1), (2, False, 0.0, 2), (8, False, 0.0, 8), (1, True, 0.0, 1), (4, True, 0.0, 1)],
)
def test_sampler_by_default_follows_the_student(sdxl, tmp_path, num_segments, conditioned, gamma, segments_of_sampler):
    denoiser = students.student(sdxl, ADAPTERS[0], 0, conditioned)
    students.save_student(denoiser, tmp_path / "student", description(sdxl, num_segments))
    student = students.load_student(sdxl, tmp_path / "student")
    assert (student.default_gamma, student.grid.num_segments) == (gamma, segments_of_sampler)


def test_merged_student_is_plain_and_computes_the_same(either, tmp_path):
    x_t, t, conditioning = inputs(either)
    for adapter in ADAPTERS:
        students.save_student(trained(either, adapter), tmp_path / adapter.kind, description(either))
        loaded = students.load_student(either, tmp_path / adapter.kind)
        plain = students.merged(loaded, torch.float32)
        assert plain.state_dict().keys() == either.denoiser.state_dict().keys()
        expected = either.predict(loaded.denoiser, x_t, t, conditioning)
        torch.testing.assert_close(either.predict(plain, x_t, t, conditioning), expected, atol=1e-4, rtol=1e-4)


# LoRA files


def test_saved_lora_carries_its_configuration_and_a_stock_pipeline_reads_its_scale(either, tmp_path):
    x_t, t, conditioning = inputs(either)
    denoiser = trained(either, Lora(rank=64, alpha=8.0))
    students.save_student(denoiser, tmp_path, description(either))
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (header["unet.r"], header["unet.lora_alpha"]) == (64, 8.0)
    stock = DiffusionPipeline.from_pretrained(either.teacher.path)
    stock.load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.safetensors")
    scales = {value for module in stock.unet.modules() for value in getattr(module, "scaling", {}).values()}
    assert scales == {0.125}
    expected = either.predict(denoiser, x_t, t, conditioning)
    torch.testing.assert_close(either.predict(stock.unet, x_t, t, conditioning), expected, atol=1e-5, rtol=1e-5)


def test_the_same_student_is_saved_to_the_same_bytes(sdxl, tmp_path):
    denoiser = trained(sdxl, ADAPTERS[0], True)
    for name in ("one", "two"):
        students.save_student(denoiser, tmp_path / name, description(sdxl))
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_lora_that_does_not_fit_the_teacher_is_refused_by_name(sdxl, tmp_path):
    students.save_student(trained(sdxl, ADAPTERS[0]), tmp_path / "student", description(sdxl))
    file = tmp_path / "student" / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    removed = next(iter(sorted(tensors)))
    save_file({key: value for key, value in tensors.items() if key != removed}, file, metadata=header)
    with pytest.raises(ValueError, match=r"1 LoRA tensors do not fit"):
        students.load_student(sdxl, tmp_path / "student")


def test_a_teacher_whose_file_says_nothing_of_target_times_has_conditioned_students(tmp_path):
    """Older published files lack the key, and diffusers' default for it must not take the student's place."""
    folder = tiny.sd(tmp_path / "teacher")
    path = folder / "unet" / "config.json"
    settings = json.loads(path.read_text())
    del settings["time_cond_proj_dim"]
    path.write_text(json.dumps(settings))
    base = load(recipe.Teacher(path=str(folder), family="sd"), "cpu")
    denoiser = students.student(base, Full(), 0, condition_on_target=True)
    assert denoiser.config.time_cond_proj_dim == 256
    tiny.perturb(students.trainable_parameters(denoiser))
    students.save_student(denoiser, tmp_path / "student", description(base))
    weights = students.load_student(base, tmp_path / "student").denoiser.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in denoiser.state_dict().items())
