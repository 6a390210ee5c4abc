"""Memory and operations of transformers whose attention goes through diffusers' dispatcher, as on real tensors."""

from collections.abc import Callable

import pytest
import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mlcm_rl.cost.flops import count_operations
from mlcm_rl.cost.live_bytes import Kernels, Live

SIDE, TOKENS, WIDTH = 4, 7, 32  # image tokens a side, tokens of a prompt and their width
SIZES = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": WIDTH}


def flux(device: str) -> tuple[FluxTransformer2DModel, dict[str, Tensor]]:
    """A tiny FLUX.1 on `device`, with what it is called with."""
    with torch.device(device):
        rotary = {"axes_dims_rope": (4, 6, 6), "num_single_layers": 2}
        denoiser = FluxTransformer2DModel(**SIZES, **rotary, in_channels=64, pooled_projection_dim=WIDTH)
        return denoiser, {
            "hidden_states": torch.zeros(2, SIDE**2, 64),
            "encoder_hidden_states": torch.zeros(2, TOKENS, WIDTH),
            "pooled_projections": torch.zeros(2, WIDTH),
            "timestep": torch.zeros(2),
            "img_ids": torch.zeros(SIDE**2, 3),
            "txt_ids": torch.zeros(TOKENS, 3),
        }


def qwen_image(device: str) -> tuple[QwenImageTransformer2DModel, dict[str, object]]:
    """A tiny Qwen-Image on `device`, with what it is called with: a mask over the prompts' tokens too."""
    with torch.device(device):
        denoiser = QwenImageTransformer2DModel(**SIZES, axes_dims_rope=(4, 6, 6))
        return denoiser, {
            "hidden_states": torch.zeros(2, SIDE**2, 64),
            "encoder_hidden_states": torch.zeros(2, TOKENS, WIDTH),
            "encoder_hidden_states_mask": torch.ones(2, TOKENS, dtype=torch.bool),
            "timestep": torch.zeros(2),
            "img_shapes": [[(1, SIDE, SIDE)]] * 2,
        }


def output(denoiser: torch.nn.Module, inputs: dict[str, object]) -> Tensor:
    return denoiser(**inputs, return_dict=False)[0]


def passes(make: Callable, device: str) -> tuple[float, float]:
    """Operations of a forward pass, and of one with its backward pass."""
    denoiser, inputs = make(device)
    forward = count_operations(torch.no_grad()(lambda: output(denoiser, inputs)))
    return forward.total, count_operations(lambda: output(denoiser, inputs).sum().backward()).total


@pytest.mark.parametrize("make", [flux, qwen_image])
def test_operations_are_those_of_real_tensors(make):
    with sdpa_kernel(SDPBackend.MATH):  # torch has no formula for the operations of a CPU's own kernel
        forward, both = passes(make, "cpu")
    assert passes(make, "meta") == (forward, both)
    assert 0 < 2 * forward < both < 3.5 * forward


def test_bytes_are_those_that_real_tensors_keep_for_the_backward_pass():
    denoiser, inputs = flux("cpu")
    own = {value.untyped_storage().data_ptr() for value in [*denoiser.parameters(), *inputs.values()]}
    saved: dict[int, Tensor] = {}  # by storage, which views share

    def pack(value: Tensor) -> Tensor:
        if value.untyped_storage().data_ptr() not in own:
            saved.setdefault(value.untyped_storage().data_ptr(), value)
        return value

    with saved_tensors_hooks(pack, lambda value: value):
        out = output(denoiser, inputs)
    expected = sum(value.untyped_storage().nbytes() for value in [*saved.values(), out])
    with Live() as live, Kernels("cpu", autocast=False):
        denoiser, inputs = flux("meta")
        before = live.now
        out = output(denoiser, inputs)
        assert live.now - before == expected


@pytest.mark.parametrize("make", [flux, qwen_image])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_backward_pass_leaves_gradients_and_checkpointing_keeps_less(make, autocast):
    def kept(is_checkpointed: bool) -> int:
        kernels = Kernels("cuda", autocast)
        with Live() as live:
            denoiser, inputs = make("meta")
            if is_checkpointed:
                denoiser.enable_gradient_checkpointing(kernels.checkpointed)
            before = live.now
            with kernels:
                loss = output(denoiser, inputs).sum()
                forward = live.now - before
                loss.backward()
        reached = [value for value in denoiser.parameters() if value.grad is not None]
        assert live.peak - before > max(forward, 4 * sum(value.numel() for value in reached))
        return forward

    assert 0 < kept(True) < 0.7 * kept(False)


def test_autocast_norms_the_queries_in_single_precision_on_a_gpu_alone():
    x = torch.empty(2, 16, device="meta", dtype=torch.bfloat16)
    scale = torch.empty(16, device="meta", dtype=torch.bfloat16)
    for kind, dtype in (("cuda", torch.float32), ("cpu", torch.bfloat16)):
        with Kernels(kind, autocast=True):
            assert F.rms_norm(x, (16,), scale).dtype == dtype
