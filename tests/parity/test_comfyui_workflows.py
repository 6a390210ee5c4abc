"""ComfyUI workflows of exports: every node against its definition, and the sampling that they ask for beside ours.

`comfyui_nodes.json` has the required inputs and the outputs of the nodes, from ComfyUI's sources (0.3.75, of 2026 for
`ManualSigmas`; `test_older_clients` compares them). The samplers and the schedule `simple` are stated anew here, from
the same sources.
"""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny
from mlcm_rl.equations.prediction import X0
from mlcm_rl.equations.segments import sampling_times
from mlcm_rl.models import comfyui, sampler, students
from mlcm_rl.models.base import Base
from mlcm_rl.models.client_export import export_for
from mlcm_rl.models.comfyui import workflow
from mlcm_rl.models.grids import SamplingGrid
from mlcm_rl.models.teachers import load
from mlcm_rl.recipe import Lora, Teacher
from mlcm_rl.recipe.families import layout_of
from tiny_families import CASES

NODES = json.loads(Path(__file__).with_name("comfyui_nodes.json").read_text(encoding="utf-8"))
VALUES = {"FILE": str, "STRING": str, "INT": int, "FLOAT": (int, float), "BOOLEAN": bool}
OTHERS = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("flux2_klein", "qwen_image", "z_image", "pixart_sigma")
]


def assert_valid(graph: dict) -> None:
    """Every node is known, has its inputs and no other, of the right types, and all but the last are used."""
    used = set()
    for number, node in graph.items():
        definition = NODES[node["class_type"]]
        assert node["inputs"].keys() == definition["inputs"].keys(), node["class_type"]
        for name, kind in definition["inputs"].items():
            value = node["inputs"][name]
            if isinstance(kind, list):
                assert value in kind, (name, value)
            elif kind in VALUES:
                assert isinstance(value, VALUES[kind]), (name, value)
                assert not isinstance(value, bool) or kind == "BOOLEAN"
            else:
                source, output = value
                assert int(source) < int(number)
                assert NODES[graph[source]["class_type"]]["outputs"][output] == kind, (name, value)
                used.add(source)
    assert set(graph) - used == {number for number, node in graph.items() if node["class_type"] == "SaveImage"}


def find(graph: dict, kind: str) -> dict:
    """The inputs of the one node of class `kind`."""
    (node,) = [node["inputs"] for node in graph.values() if node["class_type"] == kind]
    return node


def kinds(graph: dict) -> set[str]:
    return {node["class_type"] for node in graph.values()}


# ---- sampling, as ComfyUI does it ----


def own_sigmas(graph: dict, base: Base) -> Tensor:
    """The table of sigmas of ComfyUI's model: of its betas, or of a shifted flow."""
    if not layout_of(base.family).is_flow:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        signal = (1.0 - betas).cumprod(0)
        return ((1.0 - signal) / signal).sqrt()
    u = torch.arange(1, 1001, dtype=torch.float64) / 1000
    shifts = [node["inputs"] for node in graph.values() if node["class_type"].startswith("ModelSampling")]
    shift = shifts[0].get("shift") if shifts else None
    shift = shift or math.exp(shifts[0]["max_shift"] if shifts else 1.15)
    return shift * u / (1 + (shift - 1) * u)


def asked_sigmas(graph: dict, table: Tensor) -> tuple[list[float], str]:
    """The sigmas that a workflow goes through, and its sampler."""
    if "KSampler" in kinds(graph):
        node = find(graph, "KSampler")
        steps = node["steps"]
        return [float(table[-(1 + int(i * len(table) / steps))]) for i in range(steps)] + [0.0], node["sampler_name"]
    text = find(graph, "ManualSigmas")["sigmas"]
    return [float(one) for one in re.findall(r"[-+]?(?:\d*\.*\d+)", text)], find(graph, "KSamplerSelect")[
        "sampler_name"
    ]


@torch.no_grad()
def drawn(base: Base, denoiser, conditioning, noise: Tensor, graph: dict, generator: torch.Generator) -> Tensor:
    """The latents of a workflow over `denoiser`, from `noise`."""
    table = own_sigmas(graph, base)
    sigmas, name = asked_sigmas(graph, table)
    is_flow = layout_of(base.family).is_flow
    sampling = find(graph, "ModelSamplingDiscrete")["sampling"] if "ModelSamplingDiscrete" in kinds(graph) else "eps"
    assert math.isclose(sigmas[0], float(table[-1]), rel_tol=1e-5)  # or the noise would be scaled as in the middle
    x = noise * (1.0 if is_flow else math.sqrt(1.0 + sigmas[0] ** 2))
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        if is_flow:
            t = int((base.schedule.sigma.double() - sigma).abs().argmin())
            x0 = x - sigma * base.predict(denoiser, x, torch.full((len(x),), t), conditioning)
        else:
            t = int((table.log() - math.log(sigma)).abs().argmin())
            scale = math.sqrt(sigma**2 + 1.0)
            out = base.predict(denoiser, x / scale, torch.full((len(x),), t), conditioning)
            x0 = {"eps": x - sigma * out, "v_prediction": x / scale**2 - out * sigma / scale, "x0": out}[sampling]
        if name == "euler":
            x = x + (x - x0) / sigma * (following - sigma)
        else:
            x = x0
            if following > 0:
                fresh = base.noise(generator, len(noise))
                x = following * fresh + (1.0 - following if is_flow else 1.0) * x0
    return x


