"""What a loop does for large students: what is kept in memory, in which precision, and how long a stop takes."""

import gc
import os
import signal
import weakref
from pathlib import Path

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn

import runs
from mlcm_rl import pipeline
from mlcm_rl.models import teachers
from mlcm_rl.models.autoencoder import Autoencoder
from mlcm_rl.recipe import Full, Lora, Recipe, TrainTeacher
from mlcm_rl.stages import evaluate
from mlcm_rl.training import engines, processes, signals
from mlcm_rl.training.loop import Runtime


def weights_of(folder: Path) -> dict[str, Tensor]:
    """All that is in the files of the student in a stage's folder."""
    files = sorted((folder / "student").rglob("*.safetensors"))
    assert files
    return {f"{file.name}/{name}": value for file in files for name, value in load_file(file).items()}


def recipe_of(kind: str, teacher: Path, folder: Path) -> Recipe:
    prompts = runs.write_prompts(folder)
    full = runs.distill(num_segments=[1], num_steps=1, adapter=Full())
    stages = {
        "train_teacher": [TrainTeacher(images=runs.write_images(folder), batch_size=2, num_steps=1)],
        "distill": [runs.trajectories(prompts), full],
    }
    if kind not in stages:
        stages[kind] = [*stages["distill"], runs.tuning(kind, prompts, num_steps=1)]
    return runs.recipe(teacher, folder, stages[kind])


@pytest.mark.parametrize("kind", ["train_teacher", "distill", "feedback", "dpo", "policy"])
def test_weights_that_an_engine_replaces_are_free(kind, tiny_sdxl, tmp_path, monkeypatch):
    """FSDP2 puts parts in their place: where a stage keeps them too, each device has a whole copy more."""
    prepare, backward, old = Runtime.prepare, Runtime.backward, []

    def replacing(self, student: nn.Module, optimizer, **settings):
        old.clear()
        for module in student.modules():
            for name, value in list(module.named_parameters(recurse=False)):
                if value.requires_grad:
                    old.append(weakref.ref(value))
                    setattr(module, name, nn.Parameter(value.detach().clone()))
        optimizer.param_groups[0]["params"] = [value for value in student.parameters() if value.requires_grad]
        return prepare(self, student, optimizer, **settings)

    def checked(self, *arguments, **settings):
        gc.collect()
        assert old
        assert not [one for one in old if one() is not None]
        return backward(self, *arguments, **settings)

    monkeypatch.setattr(Runtime, "prepare", replacing)
    monkeypatch.setattr(Runtime, "backward", checked)
    pipeline.run(recipe_of(kind, tiny_sdxl, tmp_path))


def test_weights_in_parts_have_one_layout_whatever_the_teachers():
    student = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    assert not student.weight.is_contiguous()
    before = student.weight.detach().clone()
    engines._InParts(student, torch.optim.AdamW(student.parameters()), runs.distill())
    assert student.weight.is_contiguous()
    assert torch.equal(student.weight, before)


@pytest.mark.parametrize("in_parts", [False, True])
def test_in_bfloat16_adapters_take_what_their_layers_take_and_parts_are_not_copied(
    in_parts, tiny_sdxl, tmp_path, monkeypatch
):
    monkeypatch.setattr(engines.Whole, "weights_in_parts", in_parts)
    prepare, backward, seen = Runtime.prepare, Runtime.backward, []

    def layers(self) -> list[BaseTunerLayer]:
        return [one for one in self.engine.student.modules() if isinstance(one, BaseTunerLayer)]

    def looked(self, *arguments, **settings):
        casts = {one.cast_input_dtype_enabled for one in layers(self)}
        seen.append((casts, torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))
        return backward(self, *arguments, **settings)

    def prepared(self, student, optimizer, **settings):
        made = prepare(self, student, optimizer, **settings)
        with self.autocast():
            pass
        seen.append(({one.cast_input_dtype_enabled for one in layers(self)}, *[None] * 2))
        return made

    monkeypatch.setattr(Runtime, "backward", looked)
    monkeypatch.setattr(Runtime, "prepare", prepared)
    pipeline.run(runs.whole(tiny_sdxl, tmp_path, num_segments=[1], num_steps=1, precision="bf16"))
    assert seen == [({True}, None, None), ({False}, True, not in_parts)]


