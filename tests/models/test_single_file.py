"""A checkpoint of one file becomes the folder that it was made from, without a hub, or is refused in words."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from transformers import CLIPTextModelWithProjection

import original_layout
import tiny
from mlcm_rl.models import files, single_file, teachers
from mlcm_rl.recipe import Teacher, teacher_check
from mlcm_rl.storage.files import CheckpointError
from mlcm_rl.storage.hashing import folder_hash
from tiny_families import CASES

JSON_ONLY = shutil.ignore_patterns("*.safetensors")


def stock_of(folder: Path) -> DiffusionPipeline:
    index = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name, value in index.items() if value == [None, None]}  # diffusers wants to be told
    return DiffusionPipeline.from_pretrained(folder, **absent)


def sd3(folder: Path, with_t5: bool = False) -> Path:
    """A tiny SD3 whose first tower projects by the identity, as SD3's does."""
    stock = stock_of(tiny.sd3(folder, with_t5))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        stock.text_encoder = CLIPTextModelWithProjection(tiny._text_config(width=24, layers=3, projection_dim=24))
        stock.text_encoder_2 = CLIPTextModelWithProjection(tiny._text_config(width=28, layers=2, projection_dim=8))
    torch.nn.init.eye_(stock.text_encoder.text_projection.weight)
    shutil.rmtree(folder)
    return tiny._save(stock, folder)


MAKE = {"sdxl": tiny.sdxl, "sd": tiny.sd, "sd3": sd3}


@pytest.fixture(scope="module", params=MAKE)
def case(request, tmp_path_factory) -> tuple[str, Path, Path]:
    """Family, folder and single file of a tiny teacher."""
    root = tmp_path_factory.mktemp("single")
    folder = MAKE[request.param](root / "teacher")
    original_layout.write(stock_of(folder), root / "checkpoint.safetensors")
    return request.param, folder, root / "checkpoint.safetensors"


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """The JSON files of a tiny SDXL, its single file and the file's tensors."""
    root = tmp_path_factory.mktemp("sdxl")
    folder = tiny.sdxl(root / "teacher")
    stock = stock_of(folder)
    tensors = original_layout.write(stock, root / "checkpoint.safetensors")
    shutil.copytree(folder, root / "like", ignore=JSON_ONLY)
    return root / "like", root / "checkpoint.safetensors", {name: value.contiguous() for name, value in tensors.items()}


def assert_same(family: str, folder: Path, out: Path) -> None:
    """Both are teachers with the same weights and the same prediction."""
    assert teacher_check.problems(out, family) == []
    one, two = (teachers.load(Teacher(path=str(place), family=family), "cpu") for place in (folder, out))
    assert files.parts_with_weights(one.teacher) == files.parts_with_weights(two.teacher)
    for part in files.parts_with_weights(one.teacher):
        expected = one.pipeline.components[part].state_dict()
        actual = two.pipeline.components[part].state_dict()
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], value) for name, value in expected.items()), part
    assert one.schedule_record() == two.schedule_record()
    noise, t = one.noise(torch.Generator().manual_seed(0), 1), torch.tensor([500])
    prompt = "a red cat" if family == "sd3" else "a 红 cat"
    drawn = [base.guided_x0(noise, t, base.encode_prompts([prompt]), base.unconditional(1), 3.0) for base in (one, two)]
    assert torch.equal(*drawn)


def test_the_folder_has_the_weights_and_draws_what_the_teacher_draws(case, tmp_path):
    """Of the base's folder no weights are there."""
    family, folder, file = case
    like = Path(shutil.copytree(folder, tmp_path / "like", ignore=JSON_ONLY))
    out = single_file.convert(file, like, tmp_path / "out")
    assert_same(family, folder, out)
    assert str(tmp_path) not in "".join(path.read_text() for path in out.rglob("*.json"))