class Bases(dict):
    """Loaded teachers by name; a family's is made when it is first asked for."""

    def __init__(self, loaded: dict[str, Base], root: Path):
        super().__init__(loaded)
        self.root = root

    def __missing__(self, family: str) -> Base:
        self[family] = CASES[family].load(CASES[family].write(self.root / family))
        return self[family]


@pytest.fixture(scope="module")
def bases(loaded, tmp_path_factory) -> Bases:
    return Bases(loaded, tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize(("gamma", "steps"), [(0.0, (3, 4)), (1.0, (2, 5))])
@pytest.mark.parametrize("teacher", ["sdxl", "sd21", "sd3", "flux"])
def test_a_workflow_draws_what_our_sampler_draws(teacher, gamma, steps, bases):
    base = bases[teacher]
    denoiser = students.student(base, Lora(rank=4, alpha=8.0), 0)
    tiny.perturb(students.trainable_parameters(denoiser), 1, 0.05)
    conditioning, noise = base.encode_prompts(["a red apple"]), base.noise(torch.Generator().manual_seed(3), 1)
    for num_steps in steps:
        graph = workflow(base, "mine.safetensors", True, num_steps, SamplingGrid(), gamma)
        times = sampling_times(num_steps)
        ours = sampler.sample(base, denoiser, conditioning, noise, times, gamma, torch.Generator().manual_seed(7))
        found = drawn(base, denoiser, conditioning, noise, graph, torch.Generator().manual_seed(7))
        assert (found - ours).norm() < 2e-5 * ours.norm(), (teacher, num_steps)
        assert ("KSampler" in kinds(graph)) == (num_steps in (2, 4) and teacher != "flux")


@pytest.mark.parametrize(("gamma", "steps"), [(0.0, (1, 3)), (1.0, (1, 2))])
@pytest.mark.parametrize("teacher", ["sdxl", "sd21"])
def test_the_workflow_of_a_student_that_predicts_x0_says_so_and_draws_what_our_sampler_draws(
    teacher, gamma, steps, bases
):
    base = bases[teacher]
    denoiser = students.student(base, Lora(rank=4, alpha=8.0), 0, prediction_type=X0)
    tiny.perturb(students.trainable_parameters(denoiser), 1, 0.05)
    conditioning, noise = base.encode_prompts(["a red apple"]), base.noise(torch.Generator().manual_seed(3), 1)
    for num_steps in steps:
        graph = workflow(base, "mine.safetensors", True, num_steps, SamplingGrid(), gamma, X0)
        assert_valid(graph)
        assert find(graph, "ModelSamplingDiscrete")["sampling"] == "x0"
        times = sampling_times(num_steps)
        ours = sampler.sample(base, denoiser, conditioning, noise, times, gamma, torch.Generator().manual_seed(7))
        found = drawn(base, denoiser, conditioning, noise, graph, torch.Generator().manual_seed(7))
        assert (found - ours).norm() < 2e-5 * ours.norm()


def test_the_grid_of_several_segments_is_the_students_own(bases):
    """Three steps of two segments end on their boundary, which `simple` does not visit."""
    graph = workflow(bases["sdxl"], "mine.safetensors", True, 3, SamplingGrid(num_segments=2), 0.0)
    sigmas, _ = asked_sigmas(graph, own_sigmas(graph, bases["sdxl"]))
    table = comfyui.sigmas_in(bases["sdxl"].schedule)
    assert sigmas == pytest.approx([*table[[999, 749, 499]].tolist(), 0.0], rel=1e-6)
    assert "e" not in find(graph, "ManualSigmas")["sigmas"]  # the node reads no exponents


# ---- nodes ----


@pytest.mark.parametrize("teacher", ["sdxl", "sd15", "sd21", "sd3", "flux", *OTHERS])
@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "whole"])
def test_every_node_has_the_inputs_of_its_definition(teacher, is_lora, bases):
    base = bases[teacher]
    for num_steps in range(1, 9):
        graph = workflow(base, "mine.safetensors", is_lora, num_steps, SamplingGrid(), 0.0)
        assert_valid(graph)
        loader, name = ("LoraLoaderModelOnly", "lora_name") if is_lora else ("UNETLoader", "unet_name")
        assert find(graph, loader)[name] == "mine.safetensors"
        sampling = find(graph, "KSampler" if "KSampler" in kinds(graph) else "SamplerCustom")
        assert sampling["cfg"] == 1.0
        latent = next(node["inputs"] for node in graph.values() if node["class_type"].startswith("Empty"))
        assert (latent["width"], latent["height"]) == (base.resolution, base.resolution)


