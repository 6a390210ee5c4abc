"""Control networks (ControlNet, T2I-Adapter) and IP-Adapters over a student, for sampling: hooks on its denoiser.

A control network sees what the denoiser is given at each step, and a picture (edges, depth, a pose); what it returns is
added inside the denoiser. None was made for students: they follow one because their weights are near the teacher's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ControlNetModel, ModelMixin
from diffusers.models.embeddings import ImageProjection
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from ..recipe.control import CONTROLLED
from ..recipe.families import layout_of, of_denoiser
from ..storage import finite
from ..storage.files import read_json
from ..storage.tensors import TensorFile
from ..storage.untrusted import first_few, in_a_line
from . import files
from .base import Base
from .packing import as_tokens, patchified
from .pictures import to_pil
from .students import Student

# diffusers' class of a control network: the denoiser's class that it is for
DENOISERS = {
    "ControlNetModel": CONTROLLED,
    "T2IAdapter": CONTROLLED,
    "SD3ControlNetModel": "SD3Transformer2DModel",
    "FluxControlNetModel": "FluxTransformer2DModel",
}
WIDTHS = (16, 32, 96, 256)  # of a ControlNet's layers over its picture, each of which halves it but for the last
Arguments = dict[str, Any]  # of a denoiser's forward, by name


def refuse_control(folder: Path, family: str) -> None:
    """Raise ValueError unless `folder` holds a control network for denoisers of `family`."""
    kind = _kind(folder)
    if kind not in DENOISERS:
        raise ValueError(f"{folder} holds a {kind}: control networks are {', '.join(DENOISERS)}")
    if layout_of(family).denoiser_class != DENOISERS[kind]:
        raise ValueError(
            f"{folder} is a {kind}, and a teacher of family {family} takes none: those of "
            f"{', '.join(of_denoiser(DENOISERS[kind]))} do"
        )


def refuse_ip_adapter(family: str) -> None:
    """Raise ValueError unless a teacher of `family` takes an IP-Adapter here."""
    if family not in (able := of_denoiser(CONTROLLED)):
        raise ValueError(f"a teacher of family {family} takes no IP-Adapter: those of {', '.join(able)} do")


def new_control_net(base: Base, seed: int) -> ControlNetModel:
    """Return a ControlNet for the teacher in float32, which changes nothing yet (arXiv 2302.05543, section 3.1).

    It is a copy of the encoding half of the teacher's denoiser; the layers over the picture are drawn from `seed`.
    Raise ValueError for an autoencoder whose latents are not of 1, 2, 4 or 8 pixels.
    """
    downscale = base.geometry.downscale
    if downscale not in (1, 2, 4, 8):
        raise ValueError(
            f"teacher {base.teacher.path}: a latent of {downscale} pixels is not one that a ControlNet has"
        )
    widths = WIDTHS[: downscale.bit_length()]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = ControlNetModel.from_unet(base.denoiser, conditioning_embedding_out_channels=widths)
    if network.encoder_hid_proj is not None:
        network.encoder_hid_proj.load_state_dict(base.denoiser.encoder_hid_proj.state_dict())
    return nn.Module.to(network, base.device, torch.float32)  # diffusers' own `to` warns without reason


@contextmanager
def controlled(denoiser: nn.Module, network: nn.Module, images: Tensor, scale: float = 1.0) -> Iterator[None]:
    """Let a control network act on every pass of `denoiser` inside: on `images` (B, 3, H', W') in [0, 1], as `shown`.

    One picture serves a batch of any size. `scale` multiplies what the network adds, as `controlnet_conditioning_scale`
    of stock pipelines; several networks add up.
    """
    add = _in_own_precision(network, HOOKS[type(network).__name__](network, images, scale))
    hook = denoiser.register_forward_pre_hook(partial(_add, add), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def load_control(base: Base, folder: Path, precision: torch.dtype) -> ModelMixin:
    """Load the control network in `folder`, frozen, in `precision`, on the device of `base`.

    Raise CheckpointError for a damaged file; ValueError for weights that are not those of config.json or not finite,
    and for a network whose class has inputs that no picture gives.
    """
    kind = getattr(diffusers, _kind(folder))
    refuse_other_weights(folder, kind)
    network = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=precision)
    if getattr(network, "union", False) or network.config.get("extra_conditioning_channels"):
        raise ValueError(f"{folder}: it takes a mode, or a mask, beside a picture: take a network for pictures alone")
    if network.config.get("use_pos_embed") is False:  # it has the transformer's, as in the stock pipeline
        network.pos_embed = network._get_pos_embed_from_transformer(base.denoiser).to(precision)
    if (bad := finite.first_nonfinite(dict(network.named_parameters()))) is not None:
        raise ValueError(f"{folder}: {bad} is not made of finite numbers in {precision}: fetch its weights again")
    return network.to(base.device).requires_grad_(False).eval()


def refuse_other_weights(folder: Path, kind: type[ModelMixin]) -> None:
    """Raise ValueError unless the safetensors files in `folder` hold what a network of `kind` is made of.

    diffusers draws missing weights anew and leaves others aside.
    """
    shapes = files.shapes(folder)
    if not shapes:
        raise ValueError(f"{folder}: its weights are not there as safetensors, and are read from no other format")
    try:
        with torch.device("meta"):
            expected = {name: list(value.shape) for name, value in files.empty(folder, kind).state_dict().items()}
    except Exception as error:  # of diffusers, for settings that make no network
        raise ValueError(f"{folder / 'config.json'}: it makes no {kind.__name__}: {in_a_line(error)}") from error
    if odd := sorted(name for name in shapes | expected if shapes.get(name) != expected.get(name)):
        raise ValueError(
            f"{folder}: {len(odd)} tensors are not those of config.json, for example {odd[0]}: "
            f"{shapes.get(odd[0], 'absent')} in the files, {expected.get(odd[0], 'absent')} by the configuration"
        )


@torch.no_grad()
def refuse_unfit(base: Base, student: Student, network: ModelMixin, images: Tensor, where: str) -> None:
    """Raise ValueError, which begins with `where`, if a pass of the student under the network on `images` fails.

    Networks of one class are for several teachers, and only their shapes tell them apart.
    """
    t = torch.full((1,), base.schedule.num_times - 1, device=base.device)
    noise = base.noise([torch.Generator().manual_seed(0)], 1)
    try:
        with controlled(student.denoiser, network, images):
            s = torch.zeros_like(t) if student.conditioned else None
            base.predict(student.denoiser, noise, t, base.encode_prompts([""]), s)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: it does not fit the teacher {base.teacher.path}: take one that was made for its family, and a "
            f"resolution that it has ({in_a_line(error)})"
        ) from error


@torch.no_grad()
def shown(base: Base, network: ModelMixin, images: Tensor) -> Tensor:
    """Return `images` (B, 3, H', W') in [0, 1] as `controlled` takes them: as latents for transformers.

    As in the stock pipelines, SD3's without pooled text has latents without the autoencoder's shift, and FLUX's with
    layers over the picture has the picture in [-1, 1].
    """
    kind = type(network).__name__
    if kind == "SD3ControlNetModel":
        latents = base.autoencoder.encode(images)
        settings = base.pipeline.vae.config
        return (
            latents + settings.shift_factor * settings.scaling_factor * network.config.force_zeros_for_pooled_projection
        )
    if kind == "FluxControlNetModel":
        if network.input_hint_block is not None:
            return 2 * images - 1
        return as_tokens(patchified(base.autoencoder.encode(images), base.geometry.multiple))
    return images


@torch.no_grad()
def add_ip_adapter(base: Base, denoiser: ModelMixin, file: Path, image: Tensor, scale: float) -> None:
    """Let `denoiser` attend to `image` (1, 3, H', W') in [0, 1] too from now on, by the IP-Adapter in `file`.

    Its image encoder is in the folder `image_encoder` beside the file or one above, as adapters are published.
    Raise FileNotFoundError without it, ValueError for a file that is not in safetensors, for weights that are missing
    or not finite, and for an adapter over another teacher.
    """
    if file.suffix != ".safetensors":
        raise ValueError(f"{file}: adapters are read from safetensors files alone; take that one of its folder")
    if (bad := finite.first_nonfinite(TensorFile(file))) is not None:
        raise ValueError(f"{file}: {bad} is not made of finite numbers: fetch it again")
    encoder = next((one for one in (file.parent, file.parent.parent) if (one / "image_encoder").is_dir()), None)
    if encoder is None:
        raise FileNotFoundError(f"{file}: its image encoder is missing: put the folder image_encoder beside it")
    vision, notes = CLIPVisionModelWithProjection.from_pretrained(
        encoder / "image_encoder",
        local_files_only=True,
        use_safetensors=True,
        dtype=base.dtype,
        output_loading_info=True,
    )
    if missing := sorted(notes["missing_keys"]):  # transformers draws them anew
        raise ValueError(f"{encoder / 'image_encoder'}: {first_few(missing)} are not in its files: fetch them again")
    side, pipeline = vision.config.image_size, base.pipeline
    pipeline.register_modules(
        image_encoder=vision.to(base.device).eval(), feature_extractor=CLIPImageProcessor(size=side, crop_size=side)
    )
    own = {name: value.data for name, value in denoiser.named_parameters()}
    teacher, pipeline.unet = pipeline.unet, denoiser
    try:
        pipeline.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name, local_files_only=True)
        pipeline.set_ip_adapter_scale(scale)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of diffusers, for tensors of another layout or over another teacher
        raise ValueError(
            f"{file}: it is no IP-Adapter, or does not fit the teacher {base.teacher.path}: take one that was made for "
            f"its family ({in_a_line(error)})"
        ) from error
    finally:
        pipeline.unet = teacher
    for name, value in denoiser.named_parameters():
        value.data = own.get(name, value.data)  # diffusers casts all to one precision, that of the frozen weights
    takes_states = not isinstance(denoiser.encoder_hid_proj.image_projection_layers[0], ImageProjection)  # "plus"
    embedded, _ = pipeline.encode_image(to_pil(image[0]), base.device, 1, takes_states)

    def add(given: Arguments) -> Arguments:
        rows = embedded[:, None].expand(len(given["sample"]), *[-1] * embedded.ndim).to(given["sample"].dtype)
        return {"added_cond_kwargs": {**(given.get("added_cond_kwargs") or {}), "image_embeds": [rows]}}

    denoiser.register_forward_pre_hook(partial(_add, add), with_kwargs=True)


def _control_net(network: ModelMixin, images: Tensor, scale: float) -> Callable[[Arguments], Arguments]:
    def add(given: Arguments) -> Arguments:
        context = given["encoder_hidden_states"]
        down, mid = network(
            given["sample"],
            given["timestep"],
            encoder_hidden_states=context if network.encoder_hid_proj is None else network.encoder_hid_proj(context),
            controlnet_cond=images.to(given["sample"].dtype).expand(len(given["sample"]), -1, -1, -1),
            conditioning_scale=scale,
            added_cond_kwargs=given.get("added_cond_kwargs"),
            return_dict=False,
        )
        return {
            "down_block_additional_residuals": _sum(given.get("down_block_additional_residuals"), down),
            "mid_block_additional_residual": _sum([given.get("mid_block_additional_residual", 0.0)], [mid])[0],
        }

    return add


def _t2i_adapter(network: ModelMixin, images: Tensor, scale: float) -> Callable[[Arguments], Arguments]:
    is_grey = network.config.in_channels == 1
    states = [
        scale * state for state in network((images.mean(dim=1, keepdim=True) if is_grey else images).to(network.dtype))
    ]

    def add(given: Arguments) -> Arguments:
        own = [state.expand(len(given["sample"]), -1, -1, -1) for state in states]
        return {"down_intrablock_additional_residuals": _sum(given.get("down_intrablock_additional_residuals"), own)}

    return add


def _sd3_control_net(network: ModelMixin, latents: Tensor, scale: float) -> Callable[[Arguments], Arguments]:
    def add(given: Arguments) -> Arguments:
        states, pooled, t = (given[name] for name in ("hidden_states", "pooled_projections", "timestep"))
        (blocks,) = network(
            hidden_states=states if network.config.use_pos_embed else network.pos_embed(states),
            controlnet_cond=latents.to(states.dtype).expand(len(states), -1, -1, -1),
            conditioning_scale=scale,
            encoder_hidden_states=given["encoder_hidden_states"] if network.context_embedder is not None else None,
            pooled_projections=torch.zeros_like(pooled) if network.config.force_zeros_for_pooled_projection else pooled,
            timestep=t if t.ndim == 1 else t[:, 0],  # without a conditioned student's target times
            return_dict=False,
        )
        name = "block_controlnet_hidden_states"
        return {name: _sum(given.get(name), blocks)}

    return add


def _flux_control_net(network: ModelMixin, tokens: Tensor, scale: float) -> Callable[[Arguments], Arguments]:
    width = network.config.pooled_projection_dim

    def add(given: Arguments) -> Arguments:
        states = given["hidden_states"]
        of_both, of_one = network(
            hidden_states=states,
            controlnet_cond=tokens.to(states.dtype).expand(len(states), *[-1] * (tokens.ndim - 1)),
            conditioning_scale=scale,
            encoder_hidden_states=given["encoder_hidden_states"],
            pooled_projections=given["pooled_projections"][:, :width],  # without a conditioned student's target times
            timestep=given["timestep"],
            img_ids=given["img_ids"],
            txt_ids=given["txt_ids"],
            guidance=given["guidance"] if network.config.guidance_embeds else None,
            return_dict=False,
        )
        added = {"controlnet_block_samples": of_both, "controlnet_single_block_samples": of_one}
        summed = {name: _sum(given.get(name), own) for name, own in added.items() if own is not None}
        return summed | {"controlnet_blocks_repeat": network.input_hint_block is not None}

    return add


HOOKS: Mapping[str, Callable[[ModelMixin, Tensor, float], Callable[[Arguments], Arguments]]] = {
    "ControlNetModel": _control_net,
    "T2IAdapter": _t2i_adapter,
    "SD3ControlNetModel": _sd3_control_net,
    "FluxControlNetModel": _flux_control_net,
}


def _in_own_precision(network: nn.Module, add: Callable[[Arguments], Arguments]) -> Callable[[Arguments], Arguments]:
    """Return `add` for a denoiser in another precision than `network`, as one in training is, outside autocast."""
    first = next(network.parameters())
    own, device = first.dtype, first.device.type

    def cast(given: Arguments) -> Arguments:
        dtype = next(given[name].dtype for name in ("sample", "hidden_states") if name in given)
        if dtype == own or device == "meta" or torch.is_autocast_enabled(device):
            return add(given)
        return _floats_in(dtype, add(_floats_in(own, given)))

    return cast


def _floats_in(dtype: torch.dtype, given: Any) -> Any:
    return tree_map_only(Tensor, lambda one: one.to(dtype) if one.is_floating_point() else one, given)


def _add(
    add: Callable[[Arguments], Arguments], denoiser: ModelMixin, args: tuple, kwargs: Arguments
) -> tuple[tuple, Arguments]:
    """Return a denoiser's arguments with what `add` makes of them; those of position are a UNet's sample and time."""
    given = {**dict(zip(("sample", "timestep"), args, strict=False)), **kwargs}
    return args, kwargs | add(given)


def _sum(before: Sequence[Any] | None, own: Sequence[Tensor]) -> list[Tensor]:
    """Return what several control networks add together."""
    return list(own) if before is None else [one + other for one, other in zip(before, own, strict=True)]


def _kind(folder: Path) -> str:
    """Return diffusers' class of the network in `folder`. Raise FileNotFoundError if there is none."""
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no network of diffusers: no config.json")
    return read_json(file, _class_name=str)["_class_name"]
