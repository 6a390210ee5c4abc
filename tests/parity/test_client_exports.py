"""Exports for ComfyUI, kohya's tools and PEFT: each file adds to every weight what the student adds, or draws its x0.

The rules of the tools are stated anew, from their sources: ComfyUI looks layers of transformers up under
`transformer.<diffusers' name>`, or as slices of its own layers; kohya's sd-scripts under `lora_unet_<original name>`.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lora_students
import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, QwenImageTransformer2DModel
from diffusers.loaders import lora_conversion_utils as conversion
from lora_students import LORA, relative, updates_in
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import tiny
from mlcm_rl.equations.prediction import X0
from mlcm_rl.models import client_export, students
from mlcm_rl.models.base import Base
from mlcm_rl.models.client_export import export_as, export_for
from mlcm_rl.models.client_files import write_kohya
from mlcm_rl.models.client_keys import kohya_names
from mlcm_rl.models.export import Form, target_time_update
from mlcm_rl.models.lora_files import LORA_FILE
from mlcm_rl.models.single_file import convert
from mlcm_rl.models.teachers import class_of
from mlcm_rl.recipe import Full, Lora
from tiny_families import CASES

BUDGETS = [2, 4]
FUSED = {  # original layers of transformers that stack several of diffusers', by the end of their names
    "sd3": {
        "x_block_attn_qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
        "x_block_attn2_qkv": ["attn2.to_q", "attn2.to_k", "attn2.to_v"],
        "context_block_attn_qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    },
    "flux": {
        "img_attn_qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
        "txt_attn_qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
        "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
    },
}
SINGLE = {  # the other layers
    "sd3": {
        "x_block_attn_proj": "attn.to_out.0",
        "x_block_attn2_proj": "attn2.to_out.0",
        "x_block_mlp_fc1": "ff.net.0.proj",
        "x_block_mlp_fc2": "ff.net.2",
        "context_block_attn_proj": "attn.to_add_out",
        "context_block_mlp_fc1": "ff_context.net.0.proj",
        "context_block_mlp_fc2": "ff_context.net.2",
    },
    "flux": {
        "img_attn_proj": "attn.to_out.0",
        "txt_attn_proj": "attn.to_add_out",
        "img_mlp_0": "ff.net.0.proj",
        "img_mlp_2": "ff.net.2",
        "txt_mlp_0": "ff_context.net.0.proj",
        "txt_mlp_2": "ff_context.net.2",
        "linear2": "proj_out",
    },
}
BLOCKS = {"joint": "transformer_blocks", "double": "transformer_blocks", "single": "single_transformer_blocks"}
OUTSIDE = {
    "sd3": {"t_embedder_mlp_0": "time_text_embed.timestep_embedder.linear_1"},
    "flux": {"time_in_in_layer": "time_text_embed.timestep_embedder.linear_1", "final_layer_linear": "proj_out"},
}


def student(base: Base, folder: Path, adapter: Lora | Full = LORA, conditioned: bool = False) -> Path:
    """A student of `base` in `folder`/student."""
    denoiser = students.student(base, adapter, 0, conditioned)
    tiny.perturb(students.trainable_parameters(denoiser), 1, 0.05)
    description = {"num_segments": 1, "budgets": BUDGETS if conditioned else [], **students.expected_of(base)}
    students.save_student(denoiser, folder / "student", description)
    return folder / "student"


def expected_of(base: Base, folder: Path, num_steps: int = 0) -> dict[str, Tensor]:
    """What a student adds to each weight, and the target times of `num_steps` steps."""
    expected = updates_in(folder / LORA_FILE)
    if num_steps:
        up, down = target_time_update(base, students.load_student(base, folder), num_steps, gamma=0.0)
        expected[f"{base.time_layer}.{base.time_input}"] = up.double() @ down.double()
    return expected


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    assert max(relative(found[name], expected[name]) for name in expected) < tolerance


def kohya_updates(file: Path) -> dict[str, Tensor]:
    """What a reader of kohya's layout adds, by the names of the file: alpha / rank * up @ down."""
    tensors, found = load_file(file), {}
    for name in sorted({key.partition(".")[0] for key in tensors}):
        up, down = (tensors.pop(f"{name}.lora_{part}.weight").double() for part in ("up", "down"))
        update = tensors.pop(f"{name}.alpha").item() / len(down) * up.flatten(1) @ down.flatten(1)
        found[name] = update.reshape(len(up), *down.shape[1:])
    assert not tensors
    return found


