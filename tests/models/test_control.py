"""Control networks over students: beside stock pipelines at the same times, and what must change nothing."""

import json

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

import composed
import tiny
from composed import PROMPTS, SEED, call, near, student_of
from mlcm_rl.equations.segments import remaining_times
from mlcm_rl.models import control, students
from mlcm_rl.models import teachers as bases
from mlcm_rl.models.composition import Composition
from mlcm_rl.models.grids import SamplingGrid
from mlcm_rl.models.pictures import to_pil
from mlcm_rl.recipe import Lora, Teacher
from tiny_families import CASES


@pytest.fixture(scope="module")
def shown() -> torch.Tensor:
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).round()


def network_of(base, seed=0) -> ControlNetModel:
    """A ControlNet that acts: its zero layers are moved."""
    network = control.new_control_net(base, seed).requires_grad_(False)
    tiny.perturb(list(network.parameters()), seed, 0.1)
    return network


def draw(base, denoiser, controls=(), num_steps=4, **inputs):
    return composed.draw(base, denoiser, num_steps, controls=controls, **inputs)[0]


def stock(base, denoiser, kind, **parts):
    pipe = kind(**DiffusionPipeline.from_pretrained(base.teacher.path).components | parts)
    pipe.unet, pipe.scheduler = denoiser, base.stock_scheduler(1.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_control_net_is_the_stock_pipelines(either, shown):
    denoiser, network = student_of(either), network_of(either)
    kind = StableDiffusionControlNetPipeline if either.family == "sd" else StableDiffusionXLControlNetPipeline
    pipe = stock(either, denoiser, kind, controlnet=network)
    expected = call(pipe, remaining_times(4, 1.0), image=shown, controlnet_conditioning_scale=0.7)
    near(draw(either, denoiser, [(network, shown, 0.7)]), expected)


def test_a_control_net_over_a_picture_is_the_stock_pipelines(sd15, shown):
    denoiser, network = student_of(sd15), network_of(sd15)
    pipe = stock(sd15, denoiser, StableDiffusionControlNetImg2ImgPipeline, controlnet=network)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    encoded = sd15.autoencoder.encode(image).expand(2, -1, -1, -1)
    pipe.scheduler.set_timesteps = lambda *_, **__: None  # this pipeline takes no times
    pipe.scheduler.timesteps = torch.tensor(remaining_times(3, 0.5))
    pipe.scheduler.num_inference_steps = 3
    generator = torch.Generator().manual_seed(SEED)
    expected = pipe(
        PROMPTS, image=encoded, control_image=shown, strength=1.0, num_inference_steps=3, guidance_scale=0.0,
        generator=generator, output_type="latent", controlnet_conditioning_scale=1.0,
    ).images  # fmt: skip
    near(draw(sd15, denoiser, [(network, shown, 1.0)], 3, image=image, strength=0.5), expected)


def test_several_control_nets_add_up(sdxl, shown):
    denoiser, networks = student_of(sdxl), [network_of(sdxl, seed) for seed in (0, 1)]
    pipe = stock(sdxl, denoiser, StableDiffusionXLControlNetPipeline, controlnet=networks)
    expected = call(pipe, remaining_times(4, 1.0), image=[shown, 1 - shown], controlnet_conditioning_scale=[0.5, 1.0])
    near(draw(sdxl, denoiser, [(networks[0], shown, 0.5), (networks[1], 1 - shown, 1.0)]), expected)


def test_a_t2i_adapter_is_the_stock_pipelines(sdxl, shown):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        widths = list(sdxl.denoiser.config.block_out_channels)
        adapter = T2IAdapter(3, widths, num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl")
        adapter.requires_grad_(False)
    denoiser = student_of(sdxl)
    pipe = stock(sdxl, denoiser, StableDiffusionXLAdapterPipeline, adapter=adapter)
    expected = call(pipe, remaining_times(4, 1.0), image=shown, adapter_conditioning_scale=0.8)
    actual = draw(sdxl, denoiser, [(adapter, shown, 0.8)])
    near(actual, expected)
    assert (actual - draw(sdxl, denoiser)).abs().max() > 1e-3


def test_scale_0_and_a_new_control_net_are_the_prompt_alone(sdxl, shown):
    denoiser = student_of(sdxl)
    alone = draw(sdxl, denoiser)
    for network, scale in ((network_of(sdxl), 0.0), (control.new_control_net(sdxl, 0), 1.0)):
        assert torch.equal(draw(sdxl, denoiser, [(network, shown, scale)]), alone)
    assert not torch.allclose(draw(sdxl, denoiser, [(network_of(sdxl), shown, 1.0)]), alone)
    assert torch.equal(draw(sdxl, denoiser), alone)  # nothing stays on the denoiser


def test_a_conditioned_student_follows_too(sdxl, shown):
    """Its target times are no input of the ControlNet, which the teacher was trained with."""
    denoiser = students.student(sdxl, Lora(rank=4, alpha=8.0), 0, condition_on_target=True)
    noise, s = sdxl.noise(torch.Generator().manual_seed(0), 1), torch.tensor([499])
    with control.controlled(denoiser, network_of(sdxl), shown), torch.no_grad():
        told = sdxl.predict(denoiser, noise, torch.tensor([999]), sdxl.encode_prompts(PROMPTS[:1]), s)
    with control.controlled(sdxl.denoiser, network_of(sdxl), shown), torch.no_grad():
        teachers = sdxl.predict(sdxl.denoiser, noise, torch.tensor([999]), sdxl.encode_prompts(PROMPTS[:1]))
    near(told, teachers)  # the projection of a new student's target time is zero


def test_networks_of_other_families_are_refused_by_name(sdxl, tmp_path):
    network_of(sdxl).save_pretrained(tmp_path / "control")
    control.refuse_control(tmp_path / "control", "kolors")
    with pytest.raises(ValueError, match=r"a ControlNetModel, and .*sana takes none: those of sdxl, sd, kolors do"):
        control.refuse_control(tmp_path / "control", "sana")
    sdxl.pipeline.vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="holds a AutoencoderKL: control networks are ControlNetModel, T2IAdapter"):
        control.refuse_control(tmp_path / "vae", "sdxl")
    with pytest.raises(FileNotFoundError, match="holds no network of diffusers"):
        control.refuse_control(tmp_path, "sdxl")
    loaded = control.load_control(sdxl, tmp_path / "control", torch.float32)
    expected = network_of(sdxl).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_networks_that_are_damaged_or_over_another_teacher_are_refused(sdxl, sd15, shown, tmp_path):
    network_of(sdxl).save_pretrained(tmp_path / "whole")
    weights = tmp_path / "whole" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    first = min(tensors)

    def refused(message, changed=tensors, **settings):
        config = json.loads((tmp_path / "whole" / "config.json").read_text()) | settings
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "config.json").write_text(json.dumps(config))
        save_file(changed, tmp_path / "other" / weights.name)
        with pytest.raises(ValueError, match=message):
            control.load_control(sdxl, tmp_path / "other", torch.float32)

    absent = {name: value for name, value in tensors.items() if name != first}
    refused(f"other: 1 tensors are not those of config.json, for example {first}: absent in the files", absent)
    refused(r"for example more: \[1\] in the files, absent by", tensors | {"more": torch.zeros(1)})
    refused(f"{first} is not made of finite numbers", tensors | {first: tensors[first] * torch.nan})
    refused("config.json: it makes no ControlNetModel: TypeError", cross_attention_dim="wide")
    (tmp_path / "other" / weights.name).rename(tmp_path / "other" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="other: its weights are not there as safetensors"):
        control.load_control(sdxl, tmp_path / "other", torch.float32)
    denoiser = student_of(sdxl)
    student = students.Student(denoiser, 1, False, tmp_path)
    alone = draw(sdxl, denoiser)
    control.refuse_unfit(sdxl, student, network_of(sdxl), shown, "--control own")
    with pytest.raises(ValueError, match=r"^--control other: it does not fit the teacher .*sdxl: take one that was"):
        control.refuse_unfit(sdxl, student, network_of(sd15), shown, "--control other")
    assert torch.equal(draw(sdxl, denoiser), alone)  # nothing stays on the denoiser after an error


