"""ComfyUI: its nodes for each family, and workflows that sample a student as our sampler does.

A workflow is in ComfyUI's API format: node number -> class and inputs, where [number, i] is output i of a node. The
window takes the file by drag and drop, the server as a prompt.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from torch import Tensor

from ..equations.axis import NUM_TIMES
from ..equations.schedule import Schedule, scaled_linear_betas, vp_schedule
from ..recipe.families import layout_of

if TYPE_CHECKING:
    from .base import Base
    from .grids import SamplingGrid

SAMPLERS = {1.0: "lcm", 0.0: "euler"}  # that take the same steps, by gamma
SIMPLE = "simple"  # the schedule whose times are every (T / N)-th of T
PREDICTIONS = {"v_prediction": "v_prediction", "sample": "x0"}  # in words of ModelSamplingDiscrete, but for epsilon
LEAST_SIGNAL = 4.8973451890853435e-08  # alpha squared at the last time of a schedule of zero terminal SNR, in ComfyUI
PROMPT = "a red apple"
Link = list[Any]  # number of a node, and which of its outputs


@dataclass(frozen=True)
class Nodes:
    """What ComfyUI has for a family. File names are the usual ones; everyone's own may be called otherwise.

    A family is loaded from a checkpoint of all parts, or part by part, if `autoencoder` is named. `text_type` is the
    `type` of the loader of `text_encoders`. `renamed` are layers of which ComfyUI does not know diffusers' names, with
    the names that it knows.
    """

    text_encoders: tuple[str, ...] = ()
    text_type: str = ""
    autoencoder: str = ""
    latent: str = "EmptyLatentImage"
    shift: str = ""  # the node that sets a flow's shift
    betas: tuple[str, float, float] = ("scaled_linear", 0.00085, 0.012)  # of its one schedule with betas
    knows_sizes: bool = False  # of SDXL's prompts
    reads_adapters: bool = True  # of diffusers, `transformer.<layer>.lora_A.weight`; else kohya's
    reads_denoisers: bool = True  # of diffusers, whole
    renamed: Mapping[str, str] = field(default_factory=dict)


class Graph:
    """A workflow under construction."""

    def __init__(self) -> None:
        self.nodes: dict[str, dict[str, Any]] = {}

    def add(self, kind: str, **inputs: Any) -> Link:
        """Add a node of class `kind`; return its first output."""
        number = str(len(self.nodes) + 1)
        self.nodes[number] = {"class_type": kind, "inputs": inputs}
        return [number, 0]


def other(link: Link, output: int) -> Link:
    """Return another output of the same node."""
    return [link[0], output]


def workflow(
    base: "Base",
    file: str,
    is_lora: bool,
    num_steps: int,
    grid: "SamplingGrid",
    gamma: float,
    prediction_type: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the workflow that samples a student of `base` in `num_steps` steps on `grid`.

    `file` is the student's, a LoRA or a denoiser, by its name in ComfyUI's folder; `prediction_type` is its network's,
    by default the teacher's. Raise ValueError as `refuse` does.
    """
    refuse(base, gamma)
    nodes, graph = nodes_of(base), Graph()
    model, text_encoder, autoencoder = _loaded(base, nodes, graph, "" if is_lora else file)
    if is_lora and base.teacher.lora is not None:  # which may change the text encoders
        model = graph.add(
            "LoraLoader", model=model, clip=text_encoder, lora_name=file, strength_model=1.0, strength_clip=1.0
        )
        text_encoder = other(model, 1)
    elif is_lora:
        model = graph.add("LoraLoaderModelOnly", model=model, lora_name=file, strength_model=1.0)
    times, sampler = grid.times(num_steps), SAMPLERS[gamma]
    simple = is_simple(base, times)
    if kind := PREDICTIONS.get(prediction_type or base.prediction_type):
        model = graph.add("ModelSamplingDiscrete", model=model, sampling=kind, zsnr=_is_rescaled(base))
    elif simple and nodes.shift:
        model = graph.add(nodes.shift, model=model, **_shift(base, nodes))
    positive = _prompt(base, nodes, graph, text_encoder)
    side = base.resolution
    common = {
        "model": model,
        "positive": positive,
        "negative": graph.add("ConditioningZeroOut", conditioning=positive),  # not computed at this scale
        "latent_image": graph.add(nodes.latent, width=side, height=side, batch_size=1),
        "cfg": 1.0,
    }
    if simple:
        settings = {"seed": 0, "steps": num_steps, "sampler_name": sampler, "scheduler": SIMPLE, "denoise": 1.0}
        latents = graph.add("KSampler", **common, **settings)
    else:
        chosen = graph.add("KSamplerSelect", sampler_name=sampler)
        sigmas = graph.add("ManualSigmas", sigmas=", ".join(f"{sigma:.6f}" for sigma in sigmas_of(base, times)))
        latents = graph.add("SamplerCustom", **common, add_noise=True, noise_seed=0, sampler=chosen, sigmas=sigmas)
    images = graph.add("VAEDecode", samples=latents, vae=autoencoder)
    graph.add("SaveImage", images=images, filename_prefix=file.removesuffix(".safetensors"))
    return graph.nodes


def nodes_of(base: "Base") -> Nodes:
    """Return what ComfyUI has for the family of `base`. Raise ValueError if that is nothing."""
    if base.comfyui is None:
        raise ValueError(
            f"ComfyUI has no names for the layers of family {base.family}, or no model of it: export for diffusers"
        )
    return base.comfyui