def test_adapters_without_casts_of_their_own_are_trained_to_the_same_bits(tiny_sdxl, tmp_path, monkeypatch):
    def trained(folder: Path) -> dict[str, Tensor]:
        folder.mkdir()
        adapter = Lora(rank=2, alpha=2.0)
        stages = runs.whole(tiny_sdxl, folder, num_segments=[1], precision="bf16", adapter=adapter)
        made = pipeline.run(stages.model_copy(update={"stages": stages.stages[:2]}))
        return weights_of(made[1].folder)

    one = trained(tmp_path / "without")
    monkeypatch.setattr("mlcm_rl.training.loop.disable_input_dtype_casting", lambda student: torch.enable_grad())
    other = trained(tmp_path / "with")
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("adapter", [Lora(rank=2, alpha=2.0), Full()], ids=["lora", "full"])
def test_an_evaluation_samples_in_the_precision_of_the_teacher(adapter, tiny_sdxl, tmp_path, monkeypatch):
    """Products of float32 would be many times slower than the teacher's beside them."""
    dtypes, linear = {}, nn.functional.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        dtypes.setdefault(running[-1], set()).add(weight.dtype)
        return linear(x, weight, bias)

    running, sample = ["before"], "mlcm_rl.stages.evaluate.sample"
    original = evaluate.sample

    def sampled(scene, row, *arguments):
        running.append(row.role)
        try:
            return original(scene, row, *arguments)
        finally:
            running.append("between")

    recipe = runs.whole(tiny_sdxl, tmp_path, num_segments=[1], num_steps=1, adapter=adapter)
    teacher = recipe.teacher.model_copy(update={"dtype": "bfloat16"})
    monkeypatch.setattr(sample, sampled)
    monkeypatch.setattr(nn.functional, "linear", counted)
    pipeline.run(recipe.model_copy(update={"teacher": teacher}))
    assert dtypes["student"] == dtypes["reference"] == {torch.bfloat16}


def test_pictures_without_gradient_are_decoded_a_few_at_a_time(tiny_sdxl, tmp_path, monkeypatch):
    base = teachers.load(runs.whole(tiny_sdxl, tmp_path).teacher, torch.device("cpu"))
    latents = torch.randn(5, *base.latent_shape, generator=torch.Generator().manual_seed(0))
    pixels = base.resolution**2
    together, sizes, decoded = base.autoencoder.decode(latents), [], Autoencoder._decoded
    monkeypatch.setattr(Autoencoder, "_decoded", lambda self, part: sizes.append(len(part)) or decoded(self, part))
    for most, expected in ((2 * pixels, [2, 2, 1]), (1, [1] * 5), (5 * pixels, [5])):
        sizes.clear()
        monkeypatch.setattr("mlcm_rl.models.autoencoder.MOST_PIXELS", most)
        with torch.no_grad():
            torch.testing.assert_close(base.autoencoder.decode(latents), together, atol=1e-5, rtol=0)
        assert sizes == expected
    sizes.clear()
    base.autoencoder.decode(latents)  # with gradient: a micro-batch
    assert sizes == [5]


@pytest.mark.parametrize(("total", "size", "count"), [(7, 4, 1), (7, 4, 2), (6, 4, 4), (3, 8, 4), (1, 1, 2)])
def test_equal_parts_hold_every_sample_in_order(total, size, count, monkeypatch):
    monkeypatch.setattr(processes, "world_size", lambda: count)
    parts = []
    for rank in range(count):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        parts.append(processes.equal_parts(total, size))
    assert len({tuple(map(len, own)) for own in parts}) == 1
    gathered = [number for own in parts for part in own for number in part]
    assert gathered[:total] == list(range(total))
    assert max(len(part) for own in parts for part in own) <= max(1, size // count)


def test_a_signal_within_a_step_leaves_after_the_micro_batch_and_the_step_begins_again(
    tiny_sdxl, tmp_path, monkeypatch
):
    def recipe(place: str) -> Recipe:
        (tmp_path / place).mkdir(exist_ok=True)
        settings = {"num_segments": [1], "num_steps": 3, "gradient_accumulation": 2, "save_every": 100}
        made = runs.whole(tiny_sdxl, tmp_path / place, **settings)
        return made.model_copy(update={"stages": made.stages[:2]})

    whole = pipeline.run(recipe("whole"))[1].folder
    losses, backward = [], engines.Whole.backward

    def signalled(self, loss: Tensor) -> None:
        losses.append(loss.item())
        if len(losses) == 3:  # the first micro-batch of the second step
            os.kill(os.getpid(), signal.SIGTERM)
        backward(self, loss)

    monkeypatch.setattr(engines.Whole, "backward", signalled)
    with pytest.raises(signals.Stopped, match="stopped within step 2 of 3; the same command begins it again") as error:
        pipeline.run(recipe("cut"))
    assert error.value.code == 143
    assert len(losses) == 3
    again = pipeline.run(recipe("cut"))[1].folder
    assert len(losses) == 3 + 4  # two steps of two
    for one, other in zip(runs.records(whole), runs.records(again), strict=True):
        assert one == other
    one, other = weights_of(whole), weights_of(again)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
