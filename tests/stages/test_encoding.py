"""Pictures that a stage reads: encoded a micro-batch at a time, in the memory that is predicted of it.

Prompts: each is encoded once, where a stage has few.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import runs
from mlcm_rl.cost import memory
from mlcm_rl.cost.launches import Launch
from mlcm_rl.data.prompts import CaptionedImages
from mlcm_rl.models import pictures, teachers
from mlcm_rl.models.autoencoder import Autoencoder
from mlcm_rl.models.families import sdxl
from mlcm_rl.models.lora_files import LORA_FILE
from mlcm_rl.pipeline.planning import encodes_ahead
from mlcm_rl.recipe import Distill, Full, Teacher, TrainTeacher
from mlcm_rl.stages import distill, dpo, train_teacher
from mlcm_rl.training import processes as distributed
from mlcm_rl.training.processes import part
from mlcm_rl.training.seeding import generator


@pytest.fixture
def base(tiny_sdxl):
    return teachers.load(Teacher(path=str(tiny_sdxl), family="sdxl"), "cpu")


@pytest.fixture
def sizes(base, monkeypatch) -> list[int]:
    """How many pictures `base` was given to encode, each time."""
    result: list[int] = []
    encode = base.autoencoder.encode
    monkeypatch.setattr(base.autoencoder, "encode", lambda images: result.append(len(images)) or encode(images))
    return result


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
    (tmp_path / "teacher").mkdir()
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
    folder = CaptionedImages(runs.write_images(tmp_path), 16)
    one, all_of_them = (pictures.encode_all(base, folder.parts(size), len(folder)) for size in (1, 4))
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


SOURCES = {
    "online": {"source": "online", "target": "consistency", "num_segments": [2]},
    "data": {"source": "data", "target": "consistency", "num_segments": [1]},
    "student": {"method": "inter_segment", "num_segments": [1], "renoise": "student"},
}


def stage_of(name: str, folder: Path, **settings) -> Distill:
    paths = {"images": runs.write_images(folder)} if name == "data" else {"prompts": runs.write_prompts(folder)}
    return runs.distill(**(SOURCES[name] | paths | {"num_steps": 3, "batch_size": 4} | settings))


@pytest.mark.parametrize("name", SOURCES)
def test_a_run_encodes_each_of_its_prompts_once(tiny_sdxl, tmp_path, monkeypatch, name):
    encoded: list[str] = []
    encode = sdxl.Family._encode
    monkeypatch.setattr(sdxl.Family, "_encode", lambda self, texts: encoded.extend(texts) or encode(self, texts))
    stage = stage_of(name, tmp_path)
    recipe = runs.recipe(tiny_sdxl, tmp_path, [stage])
    for folder in ("stage", "again"):
        (tmp_path / folder).mkdir()
    distill.run(stage, recipe, {}, tmp_path / "stage")
    assert len(encoded) == len(set(encoded)) == (4 if name == "data" else len(runs.PROMPTS))
    encoded.clear()
    monkeypatch.setattr("mlcm_rl.recipe.distill.MAX_ENCODED_AHEAD", 1)  # as if there were more than memory holds
    distill.run(stage, recipe, {}, tmp_path / "again")
    assert len(encoded) == 3 * 4
    first, again = (load_file(tmp_path / one / "student" / LORA_FILE) for one in ("stage", "again"))
    assert all(torch.equal(value, again[key]) for key, value in first.items())


def test_prompts_that_a_short_run_does_not_draw_are_not_encoded_ahead(base, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "encode_ahead", lambda texts: pytest.fail("it encodes more than is drawn"))
    stage = stage_of("online", tmp_path, num_steps=1, batch_size=len(runs.PROMPTS) - 1)
    recipe = runs.recipe(tmp_path, tmp_path, [stage])
    distill.encode_ahead(stage, recipe, base, distill.make_source(stage, recipe, base, base.denoiser, {}), None)


@pytest.mark.parametrize("fewer", [0, 1])
@pytest.mark.parametrize("name", SOURCES)
def test_a_plan_knows_whether_text_encoders_leave(base, tmp_path, monkeypatch, name, fewer):
    calls: list[list[str]] = []
    monkeypatch.setattr(base, "encode_ahead", calls.append)
    stage = stage_of(name, tmp_path)
    recipe = runs.recipe(tmp_path, tmp_path, [stage])
    source = distill.make_source(stage, recipe, base, base.denoiser, {})
    monkeypatch.setattr("mlcm_rl.recipe.distill.MAX_ENCODED_AHEAD", len(set(source.texts)) - fewer)
    distill.encode_ahead(stage, recipe, base, source, None)
    assert bool(calls) == encodes_ahead(stage.networks(Full())) == (fewer == 0)


def test_clean_samples_of_a_store_need_no_text_encoder():
    assert encodes_ahead(runs.distill(method="inter_segment", num_segments=[1]).networks(Full()))


@pytest.mark.parametrize("name", SOURCES)
def test_points_of_prompts_encoded_ahead_are_near_whatever_the_micro_batch(base, tmp_path, name):
    stage = stage_of(name, tmp_path)
    recipe = runs.recipe(tmp_path, tmp_path, [stage])
    source = distill.make_source(stage, recipe, base, base.denoiser, {})
    draw = source.draw(0, 1, "next", generator(0))
    parts = [part for size in (1, 3, 4) for part in runs.parts_of(draw, size)]
    before = [source.realise(part).conditioning for part in parts]
    distill.encode_ahead(stage, recipe, base, source, None)
    assert base.pipeline.text_encoder is None
    after = [source.realise(part).conditioning for part in parts]
    for old, new in zip(before, after, strict=True):
        for key, value in old.items():
            assert (value - new[key]).abs().max() <= 1e-6 * value.abs().max()
    assert all(torch.equal(value, after[-1][key]) for key, value in before[-1].items())  # four at a time: the same bits