def ip_adapter(base, folder):
    """Write an IP-Adapter for tiny SDXL with a vision tower of 12 pixels beside it, as they are published."""
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=12, patch_size=4,
        projection_dim=10,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        CLIPVisionModelWithProjection(config).save_pretrained(folder / "image_encoder")
        width = base.denoiser.config.cross_attention_dim
        tensors = {
            "image_proj.proj.weight": torch.randn(4 * width, 10),
            "image_proj.proj.bias": torch.zeros(4 * width),
            "image_proj.norm.weight": torch.ones(width),
            "image_proj.norm.bias": torch.zeros(width),
        }
        layers = [layer for name, layer in base.denoiser.named_modules() if name.endswith("attn2")]
        for i, name in enumerate(name for name in base.denoiser.attn_processors if "attn2" in name):
            layer = base.denoiser.get_submodule(name.removesuffix(".processor"))
            for kind in ("k", "v"):
                tensors[f"ip_adapter.{2 * i + 1}.to_{kind}_ip.weight"] = torch.randn(layer.inner_dim, width) / 8
        assert len(tensors) == 4 + 2 * len(layers)
    save_file(tensors, folder / "ip.safetensors")
    return folder / "ip.safetensors"


def test_an_ip_adapter_is_the_stock_pipelines(teachers, shown, tmp_path):
    base = bases.load(Teacher(path=str(teachers["sdxl"]), family="sdxl"), "cpu")
    file, denoiser = ip_adapter(base, tmp_path), student_of(base)
    alone = draw(base, denoiser)
    vision = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "image_encoder")
    merged = students.merged(students.Student(denoiser, 1, False, tmp_path), torch.float32)
    pipe = stock(base, merged, StableDiffusionXLPipeline, image_encoder=vision, feature_extractor=None)
    pipe.feature_extractor = CLIPImageProcessor(size=12, crop_size=12)
    pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name=file.name)
    pipe.set_ip_adapter_scale(0.6)
    expected = call(pipe, remaining_times(4, 1.0), ip_adapter_image=to_pil(shown[0]))
    control.add_ip_adapter(base, denoiser, file, shown, 0.6)
    actual = draw(base, denoiser)
    near(actual, expected)
    assert (actual - alone).abs().max() > 1e-2
    assert base.pipeline.unet is base.denoiser


