"""The LoRA files of an export, read as other tools read them: what they add to every weight is what the student adds.

ComfyUI, Forge and A1111 look up `lora_unet_<name>`, its dots underscores, where <name> is a weight's name in Stability
AI's layout or in diffusers'. The weight W of (out, in, ...) becomes W + alpha / rank * up @ down, `up` (out, rank) and
`down` (rank, in ...) flattened, and without `.alpha` the factor is 1. What has another name is left out with a line in
a log. Here that rule is stated anew; `test_older_clients.py` asks ComfyUI itself.
"""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from lora_students import CONDITIONED, LORA, PREFERENCE, SD15, SD21, SDXL, WHOLE, description, relative, updates_in
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlcm_rl.models import students
from mlcm_rl.models.base import Base
from mlcm_rl.models.client_files import KOHYA_FILE, write_kohya
from mlcm_rl.models.client_keys import kohya_names
from mlcm_rl.models.export import export, target_time_update
from mlcm_rl.models.lora_files import LORA_FILE, combined, read_lora
from mlcm_rl.models.students import PREFERENCE_FILE
from mlcm_rl.models.unet import LORA_TARGETS
from mlcm_rl.recipe import Full

# ---- the rule of the tools ----


def stability_name(module: str, layers: int, attended: set[str]) -> str:
    """What Stability AI calls a module of diffusers' UNet, by arithmetic on the numbers in its name."""
    inside = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3"}
    inside |= {"conv_shortcut": "skip_connection", "linear_1": "0", "linear_2": "2"}
    if found := re.fullmatch(r"time_embedding\.(\w+)", module):
        return f"time_embed.{inside[found[1]]}"
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", module):
        return f"middle_block.{2 * int(found[2]) if found[1] == 'resnets' else 1}.{inside.get(found[3], found[3])}"
    if found := re.fullmatch(r"down_blocks\.(\d)\.downsamplers\.0\.conv", module):
        return f"input_blocks.{(int(found[1]) + 1) * (layers + 1)}.0.op"
    if found := re.fullmatch(r"(up_blocks\.(\d))\.upsamplers\.0\.conv", module):
        return f"output_blocks.{int(found[2]) * (layers + 1) + layers}.{2 if found[1] in attended else 1}.conv"
    side, level, part, j, rest = re.fullmatch(
        r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.+)", module
    ).groups()
    number = int(level) * (layers + 1) + int(j) + (side == "down")
    return f"{'input' if side == 'down' else 'output'}_blocks.{number}.{part != 'resnets':d}.{inside.get(rest, rest)}"


def known_names(denoiser: UNet2DConditionModel) -> dict[str, str]:
    """The names that a tool looks for in a LoRA file, and the weight that each is for."""
    weights = [name for name, module in denoiser.named_modules() if hasattr(module, "weight") and "norm" not in name]
    outside = ("conv_in", "conv_out", "add_embedding")
    weights = [name for name in weights if not name.startswith(outside) and "cond_proj" not in name]
    attended = {name.partition(".attentions.")[0] for name in weights if ".attentions." in name}
    known = {name: name for name in weights}
    known |= {stability_name(name, denoiser.config.layers_per_block, attended): name for name in weights}
    return {f"lora_unet_{other.replace('.', '_')}": name for other, name in known.items()}


def added(file: Path, denoiser: UNet2DConditionModel) -> dict[str, Tensor]:
    """What a tool adds to each weight of `denoiser` with the LoRA `file`, in float32; every key must be of use."""
    known, tensors, found = known_names(denoiser), load_file(file), {}
    for name in sorted({key.partition(".")[0] for key in tensors}):
        up, down = tensors.pop(f"{name}.lora_up.weight"), tensors.pop(f"{name}.lora_down.weight")
        scale = tensors.pop(f"{name}.alpha").item() / len(down)
        module = denoiser.get_submodule(known[name])
        found[known[name]] = scale * (up.flatten(1) @ down.flatten(1)).reshape(module.weight.shape)
    assert not tensors, sorted(tensors)[:3]
    return found


def of_student(folder: Path) -> dict[str, Tensor]:
    """What the student in `folder` adds to each weight of its teacher, in float64, from its own files."""
    return updates_in(*(folder / name for name in (LORA_FILE, PREFERENCE_FILE) if (folder / name).is_file()))


# ---- names ----


