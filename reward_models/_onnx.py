"""Networks that are published as ONNX files: opened by onnxruntime and run on the CPU, without gradient.

An ONNX file is a protobuf message, operators and tensors; reading one runs no code of its author. It is kept as it
was fetched, byte for byte, and its sha256 is compared with the pinned one whenever it is opened.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlcm_rl.rewards import Weights

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

AT_A_TIME = 32  # pictures of one run


class OnnxNetwork:
    """The network of fetched `weights`, from one input to its first output.

    Raises MissingWeights where they were not fetched, and ImportError that names the extra without onnxruntime.
    """

    def __init__(self, weights: Weights):
        path = weights.path()
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError("onnxruntime is not installed: run `pip install 'mlcm-rl[onnx]'`") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session: InferenceSession = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    @property
    def metadata(self) -> dict[str, str]:
        """What the file's author wrote into it, such as a list of characters."""
        return dict(self.session.get_modelmeta().custom_metadata_map)

    def __call__(self, pixels: Tensor) -> Tensor:
        """The output (B, ...) float32 on the CPU of `pixels` (B, ...), in the network's own layout."""
        name = self.session.get_inputs()[0].name
        chunks = pixels.detach().float().cpu().contiguous().split(AT_A_TIME)
        return torch.cat([torch.from_numpy(self.session.run(None, {name: chunk.numpy()})[0]) for chunk in chunks])