def split(family: str, updates: dict[str, Tensor], denoiser: torch.nn.Module) -> dict[str, Tensor]:
    """Updates of original layers as those of diffusers', by slices of their rows."""
    found = {}
    for name, update in updates.items():
        if (outside := name.removeprefix("lora_unet_")) in OUTSIDE[family]:
            found[OUTSIDE[family][outside]] = update
            continue
        kind, number, layer = re.fullmatch(r"lora_unet_(\w+?)_blocks_(\d+)_(\w+)", name).groups()
        stack = FUSED[family].get(layer) or [SINGLE[family][layer]]
        modules = [f"{BLOCKS[kind]}.{number}.{one}" for one in stack]
        rows = [len(denoiser.get_submodule(one).weight) for one in modules]
        found |= dict(zip(modules, update.split(rows), strict=True))
    return found


@pytest.fixture(scope="module", params=["sd3", "flux"])
def transformer(request, tmp_path_factory) -> Base:
    case = CASES[request.param]
    return case.load(case.write(tmp_path_factory.mktemp(request.param) / "teacher"))


# ---- UNets ----


@pytest.mark.parametrize(("teacher", "client"), [("sdxl", "kohya"), ("sd15", "comfyui")])
def test_a_lora_over_a_unet_is_in_kohyas_layout_for_both_clients(teacher, client, loaded, tmp_path):
    """Of the names, `test_lora_for_other_tools` is the test."""
    base, source = loaded[teacher], student(loaded[teacher], tmp_path)
    out = export_for(client, source, base, tmp_path / "mine", form=Form(dtype=torch.float16))
    file = (out / "loras" if client == "comfyui" else out) / "mine.safetensors"
    dtypes = {key.rpartition(".")[2]: value.dtype for key, value in load_file(file).items()}
    assert dtypes == {"alpha": torch.float32, "weight": torch.float16}
    expected = expected_of(base, source)
    names = kohya_names(expected, base.denoiser, base.in_stability_blocks)
    assert_same(kohya_updates(file), {names[module]: value for module, value in expected.items()}, 1e-3)


@pytest.mark.parametrize("rank", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_a_conditioned_student_is_a_lora_for_each_number_of_steps_whatever_its_rank(rank, loaded, tmp_path):
    """Of rank 2 too, where the layer of times has rank 4; diffusers' own export has a whole denoiser there."""
    base = loaded["sdxl"]
    source = student(base, tmp_path, Lora(rank=rank, alpha=2.0), conditioned=True)
    out = export_for("kohya", source, base, tmp_path / "mine")
    assert sorted(path.name for path in out.glob("*.safetensors")) == [f"mine-{n}-steps.safetensors" for n in BUDGETS]
    for num_steps in BUDGETS:
        stock = DiffusionPipeline.from_pretrained(base.teacher.path)
        before = {name: value.clone() for name, value in stock.unet.state_dict().items()}
        stock.load_lora_weights(out, weight_name=f"mine-{num_steps}-steps.safetensors")
        stock.fuse_lora()
        stock.unload_lora_weights()
        after = stock.unet.state_dict()
        found = {name.removesuffix(".weight"): after[name] - value for name, value in before.items()}
        changed = {name: value for name, value in found.items() if value.any()}
        assert_same(changed, expected_of(base, source, num_steps), 2e-5)


# ---- transformers ----


@pytest.mark.parametrize("conditioned", [False, True], ids=["plain", "conditioned"])
def test_stacked_layers_of_a_transformer_add_what_the_student_adds(transformer, conditioned, tmp_path):
    base, family = transformer, transformer.family
    source = student(base, tmp_path, Lora(rank=2, alpha=8.0), conditioned)
    files = sorted(export_for("kohya", source, base, tmp_path / "mine").glob("*.safetensors"))
    assert len(files) == (len(BUDGETS) if conditioned else 1)
    for file, num_steps in zip(files, BUDGETS if conditioned else [0], strict=True):
        assert_same(split(family, kohya_updates(file), base.denoiser), expected_of(base, source, num_steps))
    with safe_open(files[0], "pt") as opened:
        header = opened.metadata()
    version = {"sd3": "5-medium", "flux": "flux1"}[family]
    assert (header["ss_base_model_version"], header["ss_network_module"]) == (version, f"networks.lora_{family}")


@pytest.mark.parametrize("conditioned", [False, True], ids=["plain", "conditioned"])
def test_comfyui_has_transformers_under_diffusers_names_and_at_scale_1(transformer, conditioned, tmp_path):
    base = transformer
    source = student(base, tmp_path, Lora(rank=4, alpha=8.0), conditioned)
    files = sorted((export_for("comfyui", source, base, tmp_path / "mine") / "loras").iterdir())
    for file, num_steps in zip(files, BUDGETS if conditioned else [0], strict=True):
        tensors, found = load_file(file), {}
        for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
            down, up = tensors.pop(key), tensors.pop(key.replace("lora_A", "lora_B"))
            found[key.removeprefix("transformer.").removesuffix(".lora_A.weight")] = up.double() @ down.double()
        assert not tensors  # no alpha
        assert_same(found, expected_of(base, source, num_steps))


def qwen_image() -> QwenImageTransformer2DModel:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "joint_attention_dim": 12, "axes_dims_rope": (2, 2, 4)}
    return QwenImageTransformer2DModel(num_layers=2, in_channels=8, out_channels=2, **sizes)


