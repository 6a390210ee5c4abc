"""The judge's trunk: the MobileNetV2 that ships in `nsfwjs` (8-bit weights in JavaScript), batch norms folded in."""

import base64
import math
import re

import numpy as np
import torch
from torch import Tensor

from sources import PACKAGES, fetch, read_member

FOLDER = "dist/models/mobilenet_v2"
EPSILON = 1e-3  # of every batch norm, as in the file's topology
NUMBER = r"(-?[\d.e+-]+)"
ENTRY = re.compile(
    r'name:"([^"]+)",shape:\[([\d,]*)\],dtype:"float32"'
    rf'(?:,quantization:\{{min:{NUMBER},scale:{NUMBER},dtype:"uint8"\}})?'
)


def dequantise(manifest: str, raw: bytes) -> dict[str, Tensor]:
    """Return the tensors that a weight manifest lists, in their order in `raw`: 8-bit values times scale plus min.

    Entries without quantisation are plain float32. Raises ValueError when the bytes do not come out even.
    """
    weights, offset = {}, 0
    for name, sizes, low, scale in ENTRY.findall(manifest):
        shape = [int(size) for size in sizes.split(",") if size]
        count = math.prod(shape)
        if scale:
            values = np.frombuffer(raw, np.uint8, count, offset).astype(np.float32) * float(scale) + float(low)
        else:
            values = np.frombuffer(raw, "<f4", count, offset)
        offset += count * (1 if scale else 4)
        weights[name] = torch.from_numpy(values.reshape(shape).astype(np.float32))
    if offset != len(raw):
        raise ValueError(f"the manifest covers {offset} of {len(raw)} bytes")
    return weights


def read_weights() -> dict[str, Tensor]:
    """Return the Keras weights by name, kernels in Keras' layout (height, width, in, out)."""
    archive = fetch(PACKAGES["nsfwjs"])
    topology = read_member(archive, f"{FOLDER}/model.min.js").decode()
    shard = read_member(archive, f"{FOLDER}/group1-shard1of1.min.js").decode()
    encoded = max(re.findall(r'"([A-Za-z0-9+/=]{1000,})"', shard), key=len)
    return dequantise(topology[topology.index("weightsManifest") :], base64.b64decode(encoded))


def fold(weights: dict[str, Tensor], convolution: str, norm: str, depthwise: bool = False) -> dict[str, Tensor]:
    """Return weight (out, in, H, W) and bias (out,) of a convolution with the batch norm behind it folded in."""
    kernel = weights[f"{convolution}/{'depthwise_kernel' if depthwise else 'kernel'}"]
    kernel = kernel.permute(2, 3, 0, 1) if depthwise else kernel.permute(3, 2, 0, 1)
    mean, variance = weights[f"{norm}/moving_mean"], weights[f"{norm}/moving_variance"]
    scale = weights[f"{norm}/gamma"] * torch.rsqrt(variance + EPSILON)
    return {"weight": kernel * scale[:, None, None, None], "bias": weights[f"{norm}/beta"] - mean * scale}


def trunk_weights(num_blocks: int) -> dict[str, Tensor]:
    """Return the state dictionary of `mlcm_rl.evaluation.judge.PictureEncoder` without its head."""
    weights = read_weights()
    names = {"stem": ("Conv1", "bn_Conv1", False)}
    parts = {"first": "expanded_conv", **{f"blocks.{n - 1}": f"block_{n}" for n in range(1, num_blocks + 1)}}
    for ours, theirs in parts.items():
        for part in ("expand", "depthwise", "project"):
            if f"{theirs}_{part}_BN/gamma" in weights:
                names[f"{ours}.{part}"] = (f"{theirs}_{part}", f"{theirs}_{part}_BN", part == "depthwise")
    folded = {ours: fold(weights, *theirs) for ours, theirs in names.items()}
    return {f"{name}.{key}": value for name, pair in folded.items() for key, value in pair.items()}
