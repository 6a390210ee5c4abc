"""Paths, modules and sizes that stand in data: what leads out, runs code or fills the memory is refused in words."""

import json
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file

import tiny
from mlcm_rl.data import pairs, picture_files, prompts
from mlcm_rl.data.pairs import PairTable
from mlcm_rl.data.picture_files import read_picture
from mlcm_rl.data.prompts import CaptionedImages
from mlcm_rl.models import files, teachers
from mlcm_rl.models.lora_files import METADATA_KEY, read_lora
from mlcm_rl.recipe import Teacher, tree
from mlcm_rl.recipe.file import load
from mlcm_rl.recipe.tree import RecipeError
from mlcm_rl.storage import hashing, untrusted
from mlcm_rl.storage.files import CheckpointError, read_json
from mlcm_rl.storage.manifest import finish, verify
from mlcm_rl.storage.untrusted import path_inside


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a picture, and one beside it that it must not reach."""
    inside = tmp_path / "inside"
    inside.mkdir()
    for path in (inside / "a.png", tmp_path / "secret.png"):
        Image.new("RGB", (4, 4)).save(path)
    Image.new("RGB", (4, 4), "red").save(inside / "b.png")
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    (inside / "up").symlink_to(tmp_path)
    return inside


LEAVING = [
    "../secret.png",
    "link.png",
    "up/secret.png",
    "sub/../../secret.png",
    "{outside}/secret.png",
    "{inside}/a.png",
]


@pytest.mark.parametrize("name", LEAVING)
def test_a_name_that_leaves_its_folder_is_refused_with_file_and_line(folder, name):
    name = name.format(inside=folder, outside=folder.parent)
    good = {"file_name": "a.png", "prompts": ["x"], "prompt": "x", "chosen": "b.png", "rejected": "a.png"}
    for change in ({"file_name": name}, {"rejected": name}):
        lines = [json.dumps(good), json.dumps(good | change)]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
        with pytest.raises(ValueError, match=r"metadata\.jsonl:2: '.*' leads out of"):
            CaptionedImages(folder, 4) if "file_name" in change else PairTable(folder)


@pytest.mark.parametrize("name", ["", "a\0b", None, 3, "\ud800"])
def test_what_is_no_name_is_refused(folder, name):
    with pytest.raises(ValueError, match="here: expected the name of a file, got"):
        path_inside(folder, name, "here")


def test_a_name_in_the_folder_is_held_by_a_link_to_it_too(folder):
    (folder.parent / "run").symlink_to(folder)
    assert path_inside(folder.parent / "run", "a.png", "here").samefile(folder / "a.png")


def test_a_manifest_lists_files_of_its_folder_alone(tmp_path):
    stage = tmp_path / "stage"
    stage.mkdir()
    (tmp_path / "outside.txt").write_text("x")
    finish(stage, {"kind": "distill"})
    manifest = read_json(stage / "manifest.json")
    del manifest["seal"]  # as a version that knew none left it
    manifest["files"]["../outside.txt"] = hashing.sha256(tmp_path / "outside.txt")
    (stage / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest\.json: '\.\./outside\.txt' leads out of"):
        verify(stage)


def test_a_picture_that_a_table_only_names_is_opened_beside_it_and_nowhere_else(folder):
    for name in ("a.png", "../secret.png", str(folder.parent / "secret.png"), "https://localhost/a.png"):
        chosen, rejected = [{"bytes": None, "path": name}], [{"bytes": None, "path": "b.png"}]
        pyarrow.parquet.write_table(
            pyarrow.table({"prompt": ["x"], "chosen": chosen, "rejected": rejected}), folder / "t.parquet"
        )
        if name == "a.png":
            assert PairTable(folder / "t.parquet").pictures(0, 4).shape == (2, 3, 4, 4)
        else:
            with pytest.raises(ValueError, match=r"t\.parquet: row 0: ('.*' leads out|there is no picture)"):
                PairTable(folder / "t.parquet").pictures(0, 4)


def test_a_table_that_unpacks_to_too_much_is_refused(folder, monkeypatch):
    monkeypatch.setattr(pairs, "MAX_TABLE_BYTES", 10_000)
    blank = [b"x" * 20_000]
    columns = {"prompt": ["x"], "chosen": blank, "rejected": blank}
    pyarrow.parquet.write_table(
        pyarrow.table(columns), folder / "t.parquet", compression="zstd", write_statistics=False
    )
    assert (folder / "t.parquet").stat().st_size < 10_000
    with pytest.raises(ValueError, match=r"t\.parquet: .*unpacks to .* bytes, over 10,000"):
        PairTable(folder / "t.parquet")


def test_a_picture_of_too_many_pixels_or_bytes_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    side = 8193  # a few kilobytes that ask for 200 MB
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 20_000
    with pytest.raises(ValueError, match=r"^here: .*8193 x 8193 pixels, over"):
        read_picture(tmp_path / "bomb.png", "here:")
    monkeypatch.setattr(picture_files, "MAX_PICTURE_BYTES", 10)
    with pytest.raises(ValueError, match="more than 10 bytes"):
        read_picture(tmp_path / "bomb.png", "here:")


def test_a_picture_that_another_program_would_have_to_open_is_none(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "page.eps")
    (tmp_path / "page.eps").rename(tmp_path / "page.png")
    with pytest.raises(ValueError, match="is not a readable picture"):
        read_picture(tmp_path / "page.png", "here")


@pytest.mark.parametrize("read", [read_json, prompts.read_prompts])
def test_a_text_file_too_long_is_refused(tmp_path, monkeypatch, read):
    monkeypatch.setattr(untrusted.read_bytes, "__defaults__", (100,))
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "' + "a" * 100 + '"}')
    with pytest.raises((CheckpointError, ValueError), match=r"x\.jsonl: more than 100 bytes"):
        read(path)


def test_aliases_of_aliases_do_not_fill_the_memory(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]  # 9 ** 30 values
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(lines))
    started = time.monotonic()
    with pytest.raises(RecipeError, match="more than 10,000 values, aliases written out") as error:
        load(path)
    assert time.monotonic() - started < 20
    assert str(error.value).count("aliases written out") == 1


def test_a_recipe_file_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tree, "MAX_BYTES", 100)
    path = tmp_path / "long.yaml"
    path.write_text("name: " + "a" * 100)
    with pytest.raises(RecipeError, match=r"long\.yaml: more than 100 bytes"):
        load(path)


HOSTILE = {
    "megatron_config": {"x": 1},  # PEFT imports the module that `megatron_core` names
    "target_modules": "(a+)+$",  # a regular expression
    "init_lora_weights": "pissa",
    "modules_to_save": ["conv_in"],
    "r": 10**9,
    "lora_alpha": float("inf"),
}


@pytest.mark.parametrize("key", sorted(HOSTILE))
def test_an_adapter_states_its_rank_alpha_and_modules_and_nothing_else(tmp_path, key):
    tensors = {"unet.to_q.lora_A.weight": torch.ones(2, 3), "unet.to_q.lora_B.weight": torch.ones(3, 2)}
    stated = LoraConfig(r=2, lora_alpha=4.0, target_modules=["to_q"]).to_dict() | {"target_modules": ["to_q"]}
    for change in ({}, {key: HOSTILE[key]}):
        header = {f"unet.{name}": value for name, value in (stated | change).items()}
        save_file(tensors, tmp_path / "lora.safetensors", {METADATA_KEY: json.dumps(header)})
        if not change:
            settings, found = read_lora(tmp_path / "lora.safetensors")
            assert (settings.r, settings.lora_alpha, settings.target_modules) == (2, 4.0, {"to_q"})
            assert len(found) == 2
        else:
            with pytest.raises(
                CheckpointError, match=rf"lora\.safetensors: .*{key.split('_')[-1]}|tensors have rank 2"
            ):
                read_lora(tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    "part", [["evil_module", "Evil"], ["transformers", "AutoModel"], ["diffusers.pipelines", "X"], [], [3]]
)
def test_a_teacher_has_parts_of_known_libraries(tmp_path, part):
    """diffusers imports whatever module an index names."""
    index = {"_class_name": "StableDiffusionXLPipeline", "unet": part}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"unet is a .*; only known classes are loaded"):
        teachers.load(Teacher(path=str(tmp_path), family="sdxl"), "cpu")


def test_a_teachers_damaged_or_climbing_weights_are_told_by_name(tmp_path):
    teacher = Teacher(path=str(tiny.sdxl(tmp_path / "teacher")), family="sdxl")
    index = tmp_path / "teacher" / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../../secret.safetensors"}}))
    with pytest.raises(
        ValueError, match=r"index\.json: weight_map: '\.\./\.\./secret\.safetensors' is not a file beside it"
    ):
        teachers.load(teacher, "cpu")
    index.unlink()
    weights = tmp_path / "teacher" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors is damaged"):
        teachers.load(teacher, "cpu")


def test_the_hub_is_asked_only_for_a_pinned_revision_that_is_not_here():
    asked = []

    def read(path, revision, local_files_only=False):
        asked.append(local_files_only)
        if local_files_only and not here:
            raise FileNotFoundError(path)
        return path

    pinned = Teacher(path="owner/model", revision="0" * 40, family="sdxl")
    here = True
    assert files.local_first(read, pinned) == "owner/model"
    assert asked == [True]
    here = False
    assert files.local_first(read, pinned) == "owner/model"
    assert asked == [True, True, False]
    with pytest.raises(FileNotFoundError):
        files.local_first(read, pinned.model_copy(update={"revision": None}))
    assert asked == [True, True, False, True]


def test_a_hub_that_is_not_reached_is_not_taken_for_a_model_without_files():
    def read(path, revision, local_files_only=False):
        try:
            raise ConnectionError("the name is not resolved\nsee there")
        except ConnectionError:
            raise OSError(f"{path} does not have a file named model_index.json")  # noqa: B904  (as diffusers raises)

    pinned = Teacher(path="owner/model", revision="0" * 40, family="sdxl")
    with pytest.raises(FileNotFoundError, match=r"hub did not give it \(the name is not resolved\): check the network"):
        files.local_first(read, pinned)