def refuse(base: "Base", gamma: float) -> None:
    """Raise ValueError for a family, a schedule or a gamma that ComfyUI does not have."""
    nodes = nodes_of(base)
    if gamma not in SAMPLERS:
        raise ValueError(
            f"gamma {gamma:g}: no sampler of ComfyUI puts back a share of the noise as ours does: export for "
            "diffusers, or a student that was tuned under gamma 0 or 1"
        )
    if layout_of(base.family).is_flow:
        return
    form, start, end = nodes.betas
    linear = torch.linspace(start, end, NUM_TIMES, dtype=torch.float64)
    betas = scaled_linear_betas(NUM_TIMES, start, end) if form == "scaled_linear" else linear
    own = vp_schedule(rescale_zero_terminal_snr(betas) if _is_rescaled(base) else betas)
    if not torch.allclose(sigmas_in(base.schedule), sigmas_in(own), rtol=1e-3):
        raise ValueError(
            f"the schedule of teacher {base.teacher.path} is another one than ComfyUI has for models of family "
            f"{base.family} ({form} betas from {start:g} to {end:g}): export for diffusers"
        )


def is_multiple(times: list[int]) -> bool:
    """Return whether `times` are every (T / N)-th of T, counted from the noisiest."""
    spacing = NUM_TIMES / len(times)
    return times == [NUM_TIMES - 1 - int(i * spacing) for i in range(len(times))]


def is_simple(base: "Base", times: list[int]) -> bool:
    """Return whether ComfyUI's schedule `simple` visits `times`, in numbers that its window can hold."""
    return is_multiple(times) and all(
        math.isclose(number, round(number, 2), rel_tol=1e-6) for number in _shift(base, nodes_of(base)).values()
    )


def sigmas_in(schedule: Schedule) -> Tensor:
    """Return ComfyUI's sigmas (T,) of a schedule with betas: noise over signal, finite where there is no signal."""
    signal = schedule.alpha.double().cpu().square().clamp(min=LEAST_SIGNAL)
    return (1.0 / signal - 1.0).sqrt()


def sigmas_of(base: "Base", times: list[int]) -> list[float]:
    """Return ComfyUI's sigmas of `times`, and 0 at the end."""
    schedule = base.schedule
    table = schedule.sigma.double().cpu() if layout_of(base.family).is_flow else sigmas_in(schedule)
    return [*table[times].tolist(), 0.0]


def _loaded(base: "Base", nodes: Nodes, graph: Graph, denoiser: str) -> tuple[Link, Link, Link]:
    """Add the loaders; return model, text encoder and autoencoder. `denoiser` takes the place of the teacher's."""
    teacher = f"{base.teacher.path.rstrip('/').rpartition('/')[2]}.safetensors"
    if nodes.autoencoder:
        model = graph.add("UNETLoader", unet_name=denoiser or teacher, weight_dtype="default")
        autoencoder = graph.add("VAELoader", vae_name=nodes.autoencoder)
    else:
        model = graph.add("CheckpointLoaderSimple", ckpt_name=teacher)
        text_encoder, autoencoder = other(model, 1), other(model, 2)
        if denoiser:
            model = graph.add("UNETLoader", unet_name=denoiser, weight_dtype="default")
    absent = {name for name, part in base.pipeline.components.items() if part is None and name.startswith("text_enc")}
    files = nodes.text_encoders[: len(nodes.text_encoders) - len(absent)]
    if len(files) == 1:
        text_encoder = graph.add("CLIPLoader", clip_name=files[0], type=nodes.text_type)
    elif files:
        kind = {2: "DualCLIPLoader", 3: "TripleCLIPLoader"}[len(files)]
        named = {f"clip_name{i}": file for i, file in enumerate(files, 1)}
        text_encoder = graph.add(kind, **named, **({"type": nodes.text_type} if len(files) == 2 else {}))
    return model, text_encoder, autoencoder


def _is_rescaled(base: "Base") -> bool:
    """Return whether the teacher's betas are rescaled to zero terminal SNR."""
    return bool(base.pipeline.scheduler.config.get("rescale_betas_zero_snr"))


def _shift(base: "Base", nodes: Nodes) -> dict[str, float]:
    """Return the shift in the words of its node; nothing for a schedule with betas."""
    if not nodes.shift:
        return {}
    shift = base.schedule_record()["shift"]
    if nodes.shift != "ModelSamplingFlux":
        return {"shift": round(shift, 6)}
    mu = round(math.log(shift), 6)  # at every size: the line between the two is flat
    return {"max_shift": mu, "base_shift": mu, "width": base.resolution, "height": base.resolution}


def _prompt(base: "Base", nodes: Nodes, graph: Graph, text_encoder: Link) -> Link:
    """Add the prompt; return its conditioning."""
    if nodes.knows_sizes:
        side = base.resolution
        sizes = {"width": side, "height": side, "crop_w": 0, "crop_h": 0, "target_width": side, "target_height": side}
        return graph.add("CLIPTextEncodeSDXL", clip=text_encoder, **sizes, text_g=PROMPT, text_l=PROMPT)
    encoded = graph.add("CLIPTextEncode", clip=text_encoder, text=PROMPT)
    if layout_of(base.family).embeds_guidance:
        return graph.add("FluxGuidance", conditioning=encoded, guidance=base.teacher.guidance_scale)
    return encoded