def test_text_encoders_that_the_file_of_an_sd3_lacks_are_those_of_the_base(tmp_path):
    folder, file = tiny.sd3(tmp_path / "teacher"), tmp_path / "checkpoint.safetensors"
    original_layout.write(stock_of(folder), file, with_texts=False)
    assert_same("sd3", folder, single_file.convert(file, folder, tmp_path / "out"))
    like = Path(shutil.copytree(folder, tmp_path / "like", ignore=JSON_ONLY))
    with pytest.raises(ValueError, match="CLIPTextModelWithProjection"):
        single_file.convert(file, like, tmp_path / "other")


def test_an_sd3_without_t5_in_file_or_base_is_written_without_it(tmp_path):
    folder, file = sd3(tmp_path / "teacher", with_t5=True), tmp_path / "checkpoint.safetensors"
    original_layout.write(stock_of(folder), file)
    like = Path(shutil.copytree(folder, tmp_path / "like", ignore=JSON_ONLY))
    out = single_file.convert(file, like, tmp_path / "out")
    assert teachers.load(Teacher(path=str(out), family="sd3"), "cpu").pipeline.text_encoder_3 is None


def test_the_same_file_is_the_same_folder_in_the_files_own_precision(sdxl, tmp_path):
    like, _, tensors = sdxl
    save_file({name: value.half() for name, value in tensors.items()}, tmp_path / "half.safetensors")
    one, two = (single_file.convert(tmp_path / "half.safetensors", like, tmp_path / name) for name in ("one", "two"))
    assert folder_hash(one) == folder_hash(two)
    base = teachers.load(Teacher(path=str(one), family="sdxl", dtype="float16"), "cpu")
    name = "down_blocks.0.resnets.0.conv1.weight"
    expected = tensors["model.diffusion_model.input_blocks.1.0.in_layers.2.weight"].half()
    assert torch.equal(base.denoiser.state_dict()[name], expected)


FIRST = "model.diffusion_model.input_blocks.0.0.weight"
WRONG = {
    "a LoRA": (
        lambda tensors: {"lora_unet_mid.lora_down.weight": torch.ones(2, 2)},
        "is a LoRA, not a checkpoint: name it in teacher.lora",
    ),
    "no checkpoint": (
        lambda tensors: {"unet.x": torch.ones(2)},
        "none of its 1 tensors begins with model.diffusion_model",
    ),
    "an autoencoder": (
        lambda tensors: {name: value for name, value in tensors.items() if name.startswith("first_stage_model.")},
        "is an autoencoder alone: put it into vae/",
    ),
    "a LoHa": (lambda tensors: {"lora_unet_mid.hada_w1_a": torch.ones(2, 2)}, "is a LoHa or a LoKr: merge it into"),
    "a ControlNet": (lambda tensors: {"control_model.x": torch.ones(2)}, "is a ControlNet: name the checkpoint"),
    "another family": (
        lambda tensors: {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.ones(2, 2)},
        r"its denoiser has no model\.diffusion_model\.input_blocks\.0\.0\.weight, as that of .* has: give the folder",
    ),
    "float8": (
        lambda tensors: {name: value.to(torch.float8_e4m3fn) for name, value in tensors.items()},
        r"\d+ of its tensors are quantised, for example model.* in F8_E4M3: take the checkpoint in float16",
    ),
    "inpainting": (
        lambda tensors: tensors | {FIRST: torch.ones(12, 9, 3, 3)},
        r"is an inpainting model \(9 channels\)",
    ),
    "a refiner": (
        lambda tensors: tensors | {"conditioner.embedders.0.model.text_projection": torch.ones(2)},
        "is SDXL's refiner, which only finishes pictures: name its base model",
    ),
    "v": (
        lambda tensors: tensors | {"v_pred": torch.ones(1), "ztsnr": torch.ones(1)},
        'predicts v .*"prediction_type": "v_prediction" and "rescale_betas_zero_snr": true',
    ),
    "a gap": (
        lambda tensors: {name: value for name, value in tensors.items() if not name.endswith("out.2.bias")},
        "no whole checkpoint of the base in .*: weights are missing",
    ),
    "more blocks": (
        lambda tensors: tensors | {"model.diffusion_model.output_blocks.4.0.in_layers.0.weight": torch.ones(3)},
        r"its denoiser has [\d,]+ weights and that of .* takes [\d,]+: give the folder of its own base",
    ),
    "another width": (lambda tensors: tensors | {FIRST: torch.ones(16, 4, 3, 3)}, "conv_in.weight expected shape"),
    "no text encoder": (
        lambda tensors: {
            name: value for name, value in tensors.items() if not name.startswith("conditioner.embedders.1")
        },
        "no whole checkpoint of the base in .*Failed to load CLIPTextModel",
    ),
    "no autoencoder": (
        lambda tensors: {name: value for name, value in tensors.items() if not name.startswith("first_stage")},
        "no whole checkpoint of the base in .*Failed to load AutoencoderKL",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_file_that_is_no_whole_checkpoint_of_the_base_is_refused(sdxl, kind, tmp_path):
    like, _, tensors = sdxl
    change, words = WRONG[kind]
    save_file(change(tensors), tmp_path / "wrong.safetensors")
    with pytest.raises((ValueError, CheckpointError), match=words):
        single_file.convert(tmp_path / "wrong.safetensors", like, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.gguf", b"GGUF", "its weights are quantised: take the checkpoint in float16"),
        ("a.ckpt", b"PK", "expected a .safetensors file; other formats can run code"),
        ("text.safetensors", b"hello\n" * 50, "text.safetensors is damaged: not JSON"),
        ("gguf.safetensors", b"GGUF\3\0\0\0" + bytes(99), "gguf.safetensors is damaged"),
        ("empty.safetensors", b"", "empty.safetensors is damaged"),
    ],
)
def test_a_file_of_another_format_is_refused_in_a_line(sdxl, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, CheckpointError), match=words) as error:
        single_file.convert(tmp_path / name, sdxl[0], tmp_path / "out")
    assert "\n" not in str(error.value)