def test_sdxls_prompt_has_the_size_of_the_picture_and_fluxs_the_guidance(bases):
    sizes = find(workflow(bases["sdxl"], "m", True, 4, SamplingGrid(), 1.0), "CLIPTextEncodeSDXL")
    side = bases["sdxl"].resolution
    assert {sizes[name] for name in ("width", "height", "target_width", "target_height")} == {side}
    assert (sizes["crop_w"], sizes["crop_h"]) == (0, 0)
    assert find(workflow(bases["flux"], "m", True, 4, SamplingGrid(), 0.0), "FluxGuidance")["guidance"] == 5.0
    assert (
        find(workflow(bases["sd21"], "m", True, 4, SamplingGrid(), 1.0), "ModelSamplingDiscrete")["sampling"]
        == "v_prediction"
    )


def test_a_name_with_dots_spaces_and_characters_is_that_of_the_pictures_too(bases):
    graph = comfyui.workflow(bases["sdxl"], "红 苹果.v1.2.safetensors", True, 4, SamplingGrid(), 1.0)
    assert find(graph, "LoraLoaderModelOnly")["lora_name"] == "红 苹果.v1.2.safetensors"
    assert find(graph, "SaveImage")["filename_prefix"] == "红 苹果.v1.2"


def test_a_teacher_without_t5_names_two_text_encoders(tmp_path):
    base = load(Teacher(path=str(tiny.sd3(tmp_path / "sd3", with_t5=False)), family="sd3"), "cpu")
    graph = workflow(base, "m", True, 4, SamplingGrid(), 1.0)
    assert_valid(graph)
    assert find(graph, "DualCLIPLoader")["clip_name2"] == "clip_g.safetensors"


def test_a_lora_of_the_teacher_goes_to_the_text_encoders_too(bases):
    base = bases["sdxl"]
    teacher, base.teacher = base.teacher, base.teacher.model_copy(update={"lora": "style.safetensors"})
    try:
        graph = workflow(base, "m", True, 4, SamplingGrid(), 1.0)
    finally:
        base.teacher = teacher
    assert_valid(graph)
    assert find(graph, "LoraLoader")["strength_clip"] == 1.0
    number = next(number for number, node in graph.items() if node["class_type"] == "LoraLoader")
    assert find(graph, "CLIPTextEncodeSDXL")["clip"] == [number, 1]


# ---- refused ----


def test_a_gamma_between_and_another_schedule_are_refused(bases, tmp_path):
    with pytest.raises(ValueError, match=r"gamma 0\.3: no sampler of ComfyUI puts back a share of the noise"):
        workflow(bases["sdxl"], "m", True, 4, SamplingGrid(), 0.3)
    folder = tiny.sd(tmp_path / "other")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_schedule": "linear"}))
    base = load(Teacher(path=str(folder), family="sd"), "cpu")
    with pytest.raises(ValueError, match="is another one than ComfyUI has for models of family sd"):
        workflow(base, "m", True, 4, SamplingGrid(), 1.0)


def test_an_export_has_a_workflow_for_each_number_of_steps_and_its_card_says_the_same(bases, tmp_path):
    base = bases["sdxl"]
    denoiser = students.student(base, Lora(rank=4, alpha=8.0), 0, condition_on_target=True)
    description = {"num_segments": 1, "budgets": [2, 3], **students.expected_of(base)}
    students.save_student(denoiser, tmp_path / "student", description)
    out = export_for("comfyui", tmp_path / "student", base, tmp_path / "mine")
    assert sorted(path.name for path in (out / "loras").iterdir()) == [
        "mine-2-steps.safetensors",
        "mine-3-steps.safetensors",
    ]
    card = (out / "README.md").read_text(encoding="utf-8")
    for num_steps in (2, 3):
        graph = json.loads((out / "workflows" / f"mine-{num_steps}-steps.json").read_text(encoding="utf-8"))
        assert_valid(graph)
        assert find(graph, "LoraLoaderModelOnly")["lora_name"] == f"mine-{num_steps}-steps.safetensors"
        assert (
            f"| `mine-{num_steps}-steps.json` | `mine-{num_steps}-steps.safetensors` | {num_steps} | `euler` |" in card
        )
    assert "| `simple` |" in card
    assert "ManualSigmas" in card
    assert "tags:\n- stable-diffusion-xl\n- consistency-distillation\n- few-step\n- comfyui\n- lora\n" in card
    assert str(tmp_path) not in card