def flux() -> FluxTransformer2DModel:
    """At FLUX.1's width, which diffusers' converter has as a number: one block of each kind."""
    return FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)


@pytest.mark.parametrize(
    ("family", "network", "converted"),
    [
        ("flux", flux, conversion._convert_kohya_flux_lora_to_diffusers),
        ("qwen_image", qwen_image, conversion._convert_non_diffusers_qwen_lora_to_diffusers),
    ],
    ids=["flux", "qwen_image"],
)
def test_diffusers_reads_kohyas_names_to_the_bit(family, network, converted, tmp_path):
    base = object.__new__(class_of(family))
    with torch.device("meta"):
        base.denoiser = network()
    ends = tuple(f".{target}" for target in base.lora_targets)
    modules = [name for name, _ in base.denoiser.named_modules() if name.endswith(ends)]
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name in modules:
        rows, columns = base.denoiser.get_submodule(name).weight.shape
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    write_kohya({"transformer": (LoraConfig(r=2, lora_alpha=2), tensors)}, base, tmp_path / "file")
    found = {key.removeprefix("transformer."): one for key, one in converted(load_file(tmp_path / "file")).items()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], value) for key, value in tensors.items())


# ---- PEFT ----


@pytest.mark.parametrize(
    "conditioned", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "conditioned"]
)
def test_peft_loads_its_own_layout_over_the_teachers_denoiser(conditioned, loaded, tmp_path):
    base = loaded["sdxl"]
    source = student(base, tmp_path, Lora(rank=3, alpha=8.0), conditioned)
    out = export_for("peft", source, base, tmp_path / "mine")
    for num_steps in BUDGETS if conditioned else [0]:
        unet = DiffusionPipeline.from_pretrained(base.teacher.path).unet
        before = {name: value.clone() for name, value in unet.state_dict().items()}
        adapted = PeftModel.from_pretrained(unet, out / f"steps-{num_steps}" if num_steps else out)
        after = adapted.merge_and_unload().state_dict()
        changed = {n.removesuffix(".weight"): after[n] - v for n, v in before.items() if not torch.equal(after[n], v)}
        assert_same(changed, expected_of(base, source, num_steps), 2e-5)
    config = json.loads(next(out.rglob("adapter_config.json")).read_text(encoding="utf-8"))
    assert str(tmp_path) not in json.dumps(config)
    assert len(config) == 8


@pytest.mark.slow
@pytest.mark.parametrize("conditioned", [False, True], ids=["plain", "conditioned"])
def test_the_code_of_pefts_card_draws_a_picture(conditioned, loaded, tmp_path):
    base = loaded["sdxl"]
    out = export_for("peft", student(base, tmp_path, conditioned=conditioned), base, tmp_path / "mine")
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / Path(base.teacher.path).name).symlink_to(base.teacher.path)
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert [path.stem for path in tmp_path.glob("*.png")] == ["steps-2" if conditioned else "sample"]


def test_the_card_for_kohyas_tools_says_what_they_cannot(loaded, tmp_path):
    base = loaded["sdxl"]
    denoiser = students.student(base, LORA, 0, condition_on_target=True)
    description = {"num_segments": 1, "budgets": [3, 4], **students.expected_of(base)}
    students.save_student(denoiser, tmp_path / "student", description)
    card = (export_for("kohya", tmp_path / "student", base, tmp_path / "mine") / "README.md").read_text(
        encoding="utf-8"
    )
    assert "| `mine-4-steps.safetensors` | 4 | Euler | Simple |" in card
    assert "| `mine-3-steps.safetensors` | 3, but not so: see below | Euler | Simple |" in card
    assert "it leaves `time_embedding.linear_1` out" in card
    plain = export_for("kohya", student(base, tmp_path / "other"), base, tmp_path / "plain", gamma=0.3)
    card = (plain / "README.md").read_text(encoding="utf-8")
    assert "No sampler of these tools is known that puts noise back as `eta=0.3` does" in card
    assert "sd-scripts itself" not in card


