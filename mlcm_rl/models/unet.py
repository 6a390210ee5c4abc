"""Base of the UNet families, Stable Diffusion and SDXL."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from .base import TARGET_TIME_WIDTH, precision_of
from .client_keys import kohya_names
from .conditioning import Conditioning
from .cross_attention import prompts_attended_once
from .vp import VPBase

# The modules that the published TLCM adapter changes (from its inference code; the same as LCM-LoRA's).
LORA_TARGETS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
]


class UNetBase(VPBase):
    """A teacher whose denoiser is a UNet2DConditionModel."""

    denoiser_class = UNet2DConditionModel
    denoiser_part = "unet"
    lora_targets = LORA_TARGETS
    time_layer = "time_embedding"
    has_target_time_pipeline = True
    in_stability_blocks: ClassVar[bool] = False  # other tools name its blocks as Stability AI does, not as diffusers

    def _sizes(self) -> tuple[int, tuple[int, int, int]]:
        guidance = self.denoiser.config.time_cond_proj_dim
        if guidance is not None:
            raise ValueError(
                f"teacher {self.teacher.path}: the denoiser has time_cond_proj_dim {guidance}, an embedding of the "
                "guidance scale: it is distilled already; name the model that it was made from"
            )
        return super()._sizes()

    def empty_denoiser(self, config: Mapping[str, Any], condition: bool) -> UNet2DConditionModel:
        """Return a new denoiser; with `condition` its configuration has the target time's width too.

        The width is an argument beside `config`, not in it: for keys that a teacher's file lacks, diffusers ignores
        `config` and takes its own default.
        """
        width = TARGET_TIME_WIDTH if condition else None
        denoiser = self.denoiser_class.from_config(config, time_cond_proj_dim=width)
        return self.with_target_time(denoiser) if condition else denoiser

    @staticmethod
    def conditioning_shapes(config: Mapping[str, Any], num_tokens: int) -> dict[str, tuple[int, ...]]:
        width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
        shapes: dict[str, tuple[int, ...]] = {"context": (num_tokens, width)}
        if config.get("addition_embed_type") is not None:
            sizes = 6 * config["addition_time_embed_dim"]
            shapes["pooled"] = (config["projection_class_embeddings_input_dim"] - sizes,)
        return shapes

    def time_sinusoids(self, denoiser: UNet2DConditionModel, t: Tensor, precision: torch.dtype) -> Tensor:
        return denoiser.time_proj(self.schedule.network_time[t])

    def target_time_sinusoids(self, s: Tensor) -> Tensor:
        """Return the sinusoids of the network's own times, which are those of an exported pipeline's scheduler."""
        return super().target_time_sinusoids(self.schedule.network_time[s])

    def kohya_layers(self, modules: Sequence[str]) -> dict[str, tuple[str, ...]]:
        names = kohya_names(modules, self.denoiser, self.in_stability_blocks)
        return {name: (module,) for module, name in names.items()}

    def _added_conditions(self, conditioning: Conditioning, dtype: torch.dtype) -> dict[str, Tensor] | None:
        """Return the denoiser's `added_cond_kwargs`, for families that have them."""
        return None

    def blocks(self, denoiser: Any) -> list[torch.nn.Module]:
        return [*denoiser.down_blocks, denoiser.mid_block, *denoiser.up_blocks]

    def picture_of(self, output: Any) -> Tensor:
        """Return the features (B, D, H, W); a block on the way down returns those for the way up beside them."""
        return output if isinstance(output, Tensor) else output[0]

    def same_prompts(self, denoiser: torch.nn.Module) -> AbstractContextManager[None]:
        return prompts_attended_once(denoiser)

    def predict(
        self, denoiser: torch.nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning, s: Tensor | None = None
    ) -> Tensor:
        dtype = precision_of(denoiser)
        target_time = None if s is None else self.target_time_sinusoids(s).to(dtype)
        return denoiser(
            x_t.to(dtype),
            self.schedule.network_time[t],
            encoder_hidden_states=conditioning["context"].to(dtype),
            timestep_cond=target_time,
            added_cond_kwargs=self._added_conditions(conditioning, dtype),
            return_dict=False,
        )[0].float()