@pytest.mark.parametrize(
    ("configuration", "in_stability_blocks", "count", "digest"),
    [
        (SDXL, True, 788, "6eaed2d7a4528e0a"),
        (SD15, False, 278, "620b9a8905915e25"),
        (SD21, False, 278, "620b9a8905915e25"),
    ],
    ids=["sdxl", "sd15", "sd21"],
)
def test_the_published_shapes_have_names_that_tools_know_and_none_left_over(
    configuration, in_stability_blocks, count, digest
):
    """The digests are of lists that ComfyUI's own code took whole."""
    with torch.device("meta"):
        denoiser = UNet2DConditionModel.from_config(configuration)
    modules = [name for name, _ in denoiser.named_modules() if name.endswith(tuple(f".{one}" for one in LORA_TARGETS))]
    names = kohya_names(modules, denoiser, in_stability_blocks)
    known = known_names(denoiser)
    assert {name: known[other] for name, other in names.items()} == {name: name for name in modules}
    assert len(set(names.values())) == count
    assert hashlib.sha256("\n".join(sorted(names.values())).encode()).hexdigest()[:16] == digest


def test_the_first_layer_over_time_has_a_name_in_both_layouts():
    modules = ["time_embedding.linear_1"]
    with torch.device("meta"):
        denoiser = UNet2DConditionModel.from_config(SDXL)
    assert kohya_names(modules, denoiser, True) == {modules[0]: "lora_unet_time_embed_0"}
    assert kohya_names(modules, denoiser, False) == {modules[0]: "lora_unet_time_embedding_linear_1"}
    with pytest.raises(ValueError, match=r"encoder_hid_proj has no name among Stability AI's blocks"):
        kohya_names(["encoder_hid_proj"], denoiser, True)


# ---- exports ----


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("teacher", ["sdxl", "sd15"])
def test_a_tool_that_reads_kohyas_names_adds_what_the_student_adds(teacher, kind, loaded, lora_exports):
    out = lora_exports / "exports" / f"{teacher}-{kind}"
    expected = of_student(lora_exports / "students" / f"{teacher}-{kind}")
    found = added(out / KOHYA_FILE, loaded[teacher].denoiser)
    assert found.keys() == expected.keys()
    assert max(relative(found[name], expected[name]) for name in expected) < 1e-6


@pytest.mark.parametrize("kind", CONDITIONED)
@pytest.mark.parametrize("teacher", ["sdxl", "sd15"])
def test_the_adapters_of_a_conditioned_student_add_the_target_time_too(teacher, kind, loaded, lora_exports):
    base, name = loaded[teacher], f"{teacher}-{kind}"
    student = students.load_student(base, lora_exports / "students" / name)
    files = sorted((lora_exports / "exports" / name).glob(f"steps-*/{KOHYA_FILE}"))
    assert [file.parent.name for file in files] == ["steps-2", "steps-3", "steps-4", "steps-6", "steps-8"]
    for file in files:
        up, down = target_time_update(base, student, int(file.parent.name.removeprefix("steps-")), gamma=0.0)
        expected = of_student(student.folder) | {"time_embedding.linear_1": up.double() @ down.double()}
        found = added(file, base.denoiser)
        assert found.keys() == expected.keys()
        assert max(relative(found[module], expected[module]) for module in expected) < 1e-6


@pytest.mark.parametrize("kind", WHOLE + CONDITIONED)
def test_both_files_of_a_folder_hold_the_same_adapter_and_say_what_they_are(kind, loaded, lora_exports):
    out = lora_exports / "exports" / f"sdxl-{kind}"
    places = [out] if kind in WHOLE else sorted(out.glob("steps-*"))
    rank = LORA.rank + (PREFERENCE.rank if kind.endswith("tuned") else 0)
    for folder in places:
        with safe_open(folder / KOHYA_FILE, "pt") as file:
            assert file.metadata() == {
                "ss_base_model_version": "sdxl_base_v1-0",
                "ss_v2": "False",
                "ss_network_module": "networks.lora",
                "ss_network_dim": str(rank),
                "ss_network_alpha": str(rank),
            }
            assert {file.get_tensor(key).item() for key in file.keys() if key.endswith(".alpha")} == {rank}  # noqa: SIM118
            assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}  # noqa: SIM118
        with safe_open(folder / LORA_FILE, "pt") as file:
            header = json.loads(file.metadata()["lora_adapter_metadata"])
        stated = {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}}
        targets = sorted(LORA_TARGETS + ["time_embedding.linear_1"] * (folder != out))
        assert header == {f"unet.{key}": value for key, value in (stated | {"target_modules": targets}).items()}
        found, expected = added(folder / KOHYA_FILE, loaded["sdxl"].denoiser), updates_in(folder / LORA_FILE)
        assert max(relative(found[name], expected.pop(name)) for name in found) < 1e-6
        assert not expected