# ---- whole denoisers ----


def test_full_weights_are_one_file_for_comfyui_and_nothing_for_adapters(loaded, tmp_path):
    base = loaded["sd15"]
    source = student(base, tmp_path, Full())
    out = export_for("comfyui", source, base, tmp_path / "mine", form=Form(dtype=torch.bfloat16))
    tensors = load_file(out / "diffusion_models" / "mine.safetensors")
    expected = students.merged(students.load_student(base, source), torch.bfloat16).state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())
    with pytest.raises(ValueError, match="trained in full, without one: export for comfyui or diffusers"):
        export_for("peft", source, base, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("teacher", ["sdxl", "sd15"])
def test_a_whole_student_is_a_checkpoint_in_the_original_layout(teacher, loaded, tmp_path):
    """Read back by diffusers, through our own `convert`, which refuses tensors without a place."""
    base, source = loaded[teacher], student(loaded[teacher], tmp_path)
    out = export_for("kohya", source, base, tmp_path / "mine", form=Form(merge=True))
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "Each file is a whole checkpoint" in card
    assert "lora" not in card.lower()
    stock = DiffusionPipeline.from_pretrained(
        convert(out / "mine.safetensors", Path(base.teacher.path), tmp_path / "back")
    )
    expected = students.merged(students.load_student(base, source), torch.float32).state_dict()
    assert stock.unet.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in stock.unet.state_dict().items())
    for part in ("vae", *base.original_texts):
        found, wanted = stock.components[part].state_dict(), base.pipeline.components[part].state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items()), part


def test_a_checkpoint_is_refused_where_the_original_layout_is_not_whole(loaded, tmp_path):
    refused = "one file of everything, as kohya's tools open it, is for Stable Diffusion 1 and SDXL"
    for teacher, reason in (
        ("sdxl-one-tower", "this one has no text_encoder"),
        ("sd21", "not family sd of this shape"),
    ):
        source = student(loaded[teacher], tmp_path / teacher)
        with pytest.raises(ValueError, match=f"{refused}.*{reason}"):
            export_for("kohya", source, loaded[teacher], tmp_path / "mine", form=Form(merge=True))


def test_merge_leaves_no_adapter(loaded, tmp_path):
    base, source = loaded["sdxl"], student(loaded["sdxl"], tmp_path)
    out = export_for("comfyui", source, base, tmp_path / "mine", form=Form(merge=True))
    assert [path.name for path in out.glob("*/*.safetensors")] == ["mine.safetensors"]
    assert (out / "diffusion_models").is_dir()
    with pytest.raises(ValueError, match="--merge leaves none"):
        export_for("peft", source, base, tmp_path / "peft", form=Form(merge=True))


def test_what_half_precision_cannot_hold_is_refused_and_nothing_is_written(loaded, tmp_path):
    base = loaded["sdxl"]
    denoiser = students.student(base, LORA, 0)
    tiny.perturb(students.trainable_parameters(denoiser), 1, 1e6)
    students.save_student(denoiser, tmp_path / "student", lora_students.description(base))
    with pytest.raises(ValueError, match="is not made of finite numbers in float16"):
        export_for("comfyui", tmp_path / "student", base, tmp_path / "mine", form=Form(dtype=torch.float16))
    assert not (tmp_path / "mine").exists()
    export_for("comfyui", tmp_path / "student", base, tmp_path / "mine", form=Form(dtype=torch.bfloat16))


# ---- a student that predicts x0 ----


@pytest.mark.parametrize("adapter", [LORA, Full()], ids=["lora", "full"])
def test_a_student_that_predicts_x0_is_exported_where_it_can_be_said_and_refused_elsewhere(loaded, tmp_path, adapter):
    base = loaded["sdxl"]
    denoiser = students.student(base, adapter, 0, prediction_type=X0)
    students.save_student(denoiser, tmp_path / "student", lora_students.description(base))
    for form in (Form(), Form(merge=True)):
        with pytest.raises(ValueError, match=r"predicts x0 and its teacher does not.* as epsilon\. Export for comfyui"):
            export_for("kohya", tmp_path / "student", base, tmp_path / "kohya", form=form)
    out = export_for("comfyui", tmp_path / "student", base, tmp_path / "mine")
    for file in (out / "workflows").iterdir():
        nodes = json.loads(file.read_text()).values()
        assert [node["inputs"]["sampling"] for node in nodes if node["class_type"] == "ModelSamplingDiscrete"] == ["x0"]
    assert "Its network predicts x0, where its teacher predicts epsilon" in (out / "README.md").read_text()
    if isinstance(adapter, Lora):
        out = export_for("peft", tmp_path / "student", base, tmp_path / "peft")
        assert json.loads((out / "scheduler" / "scheduler_config.json").read_text())["prediction_type"] == "sample"
    out = export_as(["all"], tmp_path / "student", base, tmp_path / "all")
    expected = {"diffusers", "comfyui"} | ({"peft"} if isinstance(adapter, Lora) else set())
    assert {path.name for path in out.iterdir()} == expected