def test_a_file_that_ends_early_is_damaged(sdxl, tmp_path):
    like, file, _ = sdxl
    (tmp_path / "short.safetensors").write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"short\.safetensors is damaged"):
        single_file.convert(tmp_path / "short.safetensors", like, tmp_path / "out")


def test_a_base_whose_files_are_not_converted_is_named(sdxl, tmp_path):
    with pytest.raises(ValueError, match="single files of a PixArtSigmaPipeline are not converted, only those of sd, "):
        single_file.convert(sdxl[1], CASES["pixart_sigma"].write(tmp_path / "like"), tmp_path / "out")


def test_what_the_folder_of_the_base_lacks_is_named(sdxl, tmp_path):
    like, file, _ = sdxl
    with pytest.raises(FileNotFoundError, match=r"holds no model_index\.json: give its base's folder"):
        single_file.convert(file, tmp_path, tmp_path / "out")
    bare = Path(shutil.copytree(like, tmp_path / "bare"))
    (bare / "tokenizer_2" / "merges.txt").unlink()
    with pytest.raises(
        FileNotFoundError, match=f"{bare}: tokenizer_2/merges.txt: missing: download it too, or tokenizer.json"
    ):
        single_file.convert(file, bare, tmp_path / "out")
    index = json.loads((bare / "model_index.json").read_text()) | {"_class_name": "KandinskyPipeline"}
    (bare / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model_index\.json is of a KandinskyPipeline, which no family loads"):
        single_file.convert(file, bare, tmp_path / "out")


def test_only_safetensors_are_read_and_nothing_is_overwritten(sdxl, tmp_path):
    like, file, _ = sdxl
    pickled = Path(shutil.copy(file, tmp_path / "checkpoint.ckpt"))
    with pytest.raises(ValueError, match=r"expected a \.safetensors file; other formats can run code"):
        single_file.convert(pickled, like, tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="is there already; name a new folder"):
        single_file.convert(file, like, tmp_path / "there")