@pytest.mark.parametrize(
    ("teacher", "version", "second"),
    [("sdxl", "sdxl_base_v1-0", "False"), ("sd15", "sd_v1", "False"), ("sd21", "sd_v2_v", "True")],
)
def test_the_header_names_the_base_model_as_tools_test_for_it(teacher, version, second, loaded, tmp_path):
    base = loaded[teacher]
    denoiser = students.student(base, LORA, 0)
    students.save_student(denoiser, tmp_path / "student", description(base))
    write_kohya({"unet": combined([read_lora(tmp_path / "student" / LORA_FILE)])}, base, tmp_path / KOHYA_FILE)
    with safe_open(tmp_path / KOHYA_FILE, "pt") as file:
        header = file.metadata()
    assert (header["ss_base_model_version"], header["ss_v2"]) == (version, second)


@pytest.mark.parametrize("file", [LORA_FILE, KOHYA_FILE])
def test_the_same_export_is_the_same_bytes(file, loaded, lora_exports, tmp_path):
    out = export(lora_exports / "students" / "sdxl-plain", loaded["sdxl"], tmp_path / "again")
    assert (out / file).read_bytes() == (lora_exports / "exports" / "sdxl-plain" / file).read_bytes()


# ---- diffusers ----


def stock_updates(base: Base, folder: Path, **settings: str) -> dict[str, Tensor]:
    """What diffusers adds to the teacher's weights with the LoRA in `folder`."""
    stock = DiffusionPipeline.from_pretrained(base.teacher.path)
    before = {name: value.clone() for name, value in stock.unet.state_dict().items()}
    stock.load_lora_weights(folder, **settings)
    stock.fuse_lora()
    stock.unload_lora_weights()
    after = stock.unet.state_dict()
    changes = {name: after[name] - value for name, value in before.items() if not torch.equal(after[name], value)}
    return {name.removesuffix(".weight"): value for name, value in changes.items()}


def assert_same_updates(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """As near as float32 weights, from which the updates were taken, let them be told."""
    assert found.keys() == expected.keys()
    assert max(relative(found[name], expected[name]) for name in expected) < 1e-5


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("teacher", ["sdxl", "sd15"])
def test_diffusers_reads_either_file_and_takes_its_own_unless_told(teacher, kind, loaded, lora_exports):
    out = lora_exports / "exports" / f"{teacher}-{kind}"
    expected = of_student(lora_exports / "students" / f"{teacher}-{kind}")
    assert_same_updates(stock_updates(loaded[teacher], out, weight_name=KOHYA_FILE), expected)
    (out / KOHYA_FILE).rename(out / "aside")
    try:
        alone = stock_updates(loaded[teacher], out)
    finally:
        (out / "aside").rename(out / KOHYA_FILE)
    both = stock_updates(loaded[teacher], out)
    assert_same_updates(alone, expected)
    assert all(torch.equal(both[name], alone[name]) for name in alone)


@pytest.mark.parametrize("kind", WHOLE)
def test_a_lost_header_changes_nothing(kind, loaded, lora_exports, tmp_path):
    tensors = load_file(lora_exports / "exports" / f"sdxl-{kind}" / LORA_FILE)
    save_file(tensors, tmp_path / LORA_FILE)
    assert_same_updates(stock_updates(loaded["sdxl"], tmp_path), of_student(lora_exports / "students" / f"sdxl-{kind}"))
    name = "down_blocks.0.resnets.0.conv1"
    up, down = (tensors[f"unet.{name}.lora_{part}.weight"] for part in "BA")
    alone = (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])
    assert relative(alone, of_student(lora_exports / "students" / f"sdxl-{kind}")[name]) < 1e-6


def test_a_tuned_student_over_weights_of_its_own_ships_no_adapter(loaded, tmp_path):
    base = loaded["sdxl"]
    denoiser = students.student(base, Full(), 0)
    students.save_student(denoiser, tmp_path / "distilled", description(base))
    tuned = students.for_preference(base, PREFERENCE, 0, tmp_path / "distilled")
    students.save_tuned(tuned, tmp_path / "distilled", tmp_path / "student", tuned_steps=1)
    out = export(tmp_path / "student", base, tmp_path / "out")
    assert not list(out.glob("*lora*"))
    assert list((out / "unet").glob("*.safetensors"))


def test_adapters_over_different_modules_are_one():
    def ones(settings: LoraConfig) -> dict[str, Tensor]:
        shapes = {"lora_A.weight": (settings.r, 4), "lora_B.weight": (3, settings.r)}
        return {f"{name}.{part}": torch.ones(shapes[part]) for name in settings.target_modules for part in shapes}

    both = [LoraConfig(r=2, lora_alpha=1, target_modules=["a", "b"])]
    both.append(LoraConfig(r=1, lora_alpha=3, target_modules=["b", "c"]))
    settings, tensors = combined([(one, ones(one)) for one in both])
    assert (settings.r, settings.lora_alpha, settings.target_modules) == (3, 3, {"a", "b", "c"})
    updates = {name: tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] for name in "abc"}
    assert {name: value.unique().item() for name, value in updates.items()} == {"a": 1.0, "b": 4.0, "c": 3.0}