# ---- families without names elsewhere ----


@pytest.mark.parametrize(
    ("family", "client", "instead"),
    [
        ("kolors", "comfyui", "layers of family kolors, or no model of it: export for diffusers"),
        ("sana", "comfyui", "ComfyUI has no names for the layers of family sana"),
        ("hunyuan_dit", "comfyui", "ComfyUI has no names for the layers of family hunyuan_dit"),
        ("kolors", "kohya", "of family kolors: export for diffusers or peft"),
        ("z_image", "kohya", "of family z_image: export for comfyui, diffusers or peft"),
    ],
)
def test_a_family_without_names_is_refused_with_what_to_export_instead(family, client, instead):
    base = SimpleNamespace(family=family, comfyui=class_of(family).comfyui, kohya_version=None)
    one = SimpleNamespace(folder=Path("missing"), tuned=False)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(students, "combined_lora", lambda student: object())
        with pytest.raises(ValueError, match=re.escape(instead)):
            client_export.refuse(client, one, base, 0.0, Form())


# ---- several formats, and diffusers' in half precision ----


def test_several_formats_are_folders_of_one_and_what_cannot_be_is_said(loaded, tmp_path, capsys):
    base = loaded["sd15"]
    source = student(base, tmp_path, Full())
    out = export_as(["all"], source, base, tmp_path / "mine", form=Form(dtype=torch.float16))
    assert sorted(path.name for path in out.iterdir()) == ["comfyui", "diffusers", "kohya"]
    assert [path.name for path in (out / "comfyui" / "diffusion_models").iterdir()] == ["mine.safetensors"]
    assert 'from_pretrained("mine/diffusers")' in (out / "diffusers" / "README.md").read_text(encoding="utf-8")
    said = capsys.readouterr().out
    assert "--format peft: left out: peft is for adapters, and this student was trained in full" in said
    stock = DiffusionPipeline.from_pretrained(out / "diffusers", torch_dtype=torch.float16)
    expected = students.merged(students.load_student(base, source), torch.float16).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in stock.unet.state_dict().items())
    weights = load_file(next((out / "diffusers" / "unet").glob("*.safetensors")))
    assert {value.dtype for value in weights.values()} == {torch.float16}


def test_all_of_one_format_is_in_the_same_place_as_all_of_several(loaded, tmp_path, monkeypatch):
    base = loaded["sd15"]

    def refuse(client: str, *_: object) -> None:
        raise ValueError(f"{client} reads no such student")

    monkeypatch.setattr(client_export, "refuse", refuse)
    out = export_as(["all"], student(base, tmp_path, Full()), base, tmp_path / "mine")
    assert [path.name for path in out.iterdir()] == ["diffusers"]
    assert (out / "diffusers" / "model_index.json").is_file()


def test_one_that_fails_leaves_nothing_of_several(loaded, tmp_path):
    base = loaded["sd15"]
    with pytest.raises(ValueError, match="trained in full"):
        export_as(["comfyui", "peft"], student(base, tmp_path, Full()), base, tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_one_that_cannot_be_is_refused_before_another_is_written(loaded, tmp_path, monkeypatch):
    written: list[str] = []
    monkeypatch.setattr(client_export, "export", lambda *settings: written.append("diffusers"))
    with pytest.raises(ValueError, match="trained in full"):
        export_as(["diffusers", "peft"], student(loaded["sd15"], tmp_path, Full()), loaded["sd15"], tmp_path / "mine")
    assert written == []


@pytest.mark.slow
def test_a_merged_export_for_diffusers_has_no_adapter(loaded, tmp_path):
    base = loaded["sdxl"]
    source = student(base, tmp_path, conditioned=True)
    out = export_as(["diffusers"], source, base, tmp_path / "mine", form=Form(merge=True))
    assert not list(out.rglob("*lora*"))
    assert all((out / f"steps-{num_steps}" / "unet").is_dir() for num_steps in BUDGETS)
    assert "load_lora_weights" not in (out / "README.md").read_text(encoding="utf-8")
