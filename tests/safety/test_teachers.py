"""Whatever a teacher's folder holds, it is refused in lines that name file and key, or it runs to finite numbers.

Every key of every configuration takes every bad value; so do keys that the files leave out.
"""

import inspect
import json
import os
import re
import shutil
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file

import runs
import tiny
from mlcm_rl.models import teachers
from mlcm_rl.pipeline.planning import Sizes
from mlcm_rl.recipe import Teacher, teacher_check, teacher_files
from mlcm_rl.recipe.file import load
from mlcm_rl.recipe.teacher_types import Autoencoder, Denoiser
from mlcm_rl.recipe.tree import RecipeError
from mlcm_rl.storage.files import CheckpointError
from mlcm_rl.storage.tensors import read_shapes
from tiny_families.kolors import kolors

OURS = (ValueError, CheckpointError, OSError)
CONFIGURATIONS = {
    "sd": ["unet", "vae", "scheduler", "text_encoder", "tokenizer"],
    "sdxl": ["unet", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"],
    "kolors": ["unet", "vae", "scheduler", "text_encoder", "tokenizer"],
}
FILES = {
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
}
VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 3, 10**12, 10**30, 0.5, -0.5, 1e9, 1e30, float("nan"), float("inf")),
    *("", "flow", "x" * 1000, "__import__('os')", [], [1], [-1, 2], [[1]], ["x"], {}, {"a": 1}, [0.1] * 1000),
]
LEFT_OUT = {  # keys that the networks know and a file may leave out
    "unet": [
        *("class_embed_type", "addition_embed_type", "encoder_hid_dim_type", "num_attention_heads", "dropout"),
        *("time_cond_proj_dim", "num_class_embeds", "dual_cross_attention", "attention_type", "conv_in_kernel"),
        *("transformer_layers_per_block", "mid_block_type", "resnet_time_scale_shift", "cross_attention_norm"),
        "time_embedding_type",
    ],
    "vae": ["shift_factor", "latents_mean", "latents_std", "use_quant_conv"],
    "scheduler": ["trained_betas", "rescale_betas_zero_snr", "thresholding", "use_karras_sigmas", "clip_sample"],
    "text_encoder": ["dtype", "return_dict", "id2label", "layer_norm_eps", "output_hidden_states"],
    "text_encoder_2": ["dtype", "return_dict", "id2label"],
}


def place(folder: Path, part: str) -> Path:
    return folder / part / FILES.get(part, "config.json")


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def teacher(request, tmp_path_factory) -> tuple[str, Path]:
    """Family and folder of a tiny teacher that tests change and leave as it was."""
    folder = tmp_path_factory.mktemp("teacher") / request.param
    return request.param, {"sd": tiny.sd, "sdxl": tiny.sdxl}[request.param](folder)


@pytest.fixture
def copied(teacher, tmp_path) -> tuple[str, Path]:
    """The same, of this test alone."""
    family, folder = teacher
    return family, Path(shutil.copytree(folder, tmp_path / "teacher"))


def tries(family: str, folder: Path) -> Iterator[tuple[Path, str, Any]]:
    """Every (file, key, value)."""
    for part in CONFIGURATIONS[family]:
        path = place(folder, part)
        keys = dict.fromkeys([*json.loads(path.read_text()), *LEFT_OUT.get(part, [])])
        yield from ((path, key, value) for key in keys if not key.startswith("_") for value in VALUES)


def changed(path: Path, key: str, value: Any) -> dict[str, Any]:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {key: value}))
    return content


def runs_or_refuses(family: str, folder: Path) -> None:
    """Plan and draw with a teacher that passed: finite numbers, or an error of ours."""
    teacher = Teacher(path=str(folder), family=family, guidance_scale=3.0)
    try:
        Sizes(runs.recipe(folder, folder, [runs.trajectories("unread")], family)).disk(runs.trajectories("unread"))
        base = teachers.load(teacher, "cpu")
        given = base.encode_prompts(["a cat"])
        noise = base.noise(torch.Generator().manual_seed(0), 1)
        for t in (999, 0):
            x0 = base.guided_x0(noise, torch.tensor([t]), given, base.unconditional(1), 3.0)
            assert x0.isfinite().all()
        assert base.autoencoder.decode(x0).isfinite().all()
    except OURS:
        return


def named(lines: list[str], path: Path) -> None:
    for line in lines:
        assert "\n" not in line
        assert len(line) < 500
        assert line.split(":")[0].endswith((".json", path.parent.name)), line


def test_a_good_teacher_has_nothing_wrong(teacher):
    family, folder = teacher
    assert teacher_check.problems(folder, family) == []