def test_ip_adapters_that_cannot_be_read_are_refused(sdxl, shown, tmp_path):
    control.refuse_ip_adapter("kolors")
    with pytest.raises(ValueError, match="family flux takes no IP-Adapter: those of sdxl, sd, kolors do"):
        control.refuse_ip_adapter("flux")
    with pytest.raises(ValueError, match="safetensors files alone"):
        control.add_ip_adapter(sdxl, sdxl.denoiser, tmp_path / "ip-adapter.bin", shown, 1.0)
    save_file({"x": torch.zeros(1)}, tmp_path / "ip.safetensors")
    with pytest.raises(FileNotFoundError, match="put the folder image_encoder beside it"):
        control.add_ip_adapter(sdxl, sdxl.denoiser, tmp_path / "ip.safetensors", shown, 1.0)
    file, denoiser = ip_adapter(sdxl, tmp_path), student_of(sdxl)
    own, tensors = sdxl.pipeline.unet, load_file(file)
    last = max(tensors)
    for changed, message in (
        ({last: tensors[last] * torch.nan}, f"{last} is not made of finite numbers"),
        ({last: tensors[last][:, 1:].contiguous()}, "it is no IP-Adapter, or does not fit the teacher .*sdxl: take"),
    ):
        save_file(tensors | changed, file)
        with pytest.raises(ValueError, match=message):
            control.add_ip_adapter(sdxl, denoiser, file, shown, 1.0)
        assert sdxl.pipeline.unet is own
    vision = tmp_path / "image_encoder" / "model.safetensors"
    save_file(
        {name: value for name, value in load_file(vision).items() if "visual" not in name}, vision, {"format": "pt"}
    )
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"image_encoder: visual_projection.weight are not in its files"):
        control.add_ip_adapter(sdxl, denoiser, file, shown, 1.0)


SD3 = {"num_layers": 2, "num_extra_conditioning_channels": 0}
FLUX = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 10, "num_attention_heads": 3}
TRANSFORMERS = {
    "sd3": (
        SD3ControlNetModel,
        StableDiffusion3ControlNetPipeline,
        {"num_layers": 2, "num_extra_conditioning_channels": 0},
    ),
    "flux": (FluxControlNetModel, FluxControlNetPipeline, FLUX),
}


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_a_control_net_of_a_transformer_is_the_stock_pipelines(family, tmp_path, monkeypatch):
    """Both stock pipelines draw the latents of the control picture; here they are the posterior's mean."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, *_: self.mode())
    kind, pipeline_class, layers = TRANSFORMERS[family]
    case = CASES[family]
    base, stock = case.load(case.write(tmp_path / "teacher")), case.stock(tmp_path / "teacher")
    network = kind.from_transformer(stock.transformer, **layers).eval().requires_grad_(False)
    tiny.perturb(list(network.parameters()), 0, 0.1)
    network.save_pretrained(tmp_path / "control")
    control.refuse_control(tmp_path / "control", family)
    network = control.load_control(base, tmp_path / "control", torch.float32)
    image = torch.rand(1, 3, base.resolution, base.resolution, generator=torch.Generator().manual_seed(0))
    noise, times = case.noise(base), SamplingGrid().times(4)
    composition = Composition(base, base.denoiser, controls=[(network, control.shown(base, network, image), 0.7)])
    actual = composition.sample(base.encode_prompts(list(case.prompts)), noise, times, 0.0)
    pipe = pipeline_class(**stock.components, controlnet=network)
    pipe.scheduler = base.stock_scheduler(0.0)
    pipe.set_progress_bar_config(disable=True)
    settings = base.stock_call(times) | base.stock_guidance | {"height": base.resolution, "width": base.resolution}
    settings |= {"control_image": 2 * image - 1, "controlnet_conditioning_scale": 0.7, "output_type": "latent"}
    expected = pipe(list(case.prompts), latents=case.to_stock(base, noise), **settings).images
    expected = case.from_stock(base, expected)
    near(actual, expected)
    alone = Composition(base, base.denoiser).sample(base.encode_prompts(list(case.prompts)), noise, times, 0.0)
    assert (actual - alone).abs().max() > 1e-2
