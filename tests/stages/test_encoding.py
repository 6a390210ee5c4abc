"""Pictures that a stage reads: encoded a micro-batch at a time, in the memory that is predicted of it."""

from functools import partial

import pytest

import runs
from mlcm_rl.cost import memory
from mlcm_rl.cost.launches import Launch
from mlcm_rl.data.prompts import CaptionedImages
from mlcm_rl.models import pictures, teachers
from mlcm_rl.models.autoencoder import Autoencoder
from mlcm_rl.recipe import Full, Teacher, TrainTeacher
from mlcm_rl.stages import distill, dpo, train_teacher
from mlcm_rl.training import processes as distributed
from mlcm_rl.training.processes import part


@pytest.fixture
def base(tiny_sdxl):
    return teachers.load(Teacher(path=str(tiny_sdxl), family="sdxl"), "cpu")


@pytest.fixture
def sizes(base, monkeypatch) -> list[int]:
    """How many pictures `base` was given to encode, each time."""
    found: list[int] = []
    encode = base.autoencoder.encode
    monkeypatch.setattr(base.autoencoder, "encode", lambda images: found.append(len(images)) or encode(images))
    return found


SPLIT = {"batch_size": 6, "gradient_accumulation": 2}


def test_pictures_to_distil_on_are_encoded_a_micro_batch_at_a_time(base, sizes, tmp_path):
    stage = runs.distill(source="data", images=runs.write_images(tmp_path), target="consistency", **SPLIT)
    source = distill.make_source(stage, runs.recipe(tmp_path, tmp_path, [stage]), base, base.denoiser, {})
    assert (sizes, len(source.latents)) == ([3, 1], 4)


def test_pictures_to_train_a_teacher_on_are_encoded_a_micro_batch_at_a_time(tiny_sdxl, tmp_path, monkeypatch):
    sizes: list[int] = []
    encode = Autoencoder.encode
    monkeypatch.setattr(Autoencoder, "encode", lambda self, images: sizes.append(len(images)) or encode(self, images))
    stage = TrainTeacher(images=runs.write_images(tmp_path), num_steps=1, **SPLIT)
    train_teacher.run(stage, runs.recipe(tiny_sdxl, tmp_path, [stage]), {}, tmp_path / "teacher")
    assert sizes == [3, 1]


@pytest.mark.parametrize("processes", [1, 3])
def test_pictures_of_pairs_are_encoded_as_many_at_a_time_as_a_process_has_pairs(
    base, sizes, tmp_path, monkeypatch, processes
):
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    pairs = runs.write_pairs(tmp_path / "pairs")
    source = dpo.StoredPairs(runs.tuning("dpo", "unused", pairs=pairs, **SPLIT), base, seed=0)
    assert max(sizes) == 3 // processes
    assert (sum(sizes), source.x0.shape[:2]) == (2 * len(runs.PROMPTS), (2, len(runs.PROMPTS)))


def test_a_picture_has_the_same_latents_whatever_it_is_encoded_with(base, tmp_path):
    images = CaptionedImages(runs.write_images(tmp_path), 16).images
    one, all_of_them = (pictures.encode(base, images, size) for size in (1, 4))
    assert (one - all_of_them).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("stage", "processes"),
    [
        (partial(TrainTeacher, images="unused", num_steps=1), 1),
        (partial(runs.distill, source="data", images="unused", target="consistency"), 1),
        (partial(runs.tuning, "dpo", "unused", pairs="unused", form="diffusion_dpo"), 1),
        (partial(runs.tuning, "dpo", "unused", pairs="unused", form="diffusion_dpo"), 2),
    ],
)
def test_what_the_encoder_holds_is_predicted(tiny_sdxl, monkeypatch, stage, processes):
    """With an encoder of a gigabyte a picture, its pass is the peak; of a pair as many pictures as of one sample."""
    gigabyte = 2**30
    encode = Autoencoder.encode

    def large(self, images):
        held = images.new_empty(len(images), gigabyte // 4)
        assert held.is_meta
        return encode(self, images)

    monkeypatch.setattr(Autoencoder, "encode", large)
    asked = stage(batch_size=8, gradient_accumulation=2)
    found = memory.of_stage(
        asked,
        runs.recipe(tiny_sdxl, tiny_sdxl, [asked]),
        0,
        Full(),
        "cuda",
        Launch(processes=processes),
    )
    share = part(4, processes) if asked.kind == "dpo" else 4
    assert share * gigabyte <= found.activations + found.gradients < (share + 1) * gigabyte