def passing(family: str, folder: Path, every: int) -> None:
    passed = 0
    for path, key, value in tries(family, folder):
        before = changed(path, key, value)
        try:
            lines = teacher_check.problems(folder, family)
            named(lines, path)
            passed += not lines
            if not lines and passed % every == 0:
                runs_or_refuses(family, folder)
        except Exception as error:
            raise AssertionError(f"{path.parent.name}: {key}: {value!r:.60}") from error
        finally:
            path.write_text(json.dumps(before))


def test_any_value_of_any_key_is_refused_by_name_or_runs(teacher):
    passing(*teacher, every=25)


@pytest.mark.slow
def test_any_value_of_any_key_of_kolors_is_refused_by_name_or_runs(tmp_path):
    passing("kolors", kolors(tmp_path / "kolors"), every=25)


@pytest.mark.slow
def test_every_value_of_every_key_is_refused_by_name_or_runs(teacher):
    passing(*teacher, every=1)


# ---- single kinds, each by its answer ----


@pytest.mark.parametrize(
    ("part", "key", "value", "said"),
    [
        ("unet", "sample_size", [8, 8], "unet/config.json: sample_size: expected a valid integer, found [8, 8]"),
        ("unet", "layers_per_block", 10**7, "layers_per_block: expected less than or equal to 256, found 10000000"),
        ("unet", "class_embed_type", "timestep", "class_embed_type: expected None, found 'timestep'"),
        ("unet", "norm_num_groups", 5, "norm_num_groups 5 does not divide block_out_channels 12"),
        ("unet", "conv_in_kernel", 4, "conv_in_kernel 4 is even: pictures would shrink"),
        ("unet", "cross_attention_dim", 41, "cross_attention_dim: expected 40, the width of text_encoder, found 41"),
        ("unet", "block_out_channels", [12, 0], "block_out_channels[1]: expected greater than 0, found 0"),
        ("scheduler", "prediction_type", "flow", "prediction_type: expected 'epsilon', 'v_prediction' or 'sample'"),
        ("scheduler", "beta_start", -0.1, "beta_start: expected greater than 0, found -0.1"),
        ("scheduler", "beta_end", 1e9, "beta_end: expected less than 1, found 1000000000.0"),
        ("scheduler", "beta_end", 0.9, "beta_end: so much noise leaves no signal at the last time"),
        ("scheduler", "beta_start", 0.5, "beta_start 0.5 is above beta_end 0.012"),
        (
            "scheduler",
            "_class_name",
            "FlowMatchEulerDiscreteScheduler",
            "FlowMatchEulerDiscreteScheduler preserves",
        ),
        ("tokenizer", "model_max_length", -1, "tokenizer/tokenizer_config.json: model_max_length: expected greater"),
        ("tokenizer", "model_max_length", 25, "model_max_length: expected at most 24, which the text encoder reads"),
        ("text_encoder", "num_attention_heads", 3, "num_attention_heads 3 does not divide hidden_size"),
        ("text_encoder", "num_labels", 10**10, "num_labels: expected less than or equal to 10000, found 10000000000"),
        ("vae", "shift_factor", "a", "vae/config.json: shift_factor: expected"),
    ],
)
def test_a_value_that_cannot_be_is_answered_with_file_and_key(tmp_path, part, key, value, said):
    folder = tiny.sd(tmp_path / "sd")
    changed(place(folder, part), key, value)
    lines = teacher_check.problems(folder, "sd")
    assert [line for line in lines if said in line], lines
    with pytest.raises(ValueError, match=f"teacher {folder}: {part}/"):
        teachers.load(Teacher(path=str(folder), family="sd"), "cpu")
    with pytest.raises(ValueError, match=f"teacher {folder}: {part}/"):
        Sizes(runs.recipe(folder, tmp_path, [runs.distill()], "sd"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\nteacher: {path: sd, family: sd}\nstages: [{kind: evaluate, prompts: x.txt}]\n")
    with pytest.raises(RecipeError, match=f"2:11: teacher.path: sd: {part}/"):
        load(recipe, root=tmp_path)


def test_everything_that_is_wrong_is_said_at_once(copied):
    family, folder = copied
    for part in ("unet", "vae", "scheduler"):
        changed(place(folder, part), "down_block_types", 5)
        changed(place(folder, part), "beta_end", -1)
        changed(place(folder, part), "in_channels", "x")
    assert len(teacher_check.problems(folder, family)) == 5


def test_a_configuration_that_lacks_the_length_of_prompts_is_refused(copied):
    family, folder = copied
    for path in folder.glob("tokenizer*/tokenizer_config.json"):
        path.write_text("{}")
    lines = teacher_check.problems(folder, family)
    assert sorted(lines) == sorted(
        f"{path.name}/tokenizer_config.json: model_max_length: missing" for path in folder.glob("tokenizer*")
    )


BOMBS = {
    "brackets": "[" * 10**6,
    "objects": '{"a":' * 10**5,
    "twice": '{"in_channels": 4, "in_channels": 4}',
    "digits": '{"in_channels": ' + "9" * 10_000 + "}",
    "long": " " * (teacher_files.MAX_BYTES + 1),
    "no text": b"\xff\xfe\x00",
    "a list": "[]",
    "nothing": "",
    "half a pair": '{"act_fn": "\\ud800"}',
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_a_file_that_is_no_configuration_is_refused_by_name(copied, bomb, name):
    family, folder = copied
    content = BOMBS[bomb]
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (line,) = teacher_check.problems(folder, family)
    assert line.startswith(f"{name}: ")
    with pytest.raises(OURS):
        teachers.load(Teacher(path=str(folder), family=family), "cpu")


@pytest.mark.parametrize("kind", ["pipe", "socket", "zeros", "nowhere", "loop"])
@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "vae/extra.json", "unet/x.safetensors"])
def test_what_is_no_file_is_refused_and_not_waited_for(copied, monkeypatch, kind, name):
    family, folder = copied
    path = folder / name
    path.unlink(missing_ok=True)
    monkeypatch.chdir(path.parent)  # a socket's path is short
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    else:
        path.symlink_to({"zeros": "/dev/zero", "loop": path.name}.get(kind, "nowhere"))
    lines = teacher_check.problems(folder, family)
    assert any(name in line for line in lines), lines
    with pytest.raises(OURS):
        teachers.load(Teacher(path=str(folder), family=family), "cpu")


# ---- tokenizers ----


@pytest.mark.parametrize("name", teacher_files.WORDS)
@pytest.mark.parametrize("content", ["", "[]", "null", "[" * 10**5, '{"a": 1, "a": 2}'])
def test_a_file_of_a_tokenizer_that_is_no_object_is_refused_by_name(copied, name, content):
    family, folder = copied
    (part,) = folder.glob("tokenizer")
    (part / name).write_text(content)
    (line,) = teacher_check.problems(folder, family)
    assert line.startswith(f"tokenizer/{name}: ")


@pytest.mark.parametrize("number", [-1, 514, 10**30, 1.5, "1", None, [1]])
def test_a_word_with_a_number_that_the_text_encoder_does_not_know_is_refused(copied, number):
    family, folder = copied
    for part in sorted(folder.glob("tokenizer*")):
        before = changed(part / "vocab.json", "odd", number)
        (line,) = teacher_check.problems(folder, family)
        encoder = part.name.replace("tokenizer", "text_encoder")
        assert line.startswith(
            f"{part.name}/vocab.json: 'odd': expected a whole number below 514, the vocab_size of {encoder}"
        )
        (part / "vocab.json").write_text(json.dumps(before))


def test_a_tokenizer_without_its_words_is_refused(copied):
    family, folder = copied
    (folder / "tokenizer" / "merges.txt").unlink()
    expected = ["tokenizer/merges.txt: missing: download it too, or tokenizer.json"]
    assert teacher_check.problems(folder, family) == expected
    for path in folder.glob("*/*.safetensors"):
        path.unlink()
    assert teacher_check.problems(folder, family) == []  # shapes to plan with


def test_a_vocabulary_without_its_special_tokens_is_told_when_it_is_loaded(copied):
    family, folder = copied
    path = folder / "tokenizer" / "vocab.json"
    words = json.loads(path.read_text())
    path.write_text(json.dumps({word: number for word, number in words.items() if 2 <= number < 20}))
    with pytest.raises(ValueError, match=r"its files could not be loaded: .*not found in the vocabulary"):
        teachers.load(Teacher(path=str(folder), family=family), "cpu")


# ---- weights ----


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("part", ["unet", "text_encoder_2"])
def test_an_index_that_does_not_list_the_weights_beside_it_is_refused(tmp_path, part, variant):
    """What it leaves out would be drawn at random by one library and be without data in another."""
    folder = tiny.sdxl(tmp_path / "sdxl")
    (file,) = (folder / part).glob("*.safetensors")
    ending = f".{variant}" if variant else ""
    tensors, stem = load_file(file), file.name.removesuffix(".safetensors")
    names = [f"{stem}{ending}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    shards = dict(zip(names, (sorted(tensors)[::2], sorted(tensors)[1::2]), strict=True))
    for name, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / part / name, {"format": "pt"})
    file.unlink()
    index = folder / part / f"{stem}.safetensors.index{ending}.json"
    listed = {key: name for name, keys in shards.items() for key in keys}
    teacher = Teacher(path=str(folder), family="sdxl")
    for weight_map, words in (
        ({}, "lists no file and not all weights beside it"),
        ({key: name for key, name in listed.items() if name == names[0]}, "and not all weights beside it"),
        (listed | {"x": "other.safetensors"}, r"other\.safetensors: missing, and .* names it: download it too"),
        (listed | {"x": "../x.safetensors"}, "is not a file beside it"),
    ):
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        (line,) = teacher_check.problems(folder, "sdxl", variant)
        assert re.match(f"{part}/.*{words}", line)
    index.unlink()
    (line,) = teacher_check.problems(folder, "sdxl", variant)
    assert line == f"{part}/{index.name}: missing, which names the 2 files of the weights: download it too"
    index.write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    assert teacher_check.problems(folder, "sdxl", variant) == []
    if variant is None:
        teachers.load(teacher, "cpu")


def test_a_name_given_twice_in_a_tensor_file_is_damage(tmp_path):
    entry = '"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    header = f"{{{entry},{entry}}}".encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged: .*'x' is given twice"):
        read_shapes(path)


def test_weights_in_bin_files_are_answered_with_what_to_do(copied):
    family, folder = copied
    (file,) = (folder / "unet").glob("*.safetensors")
    file.rename(file.with_suffix(".bin"))
    assert teacher_check.problems(folder, family) == [
        "unet: its weights are .bin files, which can run code and are not read: download the .safetensors files, or "
        "open the teacher with diffusers and save_pretrained(safe_serialization=True)"
    ]
    file.with_suffix(".bin").unlink()
    assert teacher_check.problems(folder, family) == [
        "unet/diffusion_pytorch_model.safetensors: missing, and other parts have their weights: download it too"
    ]
    for path in folder.glob("*/*.safetensors"):
        path.unlink()
    assert teacher_check.problems(folder, family) == []  # shapes to plan with


def test_weights_of_a_variant_are_named_and_read(copied):
    family, folder = copied
    plain = teachers.load(Teacher(path=str(folder), family=family), "cpu").denoiser.state_dict()
    for path in folder.glob("*/*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    lines = teacher_check.problems(folder, family)
    assert lines[0] == "unet: its weights are the variant fp16: write teacher.variant: fp16"
    assert teacher_check.problems(folder, family, "fp16") == []
    teacher = Teacher(path=str(folder), family=family, variant="fp16")
    loaded = teachers.load(teacher, "cpu").denoiser.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in plain.items())
    recipe = runs.recipe(folder, folder, [runs.distill()], family).model_copy(update={"teacher": teacher})
    assert Sizes(recipe).weights("unet") == sum(value.numel() for value in plain.values())


@pytest.mark.parametrize("change", ["shape", "missing", "more"])
def test_weights_of_another_configuration_are_refused_by_their_headers(copied, change):
    family, folder = copied
    (file,) = (folder / "unet").glob("*.safetensors")
    tensors = load_file(file)
    name = "conv_in.weight"
    odd = {"shape": {name: tensors[name][:, :1].clone()}, "missing": {}, "more": {"extra.weight": torch.ones(2)}}[
        change
    ]
    kept = {key: value for key, value in tensors.items() if change == "more" or key != name}
    save_file(kept | odd, file)
    with pytest.raises(ValueError, match=r"unet: 1 tensors are not those of config\.json, for example"):
        teachers.load(Teacher(path=str(folder), family=family), "cpu")


def test_older_names_of_attention_are_the_same_weights(copied):
    family, folder = copied
    (file,) = (folder / "vae").glob("*.safetensors")
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(file)
    for new, old in older.items():
        tensors = {key.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): value for key, value in tensors.items()}
    assert any("query" in key for key in tensors)
    save_file(tensors, file)
    teachers.load(Teacher(path=str(folder), family=family), "cpu")


# ---- the types ----


@pytest.mark.parametrize(("kind", "network"), [(Denoiser, UNet2DConditionModel), (Autoencoder, AutoencoderKL)])
def test_every_setting_of_a_network_has_a_type_and_its_default(kind, network):
    """A setting that diffusers adds is looked at before it is let through."""
    known = {field.alias or name for name, field in kind.model_fields.items()}
    settings = inspect.signature(network.__init__).parameters
    assert set(settings) - {"self"} <= known
    for name, field in kind.model_fields.items():
        if not field.is_required() and name in settings:
            assert field.default == settings[name].default or name.endswith("block_types"), name
